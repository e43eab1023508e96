"""What is a refusal, told in one line, and what is a bug, which keeps its traceback."""

import dis
import linecache
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from types import TracebackType

from mmengine import registry as mmengine_registry
from mmengine.registry import Registry
from mmengine.runner import Runner

from .names import near

HINT = 'MMDYT_TRACEBACK=1 shows where it arose.'
FORM = re.compile(r'\S+ must .+, got ', re.DOTALL)
HOSTS = ('mmcv', 'mmpretrain', 'mmseg', 'mmaction', 'mmdyt', 'mmengine')
LINE = 120  # characters of a line of code
LONGEST = 1000  # characters of a message: hosts print whole configs
# whatever else there is (NameError, MemoryError, KeyboardInterrupt) never is about what the user typed
ERRORS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError,
          SyntaxError, TypeError, ValueError)  # fmt: skip
# a value of another kind in the place of a dict or an object, or a key that the config lacks
WRONG_VALUE = re.compile(r"'(ConfigDict|dict|list|tuple|str|int|float|bool|NoneType)' object has no attribute")


class Refusal(ValueError):
    """What the user typed cannot work: the message says where and why, and no traceback is of use."""


@contextmanager
def clean_exit() -> Iterator[None]:
    """Turn a refusal into one message and exit code 2; a bug keeps its traceback, as all does with MMDYT_TRACEBACK=1.

    A refusal was raised by someone who looked at what the user typed; a bug is what Python stumbled over.
    """
    try:
        yield
    except ERRORS as error:
        if os.environ.get('MMDYT_TRACEBACK') or not _raised(error):
            raise
        if os.environ.get('LOCAL_RANK', '0') == '0':  # once per machine: files may be missing on one only
            message = _message(error)
            print(f'error: {message}{"" if message.endswith((".", "?")) else "."} {HINT}', file=sys.stderr)
        sys.exit(2)


@contextmanager
def part(where: str, rule: str = 'be built', *, named: bool = True) -> Iterator[None]:
    """Refuse a part of the config that hosts stumble over, and say which it is.

    Hosts rarely look at what they are given. So within a part, which is made of nothing but what the user typed, wrong
    types, missing keys and tensors that do not fit are refusals, too. What our own code stumbles over stays a bug.

    Args:
        where: The part's path in the config.
        rule: What it must do, for the message.
        named: Whether messages that name an argument name the part, too.

    Raises:
        Refusal: From any other error that is one.
    """
    try:
        yield
    except ERRORS as error:
        if not (_raised(error) or (_is_value(error) and not _is_ours(error))):
            if hasattr(error, 'add_note'):  # since Python 3.11
                error.add_note(f'This happened while {where} was checked.')
            raise
        message = _message(error)
        if FORM.search(message):
            raise Refusal(f'{where}: {message}' if named else message) from error
        name = '' if isinstance(error, Refusal) else f'{type(error).__name__}: '
        raise Refusal(f'{where} must {rule}, got {name}{message}{_hint(message)}{_place(error)}') from error


def warn(message: str) -> None:
    """Say what is not refused, but should be known; once per machine."""
    if os.environ.get('LOCAL_RANK', '0') == '0':
        print(f'warning: {message}', file=sys.stderr, flush=True)


def _message(error: BaseException) -> str:
    """What an error says, in one line."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    text = re.sub(r'\s*\n\s*', ' ', str(text).strip())
    if not text:
        innermost = _innermost(error)
        text = f'{type(error).__name__} in {innermost.tb_frame.f_code.co_filename}, line {innermost.tb_lineno}'
    return text if len(text) <= LONGEST else f'{text[:LONGEST]} ...'


def _place(error: BaseException) -> str:
    """Whose code stumbled, and at which line of it: this names the argument more often than the message does."""
    owners = [frame.f_locals.get('self') for frame, _ in traceback.walk_tb(error.__traceback__)]
    owner = next((type(one).__name__ for one in reversed(owners) if _is_built(one)), '')
    innermost = _innermost(error)
    file, number = innermost.tb_frame.f_code.co_filename, innermost.tb_lineno
    line = linecache.getline(file, number).strip()[:LINE]
    return f' ({f"in {owner}, " * bool(owner)}{Path(file).name}, line {number}: {line})' if line else ''


def _is_built(one: object) -> bool:
    """Whether an object is one that a config names, not what it is made of."""
    return type(one).__module__.partition('.')[0] in HOSTS and not isinstance(one, Runner | Registry)


def _raised(error: BaseException) -> bool:
    """Whether a ``raise`` or ``assert`` made the error, or the system; not an operation that failed."""
    if isinstance(error, OSError):
        return True
    if not _is_value(error):  # an attribute of a module, whose ``__getattr__`` has a ``raise``
        return False
    innermost = _innermost(error)
    return dis.opname[innermost.tb_frame.f_code.co_code[innermost.tb_lasti]] in ('RAISE_VARARGS', 'RERAISE')


def _is_value(error: BaseException) -> bool:
    """Whether an operation may have failed for its operands."""
    return not isinstance(error, AttributeError) or bool(WRONG_VALUE.search(str(error)))


def _is_ours(error: BaseException) -> bool:
    """Whether the error arose in the code of this package; a call that does not fit its target arose in neither."""
    if 'argument' in str(error) and isinstance(error, TypeError):
        return False
    return Path(__file__).parents[1] in Path(_innermost(error).tb_frame.f_code.co_filename).parents


def _innermost(error: BaseException) -> TracebackType:
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    return trace


def _hint(message: str) -> str:
    """Names that look like an argument which a class refuses; nothing, if that is not what is wrong."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'$", message)
    kinds = [r.module_dict[found[1]] for r in _all_registries() if found[1] in r.module_dict] if found else []
    known = {name for kind in kinds for name in signature(kind).parameters}  # hosts have classes of the same name
    return f'.{near(found[2], sorted(known))}' if kinds else ''


def _all_registries() -> list[Registry]:
    """Mmengine's registries and those of all hosts that are loaded."""
    roots = [root for root in vars(mmengine_registry).values() if isinstance(root, Registry)]
    return roots + [child for root in roots for child in root.children.values()]
