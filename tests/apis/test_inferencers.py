"""OpenMMLab's own inferencers with models of this package: equal to ours, and with PyAV."""

import sys

import numpy as np
import pytest
import torch
from mmengine.config import Config
from predicting import CLASSES, make_checkpoint

from mmdyt.apis import load

CONFIGS = dict(cls='tiny_cls_config', seg='tiny_config', video='tiny_video_config')


def clips_of(config) -> list[str]:
    return sorted(map(str, config.parent.glob('videos/val*.mp4')))[:2]


def test_mmpretrain(tiny_cls_config, tmp_path):
    from mmpretrain import ImageClassificationInferencer

    checkpoint = make_checkpoint(tiny_cls_config, tmp_path)
    images = sorted(map(str, tiny_cls_config.parent.glob('test*.png')))[:3]
    infer = ImageClassificationInferencer(str(tiny_cls_config), pretrained=str(checkpoint), device='cpu')
    for theirs, ours in zip(infer(images, batch_size=2, show_dir=tmp_path), load(checkpoint)(images), strict=True):
        assert theirs['pred_class'] == ours.label in CLASSES
        assert theirs['pred_score'] == pytest.approx(ours.score, abs=1e-5)
    assert (tmp_path / 'test0.png').is_file()


def test_mmseg(tiny_config, ade_root, tmp_path):
    from mmseg.apis import MMSegInferencer

    checkpoint = make_checkpoint(tiny_config, tmp_path)
    images = sorted(map(str, (ade_root / 'images/validation').iterdir()))[:2]
    infer = MMSegInferencer(str(tiny_config), str(checkpoint), device='cpu')
    theirs = infer(images, out_dir=str(tmp_path), show=False)['predictions']
    for labels, ours in zip(theirs, load(checkpoint)(images), strict=True):
        np.testing.assert_array_equal(labels, ours.segmentation)
    assert len(list((tmp_path / 'vis').iterdir())) == 2


@pytest.mark.parametrize('reader', ['decord', 'pyav'])
def test_mmaction_with_either_reader(tiny_video_config, tmp_path, monkeypatch, reader):
    from mmaction.apis import ActionRecogInferencer

    checkpoint, clips = make_checkpoint(tiny_video_config, tmp_path), clips_of(tiny_video_config)
    monkeypatch.setenv('MMDYT_VIDEO_READER', reader)
    if reader == 'pyav':
        monkeypatch.setitem(sys.modules, 'decord', None)  # as if it were not installed
    infer = ActionRecogInferencer(str(tiny_video_config), str(checkpoint), device='cpu')
    names = [type(step).__name__ for step in infer.pipeline.transforms]
    assert names[:4] == ['InferencerPackInput', 'OpenClip', 'UniformSample', 'DecodeClip']
    theirs = infer(clips, vid_out_dir=str(tmp_path / 'vis'), out_type='img')['predictions']
    # it takes the crop in the middle in the place of three
    cfg = Config.fromfile(tiny_video_config)
    for step in cfg.test_dataloader.dataset.pipeline:
        step.update(type='CenterCrop') if step['type'] == 'ThreeCrop' else None
    for one, ours in zip(theirs, load(checkpoint, cfg)(clips), strict=True):
        scores = torch.tensor(one['pred_scores'])
        assert int(scores.argmax()) == ours.top[0].label
        assert scores.softmax(0).max() == pytest.approx(ours.score, abs=1e-4)
    assert any((tmp_path / 'vis').rglob('*.*'))


def test_mmaction_of_arrays(tiny_video_config, tmp_path):
    from decord import VideoReader
    from mmaction.apis import ActionRecogInferencer

    checkpoint, clips = make_checkpoint(tiny_video_config, tmp_path), clips_of(tiny_video_config)
    frames = VideoReader(clips[0])[:].asnumpy()
    options = dict(weights=str(checkpoint), device='cpu')
    by_array = ActionRecogInferencer(str(tiny_video_config), input_format='array', **options)(frames)
    by_file = ActionRecogInferencer(str(tiny_video_config), **options)(clips[0])
    np.testing.assert_allclose(*(f['predictions'][0]['pred_scores'] for f in (by_array, by_file)), atol=1e-5)


def test_stock_pipelines_open_with_decord_as_ever(tiny_video_config, tmp_path):
    from mmaction.apis import ActionRecogInferencer

    checkpoint = make_checkpoint(tiny_video_config, tmp_path)
    cfg = Config.fromfile(tiny_video_config)
    cfg.test_dataloader.dataset.pipeline[0] = dict(type='DecordInit', num_threads=2)
    cfg.test_dataloader.dataset.pipeline[2] = dict(type='DecordDecode')
    infer = ActionRecogInferencer(cfg, str(checkpoint), device='cpu')
    names = [type(step).__name__ for step in infer.pipeline.transforms]
    assert names[:4] == ['InferencerPackInput', 'DecordInit', 'UniformSample', 'DecordDecode']
    assert len(infer(clips_of(tiny_video_config)[0])['predictions']) == 1
