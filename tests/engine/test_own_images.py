"""What is summed over ranks counts every image once, however many processes share the images."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.dataset import DefaultSampler
from mmpretrain.datasets.samplers import SequentialSampler
from test_flops import SLIDE, WHOLE, build, make_runner
from test_flops_clips import AGGREGATED, T
from test_flops_clips import build as build_recognizer
from test_flops_clips import predict as predict_clips
from torch.utils.data import DataLoader

from mmdyt.core.fit.calibrate import threshold_for
from mmdyt.engine import costs
from mmdyt.engine.evidence import of_all_ranks
from mmdyt.engine.flops import FLOPsHook
from mmdyt.engine.own_images import count_own, name_in_dataset, of_each, place_in_dataset, spread_places

SAMPLERS = {
    'default': lambda images: DefaultSampler(images, shuffle=False),
    'shuffled': lambda images: DefaultSampler(images, shuffle=True, seed=1),
    'uneven': lambda images: DefaultSampler(images, shuffle=False, round_up=False),
    'turns': lambda images: SequentialSampler(dataset=images),
    'chunks': lambda images: SequentialSampler(dataset=images, subsample_type='sequential'),
}


def make_loader(monkeypatch, images, rank: int, ranks: int, batch_size: int = 1, sampler: str = 'default'):
    """The loader of one of several ranks."""
    monkeypatch.setattr('mmengine.dataset.sampler.get_dist_info', lambda: (rank, ranks))
    return DataLoader(images, batch_size, sampler=SAMPLERS[sampler](images))


@pytest.mark.parametrize('sampler', SAMPLERS)
@pytest.mark.parametrize('ranks', [1, 2, 4, 5])
@pytest.mark.parametrize('number', [1, 3, 8])
def test_every_image_is_some_ranks_own_once(monkeypatch, number, ranks, sampler):
    images, own = range(number), []
    for rank in range(ranks):
        indices = [int(i) for i in make_loader(monkeypatch, images, rank, ranks, sampler=sampler)]
        own += indices[: int(min(count_own(make_loader(monkeypatch, images, rank, ranks, 1, sampler)), len(indices)))]
    assert sorted(own) == list(images)


@pytest.mark.parametrize('loader', [None, DataLoader(range(3), 2), DataLoader(range(3), batch_size=None)])
def test_all_images_of_other_samplers_count(loader):
    assert count_own(loader) == math.inf


@pytest.mark.parametrize('sampler', SAMPLERS)
@pytest.mark.parametrize('ranks', [1, 2, 5])
def test_places_in_the_data_set_are_those_of_the_samples(monkeypatch, ranks, sampler):
    for rank in range(ranks):
        loader = make_loader(monkeypatch, range(8), rank, ranks, sampler=sampler)
        place, indices = place_in_dataset(loader), [int(i) for i in loader]
        own = indices[: int(min(count_own(loader), len(indices)))]
        if sampler != 'shuffled':  # whose places are those in its order
            assert [place(i) for i in range(len(own))] == own
        assert len({place(i) for i in range(len(own))}) == len(own)
    assert place_in_dataset(None)(3) == 3


class Files(list):
    """A data set of files."""

    def get_data_info(self, i):
        return dict(filename=self[i])


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_samples_are_named_by_their_files_unless_they_are_shuffled(monkeypatch, sampler):
    files = Files(f'{i}.mp4' for i in range(5))
    for rank in range(2):
        loader = make_loader(monkeypatch, files, rank, 2, sampler=sampler)
        place, name = place_in_dataset(loader), name_in_dataset(loader)
        names = [name(place(i)) for i in range(int(min(count_own(loader), len(loader))))]
        if sampler == 'shuffled':
            assert all(one.startswith('sample ') for one in names)
        else:
            assert names == [files[int(i)] for i in loader.sampler][: len(names)]
    assert name_in_dataset(None)(3) == 'sample 3'


@pytest.mark.parametrize(
    ('samples', 'number', 'expected'),
    [(63, 4, [0, 15, 31, 47]), (2, 4, [0, 1]), (5, 5, [0, 1, 2, 3, 4])],
)
def test_places_are_spread_over_all_samples(samples, number, expected):
    assert spread_places(samples, number) == expected


@pytest.mark.parametrize(('rows', 'expected'), [(3, [1, 2, 3]), (6, [3, 7, 11]), (4, [10 / 3] * 3)])
def test_rows_of_a_batch_belong_to_its_samples_in_turn_or_are_shared(rows, expected):
    counts = torch.tensor([[1.0], [10.0]]) * torch.arange(1, rows + 1)
    torch.testing.assert_close(of_each(counts, 3), torch.tensor([[1.0], [10.0]]) * torch.tensor(expected))


def evaluate(model, loader, predict) -> dict[str, float]:
    """What the hook of one rank adds to the metrics."""
    hook, runner, metrics = FLOPsHook(lines=False), make_runner(model), {}
    runner.test_dataloader = loader
    hook.before_test_epoch(runner)
    for i, images in enumerate(loader):
        with torch.no_grad():
            outputs = predict(model, images)
        hook.after_test_iter(runner, i, images, outputs)
    hook.after_test_epoch(runner, metrics)
    return metrics


def of_ranks(monkeypatch, model, images, predict, ranks: int, **loader) -> dict[str, float]:
    """What the hook reports when ranks share the images: those of the last one, after the sums of all."""
    gathered = []

    def all_gather_object(mine):
        gathered.append(mine)
        return gathered

    monkeypatch.setattr(costs, 'all_gather_object', all_gather_object)
    for rank in range(ranks):
        try:
            metrics = evaluate(model, make_loader(monkeypatch, images, rank, ranks, **loader), predict)
        except ValueError:  # so far no rank had an image
            assert rank < ranks - 1
    return metrics


def predict_images(model, images):
    return model.predict(images)


@pytest.fixture(params=['whole', 'windows', 'views', 'views one by one'])
def host(request):
    """A model, three samples that differ, and how it predicts them."""
    torch.manual_seed(1)
    if 'views' in request.param:
        at_once = dict(test_cfg=dict(max_testing_views=1)) if 'one' in request.param else {}
        return build_recognizer(AGGREGATED | at_once), torch.randn(3, 2, 3, T, 32, 32), predict_clips
    cfg = request.getfixturevalue('tiny_model_cfg') | dict(test_cfg=SLIDE if request.param == 'windows' else WHOLE)
    return build(cfg), torch.randn(3, 3, 64, 96), predict_images


@pytest.mark.parametrize(
    ('ranks', 'options'),
    [
        (2, dict(batch_size=1)),
        (2, dict(batch_size=2)),
        (2, dict(batch_size=2, sampler='shuffled')),
        (4, dict(batch_size=3)),
        (5, dict(batch_size=1)),
        (5, dict(batch_size=1, sampler='uneven')),
        (2, dict(batch_size=2, sampler='chunks')),
    ],
    ids=str,
)
def test_costs_and_rates_are_those_of_one_process(monkeypatch, host, ranks, options):
    model, images, predict = host
    monkeypatch.setattr(costs, 'part_macs', lambda host, features: dict(neck=7, head=11))  # is slow
    alone = evaluate(model, DataLoader(images, 3), predict)
    shared = of_ranks(monkeypatch, model, images, predict, ranks, **options)
    assert shared == pytest.approx(alone, rel=1e-12)


def run_rank(rank: int, ranks: int, path: str, model, images) -> None:
    dist.init_process_group('gloo', init_method=f'file://{path}', rank=rank, world_size=ranks)
    loader = DataLoader(images, 2, sampler=DefaultSampler(images, shuffle=False))
    metrics = evaluate(model, loader, predict_images)
    if rank == ranks - 1:  # whose only image is another's
        torch.save(metrics, f'{path}.pt')
    dist.destroy_process_group()


@pytest.mark.parametrize('ranks', [2, 5])
def test_processes_give_the_figures_of_one(tmp_path, tiny_cls_config, ranks):
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    import mmdyt.models.classifier  # noqa: F401

    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = build(Config.fromfile(tiny_cls_config).model)
    images = torch.randn(3, 3, 32, 32)
    alone = evaluate(model, DataLoader(images, 3), predict_images)
    run = (ranks, str(tmp_path / 'store'), model, images)
    mp.start_processes(run_rank, run, nprocs=ranks, start_method='fork')
    assert torch.load(tmp_path / 'store.pt') == pytest.approx(alone, rel=1e-12)


def gather(rank: int, numbers: tuple[int, ...], path: str) -> None:
    dist.init_process_group('gloo', init_method=f'file://{path}', rank=rank, world_size=len(numbers))
    mine = torch.arange(10.0).split(numbers)[rank]
    torch.save(of_all_ranks(mine), f'{path}{rank}.pt')
    dist.destroy_process_group()


@pytest.mark.parametrize('numbers', [(5, 5), (2, 8), (1, 3, 6), (0, 10)])
def test_a_quantile_of_all_ranks_is_that_of_all_their_logits(tmp_path, numbers):
    """Not the mean of the quantiles of each, which is another number, and infinite where one of them is."""
    mp.start_processes(gather, (numbers, str(tmp_path / 'store')), nprocs=len(numbers), start_method='fork')
    for rank in range(len(numbers)):
        found = torch.load(tmp_path / f'store{rank}.pt')
        assert found.tolist() == list(range(10)) and threshold_for(found, 0.3) == 6.5


def test_one_process_has_all_logits():
    assert of_all_ranks(torch.arange(3)).tolist() == [0, 1, 2]
