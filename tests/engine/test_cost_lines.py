"""What each sample cost: the same whatever the batch size and the number of processes, and the sum of its passes."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.dataset import DefaultSampler
from mmseg.structures import SegDataSample
from test_flops import SLIDE, WHOLE, build
from test_flops_clips import AGGREGATED, T
from test_flops_clips import build as build_recognizer
from torch.utils.data import DataLoader

from mmdyt.core.macs import count_macs
from mmdyt.engine.costs import CostCounter
from mmdyt.engine.flops import FLOPsHook
from mmdyt.engine.own_images import count_own, place_in_dataset

SIZES = [(64, 96), (72, 40), (50, 64), (64, 96), (130, 64)]


def images(shapes=SIZES):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 3, height, width, generator=generator) for height, width in shapes]


def count(model, batches) -> list[dict]:
    with CostCounter(model) as counter, torch.no_grad():
        for batch in batches:
            model.predict(batch)
            counter.add_images(len(batch))
    return counter.costs().lines()


@pytest.mark.parametrize('test_cfg', [WHOLE, SLIDE], ids=['whole', 'slide'])
def test_a_line_is_what_an_operator_counter_says_of_the_image(tiny_model_cfg, test_cfg):
    model = build(tiny_model_cfg | dict(test_cfg=test_cfg))
    for image, line in zip(images(), count(model, images()), strict=True):
        assert line['gmacs'] * 1e9 == pytest.approx(count_macs(lambda x=image: model.predict(x)), rel=1e-12)
        parts = sum(line[f'gmacs_{part}'] for part in ('backbone', 'neck', 'head'))
        assert line['gmacs'] == pytest.approx(parts, rel=1e-12)
        assert line['activation_rate'] == pytest.approx(np.mean(list(line['rates'].values())))
        height, width = image.shape[2:]
        rows, columns = (max(-(-(side - 64) // 48), 0) + 1 for side in (height, width))
        assert line['passes'] == (rows * columns if test_cfg is SLIDE else 1)


@pytest.mark.parametrize('test_cfg', [WHOLE, SLIDE], ids=['whole', 'slide'])
@pytest.mark.parametrize('batch_size', [2, 3, 5])
def test_lines_are_the_same_whatever_the_batch_size(tiny_model_cfg, test_cfg, batch_size):
    model = build(tiny_model_cfg | dict(test_cfg=test_cfg))
    whole = torch.cat(images(5 * [(64, 96)]))
    assert count(model, whole.split(batch_size)) == count(model, whole.split(1))


def test_a_clip_is_the_sum_of_its_views():
    model, clips = build_recognizer(AGGREGATED), torch.randn(2, 3, 3, T, 32, 32)
    with CostCounter(model) as counter, torch.no_grad():
        for batch in clips.split(1):
            model(batch, mode='tensor')
            counter.add_images(1)
    together = [line['gmacs_backbone'] for line in counter.costs().lines()]
    with CostCounter(model) as counter, torch.no_grad():
        for view in clips.flatten(0, 1):
            model(view[None, None], mode='tensor')
            counter.add_images(1)
    views = np.array([line['gmacs_backbone'] for line in counter.costs().lines()]).reshape(2, 3).sum(1)
    assert together == pytest.approx(views.tolist(), rel=1e-12)


def test_the_spread_is_over_samples(tiny_model_cfg):
    model = build(tiny_model_cfg)
    with CostCounter(model) as counter, torch.no_grad():
        for image in images():
            model.predict(image)
            counter.add_images(1)
    costs = counter.costs()
    each, report = [line['gmacs'] for line in costs.lines()], costs.report()
    assert report['gmacs_min'] == min(each) and report['gmacs_max'] == max(each)
    assert report['gmacs_median'] == sorted(each)[2] and report['gmacs'] == pytest.approx(np.mean(each))
    assert report['gmacs_p5'] == pytest.approx(np.percentile(each, 5))
    assert report['gmacs'] == pytest.approx(sum(report[f'gmacs_{part}'] for part in ('backbone', 'neck', 'head')))


def run_hook(model, loader, folder) -> None:
    """A test of some images in one of several processes."""
    hook = FLOPsHook()
    hub = SimpleNamespace(update_scalar=lambda *_: None)
    runner = SimpleNamespace(
        model=model, logger=logging.getLogger('lines'), message_hub=hub, test_dataloader=loader, log_dir=folder, iter=0
    )
    hook.before_test_epoch(runner)
    for i, (numbers, batch) in enumerate(loader):
        with torch.no_grad():
            outputs = model.predict(batch)
        for number, sample in zip(numbers.tolist(), outputs, strict=True):
            sample.set_metainfo(dict(img_path=f'{number}.png'))
        hook.after_test_iter(runner, i, outputs=outputs)
    hook.after_test_epoch(runner, {})


class Numbered(torch.utils.data.Dataset):
    """Images and their numbers."""

    def __init__(self, pictures):
        self.pictures = pictures

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        return i, self.pictures[i]


def run_rank(rank: int, ranks: int, folder, model, dataset) -> None:
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=ranks)
    run_hook(model, DataLoader(dataset, 2, sampler=DefaultSampler(dataset, shuffle=False), num_workers=1), str(folder))
    dist.destroy_process_group()


@pytest.mark.parametrize('ranks', [2, 3])
def test_files_are_the_same_whatever_the_number_of_processes(tmp_path, tiny_model_cfg, ranks):
    model, dataset = build(tiny_model_cfg), Numbered(torch.cat(images(7 * [(64, 64)])))
    (tmp_path / 'alone').mkdir()
    run_hook(model, DataLoader(dataset, 5), str(tmp_path / 'alone'))
    mp.spawn(run_rank, (ranks, tmp_path, model, dataset), nprocs=ranks)
    alone = (tmp_path / 'alone' / 'costs_test.jsonl').read_text()
    assert (tmp_path / 'costs_test.jsonl').read_text() == alone
    lines = [json.loads(line) for line in alone.splitlines()]
    assert [line['file'] for line in lines] == [f'{i}.png' for i in range(7)]
    assert len({line['gmacs'] for line in lines}) > 1


def test_what_is_broken_has_no_cost(tiny_model_cfg):
    model, batch = build(tiny_model_cfg), torch.cat(images(3 * [(64, 64)]))
    batch[1, :, 20:] = torch.nan
    whole, broken, other = count(model, [batch])
    assert broken['broken'] and broken['gmacs'] is broken['gmacs_backbone'] is broken['activation_rate'] is None
    assert 'broken' not in whole and whole['gmacs'] > 0 and other['gmacs_dense'] == broken['gmacs_dense']
    json.dumps([whole, broken, other], allow_nan=False)


def test_samples_are_named_by_their_files(tiny_model_cfg):
    model = build(tiny_model_cfg)
    samples = [SegDataSample(metainfo=dict(img_path=f'folder/{i}.png')) for i in range(2)]
    with CostCounter(model) as counter, torch.no_grad():
        model.predict(torch.cat(images(2 * [(64, 64)])))
        counter.add_samples(samples)
    assert [line['file'] for line in counter.costs().lines()] == ['folder/0.png', 'folder/1.png']


def test_nothing_counted_is_an_error(tiny_model_cfg):
    with CostCounter(build(tiny_model_cfg)) as counter:
        pass
    with pytest.raises(ValueError, match='samples must be counted before their costs are asked for, got none'):
        counter.costs()


def test_other_loaders_have_their_samples_in_order():
    loader = DataLoader(range(4), 2)
    assert [place_in_dataset(loader)(i) for i in range(4)] == [0, 1, 2, 3] and count_own(loader) == float('inf')
