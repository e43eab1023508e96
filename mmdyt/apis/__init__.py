"""From a checkpoint to predictions, for images and clips, in three tasks."""

import mmdyt.models  # noqa: F401  repairs the wheels, registers

from .loading import load
from .prediction import Prediction, Scored, Skipped
from .predictor import Predictor
from .tasks import Tasks, load_tasks

__all__ = ['Prediction', 'Predictor', 'Scored', 'Skipped', 'Tasks', 'load', 'load_tasks']
