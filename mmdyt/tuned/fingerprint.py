"""By which a frozen base is known again, whatever file it lies in."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# what values are rounded to before they are hashed; the sharpest first
FORMS = dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)
DIGITS = 16  # of a hash, in hexadecimal: 64 bits


class Match(NamedTuple):
    """How a base compares with a fingerprint.

    Attributes:
        form: The sharpest rounding in which all of it is equal, ``'fp32'``, ``'fp16'`` or ``'bf16'``; None if none is.
        different: Names of tensors that are equal in none.
        missing: Names of tensors that are not there.
    """

    form: str | None
    different: list[str]
    missing: list[str]


def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Hashes of each tensor by its name, one for each of :data:`FORMS`.

    The order of tensors, the kind of file and wider types of numbers do not matter. A base that was saved again in
    fp16 or bf16 is still known: what is rounded once stays as it is when it is rounded again, so the hash of the
    rounded values is the same. Rounding to 8 bits and fewer, as quantisation does, leaves other values in any of these
    forms, as a few steps of training would; so it is another base.
    """
    return {name: [_digest(tensors[name], form) for form in FORMS] for name in sorted(tensors)}


def name_of_base(hashes: Mapping[str, list[str]]) -> str:
    """A short name of a fingerprint, for people."""
    lines = '\n'.join(f'{name} {hashes[name][0]}' for name in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()[:12]


def compare(hashes: Mapping[str, list[str]], tensors: Mapping[str, Tensor]) -> Match:
    """Compare tensors with a fingerprint, which other tensors beside them do not touch."""
    missing = [name for name in hashes if name not in tensors]
    found = {name: _sharpest(tensors[name], known) for name, known in hashes.items() if name in tensors}
    different = [name for name, form in found.items() if form is None]
    weakest = None if different or missing else _weakest(found.values())
    return Match(weakest, different, missing)


def _weakest(forms: Iterable[str]) -> str:
    return max(forms, key=list(FORMS).index, default=next(iter(FORMS)))


def _sharpest(tensor: Tensor, known: list[str]) -> str | None:
    """The sharpest form in which a tensor has the hash that is known of it."""
    return next((form for form, one in zip(FORMS, known, strict=True) if _digest(tensor, form) == one), None)


def _digest(tensor: Tensor, form: str) -> str:
    """Hash of the shape and the rounded values; -0 is 0."""
    values = tensor.detach().cpu()
    if values.is_floating_point():
        values = values.to(torch.float32).to(FORMS[form]) + 0.0  # rounding may make -0 of a small number
    found = hashlib.sha256(str(tuple(values.shape)).encode())
    found.update(values.contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:DIGITS]
