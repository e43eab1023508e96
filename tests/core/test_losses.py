import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from mmdyt.core.dispatch import Dispatch, straight_through
from mmdyt.core.losses import activation_rate, distillation_loss, rate_loss


def test_rate_counts_patch_tokens_only_over_all_layers_and_images():
    first = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).float()[..., None]
    second = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).float()[..., None]
    rate = activation_rate([Dispatch(first, None, 1), Dispatch(second, None, 1)])
    assert rate.item() == pytest.approx((1 + 0 + 4 + 4) / 16)


def test_rate_loss_is_one_squared_budget_and_pulls_the_scores():
    score = torch.full((1, 4, 1), 0.9, requires_grad=True)
    loss = rate_loss(activation_rate([Dispatch(straight_through(score), None, 0)]), 0.5)
    assert loss.item() == pytest.approx(0.25)
    loss.backward()
    torch.testing.assert_close(score.grad, torch.full_like(score, 2 * 0.5 / 4))


def test_rate_of_nothing_is_refused():
    with pytest.raises(ValueError, match='dispatches must hold at least one mask'):
        activation_rate([])


@pytest.mark.parametrize('shape', [(4, 7), (4, 7, 3, 5)])
def test_distillation_is_the_mean_kl_divergence_from_the_complete_model(shape):
    student, teacher = (torch.randn(shape, requires_grad=True) for _ in range(2))
    loss = distillation_loss(student, teacher)
    p, q = teacher.detach().softmax(1), student.detach().softmax(1)
    torch.testing.assert_close(loss.detach(), (p * (p / q).log()).sum(1).mean())
    if len(shape) == 2:  # the paper's "batchmean"
        expected = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction='batchmean')
        torch.testing.assert_close(loss, expected)
    loss.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    assert distillation_loss(teacher, teacher).item() == pytest.approx(0, abs=1e-7)


def rank_gradients(rank, counts, masks_seed, path):
    dist.init_process_group('gloo', init_method=f'file://{path}', rank=rank, world_size=len(counts))
    score = torch.rand(sum(counts), generator=torch.Generator().manual_seed(masks_seed)).requires_grad_(True)
    mine = score.split(counts)[rank].reshape(1, -1, 1)
    rate = activation_rate([Dispatch(straight_through(mine), None, 0)])
    rate_loss(rate, 0.1).backward()
    dist.all_reduce(score.grad)
    score.grad /= len(counts)  # what distributed training does
    if rank == 0:
        torch.save((rate.detach(), score.grad), f'{path}.pt')
    dist.destroy_process_group()


@pytest.mark.parametrize('counts', [(6, 6), (3, 9)])
def test_rate_loss_of_two_ranks_is_that_of_the_whole_batch(tmp_path, counts):
    """A loss per rank would pull every rank to the target, and have another gradient."""
    mp.spawn(rank_gradients, (counts, 0, str(tmp_path / 'store')), nprocs=2)
    rate, grad = torch.load(tmp_path / 'store.pt')
    score = torch.rand(12, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    expected = activation_rate([Dispatch(straight_through(score.reshape(1, -1, 1)), None, 0)])
    rate_loss(expected, 0.1).backward()
    torch.testing.assert_close(rate, expected.detach())
    torch.testing.assert_close(grad, score.grad)
