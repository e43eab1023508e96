"""The docs say what is: links lead somewhere, named files exist, and the example of a new method is the method."""

import re
from pathlib import Path

import pytest
import torch

from mmdyt.parts.lora import LoRA

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist(page):
    text = page.read_text()
    links = re.findall(r'\]\((?!https?:|#)([^)#\s]+)', text)
    missing = [link for link in links if not (page.parent / link).exists()]
    if page.parent.name == 'results':  # diaries: they name what there was
        assert missing == []
        return
    named = re.findall(r'(?:configs|tools|mmdyt|docs|tests)/[\w/.-]+\.(?:py|md|sh|json)', text)
    missing += [path for path in named if '*' not in path and not (ROOT / path).exists()]
    assert missing == []


def test_the_readme_is_short():
    assert len((ROOT / 'README.md').read_text().split()) <= 900


def test_the_example_of_a_new_method_computes_what_the_method_does():
    page = (ROOT / 'docs/extending.md').read_text()
    scope = {}
    exec(re.search(r'```python\n(.*?)```', page, re.DOTALL)[1], scope)
    torch.manual_seed(0)
    ours = LoRA(6, 4, rank=2).eval()
    torch.nn.init.normal_(ours.up)
    theirs = scope['LoRA'](6, 4, rank=2).eval()
    theirs.load_state_dict(ours.state_dict())
    x, weight, bias = torch.randn(3, 4), torch.randn(6, 4), torch.randn(6)
    torch.testing.assert_close(theirs(x, weight, bias), ours(x, weight, bias))
    torch.testing.assert_close(theirs.merged(weight, bias), ours.merged(weight, bias))
    assert (theirs.word, theirs.targets, theirs.macs_per_token()) == (ours.word, ours.targets, ours.macs_per_token())


def test_every_method_has_a_row():
    page = (ROOT / 'docs/methods.md').read_text()
    for path in (ROOT / 'configs/_base_/methods').glob('*.py'):
        assert f'| `{path.stem}` |' in page
