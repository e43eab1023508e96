"""The command ``mmdyt``: ``mmdyt TOOL ...`` does what ``python tools/TOOL.py ...`` does in a clone."""

import ast
import difflib
import shutil
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import mmdyt
from mmdyt.packaged import CONFIGS, TOOLS


def main() -> None:
    """Run the tool that the command line names, in this process: its exit code and signals are the command's."""
    name, *words = sys.argv[1:] or ['--help']
    tools = {path.stem: path for path in sorted(TOOLS.glob('*.py'))}
    if name in ('-h', '--help'):
        print(overview(tools))
    elif name == '--version':
        print(mmdyt.__version__)
    elif (tool := tools.get(name.replace('-', '_'))) is None:
        near = difflib.get_close_matches(name, tools, n=3)
        hint = f' Did you mean {", ".join(near)}?' if near else ''
        print(f'error: mmdyt has no tool {name!r}.{hint} `mmdyt --help` lists them.', file=sys.stderr)
        sys.exit(2)
    else:
        run(tool, words)


def overview(tools: dict[str, Path]) -> str:
    """All tools, each with the first line of its docstring."""
    width, indent = max(60, shutil.get_terminal_size((100, 24)).columns), max(map(len, tools)) + 4
    lines = ['usage: mmdyt TOOL [ARGUMENTS ...]', '       mmdyt TOOL --help', '']
    for name, path in tools.items():
        about = (ast.get_docstring(ast.parse(path.read_text('utf-8'))) or '').partition('\n')[0]
        head = f'  {name}'.ljust(indent)
        lines += textwrap.wrap(head + about, width, subsequent_indent=' ' * indent, break_on_hyphens=False)
    lines += ['', f'configs/... is looked for in the working directory, then in {CONFIGS}']
    return '\n'.join(lines)


def run(tool: Path, words: list[str]) -> None:
    """Execute a tool as the main module, as Python does with a script; messages name it ``mmdyt TOOL``."""
    sys.argv[:] = [f'mmdyt {tool.stem}', *words]
    script = sys.modules['__main__'] = ModuleType('__main__')
    script.__file__ = str(tool)  # where processes that are spawned find it
    exec(compile(tool.read_bytes(), tool, 'exec'), vars(script))


if __name__ == '__main__':
    main()
