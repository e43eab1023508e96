"""Sphinx: what pages link to in the repository beside them becomes part of the site, as it is on GitHub.

Links stay as they are written, relative to the page. A file gets a page with its text, a folder one with its files.
"""

from collections.abc import Iterator
from html import escape
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

DOCS = Path(__file__).parent
ROOT = DOCS.parent
LANGUAGES = {'.py': 'python', '.sh': 'bash', '.json': 'json'}


class SourcePages:
    """The files and folders that were linked to, and their pages."""

    def __init__(self):
        self.linked: set[Path] = set()

    def link(self, app: Sphinx, doctree: nodes.document) -> None:
        """Point links that lead out of the pages to the pages that :meth:`pages` makes."""
        docname = app.env.docname
        for node in list(doctree.findall(is_path)):
            path = target(docname, node['reftarget'])
            if path is not None:
                self.linked |= {path, *files(path)}
                uri = app.builder.get_relative_uri(docname, page_of(path))
                node.replace_self(nodes.reference('', '', *node.children, refuri=uri, internal=True))

    def pages(self, app: Sphinx) -> Iterator[tuple[str, dict, str]]:
        """A page for each, with the names that Sphinx gives to its template."""
        for path in sorted(self.linked):
            name = path.relative_to(ROOT).as_posix()
            if path.is_dir():
                links = [f'<a href="{path.name}/{escape(one.name)}.html">{escape(one.name)}</a>' for one in files(path)]
                body = f'<ul><li>{"</li><li>".join(links)}</li></ul>'
            else:
                language = LANGUAGES.get(path.suffix, 'text')
                body = app.builder.highlighter.highlight_block(path.read_text('utf-8'), language)
            yield page_of(path), dict(title=name, body=f'<h1>{escape(name)}</h1>{body}'), 'page.html'


def is_path(node: nodes.Node) -> bool:
    """Whether a node is a link by path to something other than a page."""
    kinds = addnodes.download_reference, addnodes.pending_xref
    return isinstance(node, kinds) and node['reftype'] == 'myst' and node['refdomain'] is None


def target(docname: str, link: str) -> Path | None:
    """The source file, or the folder, that a link means; None where it is a page or belongs to the pages."""
    # the front page is the README, whose links start where it lies
    for folder in ((DOCS / docname).parent, *[ROOT] * (docname == 'index')):
        path = (folder / link.partition('#')[0]).resolve()
        if path.is_dir() and ROOT in path.parents or path.is_file() and DOCS not in path.parents:
            return path
    return None


def files(path: Path) -> list[Path]:
    """The text files of a folder that get a page of their own."""
    return sorted(one for one in path.glob('*') if one.suffix in LANGUAGES) if path.is_dir() else []


def page_of(path: Path) -> str:
    """The name of a page."""
    return f'source/{path.relative_to(ROOT).as_posix()}'


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls it."""
    pages = SourcePages()
    app.connect('doctree-read', pages.link, priority=400)  # before Sphinx collects what is to be downloaded
    app.connect('html-collect-pages', pages.pages)
    return dict(parallel_read_safe=False, parallel_write_safe=True)
