"""Repairs for mmaction2's inferencer, which knows one reader of videos.

Part of :mod:`mmdyt.compat`; nothing happens on import.
"""

import copy
from functools import wraps
from importlib import import_module
from os.path import isfile
from types import ModuleType

OPENERS = ('OpenClip', 'PyAVInit', 'OpenCVInit')  # of other readers than decord, or of several


def repair_action_recognition(module: ModuleType) -> None:
    """Let ``ActionRecogInferencer`` open and decode videos as the config says, with PyAV, say.

    mmaction2 puts decord in the place of whatever opens and decodes them: PyAV's configs fail where decord is not
    installed, as on macOS and ARM. A step that it does not know, such as ``mmdyt.OpenClip``, is left between.
    """
    kind = module.ActionRecogInferencer
    if not hasattr(kind._init_pipeline, '__wrapped__'):
        kind._init_pipeline = _with_own_reader(kind._init_pipeline)


def repair_action_visualizer(module: ModuleType) -> None:
    """Let mmaction2's visualizer read a video with PyAV where decord is not installed."""
    kind = module.ActionVisualizer
    if not hasattr(kind._load_video, '__wrapped__'):
        kind._load_video = _without_decord(kind._load_video)


def _with_own_reader(init_pipeline):
    @wraps(init_pipeline)
    def own(self, cfg):
        dataset = cfg.test_dataloader.dataset
        steps = copy.deepcopy(list(dataset.pipeline))
        opener = next((step for step in steps if _name(step) in OPENERS), None)
        if opener is None:
            return init_pipeline(self, cfg)
        if self.input_format != 'video':  # there is nothing to open
            dataset.pipeline = [step for step in steps if step is not opener]
            return init_pipeline(self, cfg)
        composed = init_pipeline(self, cfg)
        decoder = next(step for step in steps if 'Decode' in _name(step))
        opening, decoding = type(composed)([opener, decoder]).transforms
        theirs = [step for step in composed.transforms if type(step).__name__ not in ('DecordInit', _name(opener))]
        theirs = [decoding if 'Decode' in type(step).__name__ else step for step in theirs]
        composed.transforms = [theirs[0], opening, *theirs[1:]]  # the first step names the file
        return composed

    return own


def _without_decord(load_video):
    @wraps(load_video)
    def load(self, video, target_resolution=None):
        if isinstance(video, str) and isfile(video):
            try:
                import_module('decord')
            except ImportError:
                import av

                with av.open(video) as container:
                    video = [frame.to_ndarray(format='bgr24') for frame in container.decode(video=0)]
        return load_video(self, video, target_resolution)

    return load


def _name(step: dict) -> str:
    """Of the type of a step, without its scope."""
    kind = step['type']
    return (kind if isinstance(kind, str) else kind.__name__).rpartition('.')[2]
