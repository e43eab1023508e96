"""Repairs for defects of the published OpenMMLab wheels.

Nothing happens on import. `install` applies each repair only where its defect is present, so a fixed release, a
source checkout or the compiled mmcv is left as it is.
"""

import importlib
import io
import sys
import types
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from inspect import signature
from pathlib import Path
from pickle import UnpicklingError

from . import configs, loading, locks, saving, tuned_files


def install() -> None:
    """Repair the installed OpenMMLab packages, in this process only.

    Call it before mmseg or mmaction is imported. Calling it again changes nothing. No task library is imported.
    """
    _stub_missing_compiled_ops()
    _stub_missing_drn_localizer()
    _allow_resuming_history()
    _load_addresses_safely()
    _write_test_metrics_once()
    _repair_on_import()
    loading.install()
    if find_spec('mmengine') is not None:
        configs.install()
        saving.install()
        locks.install()
        tuned_files.install()


# mmcv-lite: mmcv.ops without its compiled part


def _stub_missing_compiled_ops() -> None:
    """Let `import mmcv.ops` succeed under mmcv-lite, whose ops fail only when they are called.

    mmcv-lite ships `mmcv/ops/*.py` but no `mmcv._ext`, and each of these files loads its compiled functions on import.
    mmseg imports `mmcv.ops` for functions that are pure Python (`point_sample`), so without this it cannot be imported.
    `mmcv._ext` itself stays absent: that is how mmengine tells whether the compiled ops are there.
    """
    if find_spec('mmcv') is None or find_spec('mmcv._ext') is not None:
        return
    ext_loader = importlib.import_module('mmcv.utils.ext_loader')
    ext_loader.load_ext = _load_ext


def _load_ext(name: str, funcs: list[str]) -> types.ModuleType | types.SimpleNamespace:
    """Stand in for `mmcv.utils.ext_loader.load_ext`: a missing extension module gives stubs, not an error."""
    if find_spec(f'mmcv.{name}') is not None:
        return importlib.import_module(f'mmcv.{name}')
    stubs = {func: _unavailable_op(func) for func in funcs}
    # mmcv's collect_env calls these two as soon as mmcv.ops can be imported; 'n/a' is what it prints otherwise.
    stubs |= {func: lambda: 'n/a' for func in funcs if func in ('get_compiler_version', 'get_compiling_cuda_version')}
    return types.SimpleNamespace(**stubs)


def _unavailable_op(name: str):
    def op(*args, **kwargs):
        raise RuntimeError(
            f'{name} is a compiled op of mmcv, and mmcv-lite has none. Install the full mmcv in its place: '
            '`pip uninstall mmcv-lite`, then `mim install "mmcv>=2.0,<2.2"`.'
        )

    op.__name__ = name
    return op


# mmaction2: a package that was left out of the wheel


class DRN:
    """Stands in for mmaction's temporal localizer of this name, which the wheel lacks; it cannot be built."""

    def __init__(self, *args, **kwargs):
        raise RuntimeError(
            "The localizer DRN is missing from mmaction2's wheel. Install mmaction2 from source: "
            '`pip install git+https://github.com/open-mmlab/mmaction2`.'
        )


def _stub_missing_drn_localizer() -> None:
    """Let `import mmaction.models` succeed although `mmaction/models/localizers/drn` is missing.

    The folder has no `__init__.py`, so mmaction2 1.2.0's build left it out of the wheel, but `localizers/__init__.py`
    imports `DRN` from it.
    """
    mmaction = find_spec('mmaction')  # finds the folder, imports nothing
    if mmaction is None:
        return
    localizers = Path(mmaction.submodule_search_locations[0], 'models', 'localizers')
    package = 'mmaction.models.localizers.drn'
    if not localizers.is_dir() or (localizers / 'drn').is_dir() or package in sys.modules:
        return
    sys.modules[package] = module_from_spec(ModuleSpec(package, loader=None, is_package=True))
    module = module_from_spec(ModuleSpec(f'{package}.drn', loader=None))
    module.DRN = DRN
    sys.modules[module.__name__] = sys.modules[package].drn = module


# mmengine: resuming under torch.load(weights_only=True)

# numbers, truth values and text: of logged values, of metrics, and of what a data set says of itself (a palette, say)
DTYPES = ('?', *(kind + size for kind in 'iu' for size in '1248'), 'f2', 'f4', 'f8', 'U1', 'S1')


def _allow_resuming_history() -> None:
    """Let `torch.load` read the training history that mmengine writes into each checkpoint.

    Since torch 2.6 `torch.load` accepts tensors and plain containers only, unless a class is declared safe. mmengine
    0.10.7 saves its message hub and what the data set says of itself, which hold `HistoryBuffer` objects, NumPy arrays
    and NumPy scalars, and cannot load what it saved. Declared safe is just what these objects are made of; everything
    else is still rejected.
    """
    if find_spec('mmengine') is None or _history_can_be_loaded():
        return
    from torch.serialization import add_safe_globals

    add_safe_globals(_history_globals())


def _history_can_be_loaded() -> bool:
    import torch

    file = io.BytesIO()
    torch.save(_history_samples(), file)
    file.seek(0)
    try:
        torch.load(file)
    except UnpicklingError:
        return False
    return True


def _history_samples() -> list:
    """One of each thing that a message hub holds: logged values are floats or ints, best scores any NumPy scalars."""
    import numpy as np
    from mmengine.logging import HistoryBuffer

    scalars = [np.zeros(1, code)[0] for code in DTYPES]
    return [HistoryBuffer([0.5], [1]), HistoryBuffer([1], [1]), *scalars]


def _history_globals() -> list:
    """What `_history_samples` needs, under the names that NumPy 1 and NumPy 2 write for it."""
    import numpy as np
    from mmengine.logging import HistoryBuffer

    reconstruct = np.zeros(0).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    numpy_functions = [
        (function, f'numpy.{core}.multiarray.{name}')
        for core in ('core', '_core')
        for function, name in ((reconstruct, '_reconstruct'), (scalar, 'scalar'))
    ]
    dtypes = [type(np.dtype(code)) for code in DTYPES]
    # A buffer names its four statistics through getattr. The real getattr would open every object to a hostile file.
    return [HistoryBuffer, np.ndarray, np.dtype, *dtypes, *numpy_functions, (_statistic, 'builtins.getattr')]


def _statistic(owner: type, name: str):
    """Stand in for getattr in a checkpoint: HistoryBuffer's own statistics and nothing else."""
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise UnpicklingError(f'getattr({owner!r}, {name!r}) is not allowed in a checkpoint.')
    return getattr(owner, name)


# mmengine: checkpoints from addresses


def _load_addresses_safely() -> None:
    """Let mmengine load a checkpoint from an http address as safely as one from a file.

    It calls `torch.hub.load_state_dict_from_url`, whose `weights_only` is off by default: hostile files would run code.
    """
    if find_spec('mmengine') is None:
        return
    checkpoint = importlib.import_module('mmengine.runner.checkpoint')
    parameter = signature(checkpoint.load_url).parameters.get('weights_only')
    if parameter is not None and parameter.default is not True:
        checkpoint.load_url = partial(checkpoint.load_url, weights_only=True)


# mmengine: one metrics file, many writers


def _write_test_metrics_once() -> None:
    """Let rank 0 alone write the JSON of a distributed test.

    mmengine's LoggerHook writes it on every rank, all into one file: lines of different length leave broken JSON.
    """
    if find_spec('mmengine') is None:
        return
    logger_hook = importlib.import_module('mmengine.hooks.logger_hook')
    if not hasattr(logger_hook.dump, '__wrapped__'):
        logger_hook.dump = importlib.import_module('mmengine.dist').master_only(logger_hook.dump)


# mmengine, mmcv, mmseg, mmaction2: single functions of modules that may be imported later


def _repair_on_import() -> None:
    """Mend losses, colours, schedulers and inferencers as soon as their modules are imported."""
    if find_spec('mmengine') is None:
        return
    from . import colors, inferencers, losses, schedulers
    from .imports import repair_modules

    repair_modules(
        {
            'mmengine.hub.hub': configs.repair_hub,
            'mmengine.optim.scheduler.param_scheduler': schedulers.repair_one_cycle,
            'mmcv.image.photometric': colors.repair_mmcv_hue,
            'mmaction.apis.inferencers.actionrecog_inferencer': inferencers.repair_action_recognition,
            'mmaction.visualization.action_visualizer': inferencers.repair_action_visualizer,
            'mmaction.datasets.transforms.processing': colors.repair_mmaction_hue,
            'mmseg.models.losses.accuracy': losses.repair_accuracy,
            'mmseg.models.losses.cross_entropy_loss': losses.repair_cross_entropy,
            'mmseg.models.losses.dice_loss': losses.repair_dice,
            'mmseg.models.losses.focal_loss': losses.repair_focal,
            'mmseg.models.losses.lovasz_loss': losses.repair_lovasz,
        }
    )
