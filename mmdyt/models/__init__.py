"""OpenMMLab classes. Importing this package repairs published wheels first; task files are imported by configs."""

from mmdyt import compat

compat.install()

from .necks import MoEAdapterNeck  # noqa: E402
from .vit import DyTVisionTransformer  # noqa: E402

__all__ = ['DyTVisionTransformer', 'MoEAdapterNeck']
