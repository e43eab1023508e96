"""A refusal is told in one line that says where and how to see more; a bug keeps its traceback."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import HOOKS
from torch import nn

from mmdyt.core.losses import activation_rate, check_rate
from mmdyt.preflight.refusals import HINT, Refusal, clean_exit, part


def fail(error: BaseException) -> None:
    raise error


REFUSALS = {
    'raised': (lambda: fail(ValueError('x must be y, got z.')), 'x must be y, got z.'),
    'of a key': (lambda: fail(KeyError('x must be y, got z.')), 'x must be y, got z.'),
    'of many lines': (lambda: fail(ValueError('x must be y,\n   got z.')), 'x must be y, got z.'),
    'asserted': (lambda: exec("assert 0, 'it must be so'"), 'it must be so.'),
    'asserted without a word': (lambda: exec('assert 0'), 'AssertionError in <string>, line 1.'),
    'a file': (lambda: Path('/nowhere/file').read_text(), "[Errno 2] No such file or directory: '/nowhere/file'."),
    'a key that the config lacks': (lambda: ConfigDict().model, "'ConfigDict' object has no attribute 'model'."),
}
BUGS = {
    'a list': lambda: [][3],
    'a dict': lambda: {}['key'],
    'a number': lambda: 1 / 0,
    'a type': lambda: 1 + '1',
    'an attribute': lambda: object().attribute,
    'an attribute of a module': lambda: nn.Linear(1, 1).attribute,
    'a name': lambda: name,  # noqa: F821
    'shapes': lambda: torch.ones(2, 3) @ torch.ones(2, 3),
}


@pytest.mark.parametrize('case', REFUSALS)
def test_a_refusal_is_one_line(capsys, case):
    fails, message = REFUSALS[case]
    with pytest.raises(SystemExit, match='2'), clean_exit():
        fails()
    assert capsys.readouterr().err == f'error: {message} {HINT}\n'


@pytest.mark.parametrize('case', BUGS)
def test_a_bug_keeps_its_traceback(capsys, case):
    with (
        pytest.raises((LookupError, ArithmeticError, TypeError, AttributeError, NameError, RuntimeError)),
        clean_exit(),
    ):
        BUGS[case]()
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ('fails', 'message'),
    [
        (lambda: check_rate(50), 'hooks.a: target_rate must lie in (0, 1], got 50. Rates are fractions, not percent.'),
        (lambda: fail(RuntimeError('no such thing')), 'hooks.a must be built, got RuntimeError: no such thing'),
        (lambda: {}['key'], 'hooks.a must be built, got KeyError: key'),
        (lambda: 1 + '1', "hooks.a must be built, got TypeError: unsupported operand type(s) for +: 'int' and 'str'"),
        (lambda: None.get, "hooks.a must be built, got AttributeError: 'NoneType' object has no attribute 'get'"),
        (
            lambda: HOOKS.build(dict(type='LoggerHook', intervl=3)),
            "hooks.a must be built, got TypeError: LoggerHook.__init__() got an unexpected keyword argument 'intervl'. "
            'Did you mean interval?',
        ),
    ],
)
def test_a_part_says_where(fails, message):
    with pytest.raises(Refusal) as info, part('hooks.a'):
        fails()
    said, at, place = str(info.value).partition(' (')
    if at and not message.startswith('hooks.a: '):
        assert re.fullmatch(r'(in \w+, )?\w+\.py, line \d+: .+\)', place)  # the line of code that stumbled
    else:
        said += at + place
    assert said == message


def test_the_line_that_stumbled_names_what_the_message_does_not():
    def build(lr):
        if not lr >= 0.0:
            raise AssertionError

    with pytest.raises(Refusal, match=r'line \d+: if not lr >= 0.0:\)$'), part('optimizer'):
        build('fast')


def test_a_part_within_a_part_says_both():
    with pytest.raises(Refusal, match='^lora: model: x must be y, got z.$'), part('lora'), part('model'):
        raise ValueError('x must be y, got z.')


@pytest.mark.parametrize('fails', [lambda: nn.Linear(1, 1).attribute, lambda: name])  # noqa: F821
def test_a_bug_in_a_part_stays_one(fails):
    with pytest.raises((AttributeError, NameError)), part('model'):
        fails()


def test_what_our_own_code_stumbles_over_is_a_bug():
    with pytest.raises(AttributeError, match='counted'), part('model'):
        activation_rate([1])
