"""Thresholds are set at the end of training, on training images of any host, and disturb nothing else."""

import copy
import json
import logging
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT, TINY_ARCH, run_distributed
from mmengine.hooks import EMAHook
from mmengine.registry import MODELS, DefaultScope
from torch.utils.data import DataLoader

import mmdyt.models.classifier  # noqa: F401  repairs the wheels, registers
from mmdyt.core.fit.calibrate import set_threshold, token_dispatchers
from mmdyt.core.fit.request import RULES, CalibrationRequest
from mmdyt.core.observe import dynamic_branches
from mmdyt.engine import CalibrationHook
from mmdyt.engine.calibration import calibrate_host
from mmdyt.engine.rng_state import get_random_states

LAYERS = 4
HOOK = """
_base_ = '{base}'
custom_hooks = [*_base_.custom_hooks, dict(type='mmdyt.CalibrationHook', {arguments})]
"""
CLASSIFIER = dict(
    _scope_='mmpretrain',
    type='mmdyt.DyTImageClassifier',
    data_preprocessor=dict(type='mmdyt.ImagePreprocessor', num_classes=2),
    backbone=dict(type='mmdyt.DyTVisionTransformer', arch=dict(TINY_ARCH), img_size=32, patch_size=8),
    head=dict(type='VisionTransformerClsHead', num_classes=2, in_channels=TINY_ARCH['embed_dims']),
)
EPOCHS = """
_base_ = '{root}/configs/_base_/runtime/mmpretrain.py'
custom_hooks = [*_base_.custom_hooks, dict(type='mmdyt.CalibrationHook', rule='uniform', num_batches=1)]
model = {model}
crop = [dict(type='LoadImageFromFile'), dict(type='RandomCrop', crop_size=32), dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=4, num_workers=1, drop_last=True, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='CustomDataset', data_root='{data}', data_prefix='images', pipeline=crop))
val_dataloader = train_dataloader
val_evaluator = dict(type='Accuracy')
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))
train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=1)
val_cfg = dict()
default_hooks = dict(checkpoint=dict(interval=1), logger=dict(interval=1))
"""
RANK_HOOK = '''
import json
from pathlib import Path

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class WriteThresholds(Hook):
    """Writes the thresholds of this rank."""

    def after_train(self, runner):
        found = {name: b.item() for name, b in runner.model.module.named_buffers() if name.endswith('threshold')}
        (Path(runner.work_dir) / f'rank{get_rank()}.json').write_text(json.dumps(found))
'''


def thresholds(path) -> list[float]:
    state = torch.load(path)['state_dict']
    return [tensor.item() for name, tensor in state.items() if name.endswith('threshold')]


def rows(work_dir) -> list[dict]:
    """Logged losses and metrics, without the times."""
    (log,) = work_dir.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith('time')} for row in lines]


def log_lines(work_dir, text: str) -> list[str]:
    (log,) = work_dir.glob('*/*.log')
    return [line for line in log.read_text().splitlines() if text in line]


def build(cfg, scope: str = 'mmpretrain') -> nn.Module:
    """A model whose dispatchers choose different tokens in every image and layer."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(copy.deepcopy(cfg))  # hosts write into it
    for branch in dynamic_branches(model).values():
        nn.init.normal_(branch.dispatcher.gate.weight, std=1.0)
    return model


def loader(*shapes: tuple[int, ...], batch_size: int = 4, collate_fn=None) -> DataLoader:
    """One random image per shape, as the pipelines of the hosts pack them."""
    from mmaction.structures import ActionDataSample

    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in shapes]
    video = dict(data_samples=ActionDataSample()) if len(shapes[0]) == 5 else {}  # the other hosts need none
    data = [dict(inputs=image, **video) for image in data]

    def collate(samples: list[dict]) -> dict:
        return {key: [sample[key] for sample in samples] for key in samples[0]}

    return DataLoader(data, batch_size, collate_fn=collate_fn or collate)


def make_runner(model: nn.Module, left: int = 1, hooks=()) -> SimpleNamespace:
    loop = SimpleNamespace(epoch=1 - left, max_epochs=1)
    return SimpleNamespace(
        model=model,
        train_loop=loop,
        val_loop=None,
        hooks=hooks,
        logger=logging.getLogger('calibration'),
        train_dataloader=loader((3, 32, 32)),
    )


@pytest.fixture(scope='module')
def calibrated(tmp_path_factory, run_tool, tiny_config):
    """Work dir of the run of the fixture ``trained``, with a calibration at its end, and its config."""
    folder = tmp_path_factory.mktemp('calibrated')
    config = folder / 'tiny.py'
    config.write_text(HOOK.format(base=tiny_config, arguments=''))
    run_tool('train', config, '--work-dir', folder / 'work_dir')
    return folder / 'work_dir', config


def test_iterations_end_with_a_calibrated_checkpoint_and_validation(calibrated, run_tool, tmp_path):
    work_dir, config = calibrated
    assert thresholds(work_dir / 'iter_3.pth') == [0.0] * LAYERS
    assert len(set(thresholds(work_dir / 'iter_6.pth'))) == LAYERS and 0.0 not in thresholds(work_dir / 'iter_6.pth')
    (line,) = log_lines(work_dir, 'Calibrated')
    assert 'Calibrated thresholds (rate_matched): activation rate 0.49' in line or 'rate 0.50' in line
    assert '(target 0.50), by layer 0.' in line
    run_tool('test', config, work_dir / 'iter_6.pth', '--work-dir', tmp_path)
    (file,) = tmp_path.glob('*/*.json')
    report, validation = json.loads(file.read_text()), [row for row in rows(work_dir) if 'mIoU' in row][-1]
    rates = [f'activation_rate/layer_{i}' for i in range(LAYERS)]
    assert [report[name] for name in rates] == [validation[name] for name in rates]


def test_all_but_the_thresholds_and_what_follows_is_as_without_the_hook(calibrated, trained):
    work_dir, _ = calibrated
    states = [torch.load(folder / 'iter_6.pth') for folder in (work_dir, trained)]
    weights, expected = ({k: v for k, v in s['state_dict'].items() if 'threshold' not in k} for s in states)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert torch.equal(states[0]['rng_state']['torch'], states[1]['rng_state']['torch'])
    assert states[0]['rng_state']['numpy'] == states[1]['rng_state']['numpy']
    assert states[0]['rng_state']['python'] == states[1]['rng_state']['python']
    assert rows(work_dir)[:-1] == rows(trained)[:-1] and rows(work_dir)[-1] != rows(trained)[-1]


def test_a_resumed_run_is_calibrated_alike(calibrated, run_tool, tmp_path):
    work_dir, config = calibrated
    run_tool('train', config, '--work-dir', tmp_path, '--resume', work_dir / 'iter_3.pth')
    assert thresholds(tmp_path / 'iter_6.pth') == thresholds(work_dir / 'iter_6.pth')


def test_a_calibrated_run_that_goes_on_is_calibrated_anew(calibrated, run_tool, tmp_path):
    work_dir, config = calibrated
    more = '--cfg-options', 'train_cfg.max_iters=12', 'val_dataloader=None', 'val_evaluator=None', 'val_cfg=None'
    run_tool('train', config, '--work-dir', tmp_path / 'resumed', '--resume', work_dir / 'iter_6.pth', *more)
    run_tool('train', config, '--work-dir', tmp_path / 'unbroken', *more)
    assert thresholds(tmp_path / 'resumed' / 'iter_9.pth') == [0.0] * LAYERS
    expected = thresholds(tmp_path / 'unbroken' / 'iter_12.pth')
    assert thresholds(tmp_path / 'resumed' / 'iter_12.pth') == expected and 0.0 not in expected


def test_training_that_goes_on_without_the_hook_keeps_the_thresholds(calibrated, run_tool, tiny_config, tmp_path):
    """No pass of training erases a calibration: who wants a new one says so."""
    checkpoint = calibrated[0] / 'iter_6.pth'
    args = '--work-dir', tmp_path, '--cfg-options', f'load_from={checkpoint}'
    run_tool('train', tiny_config, *args, 'train_cfg.max_iters=1', 'default_hooks.checkpoint.interval=1')
    assert thresholds(tmp_path / 'iter_1.pth') == thresholds(checkpoint)


def test_a_new_run_with_the_hook_starts_without_the_thresholds(calibrated, run_tool, tmp_path):
    work_dir, config = calibrated
    args = '--work-dir', tmp_path, '--cfg-options', f'load_from={work_dir / "iter_6.pth"}'
    run_tool('train', config, *args, 'train_cfg.max_iters=2', 'default_hooks.checkpoint.interval=1')
    assert thresholds(tmp_path / 'iter_1.pth') == [0.0] * LAYERS
    assert 0.0 not in thresholds(tmp_path / 'iter_2.pth')


@pytest.mark.parametrize('noise', [True, False])
def test_before_training_what_training_will_not_move_is_reset(noise):
    """Without noise thresholds are part of training, and those of a run that goes on stay."""
    backbone = CLASSIFIER['backbone'] | dict(dispatcher=dict(noise=noise))
    model = build(CLASSIFIER | dict(backbone=backbone))
    for dispatcher in token_dispatchers(model).values():
        dispatcher.set_rule(2.0, 0.25)
    CalibrationHook().before_train(make_runner(model))
    found = {(d.threshold.item(), d.capacity) for d in token_dispatchers(model).values()}
    assert found == ({(0.0, None)} if noise else {(2.0, 0.25)})


def test_a_calibration_that_fails_loses_neither_training_nor_thresholds(monkeypatch, caplog):
    model, hook = build(CLASSIFIER), CalibrationHook()
    set_threshold(token_dispatchers(model), 2.0)

    def fail(host, *args, **options):
        next(iter(token_dispatchers(host).values())).set_rule(3.0)
        raise MemoryError('too large')

    monkeypatch.setattr('mmdyt.engine.calibration.calibrate_host', fail)
    hook._calibrate(make_runner(model))
    assert [d.threshold.item() for d in token_dispatchers(model).values()] == [2.0] * LAYERS
    (message,) = caplog.messages
    assert 'Calibration failed (MemoryError: too large)' in message and 'tools/calibrate.py' in message
    with pytest.raises(RuntimeError, match='^calibration must succeed, got MemoryError: too large.'):
        hook.after_run(None)
    hook.after_run(None)  # said once


def test_capacities_are_in_the_checkpoint_and_followed_by_tests(calibrated, run_tool, tiny_config, tmp_path):
    config = tmp_path / 'tiny.py'
    config.write_text(HOOK.format(base=tiny_config, arguments="rule='uniform', per_image=True"))
    run_tool('train', config, '--work-dir', tmp_path / 'run', '--resume', calibrated[0] / 'iter_3.pth')
    state = torch.load(tmp_path / 'run' / 'iter_6.pth')['state_dict']
    capacities = {name: tensor.item() for name, tensor in state.items() if name.endswith('.dispatcher.capacity')}
    assert len(capacities) == LAYERS and all(value == pytest.approx(0.5, abs=0.01) for value in capacities.values())
    run_tool('test', config, tmp_path / 'run' / 'iter_6.pth', '--work-dir', tmp_path / 'test')
    (file,) = (tmp_path / 'test').glob('*/*.json')
    report = json.loads(file.read_text())
    assert [report[f'activation_rate/layer_{i}'] for i in range(LAYERS)] == [0.5] * LAYERS


def test_images_that_cannot_be_read_for_it_are_refused_before_training():
    hook, runner = CalibrationHook(), make_runner(build(CLASSIFIER))
    runner.train_dataloader = loader((3, 32, 32), collate_fn=lambda samples: [samples, samples])
    with pytest.raises(ValueError, match='dataset must give one sample at a time, got a list, whose batches .* list'):
        hook.before_train(runner)


def test_epochs_end_with_a_calibrated_checkpoint(run_tool, ade_root, tmp_path):
    model = CLASSIFIER | dict(data_preprocessor=dict(type='mmdyt.ImagePreprocessor', num_classes=2))
    (tmp_path / 'epochs.py').write_text(EPOCHS.format(root=ROOT, model=model, data=ade_root))
    run_tool('train', tmp_path / 'epochs.py', '--work-dir', tmp_path / 'work_dir')
    assert thresholds(tmp_path / 'work_dir' / 'epoch_1.pth') == [0.0] * LAYERS
    assert 0.0 not in thresholds(tmp_path / 'work_dir' / 'epoch_2.pth')
    (line,) = log_lines(tmp_path / 'work_dir', 'Calibrated')
    assert 'Calibrated thresholds (uniform): activation rate 0.500 (target 0.50), by layer 0.50 0.50 0.50 0.50.' in line


def test_every_process_ends_with_the_thresholds_of_the_checkpoint(tiny_config, tmp_path):
    (tmp_path / 'rank_hook.py').write_text(RANK_HOOK)
    (tmp_path / 'two.py').write_text(
        HOOK.format(base=tiny_config, arguments="rule='uniform', num_batches=2").replace(
            'custom_hooks = [', "custom_hooks = [dict(type='WriteThresholds'), "
        )
        + "custom_imports = dict(imports=['mmdyt.models.segmentor', 'mmdyt.engine', 'rank_hook'])\n"
        'train_cfg = dict(max_iters=3)\n'
    )
    run_distributed('train', tmp_path / 'two.py', 2, '--work-dir', tmp_path)
    first, second = (json.loads((tmp_path / f'rank{rank}.json').read_text()) for rank in (0, 1))
    assert first == second and len(first) == LAYERS and 0.0 not in first.values()
    assert list(first.values()) == thresholds(tmp_path / 'iter_3.pth')
    assert len(log_lines(tmp_path, 'Calibrated')) == 1


def tiny_recognizer() -> nn.Module:
    pytest.importorskip('mmdyt.models.recognizer')
    preprocessor = dict(type='ActionDataPreprocessor', mean=[127.5] * 3, std=[127.5] * 3, format_shape='NCTHW')
    head = dict(type='I3DHead', num_classes=2, in_channels=TINY_ARCH['embed_dims'], average_clips='prob')
    cfg = dict(type='mmdyt.DyTRecognizer', backbone=CLASSIFIER['backbone'], cls_head=head)
    return build(cfg | dict(_scope_='mmaction', data_preprocessor=preprocessor), 'mmaction')


def tiny_segmentor(tiny_model_cfg) -> nn.Module:
    return build(tiny_model_cfg, 'mmseg')


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize(
    ('host', 'shapes', 'tokens'),
    [
        ('classifier', [(3, 32, 32)] * 8, 8 * 16),
        ('segmentor', [(3, 64, 64)] * 8, 8 * 16),
        ('segmentor', [(3, 64, 64), (3, 32, 64), (3, 64, 48), (3, 32, 64)] * 2, 2 * (16 + 8 + 12 + 8)),
        ('recognizer', [(2, 3, 4, 32, 32)] * 8, 8 * 2 * 4 * 16),  # 2 views of 4 frames
    ],
    ids=['classifier', 'segmentor', 'segmentor-sizes', 'recognizer'],
)
def test_images_of_every_host_decide(tiny_model_cfg, host, shapes, tokens, rule):
    build_host = dict(classifier=lambda: build(CLASSIFIER), recognizer=tiny_recognizer)
    model = build_host.get(host, lambda: tiny_segmentor(tiny_model_cfg))()
    seen = []
    first = next(iter(dynamic_branches(model).values()))
    first.dispatcher.register_forward_hook(lambda m, args, dispatch: seen.append(dispatch.patch_mask.numel()))
    found = calibrate_host(model, loader(*shapes), None, CalibrationRequest(0.5, rule, num_batches=2))
    assert list(found) == [f'backbone.layers.{i}.dynamic.mlp' for i in range(LAYERS)]
    assert sum(seen) >= 4 * tokens and sum(seen) % tokens == 0  # some passes over all images
    assert sum(branch.rate for branch in found.values()) / LAYERS == pytest.approx(0.5, abs=1.01 / tokens)


def test_images_are_prepared_as_for_a_test():
    """Mix-ups of batches are for training."""
    cfg = CLASSIFIER | dict(train_cfg=dict(augments=dict(type='Mixup', alpha=1.0)))
    mixed, plain = build(cfg), build(CLASSIFIER)
    assert mixed.data_preprocessor.batch_augments is not None and plain.data_preprocessor.batch_augments is None
    images = loader(*[(3, 32, 32)] * 8)
    request = CalibrationRequest(0.3, 'uniform', num_batches=2)
    assert calibrate_host(mixed, images, None, request) == calibrate_host(plain, images, None, request)


def test_the_choice_of_images_is_fixed_spread_and_as_large_as_asked():
    asked = []

    def collate(samples: list[dict]) -> dict:
        asked.append([sample['inputs'].shape[2] for sample in samples])
        return dict(inputs=torch.stack([sample['inputs'][:, :32, :32] for sample in samples]))

    images = loader(*[(3, 32, 32 + i) for i in range(100)], collate_fn=collate)
    for number in (3, 3, 1000):
        torch.manual_seed(number)
        calibrate_host(build(CLASSIFIER), images, None, CalibrationRequest(0.5, 'uniform', num_batches=number))
    assert asked[:3] == asked[3:6] and [len(batch) for batch in asked[:3]] == [4, 4, 4]
    chosen = {width for batch in asked[:3] for width in batch}
    assert len(chosen) == 12 and max(chosen) > 32 + 75 and min(chosen) < 32 + 25  # lists may be sorted by class
    assert sorted(width for batch in asked[6:] for width in batch) == list(range(32, 132))


def test_random_pipelines_give_the_same_images_and_leave_the_generators_alone():
    class Noisy(list):
        def __getitem__(self, i):
            sample = super().__getitem__(i)
            noise = torch.rand(1).item() + np.random.rand() + random.random()
            return sample | dict(inputs=(sample['inputs'] * (noise / 3)).to(torch.uint8))

    source = loader(*[(3, 32, 32)] * 8)
    images = DataLoader(Noisy(source.dataset), 4, collate_fn=source.collate_fn)
    request, results = CalibrationRequest(0.3, 'rate_matched', num_batches=2), []
    for seed in (1, 2):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        model = build(CLASSIFIER)
        before = get_random_states()
        results.append(calibrate_host(model, images, None, request))
        after = get_random_states()
        assert torch.equal(before.pop('torch'), after.pop('torch')) and before == after
    assert results[0] == results[1] != calibrate_host(build(CLASSIFIER), source, None, request)


class Piped(list):
    """A data set with a pipeline."""

    pipeline = staticmethod(dict)

    def __getitem__(self, i):
        return self.pipeline(super().__getitem__(i))


def test_images_take_the_pipeline_and_the_batches_of_validation():
    source, widths = loader(*[(3, 32, 32 + 8 * i) for i in range(8)]), []

    def crop(sample: dict) -> dict:
        widths.append(sample['inputs'].shape[2])
        return dict(inputs=sample['inputs'][:, :, :32])

    train = DataLoader(Piped(source.dataset), 3, collate_fn=source.collate_fn)
    val = DataLoader(Piped(), 2, collate_fn=source.collate_fn)  # its images are not touched
    val.dataset.pipeline = crop
    model, batches = build(CLASSIFIER), []
    model.backbone.register_forward_hook(lambda m, args, output: batches.append(args[0].shape))
    request = CalibrationRequest(0.5, 'uniform', num_batches=2)
    calibrate_host(model, train, val, request)
    assert set(batches) == {(2, 3, 32, 32)} and len(batches) % 3 == 0
    assert len(set(widths)) == 6 and train.dataset.pipeline is dict
    calibrate_host(model, train, DataLoader(source.dataset), request)  # a wrapper without a pipeline
    assert len(widths) == 6 and batches[-1][3] > 32


@pytest.mark.parametrize(
    ('gmacs', 'steps', 'message'),
    [
        (1e3, 10, 'target_gmacs must lie between'),
        (1e-6, 10, 'target_gmacs must lie between'),
        (None, 0, 'target_gmacs must be a cost that a few batches can tell'),
    ],
)
@pytest.mark.parametrize('capacity', [None, 0.25])
def test_a_refused_cost_leaves_every_threshold_and_capacity_as_it_was(monkeypatch, gmacs, steps, message, capacity):
    monkeypatch.setattr('mmdyt.engine.calibration.COST_STEPS', steps)
    model, images = build(CLASSIFIER), loader(*[(3, 32, 32)] * 4)
    for i, dispatcher in enumerate(token_dispatchers(model).values()):
        dispatcher.set_rule(0.1 * i - 0.3, capacity)
    before = copy.deepcopy(model.state_dict())
    if gmacs is None:
        gmacs = model.backbone.macs(32, 32, dict.fromkeys(dynamic_branches(model.backbone), 9)) / 1e9  # half of them
    with pytest.raises(ValueError, match=message):
        calibrate_host(model, images, None, CalibrationRequest(target_gmacs=gmacs, rule='uniform', num_batches=1))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert {dispatcher.capacity for dispatcher in token_dispatchers(model).values()} == {capacity}


def test_windows_of_a_test_are_calibrated_as_windows(tiny_model_cfg):
    slide = dict(mode='slide', crop_size=(64, 64), stride=(32, 32))
    model, shapes = tiny_segmentor(tiny_model_cfg | dict(test_cfg=slide)), set()
    model.backbone.register_forward_hook(lambda m, args, output: shapes.add(args[0].shape))
    calibrate_host(model, loader(*[(3, 64, 96)] * 4), None, CalibrationRequest(0.5, 'uniform', num_batches=1))
    assert shapes == {(4, 3, 64, 64)}


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(rule='best'), r"rule must be one of \['rate_matched', 'uniform', 'global'\], got 'best'"),
        (dict(target_rate=50), r'target_rate must lie in \(0, 1\], got 50. Rates are fractions, not percent'),
        (dict(num_batches=0), 'num_batches must be at least 1, got 0'),
        (dict(num_batches=1.5), 'num_batches must be at least 1, got 1.5'),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f'^{message}'):
        CalibrationHook(**arguments)


def test_what_cannot_be_calibrated_is_refused_before_training():
    hook, model = CalibrationHook(), build(CLASSIFIER)
    hook.before_train(make_runner(model))
    with pytest.raises(ValueError, match='^custom_hooks must hold mmdyt.CalibrationHook or EMAHook, got both'):
        hook.before_train(make_runner(model, hooks=[EMAHook()]))
    plain = build(CLASSIFIER | dict(backbone=CLASSIFIER['backbone'] | dict(dispatcher=None)))
    with pytest.raises(ValueError, match='^model must have a dispatcher with a threshold'):
        hook.before_train(make_runner(plain))
    stock = build(CLASSIFIER | dict(type='ImageClassifier'))  # trained for another loss
    with pytest.raises(ValueError, match='^target_rate must be given, since the ImageClassifier has none, got None'):
        hook.before_train(make_runner(stock))
    CalibrationHook(target_rate=0.5).before_train(make_runner(stock))


def test_a_run_that_stops_early_says_that_it_is_not_calibrated(caplog):
    hook = CalibrationHook()
    hook.after_train(make_runner(build(CLASSIFIER), left=0))
    assert not caplog.messages
    hook.after_train(make_runner(build(CLASSIFIER), left=1))
    assert 'without calibration. Calibrate with tools/calibrate.py' in caplog.messages[0]
    with pytest.raises(RuntimeError, match='^calibration must succeed, got training that stopped early.'):
        hook.after_run(None)
