"""One bad or hard input for a real tool, and how to say it in a line."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REFUSED, WORKS, STOPS = 'refused clearly', 'works', 'stops with a word'


@dataclass(frozen=True)
class Case:
    """What is typed, what lies on the disk, and what must come of it.

    Attributes:
        kind: The group in the table.
        command: A tool of tools/ and its arguments. The word behind the tool names a small world with a config:
            ``seg``, ``cls`` (lists), ``folders`` (a folder for each class), ``video``, ``vtab``; ``-`` is none.
            ``{here}`` is its folder, ``{run}`` a work dir of a finished training there, ``{ckpt}`` its last checkpoint,
            ``{out}`` a new name, ``{root}`` the folder of all.
        expected: ``REFUSED`` before anything is written, ``WORKS``, or ``STOPS`` while it runs, with a message.
        says: What the message must name, each one of some words between semicolons.
        change: Spoils a copy of the world, called with ``{here}``.
        check: Whether a run that works did what it should, called with ``{here}`` and what was printed.
        env: More environment variables.
    """

    kind: str
    command: str
    expected: str
    says: tuple[str, ...] = ()
    change: Callable[[Path], None] | None = None
    check: Callable[[Path, str], bool] | None = None
    env: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """A short name for a report."""
        what = f' ({self.change.__name__.strip("_")})' if self.change else ''
        return f'{self.kind}: {self.command}{what}'


def refused(kind: str, command: str, *says: str, change=None, env=()) -> Case:
    """A bad input, known before work starts."""
    return Case(kind, command, REFUSED, says, change, env=env)


def works(kind: str, command: str, change=None, check=None, env=()) -> Case:
    """A hard input that is right."""
    return Case(kind, command, WORKS, (), change, check, env)


def stops(kind: str, command: str, *says: str, change=None, check=None, env=()) -> Case:
    """What only shows while it runs."""
    return Case(kind, command, STOPS, says, change, check, env)


def options(kind: str, world: str, table: str, tool: str = 'train') -> list[Case]:
    """A refused case for each line of a table: settings, and behind ``|`` what the message must name.

    Without a word behind ``|`` that is the last name of the first setting, or its value.
    """
    cases = []
    for line in filter(None, map(str.strip, table.splitlines())):
        settings, _, says = map(str.strip, line.partition('|'))
        name, _, value = settings.split()[0].partition('=')
        named = says.split() or [f'{name.rpartition(".")[2]};{value}' if len(value) > 3 else name.rpartition('.')[2]]
        target = ' {ckpt}' if tool == 'test' else ''
        cases.append(refused(kind, f'{tool} {world}{target} --cfg-options {settings}', *named))
    return cases
