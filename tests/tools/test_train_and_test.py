"""tools/train.py and tools/test.py on a tiny data set, from the command line to the files they leave."""

import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from conftest import run_distributed
from mmengine.config import Config

ROOT = Path(__file__).parents[2]
METRICS = {'mIoU', 'activation_rate', 'gmacs', 'gmacs_dense', 'gmacs_backbone', 'gmacs_backbone_dense'} | {
    f'activation_rate/layer_{i}' for i in range(4)
}
RANK_HOOK = '''
import json
from pathlib import Path

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class WriteRank(Hook):
    """Writes the images that this rank saw, and a sum over each of its parameters."""

    def before_run(self, runner):
        self.images = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.images += [Path(sample.img_path).name for sample in data_batch['data_samples']]

    def after_train(self, runner):
        sums = {name: p.detach().double().abs().sum().item() for name, p in runner.model.module.named_parameters()}
        report = json.dumps(dict(images=self.images, sums=sums))
        (Path(runner.work_dir) / f'rank{get_rank()}.json').write_text(report)
'''


def rows(work_dir: Path) -> list[dict]:
    (log,) = work_dir.glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in log.read_text().splitlines()]


def log_text(work_dir: Path) -> str:
    (log,) = work_dir.glob('*/*.log')
    return log.read_text()


def metrics(work_dir: Path) -> dict:
    """What a test leaves."""
    (file,) = work_dir.glob('*/*.json')
    return json.loads(file.read_text())


def dense_gmacs(*shapes: tuple[int, int]) -> float:
    """The tiny ViT without dispatchers and adapters, one pass for each (patch rows, patch columns)."""
    width, hidden, layers = 32, 64, 4
    macs = 0
    for height, columns in shapes:
        patches = height * columns
        n = patches + 1
        attention = 4 * n * width**2 + 2 * n**2 * width
        norms = 2 * 5 * n * width
        macs += patches * width * 16 * 16 * 3 + layers * (attention + 2 * n * width * hidden + norms)
    return macs / 1e9


@pytest.fixture(scope='module')
def tested(tmp_path_factory, run_tool, tiny_config, trained) -> Path:
    """Work dir of a test of the trained checkpoint."""
    work_dir = tmp_path_factory.mktemp('tested')
    run_tool('test', tiny_config, trained / 'iter_6.pth', '--work-dir', work_dir)
    return work_dir


def test_training_logs_losses_and_metrics(trained):
    losses = [row for row in rows(trained) if 'loss' in row]
    assert [row['step'] for row in losses] == [1, 2, 3, 4, 5, 6]
    assert {'decode.loss_ce', 'aux.loss_ce', 'loss_rate', 'activation_rate'} <= losses[0].keys()
    assert all(math.isfinite(row['loss']) for row in losses)
    validations = [row for row in rows(trained) if 'mIoU' in row]
    assert [row['step'] for row in validations] == [3, 6]
    assert all(row.keys() >= METRICS for row in validations)
    # adapters: 4 layers of 2 * 32 * 4 weights and 4 + 32 biases; dispatchers: 4 of 32 + 1
    assert 'tuned (adapters 0.001, dispatchers 0.000, ' in log_text(trained)
    assert log_text(trained).count('GMACs per image: ') == 2


def test_training_leaves_the_base_as_it_was(trained, pretrained):
    before = torch.load(pretrained)['state_dict']
    after = torch.load(trained / 'iter_6.pth')['state_dict']
    shared = [name for name in before if name in after and name != 'backbone.pos_embed']  # positions are resized
    assert len(shared) == 3 + 4 * 12  # CLS, patch embedding, 4 layers
    assert all(torch.equal(before[name], after[name]) for name in shared)
    assert all(after[f'backbone.layers.{i}.dynamic.mlp.adapter.up.weight'].any() for i in range(4))


def test_test_repeats_the_last_validation(trained, tested):
    report = metrics(tested)
    assert report.keys() >= METRICS
    last = [row for row in rows(trained) if 'mIoU' in row][-1]
    assert {name: report[name] for name in METRICS} == {name: last[name] for name in METRICS}
    assert 0 < report['activation_rate'] < 1
    assert report['activation_rate'] == pytest.approx(sum(report[f'activation_rate/layer_{i}'] for i in range(4)) / 4)
    assert report['gmacs_backbone_dense'] == pytest.approx(dense_gmacs((4, 6)), rel=1e-9)
    line = next(line for line in log_text(tested).splitlines() if 'GMACs per image' in line)
    assert f'Activation rate {report["activation_rate"]:.3f} (target 0.50), by layer ' in line
    assert (
        f'{report["gmacs"]:.3f} of {report["gmacs_dense"]:.3f} dense' in line and 'papers print them as FLOPs' in line
    )


@pytest.mark.slow
def test_predictions_are_dumped_and_the_metrics_stay(run_tool, tiny_config, trained, tested, tmp_path):
    file = tmp_path / 'predictions.pkl'
    run_tool('test', tiny_config, trained / 'iter_6.pth', '--work-dir', tmp_path, '--dump', file)
    assert {name: metrics(tmp_path)[name] for name in METRICS} == {name: metrics(tested)[name] for name in METRICS}
    predictions = pickle.loads(file.read_bytes())
    assert len(predictions) == 4 and predictions[0]['pred_sem_seg']['data'].shape == (1, 64, 96)


def test_views_of_test_time_augmentation_are_summed(run_tool, tiny_config, trained, tmp_path):
    run_tool('test', tiny_config, trained / 'iter_6.pth', '--work-dir', tmp_path, '--tta')
    report = metrics(tmp_path)
    assert report.keys() >= METRICS
    views = [(4, 6), (4, 6), (6, 9), (6, 9)]  # two scales, each as it is and flipped
    assert report['gmacs_backbone_dense'] == pytest.approx(dense_gmacs(*views), rel=1e-9)


def test_sliding_windows_are_summed_and_predictions_painted(run_tool, tiny_config, trained, tmp_path):
    slide = 'model.test_cfg.mode=slide', 'model.test_cfg.crop_size=(64,64)', 'model.test_cfg.stride=(32,32)'
    args = '--work-dir', tmp_path / 'work_dir', '--show-dir', tmp_path / 'show', '--cfg-options', *slide
    run_tool('test', tiny_config, trained / 'iter_6.pth', *args)
    report = metrics(tmp_path / 'work_dir')
    assert report.keys() >= METRICS
    windows = [(4, 4), (4, 4)]  # 64 of 96 columns, and 32 further
    assert report['gmacs_backbone_dense'] == pytest.approx(dense_gmacs(*windows), rel=1e-9)
    assert len(list((tmp_path / 'show').rglob('*.png'))) == 4


def test_mixed_precision_and_options_reach_the_run(run_tool, tiny_config, trained, tmp_path):
    args = '--work-dir', tmp_path, '--amp', '--cfg-options', 'train_cfg.max_iters=2', 'default_hooks.checkpoint=None'
    run_tool('train', tiny_config, *args)
    cfg = Config.fromfile(tmp_path / 'tiny.py')
    assert cfg.optim_wrapper.type == 'mmdyt.CPUAmpOptimWrapper'
    assert cfg.work_dir == str(tmp_path) and cfg.train_cfg.max_iters == 2
    assert not list(tmp_path.glob('*.pth'))
    losses, expected = ([row['decode.loss_ce'] for row in rows(d) if 'loss' in row] for d in (tmp_path, trained))
    assert losses[0] != expected[0]  # bfloat16 rounds,
    assert losses[0] == pytest.approx(expected[0], rel=0.02)  # but computes the same


def test_two_processes_train_one_model_on_different_images(tiny_config, trained, tmp_path):
    (tmp_path / 'rank_hook.py').write_text(RANK_HOOK)
    (tmp_path / 'two.py').write_text(
        f"_base_ = ['{tiny_config}']\n"
        "custom_imports = dict(imports=['mmdyt.models.segmentor', 'mmdyt.engine', 'rank_hook'])\n"
        "custom_hooks = [dict(type='WriteRank'), dict(type='mmdyt.FLOPsHook'), dict(type='mmdyt.RNGStateHook')]\n"
        'train_cfg = dict(max_iters=3)\n'
    )
    run_distributed('train', tmp_path / 'two.py', 2, '--work-dir', tmp_path)
    first, second = (json.loads((tmp_path / f'rank{rank}.json').read_text()) for rank in (0, 1))
    assert all(map(math.isfinite, first['sums'].values()))
    assert first['sums'] == second['sums']
    assert len(first['images']) == len(second['images']) == 6
    assert sorted(set(first['images'] + second['images'])) == [f'{i}.png' for i in range(6)]
    assert all(a != b for a, b in zip(first['images'], second['images'], strict=True))
    trained_sums = {
        n: t.double().abs().sum().item() for n, t in torch.load(tmp_path / 'iter_3.pth')['state_dict'].items()
    }
    assert {name: trained_sums[name] for name in first['sums']} == first['sums']


@pytest.mark.slow
def test_two_processes_report_the_metrics_of_one(tiny_config, trained, tested, tmp_path):
    (tmp_path / 'tiny.py').write_text(f"_base_ = ['{tiny_config}']\n")
    run_distributed('test', tmp_path / 'tiny.py', trained / 'iter_6.pth', 2, '--work-dir', tmp_path / 'work_dir')
    report, expected = metrics(tmp_path / 'work_dir'), metrics(tested)
    assert {name: report[name] for name in METRICS} == pytest.approx({name: expected[name] for name in METRICS})
    assert log_text(tmp_path / 'work_dir').count('GMACs per image') == 1
