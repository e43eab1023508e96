"""Training on several processes that share the frozen base among them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn as nn
from mmengine.dist import get_world_size
from mmengine.model import MMDistributedDataParallel
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mmdyt.core.block import Block
from mmdyt.registry import MODEL_WRAPPERS


@MODEL_WRAPPERS.register_module()
class FrozenShardedDataParallel(MMDistributedDataParallel):
    """``MMDistributedDataParallel`` whose processes hold the frozen weights of all blocks once between them.

    What is tuned is small and lies in every process, so optimizers, hooks, clipping and checkpoints are those of plain
    data parallel training. Frozen weights have neither gradients nor optimizer states: a block gathers its own when it
    runs, forward and back, and drops them. Source: stage 3 of ZeRO (Rajbhandari et al., arXiv 1910.02054), of frozen
    parameters, by torch's ``fully_shard`` (FSDP2).

    Weights are shared out before the first step of training, when all are initialised or loaded. In eval mode every
    process has them whole again, as processes need not run equally many windows there. Checkpoints are whole; for
    them each process keeps the frozen weights in the memory of its host.

    Args:
        module: The model.
        **options: As of ``MMDistributedDataParallel``.

    Raises:
        ValueError: If no block has frozen weights.
    """

    def __init__(self, module: nn.Module, **options):
        names = {f'{block}.{name}' for block, found in _blocks(module) for name in frozen_weights(found)}
        if not names:
            raise ValueError(
                'model must have blocks with frozen weights in a FrozenShardedDataParallel, got none. Where all is '
                'trained, take MMDistributedDataParallel or a strategy.'
            )
        self._set_params_and_buffers_to_ignore_for_model(module, names)
        super().__init__(module, **options)
        self.sharded: list[ShardedBlock] = []

    def train_step(self, data: dict, optim_wrapper) -> dict[str, Tensor]:
        """As of the parent; the first one shares the weights out."""
        if not self.sharded:
            self._shard()
        return super().train_step(data, optim_wrapper)

    def train(self, mode: bool = True) -> 'FrozenShardedDataParallel':
        """Set the mode; all processes must."""
        super().train(mode)
        self._hold(whole=not mode)
        return self

    def _hold(self, whole: bool) -> None:
        """Whether this process holds all frozen weights from now on."""
        for block in getattr(self, 'sharded', ()):  # which torch's constructor does not know
            block.gather() if whole else block.share()

    def _shard(self) -> None:
        device = next(self.module.parameters()).device.type
        mesh = init_device_mesh(device, (get_world_size(),))
        self.sharded = [ShardedBlock(block, mesh) for _, block in _blocks(self.module)]
        # one root for all, which holds no weights, lets blocks be gathered ahead
        backbones = [m for m in self.module.modules() if any(isinstance(child, Block) for child in _layers(m))]
        for backbone in backbones:
            fully_shard(backbone, mesh=mesh, ignored_params=_not_sharded(backbone))


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within the context processes may run the model on their own: each holds all of it. All processes must enter."""
    shared = isinstance(model, FrozenShardedDataParallel) and model.training
    if shared:
        model._hold(whole=True)
    yield
    if shared:  # not after an error, which the others may not know of
        model._hold(whole=False)


class ShardedBlock:
    """A block whose frozen weights are shared out among processes.

    Args:
        block: On its device.
        mesh: The processes.
    """

    def __init__(self, block: Block, mesh: DeviceMesh):
        frozen = frozen_weights(block)
        self._whole = {name: tensor.detach().to('cpu', copy=True) for name, tensor in frozen.items()}
        own = {id(tensor) for tensor in frozen.values()}
        fully_shard(block, mesh=mesh, ignored_params={p for p in block.parameters() if id(p) not in own})
        self._block, self._mesh = block, mesh
        block.register_state_dict_post_hook(lambda *args: self._save(*args))  # which takes no methods
        block.register_load_state_dict_pre_hook(self._load)

    def gather(self) -> None:
        """Hold all weights from now on."""
        self._block.set_reshard_after_forward(False)
        self._block.unshard()

    def share(self) -> None:
        """Hold a share of the weights but while the block runs."""
        self._block.set_reshard_after_forward(True)
        self._block.reshard()

    def _save(self, block: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
        """A state dict has whole tensors."""
        for name, tensor in self._whole.items():
            state[prefix + name] = tensor

    def _load(self, block: nn.Module, state: dict, prefix: str, *_) -> None:
        """Whole tensors of a state dict are shared out."""
        for name, tensor in self._whole.items():
            given = state.get(prefix + name)
            if isinstance(given, Tensor) and not isinstance(given, DTensor) and given.shape == tensor.shape:
                tensor.copy_(given)
                whole = given.to(self._mesh.device_type, tensor.dtype)
                state[prefix + name] = distribute_tensor(whole, self._mesh, [Shard(0)], src_data_rank=None)


def frozen_weights(block: Block) -> dict[str, nn.Parameter]:
    """Parameters of the base in a block that are not trained, by name; not those of parts, which hooks set."""
    return {
        name: parameter
        for name, parameter in block.named_parameters()
        if not (parameter.requires_grad or name.startswith('dynamic.'))
    }


def _blocks(model: nn.Module) -> Iterator[tuple[str, Block]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Block))


def _layers(module: nn.Module) -> list[nn.Module]:
    """Modules in the containers of a module."""
    return [layer for child in module.children() if isinstance(child, nn.ModuleList) for layer in child]


def _not_sharded(backbone: nn.Module) -> set[nn.Parameter]:
    return {parameter for parameter in backbone.parameters() if not isinstance(parameter, DTensor)}
