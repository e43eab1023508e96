"""A frozen base that processes share: the same gradients, whole checkpoints, and each process holds its part."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.optim import OptimWrapper
from mmengine.registry import MODEL_WRAPPERS, MODELS
from mmengine.runner import get_state_dict, load_state_dict
from mmpretrain.structures import DataSample
from torch.distributed.tensor import DTensor

import mmdyt.models.classifier  # noqa: F401  registers
from mmdyt.engine.sharding import FrozenShardedDataParallel, frozen_weights, gathered

ARCH = dict(embed_dims=32, num_layers=4, num_heads=2, feedforward_channels=64)
ALL = 'mmdyt.FrozenShardedDataParallel'
VARIANTS = [
    dict(),
    dict(with_cp=True),
    dict(dispatch='layer', keys='all', adapter=dict(bottleneck=4)),
    dict(adapter=None, parts=[dict(type='mmdyt.LoRA', on='attn.qkv', rows='qv'), dict(type='mmdyt.SSF', on='all')]),
    dict(
        dispatcher=None, out_type='avg_featmap',
        parts=[dict(type='mmdyt.SparseTokens', layers=[1]), dict(type='mmdyt.DenseAdapter', bottleneck=4)],
    ),
    dict(adapter=None, parts=[dict(type='mmdyt.Prompts', length=2)]),
]  # fmt: skip


def build(**backbone):
    torch.manual_seed(0)
    backbone = dict(type='mmdyt.DyTVisionTransformer', arch=ARCH, img_size=32, patch_size=8, **backbone)
    head = dict(type='mmpretrain.VisionTransformerClsHead', num_classes=5, in_channels=32)
    model = MODELS.build(dict(type='mmdyt.DyTImageClassifier', backbone=backbone, head=head))
    for name, parameter in model.named_parameters():
        if '.dynamic.' in name or 'head' in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch(rank):
    generator = torch.Generator().manual_seed(rank)
    samples = [DataSample().set_gt_label(i % 5) for i in range(4)]
    return dict(inputs=torch.randn(4, 3, 32, 32, generator=generator), data_samples=samples)


def step(model, rank):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for seed in range(2):
        torch.manual_seed(seed)
        model.train_step(batch(rank), OptimWrapper(optimizer))


def run_rank(rank, ranks, folder):
    os.environ['LOCAL_RANK'] = str(rank)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=ranks)
    for variant in VARIANTS:
        plain = MODEL_WRAPPERS.build(dict(type='MMDistributedDataParallel', module=build(**variant))).train()
        shared = MODEL_WRAPPERS.build(dict(type=ALL, module=build(**variant))).train()
        step(plain, rank)
        step(shared, rank)
        want, found = get_state_dict(plain), get_state_dict(shared)
        assert want.keys() == found.keys() == shared.module.state_dict().keys()
        for name in want:
            torch.testing.assert_close(found[name], want[name], msg=f'{variant}: {name}')
        check_shares(shared, ranks)
        check_alone(shared, plain, rank)
        check_loading(shared, want)
        step(shared, rank)
    dist.destroy_process_group()


def check_shares(shared, ranks):
    """Each process holds its part of the frozen weights, and all of what is tuned."""
    weights = [p for block in shared.module.backbone.layers for p in frozen_weights(block).values()]
    assert weights and all(isinstance(p, DTensor) for p in weights)
    held = sum(p.to_local().numel() for p in weights)
    assert held == pytest.approx(sum(p.numel() for p in weights) / ranks, rel=0.05)
    assert not any(isinstance(p, DTensor) for p in shared.parameters() if p.requires_grad)


def check_alone(shared, plain, rank):
    """One process may run the model on its own, in inference and where it is gathered, and all go on together."""
    shared.eval(), plain.eval()
    with torch.no_grad():
        for _ in range(1 + rank):  # as many windows as its images have
            found = shared.module(batch(rank)['inputs'])
        torch.testing.assert_close(found, plain.module(batch(rank)['inputs']))
    shared.train(), plain.train()
    with gathered(shared), torch.no_grad():
        if rank == 0:
            shared.module(batch(0)['inputs'])


def check_loading(shared, want):
    """Whole tensors are loaded, and saved again."""
    twice = {name: 2 * tensor if tensor.is_floating_point() else tensor for name, tensor in want.items()}
    load_state_dict(shared.module, twice, strict=True)
    for name, tensor in get_state_dict(shared).items():
        torch.testing.assert_close(tensor, twice[name], msg=name)
    weight = shared.module.backbone.layers[0].attn.qkv.weight
    torch.testing.assert_close(weight.full_tensor(), twice['backbone.layers.0.attn.qkv.weight'])


def test_two_processes_train_the_same(tmp_path):
    mp.spawn(run_rank, (2, str(tmp_path)), nprocs=2)


def test_where_all_is_trained_there_is_nothing_to_share():
    with pytest.raises(ValueError, match='model must have blocks with frozen weights'):
        FrozenShardedDataParallel(build(tuned='all'))
