"""Read the config that the user named, and merge the command line into it."""

import copy
import os
import sys
from argparse import ArgumentParser, Namespace
from functools import cache
from pathlib import Path

import torch
from mmengine.config import Config, DictAction

from mmdyt.files import check_out_file
from mmdyt.packaged import PREFIX, find_config, known_configs

from .keys import check_options
from .methods import known_methods, use_method
from .names import name_of, near
from .own_data import fill_from_data
from .processes import check_launcher
from .refusals import part, warn
from .resume import latest_checkpoint
from .work_dir import check_folder

LOCAL_RANKS = dict(slurm='SLURM_LOCALID', mpi='OMPI_COMM_WORLD_LOCAL_RANK')


class KeyValues(DictAction):
    """Options ``key=value``; mmengine's own action stumbles over one without a value."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        """Refuse what is no pair."""
        for value in values:
            if '=' not in value:
                parser.error(f'{option_string} must be pairs KEY=VALUE, got {value!r}.')
        super().__call__(parser, namespace, values, option_string)


def load_config(args: Namespace) -> Config:
    """Read the config file and merge the command line into it.

    Args:
        args: With ``config``, ``cfg_options``, ``work_dir``, ``launcher``, ``local_rank``; and where a tool has them,
            ``method`` and ``method_options``.

    Raises:
        FileNotFoundError: If the config is missing, or data of the user's own (``own``) is.
        ValueError: If the method is unknown, or does not fit the config, or the environment not the launcher; or data
            of the user's own is wrong.
    """
    check_launcher(args.launcher)
    path = _existing(args.config)
    launched = os.environ.get(LOCAL_RANKS.get(args.launcher, ''), args.local_rank)  # mmengine sets it too late
    os.environ.setdefault('LOCAL_RANK', str(launched))
    with part(f'config {path}', 'be read'):
        cfg = Config.fromfile(path, import_custom_modules=False)
    method, name = getattr(args, 'method', None), path.stem
    if method is not None:
        use_method(cfg, method, args.method_options)
        name = f'{name}_{method.replace("+", "_")}'
        cfg.pop('work_dir', None)  # of the config's own method
    elif getattr(args, 'method_options', None):
        raise ValueError(f'--method-options must come with --method, got {args.method_options} without.')
    if args.cfg_options:
        check_options(cfg, args.cfg_options)
        with part('--cfg-options', 'fit the config'):
            cfg.merge_from_dict(args.cfg_options)
    fill_from_data(cfg)
    if isinstance(cfg.get('model'), dict) and cfg.get('data_preprocessor') is not None:
        cfg.model.setdefault('data_preprocessor', copy.deepcopy(cfg.data_preprocessor))  # as a runner does
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs') / name)
    return cfg


def _existing(name: str) -> Path:
    """The file of a config, which may be one that came with the package."""
    path = find_config(name)
    if not path.is_file():
        hint = near(name.replace(PREFIX, 'configs/'), known_configs())
        raise FileNotFoundError(f'config must name an existing file, got {name}.{hint}')
    if path != Path(name) and not name.startswith(PREFIX):
        _tell_packaged(name, path)
    return path


@cache
def _tell_packaged(name: str, path: Path) -> None:
    """Say once which file is read."""
    if os.environ.get('LOCAL_RANK', '0') == '0':
        print(f'{name} is not in the working directory, that of mmdyt is read: {path}', file=sys.stderr, flush=True)


def add_method_arguments(parser: ArgumentParser) -> None:
    """Let a tool take ``--method`` and ``--method-options``."""
    parser.add_argument(
        '--method', metavar='NAME[+NAME]', help="use this method instead of the config's: " + ', '.join(known_methods())
    )
    parser.add_argument(
        '--method-options', nargs='+', action=KeyValues, metavar='KEY=VALUE', help='override settings of the method'
    )


def add_dry_run_argument(parser: ArgumentParser) -> None:
    """Let a tool take ``--no-dry-run``."""
    parser.add_argument(
        '--no-dry-run',
        dest='dry_run',
        action='store_false',
        help='start without trying the model, optimizer and metrics on one sample of each data set first',
    )


def add_training_arguments(parser: ArgumentParser) -> None:
    """Let a tool take what every training takes: ``--work-dir``, ``--resume``, ``--amp``."""
    parser.add_argument('--work-dir', help='folder for logs and checkpoints; default work_dirs/<config name>')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='continue from a checkpoint; without a value, from the latest one in the work dir',
    )
    parser.add_argument('--amp', action='store_true', help='train with automatic mixed precision')


def use_amp(cfg: Config) -> None:
    """Switch the optimizer wrapper to mixed precision: fp16 with loss scale on a GPU, bf16 on the CPU.

    A config that has it already keeps its settings; on the CPU but those of a loss scale, which bf16 does not need.

    Raises:
        ValueError: For an optimizer wrapper that cannot, or none.
    """
    if cfg.get('optim_wrapper') is None:
        raise ValueError('--amp must find optim_wrapper in the config, got none.')
    kind = name_of(cfg.optim_wrapper.get('type', 'OptimWrapper')).removeprefix('mmengine.')
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise ValueError(f"--amp must find optim_wrapper.type 'OptimWrapper', got {kind!r}.")
    if torch.cuda.is_available():
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    else:
        cfg.optim_wrapper.type = 'mmdyt.CPUAmpOptimWrapper'
        for name in ('loss_scale', 'dtype', 'use_fsdp'):
            cfg.optim_wrapper.pop(name, None)
        if not getattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: True)():
            warn('--amp: this processor has no instructions for bf16, so steps take longer than without.')


def set_resume(cfg: Config, resume: str | None) -> None:
    """Resume from a checkpoint, or with ``'auto'`` from the latest in the work dir; none there starts as without."""
    if resume is None and cfg.get('resume') and not cfg.get('load_from'):
        cfg.resume, resume = False, 'auto'  # the config's own wish
    checkpoint = latest_checkpoint(cfg) if resume == 'auto' else resume
    if checkpoint is not None:
        cfg.resume, cfg.load_from = True, checkpoint


def use_tta(cfg: Config) -> None:
    """Test through the config's test-time augmentation.

    Raises:
        ValueError: If the config has none.
    """
    for name in ('tta_model', 'tta_pipeline'):
        if not cfg.get(name):
            raise ValueError(f'--tta must find {name} in the config, got none.')
    if 'pipeline' not in cfg.test_dataloader.dataset:
        kind = cfg.test_dataloader.dataset.type
        raise ValueError(f'--tta must find a data set with a pipeline in test_dataloader, got the wrapper {kind}.')
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.model = cfg.tta_model | dict(module=cfg.model)


def paint_predictions(cfg: Config, folder: str) -> None:
    """Let the config's visualization hook write the prediction of every image into ``folder``.

    Raises:
        ValueError: If the config has no such hook, or the folder cannot be written to.
    """
    hook = cfg.get('default_hooks', {}).get('visualization')
    if not hook or not cfg.get('visualizer'):
        raise ValueError('--show-dir must find a visualizer and a visualization hook in the config, got none.')
    check_folder('--show-dir', folder)
    # mmseg's hook has a name and a switch of its own
    switch = dict(draw=True) if 'Seg' in name_of(hook.type) else dict(enable=True, out_dir=folder)
    hook.update(interval=1, **switch)
    cfg.visualizer.save_dir = folder


def dump_predictions(cfg: Config, file: str) -> None:
    """Let the test write all its predictions into a pickle.

    Raises:
        ValueError: If the file's name does not end with ``.pkl`` or ``.pickle``, or its folder is missing.
    """
    if not file.endswith(('.pkl', '.pickle')) or not Path(file).resolve().parent.is_dir():
        raise ValueError(f'--dump must name a .pkl file in an existing folder, got {file}.')
    check_out_file('--dump', file)
    evaluator = cfg.get('test_evaluator') or []
    metrics = list(evaluator) if isinstance(evaluator, list | tuple) else [evaluator]
    cfg.test_evaluator = [*metrics, dict(type='DumpResults', out_file_path=file)]
