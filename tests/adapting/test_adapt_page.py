"""docs/adapt.md: its Python runs as it stands, on a tiny network of timm, or one with its names where it is missing."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from library_vits import TimmViT, images, scrambled

from mmdyt.adapting.methods import METHODS

try:
    from timm.models.vision_transformer import VisionTransformer
except ImportError:
    VisionTransformer = None

PAGE = Path(__file__).parents[2] / 'docs/adapt.md'
BLOCKS = re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.DOTALL)


def new_vit(*args, **options):
    """What ``timm.create_model`` gives, tiny and random."""
    if VisionTransformer is None:
        return scrambled(TimmViT()).train()
    return scrambled(VisionTransformer(16, 4, embed_dim=16, depth=3, num_heads=2, num_classes=5)).train()


def test_the_first_example_is_ten_lines():
    assert len([line for line in BLOCKS[0].splitlines() if line]) == 10


def test_examples_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    timm = ModuleType('timm')
    timm.create_model = new_vit
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    batches = [(images(4, seed=seed), torch.arange(4) % 5) for seed in range(3)]
    scope = dict(loader=batches, some_batches=batches[:2], images=images(), new_vit=new_vit)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'timm', timm)
        exec(BLOCKS[0], scope)
    assert not scope['model'].waits and scope['model'].rate == 0.5
    pytest.importorskip('safetensors', reason='safetensors is not installed')
    model = scope['model']
    for block in BLOCKS[1:3]:
        exec(block, scope)
        assert scope['model'] is not model
        model = scope['model']
    exec(BLOCKS[3], scope)
    assert scope['left'] == [] and (tmp_path / 'tuned.safetensors').exists()
    macs, plain = capsys.readouterr().out.replace(')', '').rsplit(None, 1)
    assert float(re.search(r'\d+\.?\d*', macs)[0]) > 0 < float(plain)


def test_the_page_names_all_methods():
    words = set(re.findall(r'`(\w+)`', PAGE.read_text().split('`method` is a word:')[1].split('Or it is a list')[0]))
    assert words == METHODS.keys()
