"""Play one case: a real tool in a process of its own, on a copy of a small world; then say how it went."""

import contextlib
import hashlib
import io
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

from case import REFUSED, WORKS, Case

TOOLS = Path(__file__).parents[2] / 'tools'
LIMIT = 120  # seconds, after which a run counts as endless
UNCLEAR, WRONG, ENDLESS = 'late or unclear', 'wrong or lost', 'endless'
OWN = re.compile(r'(run|moved)/(\.lock|config\.py|last_checkpoint)$')  # that a resumed run writes again
OWN_WORK_DIR = ('train', 'test', 'vtab', 'compare')


def play(case: Case, master: Path, folder: Path) -> tuple[str, str]:
    """Run a case; returns the outcome and what explains it."""
    tool, world, *rest = shlex.split(case.command)
    here = copy_world(master, folder, world)
    places = dict(here=here, out=folder / 'out', run=here / 'run', ckpt=last_checkpoint(here / 'run'), root=folder)
    if case.change:
        case.change(here)
    arguments = [argument.format(**places) if re.search(r'\{\w+\}', argument) else argument for argument in rest]
    config = [] if world == '-' else [str(here / 'config.py')]
    work_dir = ['--work-dir', str(folder / 'out')] if tool in OWN_WORK_DIR and '--work-dir' not in arguments else []
    before = snapshot(folder)
    env = {name: value.format(**places) for name, value in case.env}
    code, output = run(tool, [*config, *work_dir, *arguments], folder, env)
    return judge(case, code, output, before, snapshot(folder), here)


def judge(case: Case, code: int | None, output: str, before: dict, after: dict, here: Path) -> tuple[str, str]:
    """Say how a run went from its exit code, its output, and the files before and after."""
    tail = '\n'.join(output.strip().splitlines()[-12:])
    spoiled = sorted(path for path, content in before.items() if after.get(path) != content and not OWN.search(path))
    new = sorted(path for path in after if path not in before)
    if code is None:
        return ENDLESS, tail
    if spoiled:
        return WRONG, f'changed or lost: {spoiled[:3]}\n{tail}'
    if case.expected == WORKS:
        if code == 0 and (case.check is None or case.check(here, output)):
            return WORKS, ''
        return WRONG, f'exit code {code}, though it is right, or not what it should give\n{tail}'
    if code == 0:
        return WRONG, f'exit code 0\n{tail}'
    if 'Traceback (most recent call last)' in output:
        return UNCLEAR, f'a traceback\n{tail}'
    said = output.lower()
    if missing := [words for words in case.says if not any(word in said for word in words.lower().split(';'))]:
        return UNCLEAR, f'does not name {missing}\n{tail}'
    if case.expected == REFUSED and new:
        return UNCLEAR, f'wrote {new[:3]}\n{tail}'
    if case.check is not None and not case.check(here, output):
        return WRONG, f'the check fails\n{tail}'
    return case.expected, ''


def copy_world(master: Path, folder: Path, world: str) -> Path:
    """Copy a world, and rewrite the paths in its config; returns its folder."""
    shutil.copy(master / 'pretrained.pth', folder)
    if world == '-':
        return folder
    shutil.copytree(master / world, folder / world, symlinks=True)
    for config in (folder / world).rglob('*.py'):
        config.write_text(config.read_text().replace(str(master), str(folder)))
    for pointer in (folder / world).rglob('last_checkpoint'):
        pointer.write_text(pointer.read_text().replace(str(master), str(folder)))
    return folder / world


def last_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a work dir."""
    found = sorted(run.glob('*.pth'), key=lambda path: int(re.sub(r'\D', '', path.stem) or 0))
    return found[-1] if found else run / 'none.pth'


def snapshot(folder: Path) -> dict[str, str]:
    """The content of all files below a folder, and the folders."""
    found = {}
    for path in sorted(folder.rglob('*')):
        if '__pycache__' in path.parts:
            continue
        name = str(path.relative_to(folder))
        found[name] = hashlib.sha1(path.read_bytes()).hexdigest() if path.is_file() else 'folder'
    return found


def run(tool: str, arguments: list[str], cwd: Path, env: dict[str, str]) -> tuple[int | None, str]:
    """Run ``tools/<tool>.py`` in a forked process, so that nothing is imported anew; None is no end."""
    log = cwd.parent / f'{cwd.name}.txt'
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            code = _child(tool, arguments, cwd, env, log)
        finally:  # whatever happens, this is no second test session
            os._exit(code)
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            _kill(child)  # workers that it left behind
            return os.waitstatus_to_exitcode(status), log.read_text(errors='replace')
        time.sleep(0.05)
    _kill(child)
    os.waitpid(child, 0)
    return None, log.read_text(errors='replace')


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _child(tool: str, arguments: list[str], cwd: Path, env: dict[str, str], log: Path) -> int:
    """What the forked process does; returns its exit code."""
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(stream, 'wb', 0), write_through=True) for stream in (1, 2))
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:0] = filter(None, [env.get('MODULES')])
    if limit := env.get('FILE_LIMIT'):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    sys.argv = [str(TOOLS / f'{tool}.py'), *arguments]
    try:
        runpy.run_path(sys.argv[0], run_name='__main__')
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
