"""What runs on a CPU runs on a GPU, and gives the same: pytest -m gpu tests/models/test_cuda.py."""

import pytest
import torch
from test_methods import DECIDING, METHODS, build, features, images, learn

from mmdyt.core.observe import complete_model, record_dispatch
from mmdyt.core.tuning import merge

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')]

DISPATCH = ['mlp', 'attn', 'attn_mlp', 'layer']


def dispatched(method, dispatch, **vit):
    if method == 'avit':
        dispatch = 'layer'  # what else is refused
    word = method if method in DECIDING else f'{method}+dyt'
    options = dict(dispatch=dispatch) | ({} if method == 'adapter' or word == method else dict(adapter=None))
    return learn(build(word, options, **vit))


@pytest.mark.parametrize('inference', ['packed', 'masked'])
@pytest.mark.parametrize('dispatch', DISPATCH)
@pytest.mark.parametrize('method', METHODS)
def test_features_masks_and_costs_are_those_of_the_cpu(method, dispatch, inference):
    backbone = dispatched(method, dispatch, inference=inference)
    found = {}
    for device in ('cpu', 'cuda'):
        backbone.to(device)
        with record_dispatch(backbone) as record, torch.no_grad():
            out = backbone(images().to(device))[-1].cpu()
            whole = complete(backbone, images().to(device))
        masks = [dispatch.patch_mask.cpu() for dispatch in record.flat()]
        macs = torch.as_tensor(backbone.macs_of(16, {name: p[0] for name, p in record.runs.items()})).cpu()
        found[device] = dict(out=out, whole=whole, masks=masks, macs=macs)
    torch.testing.assert_close(found['cuda'], found['cpu'], rtol=0, atol=1e-9)


def complete(backbone, x):
    with complete_model(backbone):
        return backbone(x)[-1].cpu()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('dispatch', DISPATCH)
@pytest.mark.parametrize('method', METHODS)
def test_it_trains_and_predicts_in_mixed_precision(method, dispatch, dtype):
    backbone = dispatched(method, dispatch, out_type='featmap').float().cuda().train()
    x = images(4).float().cuda()
    with torch.autocast('cuda', dtype=dtype):
        loss = backbone(x)[-1].float().square().mean()
    loss.backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    with torch.no_grad(), torch.autocast('cuda', dtype=dtype):
        assert backbone.eval()(x)[-1].isfinite().all()


@pytest.mark.parametrize('method', ['lora', 'ssf', 'ether', 'ether_plus'])
def test_a_merged_model_gives_the_same(method):
    backbone = learn(build(method)).cuda()
    x = images().cuda()
    before = features(backbone, x)
    merge(backbone)
    torch.testing.assert_close(features(backbone, x), before, rtol=0, atol=1e-9)
