"""One linear score per token, in full precision. B images, N tokens, C width."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from . import kernels


def gate_logits(gate: nn.Linear, x: Tensor) -> Tensor:
    """Scores (B, N, 1) of tokens (B, N, C) in fp32 or wider, whatever autocast says."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if dtype == gate.weight.dtype == torch.float32 and x.stride(-1) == 1 and kernels.usable(x):
        return kernels.gate_logits(x, gate.weight, gate.bias)
    tensors = x.to(dtype), gate.weight.to(dtype), gate.bias.to(dtype)
    device = x.device.type  # 'meta' has no autocast
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return F.linear(*tensors)  # the context takes as long as the product
    with torch.autocast(device, enabled=False):
        return F.linear(*tensors)


@torch.no_grad()
def set_gate(gate: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """Set it to weights (C,) and a bias."""
    gate.weight.copy_(weight[None])
    gate.bias.copy_(bias[None])
