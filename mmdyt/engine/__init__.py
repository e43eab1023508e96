"""Hooks of mmengine's runner: cost and parameter reports, exact resuming."""

from .cpu_amp import CPUAmpOptimWrapper
from .flops import FLOPsHook
from .parameters import ParameterReportHook
from .rng_state import RNGStateHook

__all__ = ['CPUAmpOptimWrapper', 'FLOPsHook', 'ParameterReportHook', 'RNGStateHook']
