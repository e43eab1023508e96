"""Set the thresholds of a checkpoint's dispatchers, such that inference meets the activation rate that was asked for.

python tools/calibrate.py configs/dyt/vitb_cifar100.py work_dirs/vitb_cifar100/epoch_100.pth calibrated.pth
    [--rule rate_matched|uniform|global] [--target-rate R | --target-gmacs G] [--batches N] [--fit]
"""

import argparse
import io
import math
from pathlib import Path

from mmdyt import compat

compat.install()

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmdyt import preflight
from mmdyt.core.fit.calibrate import Calibrated, check_per_image, set_threshold, token_dispatchers
from mmdyt.core.fit.request import RULES, CalibrationRequest
from mmdyt.core.part import Delta, Dispatcher
from mmdyt.engine.calibration import calibrate_host, sentence, wanted_rate
from mmdyt.engine.evidence import fit_host, fit_sentence
from mmdyt.files import check_out_file, whole_file
from mmdyt.preflight.checkpoints import check_exists, check_fit, read_checkpoint, read_tensors
from mmdyt.tuned.file import SUFFIX
from mmdyt.tuned.file import write as write_safetensors

LOADERS = ('train_dataloader', 'val_dataloader')  # whose images, and whose pipeline


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Calibrate the thresholds of a checkpoint on its training images, in the pipeline of validation.'
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('out', type=Path, help='file to write: the checkpoint with the new thresholds')
    parser.add_argument('--rule', default=RULES[0], help=f'how layers share the rate: {", ".join(RULES)}')
    parser.add_argument('--target-rate', type=float, help="wanted activation rate in (0, 1]; default: the model's")
    parser.add_argument('--target-gmacs', type=float, help='wanted cost instead, neck and head included')
    parser.add_argument('--batches', type=int, default=8, help='batches of training images; default: 8')
    parser.add_argument('--per-image', action='store_true', help='the same rate for every image, whatever it shows')
    parser.add_argument(
        '--fit', action='store_true', help='first fit the dispatchers to evidence; the checkpoint may have none'
    )
    parser.add_argument('--cfg-options', nargs='+', action=preflight.KeyValues, help='override settings, key=value')
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)
    return parser.parse_args()


def check_out(out: Path, checkpoint: str) -> None:
    """Refuse a file that cannot be written, or that is the checkpoint itself."""
    check_out_file('out', out)
    if out.exists() and Path(checkpoint).exists() and out.samefile(checkpoint):
        raise ValueError(f'out must name another file than the checkpoint, got {out} for both.')


def load(args: argparse.Namespace) -> tuple[Config, nn.Module]:
    """Check what the user typed; return the config, and the model with the checkpoint's weights."""
    check_out(args.out, args.checkpoint)
    cfg = preflight.load_config(args)
    check_exists('checkpoint', args.checkpoint)
    cfg.load_from = None  # a config may go on from another
    preflight.check(cfg, loops=())
    preflight.check_images(cfg, LOADERS)
    model = MODELS.build(cfg.model)
    tensors = read_tensors(args.checkpoint)
    if args.fit:
        tensors = dispatcher_tensors(model) | tensors
    check_fit(model, tensors, args.checkpoint, exact=True)  # loads it too
    check_per_image(token_dispatchers(model), args.per_image)
    return cfg, model


def dispatcher_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a fit and a calibration set in the state of a model: dispatchers, and what inactive tokens get."""
    parts = {f'{name}.': module for name, module in model.named_modules() if isinstance(module, Delta | Dispatcher)}
    chosen = tuple(name for name, part in parts.items() if isinstance(part, Dispatcher) or part.place == 'inactive')
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith(chosen)}


def fit(model: nn.Module, train: DataLoader, batches: int) -> None:
    """Fit the dispatchers with every token active, and print how well that went."""
    set_threshold(token_dispatchers(model), -math.inf)
    print(fit_sentence(fit_host(model, train, batches)))


def write(model: nn.Module, checkpoint: str, out: Path) -> None:
    """The checkpoint, with the dispatchers of the model."""
    content = read_checkpoint(checkpoint)
    whole = 'tuned' not in content or out.suffix == SUFFIX
    content['state_dict'] = dict(read_tensors(checkpoint)) if whole else model.state_dict()
    capacities = [name for name in content['state_dict'] if name.endswith('.dispatcher.capacity')]
    for name in capacities:  # of an earlier calibration
        del content['state_dict'][name]
    content['state_dict'].update({name: tensor.cpu() for name, tensor in dispatcher_tensors(model).items()})
    if out.suffix == SUFFIX:
        write_safetensors(content, out)
        return
    content.pop('tuned', None)
    with io.BytesIO() as whole, whole_file(out, 'wb') as stream:  # torch does not say why it could not write a file
        torch.save(content, whole)
        stream.write(whole.getbuffer())


def report(found: dict[str, Calibrated], target_rate: float | None) -> str:
    """A table for people."""
    width = max(map(len, found))
    lines = [f'{"branch":<{width}}{"threshold":>12}{"rate":>8}']
    lines += [f'{name:<{width}}{branch.threshold:>12.4f}{branch.rate:>8.3f}' for name, branch in found.items()]
    return '\n'.join([*lines, '', sentence(found, target_rate).capitalize()])


def main() -> None:
    """Check everything the user typed, then calibrate, write and print."""
    args = parse_args()
    with preflight.clean_exit():
        request = CalibrationRequest(args.target_rate, args.rule, args.per_image, args.batches, args.target_gmacs)
        cfg, model = load(args)
        rate = None if args.target_gmacs else wanted_rate(model, args.target_rate)
        loaders = [cfg.get(name) and Runner.build_dataloader(cfg[name]) for name in LOADERS]
        model.to(get_device())
        if args.fit:
            fit(model, loaders[0], args.batches)
        found = calibrate_host(model, *loaders, request)
        write(model, args.checkpoint, args.out)
    print(report(found, rate))
    print(f'Wrote {args.out}.')


if __name__ == '__main__':
    main()
