"""The video recipes. Numbers are those of arXiv 2403.11808, appendix: video."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, write_clip
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.utils import import_modules_from_strings

from mmdyt.core.tuning import count_parameters


def load(name: str) -> Config:
    cfg = Config.fromfile(ROOT / f'configs/{name}.py', import_custom_modules=False)
    import_modules_from_strings(**cfg.custom_imports)
    return cfg


def build_model(name: str) -> torch.nn.Module:
    cfg = load(name)
    with DefaultScope.overwrite_default_scope('mmaction'), torch.device('meta'):
        return MODELS.build(cfg.model)


def steps(pipeline: list) -> dict[str, dict]:
    return {step.type: step for step in pipeline}


@pytest.mark.parametrize(('data', 'epochs', 'classes'), [('k400', 12, 400), ('ssv2', 50, 174)])
def test_the_papers_recipe(data, epochs, classes):
    cfg = load(f'dyt/vitb_{data}')
    optimizer, (warm_up, decay) = cfg.optim_wrapper.optimizer, cfg.param_scheduler
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 1e-3 * 128 / 256, 0.01)
    assert cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 128
    assert cfg.train_cfg.max_epochs == decay.end == epochs and (warm_up.end, decay.begin) == (2, 2)
    assert (warm_up.type, decay.type, decay.eta_min) == ('LinearLR', 'CosineAnnealingLR', 0)
    model = cfg.model
    assert (model.target_rate, model.rate_weight, model.complete_weight, model.distill_weight) == (0.5, 2, 1, 1)
    assert (model.backbone.arch, model.backbone.out_type, model.backbone.get('drop_path_rate', 0)) == ('base', 'raw', 0)
    assert (model.backbone.adapter.bottleneck, model.backbone.adapter.scale, model.backbone.dispatcher.tau) == (
        64,
        0.1,
        5,
    )
    assert model.data_preprocessor.mean == model.data_preprocessor.std == [127.5] * 3
    assert model.cls_head.num_classes == classes and model.cls_head.average_clips == 'score'


def test_kinetics_sees_8_frames_of_stride_16_and_3_views_of_the_centre():
    cfg = load('dyt/vitb_k400')
    train, test = (steps(cfg[f'{loop}_dataloader'].dataset.pipeline) for loop in ('train', 'test'))
    for pipeline, clips in ((train, 1), (test, 3)):
        sampling = pipeline['SampleFrames']
        assert (sampling.clip_len, sampling.frame_interval, sampling.num_clips) == (8, 16, clips)
    assert train['RandomRescale'].scale_range == (224, 256) and train['RandomCrop'].size == 224
    assert train['Flip'].flip_ratio == 0.5
    assert test['SampleFrames'].test_mode and test['CenterCrop'].crop_size == 224 and test['Resize'].scale == (-1, 224)


def test_something_something_sees_8_uniform_frames_and_3_crops_and_never_flips():
    cfg = load('dyt/vitb_ssv2')
    train, test = (steps(cfg[f'{loop}_dataloader'].dataset.pipeline) for loop in ('train', 'test'))
    assert train['UniformSample'].clip_len == test['UniformSample'].clip_len == 8 and test['UniformSample'].test_mode
    assert train['RandomResizedCrop'].area_range == (0.08, 1.0)
    assert (train['mmdyt.ClipRandAugment'].num_ops, train['mmdyt.ClipRandAugment'].magnitude) == (4, 7)
    assert 'Flip' not in train and test['ThreeCrop'].crop_size == 224


@pytest.mark.parametrize('data', ['k400', 'ssv2'])
def test_baselines_and_variants_differ_in_what_they_are_named_after(data):
    """The paper's tuned parameters: adapters 1.19 M, of 4 experts 4.80 M; with each the aggregator, 2.37 M."""
    counts = {}
    for name in ('dyt/vitb', 'dyt/vitb_moe', 'dyt/vitb_full', 'baselines/vitb_adapter', 'baselines/vitb_linear',
                 'baselines/vitb_full'):  # fmt: skip
        model = build_model(f'{name}_{data}')
        counts[name] = count_parameters(model) | dict(neck=sum(p.numel() for p in model.neck.parameters()))
    assert all(count['neck'] == 2_367_744 for count in counts.values())
    assert counts['dyt/vitb']['adapter'] == counts['baselines/vitb_adapter']['adapter'] == 1_189_632
    assert counts['dyt/vitb_moe']['adapter'] == pytest.approx(4.80e6, rel=5e-3)
    assert counts['baselines/vitb_adapter']['dispatcher'] == 0 < counts['dyt/vitb']['dispatcher']
    assert counts['baselines/vitb_linear']['adapter'] == counts['baselines/vitb_full']['adapter'] == 0
    assert counts['baselines/vitb_full']['frozen'] == counts['dyt/vitb_full']['frozen'] == 0
    base, full = load(f'dyt/vitb_{data}'), load(f'baselines/vitb_full_{data}')
    assert full.optim_wrapper.optimizer.lr == pytest.approx(base.optim_wrapper.optimizer.lr / 10)


@pytest.mark.parametrize('name', ['dyt/vitb_temporal_ssv2', 'dyt/vitti_temporal_gmdcsa24'])
def test_temporal_configs_differ_in_the_positions_alone(name):
    plain, temporal = load(name.replace('_temporal', '')), load(name)
    assert temporal.model.neck.aggregator.pop('temporal_positions') == temporal.clip_len == 8
    assert temporal.model == plain.model and temporal.train_dataloader == plain.train_dataloader


def test_the_reader_is_switched_by_name(monkeypatch):
    for reader in ('decord', 'pyav'):
        monkeypatch.setenv('MMDYT_VIDEO_READER', reader)
        pipelines = [load('dyt/vitb_k400')[f'{loop}_dataloader'].dataset.pipeline for loop in ('train', 'test')]
        assert [pipeline[0].reader for pipeline in pipelines] == [reader] * 2


@pytest.mark.parametrize(('name', 'views'), [('dyt/vitb_k400', 3), ('dyt/vitb_ssv2', 3)])
def test_a_clip_passes_the_pipelines_as_views_of_8_frames(tmp_path, monkeypatch, name, views):
    monkeypatch.setenv('MMDYT_DATA', str(tmp_path))
    rng = np.random.default_rng(0)
    cfg = load(name)
    for loop, count in (('train', 1), ('test', views)):
        dataset = cfg[f'{loop}_dataloader'].dataset
        folder = Path(dataset.data_root, dataset.data_prefix.video)
        folder.mkdir(parents=True, exist_ok=True)
        write_clip(folder / 'clip.mp4', rng.integers(0, 256, (140, 96, 128, 3)).astype(np.uint8))
        Path(dataset.data_root, dataset.ann_file).write_text('clip.mp4 7\n')
        with DefaultScope.overwrite_default_scope('mmaction'):
            sample = DATASETS.build(dataset)[0]
        assert sample['inputs'].shape == (count, 3, 8, 224, 224) and sample['inputs'].dtype == torch.uint8
        assert sample['data_samples'].gt_label.item() == 7
        frames = sample['inputs'][0].transpose(0, 1)
        assert len({frame.numpy().tobytes() for frame in frames}) == 8
