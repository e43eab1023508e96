"""mmengine: ``mmdyt::dyt/vitb_cifar100.py`` names a config of this package.

mmengine finds such names for the packages in a table of its own. It would also give all that it reads the scope
``mmdyt``, in which a host's types, such as ``PackInputs``, are unknown; ours are named with their prefix and need none.
"""

import types
from functools import wraps

from mmdyt.packaged import PREFIX, find_config

from .imports import replace


def install() -> None:
    """Let ``_base_ = 'mmdyt::...'`` be read."""
    from mmengine.config import Config

    original = Config._get_cfg_path
    if hasattr(original, '__wrapped__'):
        return

    @wraps(original)
    def get_cfg_path(cfg_path: str, filename: str) -> tuple[str, str | None]:
        return (_own(cfg_path), None) if cfg_path.startswith(PREFIX) else original(cfg_path, filename)

    Config._get_cfg_path = staticmethod(get_cfg_path)


def repair_hub(hub: types.ModuleType) -> None:
    """Let ``mmengine.hub.get_config('mmdyt::...')`` be read."""
    original = hub.get_config

    @wraps(original)
    def get_config(cfg_path: str, pretrained: bool = False):
        if not cfg_path.startswith(PREFIX) or pretrained:
            return original(cfg_path, pretrained)
        return hub.Config.fromfile(_own(cfg_path))

    if not hasattr(original, '__wrapped__'):
        hub.get_config = get_config
        replace('mmengine', 'get_config', get_config)


def _own(name: str) -> str:
    path = find_config(name)
    if not path.is_file():
        raise FileNotFoundError(f'{PREFIX} must come before a config such as dyt/vitb_k400.py, got {name}.')
    return str(path)
