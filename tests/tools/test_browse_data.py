"""tools/browse_data.py: its pictures show what the model gets, and broken files are named."""

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from own_worlds import draw_class_folders, draw_masks

import mmdyt.models  # noqa: F401  repairs the wheels, registers
from mmdyt.engine.browse import draw_seen, see, wrong_labels


@pytest.mark.parametrize('swaps', [False, True])
def test_normalisation_is_undone_and_colours_are_right(swaps):
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)  # blue first
    mask = torch.tensor([[0, 1], [255, 1]]).repeat_interleave(4, 0).repeat_interleave(4, 1)
    packed = dict(inputs=torch.from_numpy(image).permute(2, 0, 1), data_samples=SegDataSample())
    packed['data_samples'].gt_sem_seg = PixelData(data=mask[None])
    with DefaultScope.overwrite_default_scope('mmseg'):
        cfg = dict(mean=[10, 20, 30], std=[3, 5, 7], bgr_to_rgb=swaps, size=(8, 12), seg_pad_val=255)
        preprocessor = MODELS.build(dict(type='SegDataPreProcessor', **cfg))
    seen = see(preprocessor, packed, training=True)
    (picture,) = seen.pictures
    assert picture.shape == (8, 12, 3) and (picture[:, :8] == image).all()
    assert (seen.mask[:, :8] == mask.numpy()).all() and (seen.mask[:, 8:] == 255).all()
    assert wrong_labels(packed, 2) == [] and wrong_labels(packed, 1) == [1]
    drawn = draw_seen(seen, 'a.png', ('x', 'y'), [[255, 0, 0], [0, 255, 0]])
    assert drawn.shape[2] == 3 and drawn.shape[1] > 480


def test_clips_are_red_first():
    frames = torch.randint(0, 256, (1, 3, 4, 8, 8), dtype=torch.uint8)  # a view of 4 frames
    with DefaultScope.overwrite_default_scope('mmaction'):
        cfg = dict(mean=[127.5] * 3, std=[127.5] * 3, format_shape='NCTHW')
        preprocessor = MODELS.build(dict(type='ActionDataPreprocessor', **cfg))
        from mmaction.structures import ActionDataSample

        seen = see(preprocessor, dict(inputs=frames, data_samples=ActionDataSample().set_gt_label(2)), training=False)
    assert seen.labels == [2] and seen.mask is None and len(seen.pictures) == 4
    for i, picture in enumerate(seen.pictures):
        assert (picture[..., ::-1] == frames[0, :, i].permute(1, 2, 0).numpy()).all()


def test_pictures_and_sheet_are_written_of_stock_configs_too(tiny_config, run_tool, tmp_path, capsys):
    run_tool('browse_data', tiny_config, '--number', 3, '--out', tmp_path / 'out', '--split', 'val')
    names = sorted(path.name for path in (tmp_path / 'out').iterdir())
    assert names == ['val_000000_0.png', 'val_000001_1.png', 'val_000002_2.png', 'val_contact.png']
    assert cv2.imread(str(tmp_path / 'out/val_contact.png')).std() > 20
    assert 'val: 4 samples' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('task', 'world', 'file'),
    [('classification', draw_class_folders, 'train/red/2.png'), ('segmentation', draw_masks, 'masks/train/3.png')],
)
def test_check_names_broken_files(task, world, file, run_tool, tmp_path, capsys, monkeypatch):
    world(tmp_path)
    monkeypatch.setattr('mmdyt.preflight.samples.LOOK', 2)  # as if there were thousands
    if task == 'classification':
        (tmp_path / file).write_bytes(b'no picture')
    else:
        cv2.imwrite(str(tmp_path / file), np.full((48, 64), 9, np.uint8))
    with pytest.raises(SystemExit) as stop:
        run_tool('browse_data', ROOT / f'configs/own/{task}.py', '--check', '--out', tmp_path / 'out',
                 '--cfg-options', f'own.root={tmp_path}', 'own.size=32')  # fmt: skip
    printed = capsys.readouterr().out
    assert stop.value.code == 1 and printed.count('Broken: 1 of') == 1 and not (tmp_path / 'out').exists()
    assert ('2.png' in printed) if task == 'classification' else ('3.jpg: its mask has labels [9]' in printed)


def test_bad_options_are_refused(tiny_config, run_tool, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_tool('browse_data', tiny_config, '--number', 0, '--out', tmp_path)
    assert '--number must be at least 1' in capsys.readouterr().err
