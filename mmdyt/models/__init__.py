"""OpenMMLab classes. Importing this package repairs published wheels first; task files are imported by configs."""

from mmdyt import compat

compat.install()

from .vit import DyTVisionTransformer  # noqa: E402

__all__ = ['DyTVisionTransformer']
