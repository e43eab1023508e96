"""The memory table of docs/scale.md is what its formula gives."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / 'docs' / 'scale.md').read_text()
GIB, BATCH, D = 2**30, 32, 64
# parameters of the network, tokens, width, layers
MODELS = {
    'ViT-B/16': (85.8e6, 197, 768, 12),
    'ViT-L/16': (303.3e6, 197, 1024, 24),
    'ViT-H/14': (630.8e6, 257, 1280, 32),
}


@pytest.mark.parametrize('name', MODELS)
def test_the_table_is_the_formula(name):
    table = PAGE.split('<!-- memory table -->')[1].split('<!-- end')[0]
    row = re.search(rf'\| {re.escape(name)} \|(.*)\|', table)[1]
    parameters, n, c, layers = MODELS[name]
    tuned = layers * (2 * c * D + D + c)
    held = 10 * c + 2 * D
    expected = [
        4 * parameters,
        16 * tuned,
        2 * BATCH * n * layers * held,
        2 * BATCH * n * (layers * c + held),
    ]
    assert [float(cell) for cell in row.split('|')] == pytest.approx([x / GIB for x in expected], abs=0.006)
