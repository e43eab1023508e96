"""Checkpoints of tiny random models, as a run would have written them."""

import io
import logging
from contextlib import redirect_stdout
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils import import_modules_from_strings

CLASSES = 'red', 'green', 'blue'
PALETTE = [[250, 0, 0], [0, 250, 0], [0, 0, 250]]


def make_checkpoint(config: Path, folder: Path, capacities=None, options=None, text: str | None = None) -> Path:
    """A checkpoint of the config's model, whose gates differ between tokens; it carries the config as text.

    Args:
        config: A file.
        folder: For the checkpoint.
        capacities: Of the branches; None leaves thresholds.
        options: Changes of the config.
        text: In the place of the config.
    """
    from mmdyt.core.fit.calibrate import token_dispatchers
    from mmdyt.core.observe import dynamic_branches

    cfg = Config.fromfile(config, import_custom_modules=False)
    cfg.merge_from_dict(options or {})
    import_modules_from_strings(**cfg.custom_imports)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope), redirect_stdout(io.StringIO()):
        logging.disable(logging.INFO)
        try:
            model = MODELS.build(cfg.model)
            model.init_weights()
        finally:
            logging.disable(logging.NOTSET)
    if dynamic_branches(model):
        for i, dispatcher in enumerate(token_dispatchers(model).values()):
            torch.nn.init.normal_(dispatcher.gate.weight)
            dispatcher.set_rule(capacity=capacities[i] if capacities else None)
    for name, parameter in model.named_parameters():
        if name.endswith(('head.weight', 'head.bias', 'fc_cls.weight', 'fc_cls.bias', 'conv_seg.weight')):
            torch.nn.init.normal_(parameter)  # else they say the same of all that they see
    meta = dict(cfg=cfg.pretty_text if text is None else text, dataset_meta=dict(classes=CLASSES, palette=PALETTE))
    path = folder / 'model.pth'
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return path
