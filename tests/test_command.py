"""The command ``mmdyt`` runs the tools; see mmdyt/__main__.py."""

import ast
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT

from mmdyt import __main__ as command
from mmdyt import __version__

TOOLS = sorted((ROOT / 'tools').glob('*.py'))


def run(monkeypatch, *words) -> int:
    """The exit code of ``mmdyt WORDS`` in this process."""
    monkeypatch.setattr(sys, 'argv', ['mmdyt', *words])
    monkeypatch.setitem(sys.modules, '__main__', sys.modules['__main__'])  # put back afterwards
    try:
        command.main()
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Path:
    """A folder of tools of our own."""
    monkeypatch.setattr(command, 'TOOLS', tmp_path)
    return tmp_path


@pytest.mark.parametrize('words', [[], ['--help'], ['-h']])
def test_all_tools_are_listed_with_what_they_do(words, monkeypatch, capsys):
    assert run(monkeypatch, *words) == 0
    printed = ' '.join(capsys.readouterr().out.split())
    for path in TOOLS:
        assert f' {path.stem} {ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]}' in printed


def test_version(monkeypatch, capsys):
    assert run(monkeypatch, '--version') == 0 and capsys.readouterr().out == f'{__version__}\n'


def test_a_new_tool_is_listed_and_runs_as_a_script(tools, monkeypatch, capsys):
    (tools / 'new_tool.py').write_text(
        '"""Say what it was told.\n\nMore."""\nimport argparse, sys\nfrom pathlib import Path\n\n'
        "parser = argparse.ArgumentParser()\nparser.add_argument('word')\n"
        "if __name__ == '__main__':\n"
        "    print(parser.prog, parser.parse_args().word, Path(__file__).name, sys.modules['__main__'].__file__)\n"
        '    sys.exit(3)\n'
    )
    run(monkeypatch, '--help')
    assert 'new_tool  Say what it was told.\n' in capsys.readouterr().out
    for name in ('new_tool', 'new-tool'):
        assert run(monkeypatch, name, '--', '--hello') == 3
        assert capsys.readouterr().out == f'mmdyt new_tool --hello new_tool.py {tools / "new_tool.py"}\n'


@pytest.mark.parametrize(('word', 'near'), [('trian', ' Did you mean train?'), ('xxxxxx', '')])
def test_an_unknown_word_is_refused_with_the_nearest(word, near, monkeypatch, capsys):
    assert run(monkeypatch, word) == 2
    assert capsys.readouterr().err == f'error: mmdyt has no tool {word!r}.{near} `mmdyt --help` lists them.\n'


def test_codes_and_refusals_of_a_tool_are_those_of_the_command(tmp_path):
    """In a process of its own, far from the repository's folder."""
    result = subprocess.run(
        [sys.executable, '-m', 'mmdyt', 'get_flops', 'configs/none.py'],
        cwd=tmp_path, env=dict(PYTHONPATH=str(ROOT)), capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2 and 'config must name an existing file' in result.stderr
    assert 'Traceback' not in result.stderr


def test_the_list_imports_no_torch(tmp_path):
    script = "import sys\nfrom mmdyt.__main__ import main\nmain()\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, '-c', script], env=dict(PYTHONPATH=str(ROOT)), check=True, cwd=tmp_path)


WAITING = """
import time
try:
    print('ready', flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    raise SystemExit(7)
"""


def test_ctrl_c_reaches_the_tool(tools):
    (tools / 'wait.py').write_text(WAITING)
    script = f'import mmdyt.__main__ as m; m.run(m.Path({str(tools / "wait.py")!r}), [])'
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # else ignored in the background
    options = dict(env=dict(PYTHONPATH=str(ROOT)), stdout=subprocess.PIPE, text=True, preexec_fn=heeds)
    with subprocess.Popen([sys.executable, '-c', script], **options) as process:
        assert process.stdout.readline() == 'ready\n'
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 7
