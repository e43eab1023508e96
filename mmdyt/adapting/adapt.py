"""A Vision Transformer that is in memory gets parts. On torch alone: timm and transformers are not imported."""

import math
import re
from collections.abc import Sequence

import torch.nn as nn

from mmdyt.core.attaching import add_parts, check_parts, share_decisions
from mmdyt.core.block import DISPATCH, Place
from mmdyt.core.branch import INFERENCE, TRAINING
from mmdyt.core.executors import KEYS
from mmdyt.core.observe import dynamic_branches
from mmdyt.core.options import check_choice, check_switches
from mmdyt.core.part import parts
from mmdyt.core.restoring import RESTORE
from mmdyt.core.tuning import PARTS, Tuned, set_tuned
from mmdyt.hosts import hf, timm
from mmdyt.hosts.library import Host
from mmdyt.hosts.named import NamedLayer, Network, as_block

from .adapted import Adapted
from .methods import Given, Method, method_of


def adapt(
    vit: nn.Module,
    method: Given = 'dyt',
    rate: float | None = None,
    *,
    dispatch: str | None = None,
    keys: str | None = None,
    inference: str = 'auto',
    training: str = 'split',
    restore: str = 'stale',
    tuned: Tuned | None = None,
    with_cp: bool = False,
    **options,
) -> Adapted:
    """Add a method to a Vision Transformer of timm or Hugging Face, or one whose modules are named like theirs.

    ``vit`` is changed in place: its layers become blocks with rooms for parts, and it is frozen but for the parts and
    its classifier. It gives what it gave, and its own checkpoints load (``strict=False``). A network that is refused is
    as it was.

    Args:
        vit: The network, with or without a head.
        method: A word of :data:`mmdyt.adapting.methods.METHODS`, or a list of configs of parts.
        rate: Share of the patch tokens that run each dispatched branch in inference, in (0, 1], exact for every image
            to the nearest token; None leaves it to the dispatchers.
        dispatch: ``'mlp'``, ``'attn'``, ``'attn_mlp'`` or ``'layer'``; None is what the method says.
        keys: Which tokens active ones attend to, ``'active'`` or ``'all'``; None is what the method says.
        inference: Executor of inference; see :class:`mmdyt.core.branch.DynamicBranch`.
        training: Executor of training; see there.
        restore: What patches get behind the last layer whose token was merged or dropped.
        tuned: Which parameters are trained, as of :func:`mmdyt.core.tuning.set_tuned`, names being those of ``vit``;
            None is what the parts declare, and the classifier.
        with_cp: Gradient checkpointing: layers run again in the backward pass, for less memory and more time.
        **options: For the parts of the method that know an option of that name: ``rank=16``.

    Raises:
        ValueError: If the network, the method or an option is none that is known, or they do not go together.
    """
    chosen = method_of(method, options, dispatch, keys)
    check_choice(DISPATCH, dispatch=chosen.dispatch)
    check_choice(KEYS, keys=chosen.keys)
    check_choice(INFERENCE, inference=inference)
    check_choice(TRAINING, training=training)
    check_choice(RESTORE, restore=restore)
    check_switches(with_cp=with_cp)
    host = host_of(vit)
    blocks = _blocks(host, chosen, inference, training, restore)
    _attach(blocks, chosen, restore)
    for block in blocks:
        block.with_cp = with_cp
    before = list(host.layers)
    flags = {parameter: parameter.requires_grad for parameter in vit.parameters()}
    try:
        for i, block in enumerate(blocks):
            host.layers[i] = block
        head = [host.head] if any(re.search(host.head, name) for name, _ in vit.named_parameters()) else []
        set_tuned(vit, [PARTS, *head] if tuned is None else tuned)
        adapted = Adapted(vit, chosen)
        for branch in dynamic_branches(vit).values():
            if getattr(branch.dispatcher, 'fitted', False):  # a random gate would choose at random
                branch.dispatcher.set_rule(-math.inf)
        if rate is not None:
            adapted.set_rate(rate)
    except BaseException:
        for i, layer in enumerate(before):
            host.layers[i] = layer
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        raise
    return adapted


def host_of(vit: nn.Module) -> Host:
    """What is to be known of a network.

    Raises:
        ValueError: If it is of no library that is known, or adapted already.
    """
    if not isinstance(vit, nn.Module):
        raise ValueError(f'vit must be a network, got a {type(vit).__name__}.')
    if any(isinstance(module, NamedLayer) for module in vit.modules()):
        raise ValueError('vit must not be adapted already, got one that is. Name several parts in one list.')
    for library in (timm, hf):
        host = library.host_of(vit)
        if host is not None and len(host.layers):
            return host
    raise ValueError(
        f"vit must be a Vision Transformer of timm ('blocks', 'patch_embed.proj') or of Hugging Face ('embeddings', "
        f"'layers' or 'encoder'), got a {type(vit).__name__} with {[name for name, _ in vit.named_children()]}."
    )


def _blocks(host: Host, method: Method, inference: str, training: str, restore: str) -> list[NamedLayer]:
    """The layers as blocks; the network still has its own."""
    values = host.patch.weight[0].numel()
    network, depth = Network(), len(host.layers)
    options = dict(dispatch=method.dispatch, keys=method.keys, inference=inference, training=training)
    return [
        as_block(
            layer,
            host.names,
            Place(host.patch.out_channels, i, depth, host.prefix, values),
            network=network,
            restoring=restore,
            **options,
        )
        for i, layer in enumerate(host.layers)
    ]


def _attach(blocks: Sequence[NamedLayer], method: Method, restore: str) -> None:
    """Parts, on the device and in the precision of their blocks."""
    if method.keys == 'all' and method.dispatch == 'mlp':
        raise ValueError("keys must be 'active' with dispatch='mlp', whose tokens attend to nothing, got 'all'.")
    kinds, options = method.built()
    for kind in kinds:
        if getattr(kind, 'needs_grid', False):
            raise ValueError(
                f'method must not hold a {kind.__name__}, which decides by the grid: layers know tokens alone.'
            )
    add_parts(blocks, kinds, options)
    share_decisions(blocks)
    check_parts(blocks, 'raw', restore)
    for block in blocks:
        like = block.find('attn.proj').weight
        for part in parts(block):
            part.to(device=like.device, dtype=like.dtype)
        block.dynamic.train(block.training)
