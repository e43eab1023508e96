"""The docs say what is: links lead somewhere, named files and options exist, the example of a method is the method."""

import ast
import inspect
import pkgutil
import re
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import load_tool

import mmdyt.compat
from mmdyt.core.part import Part
from mmdyt.models import DyTVisionTransformer
from mmdyt.models.dynamic_model import DynamicModel
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


@cache
def options_of(tool: str) -> set[str]:
    """The options that a tool's own help lists."""
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr('sys.argv', [f'tools/{tool}.py', '--help'])
        patch.setattr('argparse.ArgumentParser._print_message', lambda self, text, file=None: printed.append(text))
        with pytest.raises(SystemExit):
            load_tool(tool).main()
    return set(re.findall(r'--[a-z][a-z_-]*', ''.join(printed)))


@cache
def classes() -> dict[str, type]:
    """All classes of the package by name."""
    mmdyt.compat.install()
    found = {}
    for info in pkgutil.walk_packages(mmdyt.__path__, 'mmdyt.'):
        module = import_module(info.name)
        found |= {n: c for n, c in vars(module).items() if inspect.isclass(c) and c.__module__ == info.name}
    return found


def arguments_of(cls: type) -> set[str]:
    """What a config of a class may say: arguments of its constructors, and of how a part finds its room."""
    functions = [base.__init__ for base in cls.__mro__]
    functions += [cls.add_to] if issubclass(cls, Part) else []
    return {name for function in functions for name in inspect.signature(function).parameters}


def code(text: str) -> str:
    """A page without what breaks its lines of code."""
    return text.replace('\\\n', ' ').replace('\\|', '|')


def calls(text: str):
    """Class and argument names of each ``mmdyt.Class(...)`` and ``dict(type='mmdyt.Class', ...)``."""
    text = code(text)
    for found in re.finditer(r"mmdyt\.[A-Z]\w+\(|dict\(\s*type='mmdyt\.[A-Z]", text):
        depth = [0]
        for letter in text[found.start() :]:
            depth.append(depth[-1] + (letter == '(') - (letter == ')'))
            if letter == ')' and depth[-1] == 0:
                break
        call = text[found.start() : found.start() + len(depth) - 1]
        tree = ast.parse(re.sub(r'(?<=,)\s*\.\.\.(?=\s*\))', '', call), mode='eval').body
        names = [arg.id for arg in tree.args if isinstance(arg, ast.Name)] + [keyword.arg for keyword in tree.keywords]
        name = re.search(r'mmdyt\.(\w+)', call)[1]
        yield name, set(names) - {'type', 'layers', '_delete_'}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_options_of_tools_exist(page):
    text = code(page.read_text())
    tools = [path.stem for path in (ROOT / 'tools').glob('*.py')]
    unknown = []
    for tool, rest in re.findall(r'tools/(?:dist_)?(\w+)\.(?:py|sh)([^\n`|]*)', text):
        if tool in tools:
            unknown += [(tool, option) for option in re.findall(r'(?<!\S)--[a-z][a-z_-]*', rest)
                        if option not in options_of(tool)]  # fmt: skip
    if page.parent.name != 'results':  # diaries: what there was
        known = {option for tool in tools if tool != 'demo_data' for option in options_of(tool)}
        unknown += [option for option in re.findall(r'`(--[a-z][a-z_-]*)', text) if option not in known]
        assert unknown == []


@pytest.mark.parametrize('page', [page for page in PAGES if page.parent.name != 'results'], ids=lambda page: page.name)
def test_named_arguments_of_classes_exist(page):
    for name, named in calls(page.read_text()):
        assert named <= arguments_of(classes()[name]), name


def test_the_pages_name_classes_and_options():
    found = [name for page in PAGES for name, _ in calls(page.read_text())]
    assert len(found) > 25 and {'EvidenceHook', 'TokenDispatcher', 'LoRA', 'DyTVisionTransformer'} <= set(found)
    assert {'--method', '--amp', '--resume', '--cfg-options'} <= options_of('train')


def test_the_table_of_the_backbone_names_its_arguments_all_of_them():
    table = (ROOT / 'docs/configs.md').read_text().split('## Options of the backbone')[1].split('\n## ')[0]
    named = re.findall(r'^\| `(\w+)` \|', table, re.MULTILINE)
    own = inspect.signature(DyTVisionTransformer).parameters.values()
    assert sorted(named) == sorted(p.name for p in own if p.name != 'arch' and p.kind != p.VAR_KEYWORD)


def test_defaults_that_the_table_of_losses_names_are_the_defaults():
    (row,) = re.findall(r'^\| the model \|.*', (ROOT / 'docs/configs.md').read_text(), re.MULTILINE)
    defaults = {p.name: p.default for p in inspect.signature(DynamicModel).parameters.values()}
    named = re.findall(r'`(\w+)(?:=([\d.]+))?`', row)
    assert {name for name, _ in named} == defaults.keys() - {'host'}
    assert all(float(value) == defaults[name] for name, value in named if value)


@pytest.mark.parametrize('hook', ['EvidenceHook', 'TauScheduleHook', 'CalibrationHook'])
def test_the_table_of_hooks_names_all_their_arguments(hook):
    named = dict(calls((ROOT / 'docs/configs.md').read_text()))[hook]
    assert named == set(inspect.signature(classes()[hook]).parameters)
