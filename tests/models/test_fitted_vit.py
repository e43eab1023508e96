"""Every branch of a Vision Transformer can be fitted to what skipping its tokens costs."""

import pytest
import torch

from mmdyt.core.fit.calibrate import calibrate, token_dispatchers
from mmdyt.core.fit.evidence import fit_dispatchers
from mmdyt.core.fit.request import CalibrationRequest
from mmdyt.core.observe import dynamic_branches
from mmdyt.models import DyTVisionTransformer


@pytest.mark.parametrize('dispatch', ['mlp', 'attn', 'attn_mlp', 'layer'])
@pytest.mark.parametrize('skip_unread', [False, True])
def test_every_branch_of_a_vit_can_be_fitted(dispatch, skip_unread):
    """But those whose patch tokens nobody reads."""
    torch.manual_seed(0)
    arch = dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64)
    vit = DyTVisionTransformer(arch, img_size=32, patch_size=8, dispatch=dispatch, skip_unread=skip_unread).eval()
    images = torch.randn(8, 3, 32, 32)
    for dispatcher in token_dispatchers(vit).values():
        dispatcher.set_rule(-torch.inf)
    explained = fit_dispatchers(vit, [lambda: vit(images)[0].square().sum()])
    branches = list(dynamic_branches(vit))
    unread = [f'layers.2.dynamic.{"mlp" if dispatch == "attn_mlp" else dispatch}']
    assert list(explained) == (branches[:-1] if skip_unread and unread[0].endswith('mlp') else branches)
    worthless = [name for name in branches if name in unread and not skip_unread]
    assert all(explained.get(name, 0) < 1e-6 for name in worthless)  # their own update is not read
    found = calibrate(vit, [lambda: vit(images)], CalibrationRequest(0.5, 'global'))
    assert sum(branch.rate for branch in found.values()) / len(found) == pytest.approx(0.5, abs=0.02)
