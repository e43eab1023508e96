"""ConsistencyHook: figures of known decisions, and no trace of its own passes in other reports."""

import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import set_random_seed
from test_flops import build
from test_maps import SLIDE, BrightTokens, expected, picture, sample

from mmdyt import preflight
from mmdyt.core.fit.calibrate import token_dispatchers
from mmdyt.engine.consistency import ConsistencyHook, means

HOOKS = [dict(type='mmdyt.FLOPsHook'), dict(type='mmdyt.ConsistencyHook', flip=True)]


def stand_in(model):
    hub = SimpleNamespace(scalars={})
    hub.update_scalar = hub.scalars.__setitem__
    return SimpleNamespace(model=model, logger=logging.getLogger('consistency'), message_hub=hub)


def batch_of(images):
    return dict(inputs=list(images), data_samples=[sample(*image.shape[1:]) for image in images])


@torch.no_grad()
@pytest.mark.parametrize('test_cfg', [dict(mode='whole'), SLIDE], ids=['whole', 'slide'])
def test_decisions_by_pixels_agree_in_flips_and_windows(tiny_model_cfg, test_cfg):
    model = build(tiny_model_cfg | dict(test_cfg=test_cfg))
    model.data_preprocessor.channel_conversion = model.data_preprocessor._enable_normalize = False
    hook, runner, images = ConsistencyHook(flip=True), stand_in(model), [picture(4, 6, seed) for seed in range(3)]
    metrics = {}
    hook.before_test_epoch(runner)
    with BrightTokens(model):
        for i, image in enumerate(images):
            batch = batch_of([image])
            hook.after_test_iter(runner, i, batch, model.test_step(batch))
    hook.after_test_epoch(runner, metrics)
    assert metrics['consistency/flip'] == pytest.approx(1)
    assert metrics.get('consistency/windows', 1) == pytest.approx(1)
    assert ('consistency/windows' in metrics) == (test_cfg is SLIDE)
    if test_cfg is not SLIDE:
        masks = [expected(image).squeeze(1) for image in images]
        pairs = [(m[:, 1:] == m[:, :-1]).sum().item() + (m[:, :, 1:] == m[:, :, :-1]).sum().item() for m in masks]
        assert metrics['consistency/neighbours'] == pytest.approx(sum(pairs) / 3 / (4 * (3 * 6 + 4 * 5)))
    assert runner.message_hub.scalars.keys() == {f'test/{name}' for name in metrics}


@pytest.mark.parametrize('config', ['tiny_config', 'tiny_cls_config', 'tiny_video_config'])
def test_its_own_passes_cost_nothing(request, tmp_path, config):
    reports = []
    for hooks in (HOOKS[:1], HOOKS):
        cfg = Config.fromfile(request.getfixturevalue(config))
        cfg.work_dir, cfg.custom_hooks = str(tmp_path), hooks
        set_random_seed(0)
        runner = preflight.build_runner(cfg)
        for dispatcher in token_dispatchers(runner.model).values():
            torch.nn.init.normal_(dispatcher.gate.weight)
        reports.append(runner.test())
    alone, both = reports
    assert {name: both[name] for name in alone} == alone
    new = {name.removeprefix('consistency/') for name in both.keys() - alone.keys()}
    assert new == ({'neighbours', 'time'} if 'video' in config else {'neighbours', 'flip'})
    assert all(0 < both[f'consistency/{name}'] < 1 for name in new)


def test_augmented_tests_compare_the_flips_that_they_have(tiny_model_cfg):
    model = build(tiny_model_cfg)
    tta = MODELS.build(dict(type='SegTTAModel', module=model)).eval()
    image = torch.randint(0, 255, (3, 64, 96), dtype=torch.uint8)
    samples = [sample(64, 96, flip=flip, flip_direction='horizontal') for flip in (False, True)]
    batch = dict(inputs=[[image], [image.flip(-1)]], data_samples=[[one] for one in samples])
    hook, runner, metrics = ConsistencyHook(flip=True), stand_in(tta), {}
    hook.before_test_epoch(runner)
    with torch.no_grad():
        hook.after_test_iter(runner, 0, batch, tta.test_step(batch))
    hook.after_test_epoch(runner, metrics)
    assert 0 < metrics['consistency/flip'] <= 1


def test_a_test_that_is_repeated_at_random_leaves_nothing_behind(tiny_config, tmp_path):
    cfg = Config.fromfile(tiny_config)
    cfg.work_dir, cfg.custom_hooks = str(tmp_path), [HOOKS[0], dict(type='mmdyt.RandomMasksHook'), HOOKS[1]]
    runner = preflight.build_runner(cfg)
    found = runner.test()
    hook = next(hook for hook in runner.hooks if isinstance(hook, ConsistencyHook))
    assert hook._recorder.take() == [] and 'consistency/flip' in found


def test_means_are_over_the_samples_that_have_a_figure():
    assert means([dict(a=1.0), dict(a=0.0, b=0.5), {}]) == dict(a=0.5, b=0.5)


def test_models_without_dispatchers_and_words_are_refused(tiny_model_cfg):
    tiny_model_cfg.backbone.dispatcher = None
    with pytest.raises(ValueError, match='model must have dispatchers for mmdyt.ConsistencyHook, got none'):
        ConsistencyHook().before_run(stand_in(build(tiny_model_cfg)))
    with pytest.raises(ValueError, match='flip must be True or False'):
        ConsistencyHook(flip='yes')
