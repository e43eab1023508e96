"""Refuse mistakes before work starts: what the tools do with a command line before anything runs."""

from .check import check, check_images
from .config import (
    KeyValues,
    add_dry_run_argument,
    add_method_arguments,
    add_training_arguments,
    dump_predictions,
    load_config,
    paint_predictions,
    set_resume,
    use_amp,
    use_tta,
)
from .processes import build_runner, end_cpu_processes, is_flexible
from .refusals import clean_exit, part
from .work_dir import hold_work_dir

__all__ = [
    'KeyValues',
    'add_dry_run_argument',
    'add_method_arguments',
    'add_training_arguments',
    'build_runner',
    'check',
    'check_images',
    'clean_exit',
    'dump_predictions',
    'end_cpu_processes',
    'hold_work_dir',
    'is_flexible',
    'load_config',
    'paint_predictions',
    'part',
    'set_resume',
    'use_amp',
    'use_tta',
]
