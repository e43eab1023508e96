"""What the user typed is refused with one message, exit code 2, and nothing written."""

import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS

from mmdyt import preflight
from mmdyt.preflight.checkpoints import check_fit, check_resumable, read_tensors
from mmdyt.preflight.datasets import check_data
from mmdyt.preflight.names import check_types
from mmdyt.preflight.processes import _replace_type

ROOT = Path(__file__).parents[2]
FORM = r'error: .*\S+ must .+, got .+'


@pytest.fixture
def refused(run_tool, tmp_path, capfd):
    """``refused('train', config, ...)`` returns the message with which a tool refuses."""

    def refuse(name: str, *args) -> str:
        capfd.readouterr()
        before = sorted(tmp_path.rglob('*'))
        with pytest.raises(SystemExit) as exit_info:
            run_tool(name, *args, '--work-dir', tmp_path / 'work_dir')
        assert exit_info.value.code == 2
        assert sorted(tmp_path.rglob('*')) == before
        (message,) = capfd.readouterr().err.splitlines()
        assert re.match(FORM, message)
        return message

    return refuse


@pytest.fixture
def model(tiny_model_cfg):
    return MODELS.build(tiny_model_cfg)


def save(path: Path, content) -> Path:
    torch.save(content, path)
    return path


class Hostile:
    """Creates a folder when unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize('name', ['train', 'test'])
def test_missing_config_is_refused_with_near_names(refused, name):
    checkpoint = ['any.pth'] if name == 'test' else []
    message = refused(name, 'configs/dyt/upernet_vitb_ade20.py', *checkpoint)
    assert 'config must name an existing file, got configs/dyt/upernet_vitb_ade20.py.' in message
    assert 'Did you mean configs/dyt/upernet_vitb_ade20k.py' in message


@pytest.mark.parametrize(
    ('option', 'expected'),
    [
        ('train_dataloader.dataset.data_root=/no', 'train_dataloader.dataset.data_root must name an existing folder'),
        ('val_dataloader.dataset.data_root=/no', 'val_dataloader.dataset.data_root must name an existing folder'),
        (
            'val_dataloader.dataset.data_prefix.img_path=images/no',
            'val_dataloader.dataset.data_prefix.img_path must name an existing folder',
        ),
        ('train_dataloader.dataset.ann_file=no.txt', 'train_dataloader.dataset.ann_file must name an existing file'),
        ('model.backbone.init_cfg.checkpoint=no.pth', 'model.backbone.init_cfg.checkpoint must name an existing file'),
        ('load_from=no.pth', 'checkpoint must name an existing file'),
        ('model.backbone.type=mmdyt.DyTVisonTransformer', 'Did you mean mmdyt.DyTVisionTransformer'),
        ('model.decode_head.type=UperHead', "model.decode_head.type must be a registered type, got 'UperHead'"),
        ('train_dataloader.dataset.pipeline.3.type=RandomFlp', 'pipeline[3].type must be a registered type'),
        ('train_dataloader.dataset.pipeline.3.type=RandomFlp', 'Did you mean RandomFlip'),
        ('custom_hooks.1.type=mmdyt.FLOPHook', 'Did you mean mmdyt.FLOPsHook'),
        ('custom_hooks.1.type=nowhere.FLOPsHook', 'custom_hooks[1].type must be a registered type'),
        ('optim_wrapper.optimizer.type=AdmW', 'Did you mean AdamW'),
        ('model.target_rate=50', 'target_rate must lie in (0, 1], got 50. Rates are fractions, not percent.'),
        ('model.backbone.adapter.bottleneck=0', 'bottleneck must be a positive integer, got 0'),
        ('model.backbone.arch.num_layers=5', '12 missing, first layers.4.'),
        ('activation_checkpointing=[backbone.layers.0]', 'activation_checkpointing must not be set, got'),
    ],
)
def test_train_refuses(refused, tiny_config, option, expected):
    assert expected in refused('train', tiny_config, '--cfg-options', option)


def test_a_deeper_base_is_refused(refused, tiny_config):
    options = ['model.backbone.arch.num_layers=3', 'model.backbone.out_indices=[0,1,2]']
    assert '12 unexpected, first layers.3.' in refused('train', tiny_config, '--cfg-options', *options)


def test_test_refuses_missing_data_and_checkpoint(refused, tiny_config, trained):
    assert 'checkpoint must name an existing file, got no.pth' in refused('test', tiny_config, 'no.pth')
    option = 'test_dataloader.dataset.data_root=/no'
    message = refused('test', tiny_config, trained / 'iter_6.pth', '--cfg-options', option)
    assert 'test_dataloader.dataset.data_root must name an existing folder, got /no.' in message


def test_options_that_the_config_cannot_serve_are_refused(refused, tiny_config, trained, tmp_path):
    (tmp_path / 'plain.py').write_text(
        f"_base_ = ['{tiny_config}']\ntta_model = None\ntta_pipeline = None\n"
        'default_hooks = dict(visualization=None)\noptim_wrapper = dict(type="mmdyt.CPUAmpOptimWrapper")\n'
    )
    args = 'test', tmp_path / 'plain.py', trained / 'iter_6.pth'
    assert '--tta must find tta_model in the config, got none.' in refused(*args, '--tta')
    assert '--dump must name a .pkl file' in refused(*args, '--dump', tmp_path / 'scores.json')
    assert '--dump must name a .pkl file in an existing' in refused(*args, '--dump', tmp_path / 'no' / 'scores.pkl')
    assert '--show-dir must find a visualizer' in refused(*args, '--show-dir', tmp_path / 'show')
    assert "--amp must find optim_wrapper.type 'OptimWrapper'" in refused('train', tmp_path / 'plain.py', '--amp')


def test_missing_resume_checkpoint_is_refused(refused, tiny_config):
    assert 'checkpoint must name an existing file, got no.pth' in refused('train', tiny_config, '--resume', 'no.pth')


def test_resuming_from_bare_weights_is_refused(refused, tiny_config, trained, tmp_path):
    weights = save(tmp_path / 'weights.pth', dict(state_dict=torch.load(trained / 'iter_3.pth')['state_dict']))
    message = refused('train', tiny_config, '--resume', weights)
    assert 'without meta, message_hub, optimizer. To start from its weights: --cfg-options load_from=' in message


def test_unsafe_and_corrupt_checkpoints_are_refused_and_not_executed(refused, tiny_config, trained, tmp_path):
    hostile = save(tmp_path / 'hostile.pth', dict(state_dict=dict(a=Hostile(tmp_path / 'executed'))))
    ways = (
        ('test', tiny_config, hostile),
        ('train', tiny_config, '--resume', hostile),
        ('train', tiny_config, '--cfg-options', f'load_from={hostile}'),
        ('train', tiny_config, '--cfg-options', f'model.backbone.init_cfg.checkpoint={hostile}'),
    )
    for way in ways:
        message = refused(*way)
        assert 'torch loads safely' in message and 'mkdir, which is not allowed' in message
    (tmp_path / 'broken.pth').write_bytes((trained / 'iter_3.pth').read_bytes()[:5000])
    (tmp_path / 'junk.pth').write_bytes(b'no checkpoint')
    for name in ('broken', 'junk'):
        assert 'torch loads safely' in refused('test', tiny_config, tmp_path / f'{name}.pth')


@pytest.mark.parametrize('content', [[1, 2], torch.zeros(2), {}, dict(epoch=1), dict(state_dict=[1])])
def test_files_without_named_tensors_are_refused(tmp_path, content):
    with pytest.raises(ValueError, match='checkpoint must hold named tensors'):
        read_tensors(str(save(tmp_path / 'odd.pth', content)))


@pytest.mark.parametrize(
    'config', ["__import__('os').mkdir('x')", 'import os', 'dict = exec\na = dict("b")', 'a = [b for b in dict(c=1)]']
)
def test_code_in_the_config_of_a_checkpoint_is_refused(trained, tmp_path, config):
    checkpoint = torch.load(trained / 'iter_3.pth')
    check_resumable(str(trained / 'iter_3.pth'))  # the config that a run writes is plain
    checkpoint['meta']['config'] = config
    with pytest.raises(ValueError, match='checkpoint must hold a config of plain values, got code'):
        check_resumable(str(save(tmp_path / 'code.pth', checkpoint)))


@pytest.mark.parametrize(
    ('change', 'expected'),
    [
        (lambda t: t.pop('decode_head.conv_seg.weight'), '1 missing, first decode_head.conv_seg.weight'),
        (lambda t: t.update(extra=torch.zeros(1)), '1 unexpected, first extra'),
        (
            lambda t: t.update({'backbone.ln9': torch.zeros(1), 'neck.x': torch.zeros(1)}),
            '2 unexpected, first backbone.ln9',
        ),
        (
            lambda t: t.update({'decode_head.conv_seg.bias': torch.zeros(7)}),
            '1 of another shape, first decode_head.conv_seg.bias',
        ),
    ],
)
def test_a_test_checkpoint_must_fit_exactly(refused, tiny_config, trained, tmp_path, change, expected):
    tensors = torch.load(trained / 'iter_6.pth')['state_dict']
    change(tensors)
    message = refused('test', tiny_config, save(tmp_path / 'changed.pth', dict(state_dict=tensors)))
    assert 'checkpoint must fit the model' in message and expected in message


@pytest.mark.parametrize(
    'name',
    ['cls_token', 'pos_embed', 'patch_embed.projection.bias', 'layers.1.ln2.weight', 'layers.3.ffn.layers.1.bias'],
)
def test_every_frozen_tensor_of_the_base_must_be_there(model, pretrained, name):
    tensors = read_tensors(str(pretrained), 'backbone')
    check_fit(model.backbone, tensors, 'base.pth', exact=False)
    tensors.pop(name)
    with pytest.raises(ValueError, match=f'checkpoint must fit the model, got base.pth: .* 1 missing, first {name}'):
        check_fit(model.backbone, tensors, 'base.pth', exact=False)


def test_weights_of_a_whole_model_may_come_with_another_head(model, pretrained):
    tensors = read_tensors(str(pretrained))
    check_fit(model, tensors, 'base.pth', exact=False)
    tensors['backbone.layers.0.attn.qkv.bias'] = torch.zeros(3)
    with pytest.raises(ValueError, match='1 of another shape, first backbone.layers.0.attn.qkv.bias'):
        check_fit(model, tensors, 'base.pth', exact=False)


def test_prefix_of_a_base_must_be_in_it(pretrained):
    with pytest.raises(ValueError, match="checkpoint must hold tensors named 'vit.'"):
        read_tensors(str(pretrained), 'vit')


@pytest.mark.parametrize(
    ('wrap', 'where'),
    [
        (lambda d: dict(type='RepeatDataset', times=2, dataset=d), 'train.dataset'),
        (lambda d: dict(type='ConcatDataset', datasets=[d]), 'train.datasets[0]'),
        (
            lambda d: dict(type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=[{}, d])),
            'train.dataset.datasets[1]',
        ),
    ],
)
def test_data_inside_wrappers_is_checked(ade_root, wrap, where):
    for key, value in (('data_root', '/no'), ('data_prefix', dict(img_path='no')), ('ann_file', 'no.txt')):
        dataset = dict(data_root=str(ade_root), data_prefix=dict(img_path='images/training')) | {key: value}
        with pytest.raises(
            FileNotFoundError, match=re.escape(f'{where}.{key}') + r'(\.img_path)? must name an existing'
        ):
            check_data(ConfigDict(wrap(dataset)), 'train')
    check_data(ConfigDict(wrap(dict(data_root=str(ade_root)))), 'train')


def test_images_and_their_annotations_must_be_there(ade_root, tmp_path):
    folders = dict(img_path='images/training', seg_map_path='annotations/training')
    dataset = ConfigDict(type='mmseg.BaseSegDataset', data_root=str(ade_root), data_prefix=folders, img_suffix='.png')
    check_data(dataset, 'train')
    with pytest.raises(FileNotFoundError, match=r"train.img_suffix must end some file of .*, got '.jpg'"):
        check_data(dataset | dict(img_suffix='.jpg'), 'train')
    with pytest.raises(FileNotFoundError, match='annotation for each of its 6 images, got none for 6, first .*0.tif'):
        check_data(ConfigDict(dataset | dict(seg_map_suffix='.tif')), 'train')


def test_data_that_is_fetched_is_left_alone():
    import mmpretrain.datasets  # noqa: F401

    check_data(ConfigDict(type='mmpretrain.CIFAR10', data_root='/no'), 'train')  # downloads by default
    check_data(ConfigDict(type='mmpretrain.CustomDataset', data_root='s3://bucket/no'), 'train')
    with pytest.raises(FileNotFoundError):
        check_data(ConfigDict(type='mmpretrain.CIFAR10', data_root='/no', download=False), 'train')
    with pytest.raises(TypeError, match=r"train.data_root must be a string, got \['a'\]"):
        check_data(ConfigDict(type='mmpretrain.CIFAR10', data_root=['a']), 'train')


def test_testing_needs_no_pretrained_file(tiny_config, trained, refused):
    args = Namespace(config=tiny_config, work_dir='x', launcher='none', local_rank=0)
    args.cfg_options = {'model.backbone.init_cfg.checkpoint': 'gone.pth', 'load_from': str(trained / 'iter_3.pth')}
    preflight.check(preflight.load_config(args), loops=('test',))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(model=None), 'config must set model, got none'),
        (dict(optim_wrapper=None), 'config must set optim_wrapper, got none'),
        (dict(val_cfg=None), 'config must set val_cfg, got none'),
    ],
)
def test_an_incomplete_config_is_refused(tiny_config, change, message):
    args = Namespace(config=tiny_config, cfg_options=None, work_dir='x', launcher='none', local_rank=0)
    cfg = preflight.load_config(args)
    for name, value in change.items():
        cfg[name] = value
    with pytest.raises(ValueError, match=message):
        preflight.check(cfg, loops=('train', 'val'))


def test_a_scope_in_the_config_is_followed():
    import mmpretrain.models  # noqa: F401

    check_types(dict(_scope_='mmpretrain', type='ImageClassifier', head=dict(type='LinearClsHead')), 'mmseg')
    with pytest.raises(KeyError, match='head.type must be a registered type'):
        check_types(dict(_scope_='mmpretrain', type='ImageClassifier', head=dict(type='UPerHead')), 'mmseg')


def test_sync_bn_becomes_bn_without_gpus():
    model = dict(neck=dict(norm_cfg=dict(type='SyncBN')), heads=[dict(norm_cfg=dict(type='SyncBN'))])
    assert _replace_type(model, 'SyncBN', 'BN') == 2
    assert model == dict(neck=dict(norm_cfg=dict(type='BN')), heads=[dict(norm_cfg=dict(type='BN'))])


def test_data_prefix_may_be_one_folder(ade_root):
    check_data(ConfigDict(data_root=str(ade_root), data_prefix='images'), 'train')
    with pytest.raises(FileNotFoundError, match='train.data_prefix must name an existing folder'):
        check_data(ConfigDict(data_root=str(ade_root), data_prefix='no'), 'train')


def test_show_dir_switches_the_hook_of_each_host_on():
    for kind, switch in (
        ('SegVisualizationHook', dict(draw=True)),
        ('VisualizationHook', dict(enable=True, out_dir='show')),
    ):
        cfg = Config(dict(default_hooks=dict(visualization=dict(type=kind)), visualizer=dict(type='Visualizer')))
        preflight.paint_predictions(cfg, 'show')
        assert cfg.default_hooks.visualization == dict(type=kind, interval=1, **switch)
        assert cfg.visualizer.save_dir == 'show'


def test_a_good_config_passes_and_nothing_is_written(tiny_config, tmp_path, trained):
    args = Namespace(config=tiny_config, cfg_options=None, work_dir=str(tmp_path / 'x'), launcher='none', local_rank=0)
    cfg = preflight.load_config(args)
    assert cfg.work_dir == args.work_dir
    preflight.check(cfg, loops=('train', 'val'))
    cfg.load_from, cfg.resume = str(trained / 'iter_3.pth'), True
    preflight.check(cfg, loops=('train', 'val'))
    preflight.check(cfg, loops=('test',))
    assert not list(tmp_path.iterdir())


def test_default_work_dir_is_named_after_the_config(tiny_config):
    args = Namespace(config=tiny_config, cfg_options=None, work_dir=None, launcher='none', local_rank=0)
    assert preflight.load_config(args).work_dir == 'work_dirs/tiny'


@pytest.mark.parametrize(('own', 'expected'), [(None, 'Given'), (dict(type='Own'), 'Own')])
def test_a_preprocessor_beside_the_model_is_the_models_for_every_tool_as_for_a_runner(tmp_path, own, expected):
    path = tmp_path / 'config.py'
    model = dict(type='Model') | ({} if own is None else dict(data_preprocessor=own))
    path.write_text(f"model = {model!r}\ndata_preprocessor = dict(type='Given')\n")
    args = Namespace(config=str(path), cfg_options=None, work_dir=None, launcher='none', local_rank=0)
    assert preflight.load_config(args).model.data_preprocessor.type == expected


def test_auto_resume_without_a_checkpoint_starts_as_without(tmp_path, trained):
    cfg = Config(dict(work_dir=str(tmp_path), load_from='base.pth', resume=False))
    preflight.set_resume(cfg, 'auto')
    assert not cfg.resume and cfg.load_from == 'base.pth'
    cfg.work_dir = str(trained)
    preflight.set_resume(cfg, 'auto')
    assert Path(cfg.load_from) == trained / 'iter_6.pth'


def test_tracebacks_on_demand(monkeypatch):
    monkeypatch.setenv('MMDYT_TRACEBACK', '1')
    with pytest.raises(ValueError, match='x must'), preflight.clean_exit():
        raise ValueError('x must be y, got z.')


def test_only_the_first_rank_of_a_machine_speaks(monkeypatch, capsys):
    monkeypatch.setenv('LOCAL_RANK', '1')
    with pytest.raises(SystemExit, match='2'), preflight.clean_exit():
        raise ValueError('x must be y, got z.')
    assert not capsys.readouterr().err


@pytest.mark.parametrize('name', ['train', 'test'])
def test_a_real_process_exits_with_2_and_one_message(tiny_config, tmp_path, name):
    args = dict(train=['--cfg-options', 'model.target_rate=50'], test=['no.pth'])[name]
    result = subprocess.run(
        [sys.executable, ROOT / 'tools' / f'{name}.py', tiny_config, *args, '--work-dir', 'work_dir'],
        cwd=tmp_path,
        env=os.environ | dict(PYTHONPATH=str(ROOT), PYTHONWARNINGS='ignore'),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    (message,) = result.stderr.splitlines()
    assert re.match(FORM, message)
    assert not list(tmp_path.iterdir())
