"""A repair of how mmengine holds the lock on what it keeps by name: loggers, visualizers, message hubs.

Part of :mod:`mmdyt.compat`; nothing happens on import.
"""

from functools import wraps
from threading import Thread


def install() -> None:
    """Let mmengine give its lock back where a constructor raises. Calling it again changes nothing.

    mmengine 0.10 acquires it and releases it at the end, which an error skips: from then on every other thread that
    logs waits for ever, such as the one in which a clip is opened.
    """
    from mmengine.utils import manager

    if not _keeps_lock(manager):
        return
    manager._release_lock()  # what the probe has left
    manager._accquire_lock = manager._release_lock = _nothing
    for name in ('get_instance', 'get_current_instance'):
        method = vars(manager.ManagerMixin)[name].__func__
        setattr(manager.ManagerMixin, name, classmethod(_within(manager._lock, method)))


def _keeps_lock(manager) -> bool:
    """Whether another thread finds the lock taken after an error."""
    probe, free = type('Probe', (manager.ManagerMixin,), {}), []
    try:
        probe.get_current_instance()  # there is none
    except RuntimeError:
        thread = Thread(target=_try, args=(manager._lock, free))
        thread.start()
        thread.join()
    return free == [False]


def _try(lock, free: list[bool]) -> None:
    free.append(lock.acquire(blocking=False))
    if free[0]:
        lock.release()


def _nothing() -> None:
    """The lock is held by the method around it."""


def _within(lock, method):
    @wraps(method)
    def locked(cls, *args, **kwargs):
        with lock:
            return method(cls, *args, **kwargs)

    return locked
