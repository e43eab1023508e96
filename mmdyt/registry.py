"""Registries of scope ``mmdyt``: children of mmengine's, so that any OpenMMLab host finds ``mmdyt.<Class>``."""

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODEL_WRAPPERS as MMENGINE_MODEL_WRAPPERS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='mmdyt', locations=['mmdyt.models'])
DATASETS = Registry('dataset', parent=MMENGINE_DATASETS, scope='mmdyt', locations=['mmdyt.datasets'])
TRANSFORMS = Registry('transform', parent=MMENGINE_TRANSFORMS, scope='mmdyt', locations=['mmdyt.datasets'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='mmdyt', locations=['mmdyt.engine'])
OPTIM_WRAPPERS = Registry('optim_wrapper', parent=MMENGINE_OPTIM_WRAPPERS, scope='mmdyt', locations=['mmdyt.engine'])
MODEL_WRAPPERS = Registry('model_wrapper', parent=MMENGINE_MODEL_WRAPPERS, scope='mmdyt', locations=['mmdyt.engine'])
