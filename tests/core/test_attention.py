import pytest
import torch
import torch.nn.functional as F

from mmdyt.core.attention import DENSE, Layout, _image_by_image, _padded, attend, dot_product_attention


def qkv(batch=3, tokens=7):
    torch.manual_seed(0)
    return torch.randn(3, batch, 2, tokens, 4, dtype=torch.float64).unbind()


def slow(query, key, value, mask):
    """Attention of the active tokens of each image among themselves, written out."""
    out = torch.zeros_like(query)
    for b in range(len(query)):
        k = mask[b].bool()
        weights = (query[b][:, k] @ key[b][:, k].transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
        out[b][:, k] = weights @ value[b][:, k]
    return out


MASK = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])


def test_dense_layout_hides_inactive_keys():
    q, k, v = qkv()
    got = attend(q, k, v, Layout(keys=MASK.bool())) * MASK[:, None, :, None]
    torch.testing.assert_close(got, slow(q, k, v, MASK))


def test_without_a_layout_everyone_attends_to_everyone():
    q, k, v = qkv()
    torch.testing.assert_close(attend(q, k, v, DENSE), slow(q, k, v, torch.ones_like(MASK)))


@pytest.mark.parametrize('packed', [_image_by_image, _padded])
def test_packed_layout_attends_within_each_image(packed):
    q, k, v = qkv()
    row = [t.transpose(1, 2)[MASK.bool()].transpose(0, 1)[None] for t in (q, k, v)]
    got = packed(*row, tuple(MASK.sum(1).tolist()))
    expected = slow(q, k, v, MASK).transpose(1, 2)[MASK.bool()].transpose(0, 1)[None]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize('packed', [_image_by_image, _padded])
def test_an_image_without_active_tokens_is_no_nan(packed):
    q, k, v = (t[:1, :, :4] for t in qkv())
    assert torch.isfinite(packed(q, k, v, (3, 0, 1))).all()
    keys = torch.tensor([[False] * 4])
    assert torch.isfinite(attend(q, k, v, Layout(keys=keys))).all()


@pytest.mark.parametrize('shape', [(7, 7), (1, 1, 7), (3, 1, 1, 7), (3, 2, 7, 7)])
@pytest.mark.parametrize('kind', ['bool', 'float', 'infinite'])
def test_masks_of_either_kind_give_what_the_fused_kernel_gives(shape, kind):
    """With gradients the CPU writes the softmax out."""
    torch.manual_seed(0)
    keep = torch.rand(shape) > 0.3
    keep[..., 0] = True
    mask = dict(bool=keep, float=torch.randn(shape).double(), infinite=torch.zeros(shape).double())[kind]
    if kind == 'infinite':
        mask = mask.masked_fill(~keep, float('-inf'))
    results = []
    for attention in (dot_product_attention, F.scaled_dot_product_attention):
        inputs = [t.clone().requires_grad_() for t in qkv()]
        bias = mask.clone().requires_grad_(kind == 'float')
        out = attention(*inputs, attn_mask=bias)
        wanted = [*inputs, bias] if kind == 'float' else inputs
        results.append((out, *torch.autograd.grad(out.square().sum(), wanted)))
    torch.testing.assert_close(*results)
