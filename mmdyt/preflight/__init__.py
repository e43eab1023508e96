"""Refuse mistakes before work starts: what the tools do with a command line before anything runs."""

from .check import check, check_images
from .config import (
    add_dry_run_argument,
    add_method_arguments,
    dump_predictions,
    load_config,
    paint_predictions,
    set_resume,
    use_amp,
    use_tta,
)
from .processes import end_cpu_processes
from .refusals import clean_exit, part

__all__ = [
    'add_dry_run_argument',
    'add_method_arguments',
    'check',
    'check_images',
    'clean_exit',
    'dump_predictions',
    'end_cpu_processes',
    'load_config',
    'paint_predictions',
    'part',
    'set_resume',
    'use_amp',
    'use_tta',
]
