"""The pages as a site: all are in its navigation, all of its API can be imported, and it is built without complaint."""

import importlib
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT

import mmdyt.compat

DOCS = ROOT / 'docs'
NEEDED = ('sphinx', 'myst_parser', 'furo')


def listed(page: str) -> list[str]:
    """What the blocks that list pages or modules hold, options and captions left out."""
    blocks = re.findall(r'```\{(?:toctree|eval-rst)\}\n(.*?)```', (DOCS / page).read_text(), re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [re.sub(r'.*<(.*)>', r'\1', line) for line in lines if line and not line.startswith((':', '..'))]


def test_the_navigation_has_every_page_once():
    pages = [path.relative_to(DOCS).with_suffix('').as_posix() for path in DOCS.rglob('*.md')]
    assert sorted(listed('index.md')) == sorted(set(pages) - {'index'})


def test_every_entry_of_the_api_is_imported_and_says_what_it_is():
    mmdyt.compat.install()
    names = listed('api.md')
    assert {'mmdyt.adapting.adapt', 'mmdyt.apis', 'mmdyt.core.observe', 'mmdyt.parts', 'mmdyt.engine'} <= set(names)
    for name in names:
        module = importlib.import_module(name)
        assert module.__doc__, name
        for public in getattr(module, '__all__', ()):
            assert getattr(module, public).__doc__, f'{name}.{public}'


@pytest.fixture(scope='module')
def build():
    """``build(docs, site)`` builds a site as ``make docs`` does."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        pytest.skip(f'{", ".join(missing)} not installed; the extra `docs` brings them')
    (rule,) = re.findall(r'-m (sphinx .*)', (ROOT / 'Makefile').read_text())
    options = [word for word in rule.split()[1:] if word.startswith('--')]

    def run(docs: Path, site: Path) -> subprocess.CompletedProcess:
        command = [sys.executable, '-m', 'sphinx', '-q', *options, '-d', site / '.doctrees', docs, site]
        env = os.environ | dict(PYTHONPATH=str(ROOT), NO_COLOR='1')
        return subprocess.run([str(word) for word in command], env=env, capture_output=True, text=True)

    return run


@pytest.mark.slow
def test_the_site_is_built_without_complaint_and_links_to_sources(build, tmp_path):
    result = build(DOCS, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert 'source/mmdyt/parts/lora.py.html' in (tmp_path / 'methods.html').read_text()
    assert 'class' in (tmp_path / 'source/mmdyt/parts/lora.py.html').read_text()
    assert 'source/mmdyt/compat.html' in (tmp_path / 'index.html').read_text()
    assert 'colors.py' in (tmp_path / 'source/mmdyt/compat.html').read_text()
    for page in tmp_path.rglob('*.html'):
        links = re.findall(r'href="(?!https?:|#|data:|mailto:)([^"#?]+)', page.read_text())
        assert [link for link in links if not (page.parent / link).exists()] == [], page
        fetched = r'<(?:script|img|link rel="stylesheet")[^>]*https?://'
        assert not re.search(fetched, page.read_text()), page
    assert 'LoRA' in (tmp_path / 'api/mmdyt.parts.lora.html').read_text()


@pytest.mark.slow
@pytest.mark.parametrize('link', ['none.md', '../mmdyt/none.py', 'page.md#none'])
def test_a_broken_link_fails_the_build(link, build, tmp_path):
    (tmp_path / 'docs').mkdir()
    (tmp_path / 'docs/conf.py').write_text("extensions = ['myst_parser']\nmyst_heading_anchors = 4\n")
    (tmp_path / 'docs/index.md').write_text('# Page\n\n```{toctree}\npage\n```\n')
    (tmp_path / 'docs/page.md').write_text(f'# Page\n\n[link]({link})\n')
    result = build(tmp_path / 'docs', tmp_path / 'site')
    assert result.returncode != 0 and 'none' in result.stderr
