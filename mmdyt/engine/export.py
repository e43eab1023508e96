"""A model made ready to run elsewhere: a static graph from normalised images to scores, and the facts about it.

B images, K classes, H and W pixels.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
from mmengine.config import Config
from torch import Tensor
from torch.export import Dim, ExportedProgram

import mmdyt
from mmdyt.core.observe import dynamic_branches, eval_mode, record_dispatch
from mmdyt.core.tuning import merge
from mmdyt.engine.host import is_recognizer

FACTS = 'mmdyt.json'  # the extra file of a .pt2
INPUT, OUTPUT = 'image', 'scores'
EXAMPLE = 2  # images that the graph is made from: one would be a special case, with more the number stays open


@dataclass(frozen=True)
class Facts:
    """What whoever runs the exported file must know.

    Attributes:
        task: ``'classification'`` or ``'segmentation'``.
        size: H and W of the images.
        mean: Subtracted from values of 0 to 255, by channel.
        std: What they are then divided by.
        channels: Their order, ``'RGB'`` or ``'BGR'``.
        classes: Their names, in the order of the scores; None where the data has none.
        output: What the scores are.
        capacities: Fraction of the patch tokens of each image that run, by dispatched branch.
        unmerged: Frozen modules whose rewrites have no merged form, and run beside them.
        config: Name of the config.
        version: Of mmdyt.
    """

    task: str
    size: tuple[int, int]
    mean: list[float]
    std: list[float]
    channels: str
    classes: list[str] | None
    output: str
    capacities: Mapping[str, float]
    unmerged: list[str]
    config: str
    version: str


class Deployed(nn.Module):
    """A host model as it is deployed: normalised images in, scores out, nothing else.

    Args:
        host: A classifier of mmpretrain or a segmentor of mmseg; it becomes part of this module.

    Shape:
        (B, 3, H, W) -> (B, K) of a classifier, before softmax or sigmoid; (B, K, H, W) of a segmentor, the logits of
        its decode head resized to the input, as the host does it.
    """

    def __init__(self, host: nn.Module):
        super().__init__()
        self.task = task_of(host)
        self.host = host

    def forward(self, image: Tensor) -> Tensor:
        """Scores of each image, or of each pixel."""
        if self.task == 'segmentation':
            return self.host.encode_decode(image, [dict(img_shape=tuple(image.shape[2:]))])
        return self.host(image, mode='tensor')


def task_of(host: nn.Module) -> str:
    """What a host model does.

    Raises:
        ValueError: If it does something that cannot be exported.
    """
    if getattr(host, 'decode_head', None) is not None:
        return 'segmentation'
    if is_recognizer(host) or getattr(host, 'head', None) is None:
        raise ValueError(
            f'model must be a classifier or a segmentor of images to be exported, got a {type(host).__name__}. Clips, '
            'their views and what joins their frames are not exported.'
        )
    return 'classification'


@torch.no_grad()
def capacities(host: nn.Module) -> dict[str, float]:
    """The capacities of all dispatchers that inference asks, by branch: one pass tells which these are.

    Raises:
        ValueError: If one has none: how many tokens run would be known only while the model runs.
    """
    with record_dispatch(host) as record, eval_mode(host):
        Deployed(host)(torch.zeros(1, 3, *host.backbone.img_size))
    found, branches = {}, dynamic_branches(host)
    for name, (dispatch,) in record.dispatches.items():
        (run,) = record.runs[name]
        if run.executor == 'packed' and dispatch.active is not None:
            raise ValueError(f"inference must be 'auto' or 'fixed' to export a model, got 'packed' in {name}.")
        if dispatch.complete:  # nobody was asked: only the class token is read, say
            continue
        if dispatch.active is None:
            raise ValueError(
                f'dispatchers must have a capacity for the model to be exported, got a '
                f'{type(branches[name].dispatcher.decider).__name__} without one in {name}. Calibrate the checkpoint '
                'with tools/calibrate.py CONFIG CHECKPOINT OUT --per-image, or give this tool a --target-rate.'
            )
        found[name] = branches[name].dispatcher.decider.capacity
    return found


def deploy(host: nn.Module) -> tuple[Deployed, list[str]]:
    """A copy of a host model with everything merged that merges, without what only training needs.

    Args:
        host: Left as it is.

    Returns:
        The copy in fp32, on the CPU, in eval mode; and the names of what has no merged form.
    """
    host = copy.deepcopy(host).cpu().float().eval()
    unmerged = merge(host)
    if hasattr(host, 'auxiliary_head'):
        del host.auxiliary_head
    return Deployed(host).requires_grad_(False), unmerged


@torch.no_grad()
def to_program(model: nn.Module, size: tuple[int, int]) -> ExportedProgram:
    """The graph of a model for images of one size, any number of them.

    Args:
        model: From :func:`deploy`.
        size: H and W.
    """
    example = torch.randn(EXAMPLE, 3, *size, generator=torch.Generator().manual_seed(0))
    return torch.export.export(model, (example,), dynamic_shapes=({0: Dim('batch')},))


def facts_of(model: Deployed, unmerged: list[str], cfg: Config, size: tuple[int, int], classes=None) -> Facts:
    """What goes with an exported model.

    Args:
        model: From :func:`deploy`.
        unmerged: From there.
        cfg: The config of the model.
        size: H and W.
        classes: Names of the classes, in order; None where the data has none.

    Raises:
        ValueError: If images are not normalised by a mean and a standard deviation of three channels.
    """
    preprocessor = model.host.data_preprocessor
    values = [getattr(preprocessor, name, None) for name in ('mean', 'std')]
    if not all(isinstance(value, Tensor) and value.numel() == 3 for value in values):
        raise ValueError('data_preprocessor must have a mean and a std of three channels to be exported, got none.')
    turned = getattr(preprocessor, 'to_rgb', False) or cfg.model.data_preprocessor.get('bgr_to_rgb', False)
    pixel = ' for each pixel' if model.task == 'segmentation' else ''
    return Facts(
        task=model.task,
        size=tuple(size),
        mean=values[0].flatten().tolist(),
        std=values[1].flatten().tolist(),
        channels='RGB' if turned else 'BGR',  # which mmcv loads
        classes=None if classes is None else [str(name) for name in classes],
        output=f'one score for each class{pixel}, before softmax or sigmoid',
        capacities=capacities(model.host),
        unmerged=unmerged,
        config=Path(cfg.filename or '').name,
        version=mmdyt.__version__,
    )


def write_program(program: ExportedProgram, facts: Facts, path: Path) -> None:
    """Write a ``.pt2``, with the facts as JSON in the extra file ``mmdyt.json``."""
    torch.export.save(program, path, extra_files={FACTS: json.dumps(asdict(facts))})


def read_program(path: Path) -> tuple[nn.Module, dict]:
    """A ``.pt2`` as a module, and its facts."""
    extra = {FACTS: ''}
    program = torch.export.load(path, extra_files=extra)
    return program.module(), json.loads(extra[FACTS])
