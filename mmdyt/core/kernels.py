"""What a GPU does in one kernel instead of several, in Triton, for inference; the plain path is the reference.

A GPU that skips tokens waits for memory more than for arithmetic: each pass over all tokens that is saved is time. Not
used under ``torch.compile``, which fuses on its own, nor where gradients or an export are wanted, nor without Triton.
B images, N tokens incl. P prefix tokens, M = N - P, C width, d bottleneck, K active tokens.
"""

import functools
import os
import warnings

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch comes without
    triton = None

SWITCH = 'MMDYT_KERNELS'  # 'library' in the environment takes the plain path, to compare
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)  # the kernels sum in fp32: too little for fp64
ROWS, COLUMNS = 8, 256  # of a tile that is reduced, or compared
TILE = 64  # tokens that share one reading of the adapter's weights


def usable(x: Tensor) -> bool:
    """Whether these tokens are on a GPU that runs the kernels, and nobody wants what they do not give."""
    if not x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if x.dtype not in DTYPES or x.device.index != torch.cuda.current_device():  # Triton launches on the current GPU
        return False
    return _works(x.device)


@functools.cache
def _works(device: torch.device) -> bool:
    """Whether a kernel can be built and gives what it must: that needs a C compiler, and a GPU that is not too old."""
    if triton is None or os.environ.get(SWITCH) == 'library':
        return False
    try:
        out = torch.zeros(3, 4, device=device)
        add_rows(out, torch.tensor([2, 0], device=device), torch.ones(2, 4, device=device))
        if out.sum(dim=1).tolist() == [4.0, 0.0, 4.0]:
            return True
        reason = 'a wrong result'
    except Exception as error:  # whatever its compiler, its driver or the GPU says
        reason = f'{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ""}'
    warnings.warn(f'Triton does not run on {device} ({reason}): slower operators are used.', stacklevel=3)
    return False


def gate_logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The gate of a dispatcher, in fp32 from one reading of the tokens in their own dtype.

    Args:
        x: (B, M, C), the last dimension dense.
        weight: (1, C) in fp32.
        bias: (1,) in fp32.

    Returns:
        (B, M, 1) in fp32.
    """
    images, tokens, width = x.shape
    out = torch.empty(images, tokens, 1, dtype=torch.float32, device=x.device)
    if out.numel():
        grid = (triton.cdiv(images * tokens, ROWS),)
        _gate_logits[grid](
            x, weight, bias, out, images * tokens, tokens, width, x.stride(0), x.stride(1), rows=ROWS, columns=COLUMNS
        )
    return out


def order_tokens(logits: Tensor, active: int, prefix: int) -> tuple[Tensor, Tensor]:
    """The tokens of each image, the prefix first, then by falling logits; broken ones before all others.

    Args:
        logits: (B, M, 1) in fp32.
        active: K, prefix included.
        prefix: P.

    Returns:
        Order (B, N), and the first K of each image as places within the batch, (B * K,).
    """
    images, patches = logits.shape[:2]
    tokens = prefix + patches
    order = torch.empty(images, tokens, dtype=torch.long, device=logits.device)
    rows = torch.empty(images * active, dtype=torch.long, device=logits.device)
    if order.numel():
        tiles = max(1, triton.cdiv(patches, ROWS))
        _order_tokens[(images, tiles)](
            logits.contiguous(), order, rows, patches, active, prefix,
            leading=triton.next_power_of_2(max(1, prefix)), rows=ROWS, columns=COLUMNS,
        )  # fmt: skip
    return order, rows


def add_rows(out: Tensor, rows: Tensor, update: Tensor) -> Tensor:
    """Add (K, C) to rows (K,) of ``out`` (R, C), in place. No row may come twice; rows of ``out`` are dense."""
    if rows.numel():
        width = out.shape[1]
        _add_rows[(rows.shape[0],)](
            out, rows, update.contiguous(), width, out.stride(0), columns=triton.next_power_of_2(width)
        )
    return out


def adapted(out: Tensor, x: Tensor, down: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """``out`` plus an adapter's update of ``x``, ``out + scale * up(relu(down(x)))``, eq. (1) of Dynamic Tuning.

    Args:
        out: (B, N, C) in half precision, contiguous; not written into.
        x: As ``out``; may be the same.
        down: Weight (d, C) and bias (d,).
        up: Weight (C, d) and bias (C,).
        scale: Factor on the update.
    """
    width, bottleneck = x.shape[-1], down[0].shape[0]
    result = torch.empty_like(out)
    tokens = x.numel() // width
    _adapted[(triton.cdiv(tokens, TILE),)](
        out, x, *down, *up, result, tokens, scale, width, bottleneck,
        rows=TILE, columns=64, inner=max(16, triton.next_power_of_2(bottleneck)), num_warps=4,
    )  # fmt: skip
    return result


if triton is not None:

    @triton.jit
    def _gate_logits(
        x, weight, bias, out, total, tokens, width, image_stride, token_stride,
        rows: tl.constexpr, columns: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * rows + tl.arange(0, rows)
        inside = row < total
        start = (row // tokens).to(tl.int64) * image_stride + (row % tokens).to(tl.int64) * token_stride
        found = tl.zeros((rows,), tl.float32)
        for first in range(0, width, columns):
            column = first + tl.arange(0, columns)
            wanted = column < width
            tile = tl.load(x + start[:, None] + column[None], mask=inside[:, None] & wanted[None], other=0.0)
            factor = tl.load(weight + column, mask=wanted, other=0.0)
            found += tl.sum(tile.to(tl.float32) * factor[None], axis=1)
        tl.store(out + row, found + tl.load(bias), mask=inside)

    @triton.jit
    def _order_tokens(
        logits, order, chosen, patches, active, prefix,
        leading: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
    ):  # fmt: skip
        image, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
        tokens = patches + prefix
        mine = tile * rows + tl.arange(0, rows)
        inside = mine < patches
        score = tl.load(logits + image * patches + mine, mask=inside, other=0.0)
        score = tl.where(tl.abs(score) < float('inf'), score, float('inf'))  # NaN is less than nothing
        rank = tl.zeros((rows,), tl.int32)
        for first in range(0, patches, columns):
            other = first + tl.arange(0, columns)
            real = other < patches
            rival = tl.load(logits + image * patches + other, mask=real, other=0.0)
            rival = tl.where(tl.abs(rival) < float('inf'), rival, float('inf'))
            tie = (rival[None] == score[:, None]) & (other[None] < mine[:, None])
            before = ((rival[None] > score[:, None]) | tie) & real[None]
            rank += tl.sum(before.to(tl.int32), axis=1)
        place, token = rank + prefix, mine.to(tl.int64) + prefix
        tl.store(order + image * tokens + place, token, mask=inside)
        tl.store(chosen + image * active + place, image * tokens + token, mask=inside & (place < active))
        if tile == 0:
            lead = tl.arange(0, leading)
            tl.store(order + image * tokens + lead, lead.to(tl.int64), mask=lead < prefix)
            tl.store(chosen + image * active + lead, image * tokens + lead, mask=lead < prefix)

    @triton.jit
    def _add_rows(out, rows, update, width, out_stride, columns: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, columns)
        wanted = column < width
        place = out + tl.load(rows + row) * out_stride + column
        old = tl.load(place, mask=wanted, other=0.0).to(tl.float32)
        more = tl.load(update + row * width + column, mask=wanted, other=0.0).to(tl.float32)
        tl.store(place, (old + more).to(out.dtype.element_ty), mask=wanted)

    @triton.jit
    def _adapted(
        out, x, down, down_bias, up, up_bias, result, tokens, scale, width, bottleneck,
        rows: tl.constexpr, columns: tl.constexpr, inner: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * rows + tl.arange(0, rows)
        unit = tl.arange(0, inner)
        inside, real = row < tokens, unit < bottleneck
        start = row.to(tl.int64) * width
        hidden = tl.zeros((rows, inner), tl.float32)
        for first in range(0, width, columns):
            column = first + tl.arange(0, columns)
            wanted = column < width
            tile = tl.load(x + start[:, None] + column[None], mask=inside[:, None] & wanted[None], other=0.0)
            # (columns, inner)
            factor = tl.load(down + unit[None] * width + column[:, None], mask=real[None] & wanted[:, None], other=0.0)
            hidden = tl.dot(tile, factor, hidden)
        hidden += tl.load(down_bias + unit, mask=real, other=0.0).to(tl.float32)[None]
        # ReLU that keeps NaN; a unit beyond the bottleneck is 0 also where a token is infinite
        hidden = tl.where((hidden > 0) | ((hidden != hidden) & real[None]), hidden, 0.0).to(x.dtype.element_ty)
        for first in range(0, width, columns):
            column = first + tl.arange(0, columns)
            wanted = column < width
            factor = tl.load(
                up + column[None] * bottleneck + unit[:, None], mask=real[:, None] & wanted[None], other=0.0
            )
            update = tl.dot(hidden, factor)
            update += tl.load(up_bias + column, mask=wanted, other=0.0).to(tl.float32)[None]
            both = inside[:, None] & wanted[None]
            old = tl.load(out + start[:, None] + column[None], mask=both, other=0.0).to(tl.float32)
            new = (old + scale * update).to(x.dtype.element_ty)
            tl.store(result + start[:, None] + column[None], new, mask=both)
