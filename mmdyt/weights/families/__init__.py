"""A table for each family of layouts, the likeliest first."""

from ..family import Family
from .clip import CLIP_TOWER
from .huggingface import HF_CLIP, HF_DINOV2, HF_VIT
from .timm import TIMM
from .torchvision import TORCHVISION

FAMILIES: tuple[Family, ...] = (TIMM, TORCHVISION, CLIP_TOWER, HF_VIT, HF_DINOV2, HF_CLIP)
