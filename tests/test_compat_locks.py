"""An error while mmengine makes something by name blocks no other thread."""

from threading import Thread

import pytest
from mmengine.logging import MMLogger
from mmengine.utils import ManagerMixin
from mmengine.visualization import Visualizer

from mmdyt import compat

compat.install()


class Broken(ManagerMixin):
    def __init__(self, name, **options):
        raise ValueError('broken')


class Empty(ManagerMixin):
    pass


@pytest.mark.parametrize(
    'fails',
    [
        lambda: Broken.get_instance('a'),
        lambda: Broken.get_instance(3),
        lambda: Broken.get_instance(),
        lambda: Empty.get_current_instance(),
        lambda: Visualizer.get_instance('b', no_such_argument=1),
    ],
)
def test_another_thread_can_log_after_an_error(fails):
    with pytest.raises((ValueError, AssertionError, TypeError, RuntimeError)):
        fails()
    thread = Thread(target=MMLogger.get_current_instance, daemon=True)
    thread.start()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_instances_are_kept_as_ever():
    first = Empty.get_instance('x')
    assert Empty.get_instance('x') is Empty.get_current_instance() is first
