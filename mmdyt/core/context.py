"""What is asked of branches from outside, in one thread (or task) only.

Contexts of :mod:`~mmdyt.core.observe` may be open in several threads on one model. So nothing of them is kept in the
model: context variables hold tuples, which are replaced and never changed. A new thread has none of them; one that runs
in a copy of its parent's context (``contextvars.copy_context().run``) has what its parent had.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch.nn as nn

Asked = ContextVar[tuple[Mapping[nn.Module, Any], ...]]

# each open context adds one mapping from branches, the innermost last
RULES: Asked = ContextVar('mmdyt_rules', default=())
RECORDS: Asked = ContextVar('mmdyt_records', default=())
WATCHERS: Asked = ContextVar('mmdyt_watchers', default=())


def asked_of(what: Asked, branch: nn.Module) -> list:
    """What is asked of a branch here and now, the innermost last."""
    return [of[branch] for of in what.get() if branch in of]


@contextmanager
def ask(what: Asked, of: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Within the context something more is asked of some branches."""
    what.set((*what.get(), of))
    try:
        yield
    finally:  # not reset(): generators may leave in another order than they entered, and in another thread
        what.set(tuple(other for other in what.get() if other is not of))
