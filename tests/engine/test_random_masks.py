"""What the dispatchers know: the same test with masks that chance drew, at the same rates."""

import json
import pickle

import pytest
import torch
import torch.nn as nn

from mmdyt.core.observe import dynamic_branches, random_masks, record_dispatch
from mmdyt.models import DyTVisionTransformer

ARCH = dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64)


def metrics(work_dir) -> dict:
    (file,) = work_dir.glob('*/*.json')
    return {name: value for name, value in json.loads(file.read_text()).items() if not name.endswith('time')}


def test_random_masks_have_the_rates_and_leave_no_trace():
    torch.manual_seed(0)
    model, x = DyTVisionTransformer(ARCH, img_size=64, patch_size=4).eval(), torch.randn(4, 3, 64, 64)
    names = list(dynamic_branches(model))
    with torch.no_grad(), record_dispatch(model) as record:
        before = model(x)
        with random_masks(model, {names[0]: 0.3, names[1]: 1.0}):
            model(x)
            model(x)
        after = model(x)
    first, second = (record.dispatches[names[0]][i].mask for i in (1, 2))
    assert first[:, 1:].mean().item() == pytest.approx(0.3, abs=0.05) and not torch.equal(first, second)
    assert first[:, 0].min() == 1 and set(first.unique().tolist()) == {0.0, 1.0}
    assert record.dispatches[names[1]][1].mask.min() == 1
    plain = record.dispatches[names[2]][1]  # not named: decides as ever
    assert torch.equal(plain.patch_mask, (plain.logits > 0).float())
    assert torch.equal(before[0], after[0])


def test_branches_that_are_not_there_are_refused():
    with pytest.raises(KeyError, match='nowhere'), random_masks(nn.Linear(1, 1), dict(nowhere=0.5)):
        pass


def test_a_test_is_repeated_with_random_masks_beside_the_first_metrics(run_tool, tiny_config, trained, tmp_path):
    test = 'test', tiny_config, trained / 'iter_6.pth', '--work-dir'
    run_tool(*test, tmp_path / 'plain', '--dump', tmp_path / 'plain.pkl')
    for folder in 'first', 'second':
        run_tool(*test, tmp_path / folder, '--random-masks', '--dump', tmp_path / f'{folder}.pkl')
    plain, first, second = (metrics(tmp_path / folder) for folder in ('plain', 'first', 'second'))
    assert first == second  # always the same masks
    assert {name: first[name] for name in plain} == plain
    assert first.keys() - plain.keys() == {'random_masks/mIoU', 'random_masks/mAcc', 'random_masks/aAcc'}
    assert first['random_masks/aAcc'] != plain['aAcc']
    predictions = [pickle.loads((tmp_path / f'{name}.pkl').read_bytes()) for name in ('plain', 'first')]
    assert all(
        torch.equal(a['pred_sem_seg']['data'], b['pred_sem_seg']['data']) for a, b in zip(*predictions, strict=True)
    )
    (log,) = (tmp_path / 'first').glob('*/*.log')
    assert 'Random masks at the same rates: aAcc ' in log.read_text()


def test_random_masks_need_dispatchers_and_measured_rates(run_tool, tiny_config, trained, tmp_path, capsys):
    test = 'test', tiny_config, trained / 'iter_6.pth', '--work-dir', tmp_path, '--random-masks'
    with pytest.raises(SystemExit):
        run_tool(*test, '--cfg-options', 'custom_hooks=[]')
    assert 'custom_hooks must hold mmdyt.FLOPsHook before mmdyt.RandomMasksHook' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_tool(*test, '--complete')
