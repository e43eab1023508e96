"""A base is known again however it was saved, and another one is not taken for it."""

import pytest
import torch

from mmdyt.tuned.fingerprint import compare, fingerprint, name_of_base


def base() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scales = (0.02, 1e-6, 1.0)  # small ones are subnormal in fp16, or zero
    return {f'w{i}': scale * torch.randn(64, 48, generator=generator) for i, scale in enumerate(scales)}


@pytest.mark.parametrize(
    ('save', 'form'),
    [
        (lambda t: t.clone(), 'fp32'),
        (lambda t: t.double(), 'fp32'),
        (lambda t: t.t().contiguous().t(), 'fp32'),
        (lambda t: t.half(), 'fp16'),
        (lambda t: t.bfloat16(), 'bf16'),
        (lambda t: t.half().float(), 'fp16'),
    ],
)
def test_an_equal_base_passes_in_any_order_and_type(save, form):
    hashes = fingerprint(base())
    again = {name: save(tensor) for name, tensor in reversed(base().items())}
    assert compare(hashes, again | dict(more=torch.zeros(1))) == (form, [], [])


def test_types_may_be_mixed():
    tensors = base()
    assert compare(fingerprint(base()), tensors | dict(w1=tensors['w1'].half())).form == 'fp16'


def eight_bits(tensor: torch.Tensor) -> torch.Tensor:
    step = tensor.abs().max() / 127
    return (tensor / step).round() * step


@pytest.mark.parametrize(
    'change',
    [
        lambda t: t + 1e-4 * torch.ones_like(t),  # one step of training
        lambda t: t * (1 + 2**-7),
        lambda t: t.flip(0),
        lambda t: t.reshape(48, 64),
        eight_bits,
    ],
)
def test_another_base_is_refused_by_the_names_of_its_tensors(change):
    tensors = base()
    found = compare(fingerprint(base()), tensors | dict(w0=change(tensors['w0'])))
    assert found == (None, ['w0'], [])


def test_a_missing_tensor_is_named():
    tensors = base()
    del tensors['w2']
    assert compare(fingerprint(base()), tensors) == (None, [], ['w2'])


def test_the_name_depends_on_values_and_names_alone():
    tensors = base()
    name = name_of_base(fingerprint(tensors))
    assert name == name_of_base(fingerprint(dict(reversed(tensors.items()))))
    assert name != name_of_base(fingerprint(tensors | dict(w0=tensors['w0'] + 1)))
    assert name != name_of_base(fingerprint({f'x{key}': value for key, value in tensors.items()}))


def test_zero_has_no_sign():
    assert fingerprint(dict(w=torch.tensor([-0.0]))) == fingerprint(dict(w=torch.tensor([0.0])))


def test_scalars_and_integers_have_hashes():
    tensors = dict(count=torch.tensor(3), share=torch.tensor(0.5))
    assert compare(fingerprint(tensors), tensors).form == 'fp32'
    assert compare(fingerprint(tensors), tensors | dict(count=torch.tensor(4))).different == ['count']
