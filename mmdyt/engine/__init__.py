"""Hooks of mmengine's runner: cost and parameter reports, calibration, the temperature's schedule, exact resuming."""

from .calibration import CalibrationHook
from .cpu_amp import CPUAmpOptimWrapper
from .evidence import EvidenceHook
from .flops import FLOPsHook
from .parameters import ParameterReportHook
from .rng_state import RNGStateHook
from .tau import TauScheduleHook

__all__ = [
    'CPUAmpOptimWrapper',
    'CalibrationHook',
    'EvidenceHook',
    'FLOPsHook',
    'ParameterReportHook',
    'RNGStateHook',
    'TauScheduleHook',
]
