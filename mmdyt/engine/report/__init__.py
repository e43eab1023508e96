"""One page about one or more runs: what they were, how they went, what they cost."""

from .page import MARK, write_report
from .reading import Run, read_runs

__all__ = ['MARK', 'Run', 'read_runs', 'write_report']
