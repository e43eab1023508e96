"""The model that owns a dispatched backbone, in the words of its library, and what its neck and head cost."""

import copy

import torch
import torch.nn as nn
from torch import Tensor

from mmdyt.core.macs import count_macs

HEADS = ('decode_head', 'head', 'cls_head')  # mmseg, mmpretrain, mmaction2


def find_host(model: nn.Module) -> nn.Module:
    """The module that owns the dispatched backbone, inside any wrapper (distributed, test-time augmentation).

    Raises:
        TypeError: If there is none.
    """
    for module in model.modules():
        if hasattr(getattr(module, 'backbone', None), 'dense_macs'):
            return module
    raise TypeError(f'model must have a mmdyt.DyTVisionTransformer as its backbone, got {type(model).__name__}.')


def is_recognizer(host: nn.Module) -> bool:
    """Whether necks and heads follow mmaction2's contract: features are a tensor, a neck returns them and losses."""
    return getattr(host, 'cls_head', None) is not None


def part_macs(host: nn.Module, features: tuple[Tensor, ...]) -> dict[str, int]:
    """MACs of neck and head on one image; auxiliary heads do not run at inference and do not count.

    Args:
        host: The model that owns them.
        features: What its backbone returns for one image, or for one view of a clip; only the shapes are used.

    Returns:
        ``neck`` and ``head``.
    """
    neck = getattr(host, 'neck', None)
    head = next((getattr(host, name) for name in HEADS if getattr(host, name, None) is not None), None)
    features = tuple(torch.empty((1, *f.shape[1:]), device='meta') for f in features)
    if is_recognizer(host):
        (features,) = features
    macs = dict(neck=0, head=0)
    if neck is not None:
        neck = _on_meta(neck)
        macs['neck'] = count_macs(lambda: neck(features))
        with torch.no_grad():
            features = neck(features)
        if is_recognizer(host):
            features, _ = features
    if head is not None:
        head = _on_meta(head)
        macs['head'] = count_macs(lambda: head(features))
    return macs


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy of ``module`` in fp32 and eval mode that has shapes but no values, made without copying these."""
    memo = {}
    for tensor in (*module.parameters(), *module.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_like(tensor, device='meta', dtype=dtype)
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo).eval()


def branch_labels(names: list[str]) -> dict[str, str]:
    """``layers.3.dynamic.mlp`` -> ``layer_3``; where a layer has two dispatchers, ``layer_3_mlp``."""
    parts = [name.split('.') for name in names]
    several = len(names) > len({i for _, i, _, _ in parts})
    return {'.'.join(p): f'layer_{p[1]}_{p[3]}' if several else f'layer_{p[1]}' for p in parts}
