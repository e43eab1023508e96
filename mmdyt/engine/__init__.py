"""For mmengine's runner: hooks that report, calibrate, fit, schedule, resume and watch; processes that share a base."""

from .calibration import CalibrationHook
from .consistency import ConsistencyHook
from .cpu_amp import CPUAmpOptimWrapper
from .evidence import EvidenceHook
from .finite import FiniteHook
from .flops import FLOPsHook
from .keep_rate import KeepRateHook
from .parameters import ParameterReportHook
from .random_masks import RandomMasksHook
from .rng_state import RNGStateHook
from .sharding import FrozenShardedDataParallel
from .tau import TauScheduleHook
from .tuned_checkpoint import TunedCheckpointHook
from .visualize.hook import DispatchVisualizationHook

__all__ = [
    'CPUAmpOptimWrapper',
    'CalibrationHook',
    'ConsistencyHook',
    'DispatchVisualizationHook',
    'EvidenceHook',
    'FLOPsHook',
    'FiniteHook',
    'FrozenShardedDataParallel',
    'KeepRateHook',
    'ParameterReportHook',
    'RNGStateHook',
    'RandomMasksHook',
    'TauScheduleHook',
    'TunedCheckpointHook',
]
