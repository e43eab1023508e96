"""Sphinx: these pages and the docstrings of the package as a site, by ``make docs``."""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

from mmdyt import __version__, compat

compat.install()  # before autodoc imports the hosts

project, release = 'mmdyt', __version__
extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.autosummary',
    'sphinx.ext.napoleon',
    'sphinx.ext.viewcode',
    'source_pages',
]
html_theme = 'furo'
html_title = f'mmdyt {release}'
html_show_copyright = False
html_static_path, html_css_files = ['static'], ['wide.css']
highlight_language = 'text'  # of blocks that name none
myst_heading_anchors = 4  # links such as methods.md#context-dispatch
templates_path = ['templates']
exclude_patterns = ['templates', 'static']
autodoc_default_options = {'members': True, 'member-order': 'bysource'}
napoleon_use_ivar = True  # fields of a NamedTuple are members already
maximum_signature_line_length = 80  # a longer one has a line for each argument
autosummary_ignore_module_all = False
