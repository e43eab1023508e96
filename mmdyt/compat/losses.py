"""Losses of mmsegmentation on ignored pixels, one output channel, class weights, and the CPU.

B images, C classes. Each repair first asks the host for a loss that it gets wrong, and does nothing where it is right.
"""

import types
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor

from .imports import replace

IGNORED = 255


def repair_cross_entropy(module: types.ModuleType) -> None:
    """Mend class weights in softmax and sigmoid cross-entropy, and sigmoid of one channel without any label."""
    logits, labels = torch.zeros(1, 2, 1, 3), torch.tensor([[[0, 1, IGNORED]]])
    if not _works(lambda: module.cross_entropy(logits, labels, class_weight=torch.ones(2), ignore_index=IGNORED)):
        replace('mmseg', 'cross_entropy', _weighted(module.cross_entropy))
    nothing = torch.full_like(labels, IGNORED)
    options = dict(ignore_index=IGNORED)
    if not (
        _works(lambda: module.binary_cross_entropy(logits, labels, class_weight=torch.ones(2), **options))
        and _works(lambda: module.binary_cross_entropy(logits[:, :1], nothing, **options))
    ):
        replace('mmseg', 'binary_cross_entropy', _weighted_binary(module.binary_cross_entropy))


def _works(loss) -> bool:
    """Whether a loss can be computed."""
    try:
        loss()
    except (IndexError, RuntimeError, ValueError):
        return False
    return True


def _weighted(cross_entropy):
    """The mean of pixels that have a class weight looks up the weight of class 255.

    An ignored pixel weighs nothing where only the others are averaged (``avg_non_ignore``), and 1 where all are, so
    that weights of 1 give what no weights give. An ``ignore_index`` that has a weight of its own is left to the host.
    """

    @wraps(cross_entropy)
    def weighted(
        pred,
        label,
        weight=None,
        class_weight=None,
        reduction='mean',
        avg_factor=None,
        ignore_index=-100,
        avg_non_ignore=False,
    ):
        classes = 0 if class_weight is None else len(class_weight)
        if classes and classes != pred.shape[1]:
            raise ValueError(f'class_weight must hold a number for each of {pred.shape[1]} classes, got {classes}.')
        if classes and avg_factor is None and reduction == 'mean' and not -classes <= ignore_index < classes:
            ignored = label == ignore_index
            weights = class_weight[label.masked_fill(ignored, 0)]
            avg_factor = weights.masked_fill(ignored, 0.0 if avg_non_ignore else 1.0).sum()
        return cross_entropy(pred, label, weight, class_weight, reduction, avg_factor, ignore_index, avg_non_ignore)

    return weighted


def _weighted_binary(binary_cross_entropy):
    """Class weights are laid along the width of the image; one channel looks for the highest label among none."""

    @wraps(binary_cross_entropy)
    def weighted(pred, label, weight=None, reduction='mean', avg_factor=None, class_weight=None, **options):
        if pred.size(1) == 1 and (label == options.get('ignore_index', -100)).all():
            nothing = pred.squeeze(1) * 0
            return nothing if reduction == 'none' else nothing.sum()
        if class_weight is not None and pred.dim() == 4 and class_weight.dim() == 1:
            class_weight = class_weight.view(-1, 1, 1)
        return binary_cross_entropy(pred, label, weight, reduction, avg_factor, class_weight, **options)

    return weighted


def repair_dice(module: types.ModuleType) -> None:
    """Leave ignored pixels out of the Dice loss, and let one channel mean the foreground.

    mmseg 1.2 counts what is predicted on ignored pixels as wrong, and takes label 0 for the foreground of one channel,
    where all its other losses and its predictions take label 1.
    """
    logits = torch.tensor([20.0, -20.0, 20.0]).view(1, 1, 1, 3)
    labels = torch.tensor([[[1, 0, IGNORED]]])
    if module.DiceLoss()(logits, labels).item() > 0.01:
        module._expand_onehot_labels_dice = _marked_one_hot(module._expand_onehot_labels_dice)
        module.dice_loss = _dice_of_known(module.dice_loss)


def _marked_one_hot(expand):
    """One-hot labels (B, C, H, W), with -1 at pixels that have none of the classes."""

    @wraps(expand)
    def marked(pred: Tensor, target: Tensor) -> Tensor:
        classes = pred.shape[1]
        known = (target >= 0) & (target < max(classes, 2))
        one_hot = (target == 1).unsqueeze(1).long() if classes == 1 else expand(pred, target)
        return one_hot.masked_fill(~known.unsqueeze(1), -1)

    return marked


def _dice_of_known(dice_loss):
    @wraps(dice_loss)
    def of_known(pred, target, *args, **kwargs):
        known = target >= 0
        return dice_loss(pred * known, target * known, *args, **kwargs)

    return of_known


def repair_focal(module: types.ModuleType) -> None:
    """Let the focal loss run on the CPU, where it takes the one-hot column of no class at all for the labels."""
    if not _works(lambda: module.FocalLoss()(torch.zeros(1, 3, 1, 2), torch.zeros(1, 1, 2, dtype=torch.long))):
        module.FocalLoss.forward = _one_hot_on_cpu(module.FocalLoss.forward)


def _one_hot_on_cpu(forward):
    @wraps(forward)
    def on_cpu(
        self, pred, target, weight=None, avg_factor=None, reduction_override=None, ignore_index=IGNORED, **kwargs
    ):
        if not pred.is_cuda and pred.shape != target.shape:
            known = target != ignore_index
            weight = (known.to(pred) if weight is None else weight * known).flatten()
            labels = target.masked_fill(~known, 0)
            classes = pred.shape[1]
            target = labels.unsqueeze(1) if classes == 1 else F.one_hot(labels, classes).movedim(-1, 1)
        return forward(self, pred, target, weight, avg_factor, reduction_override, ignore_index, **kwargs)

    return on_cpu


def repair_lovasz(module: types.ModuleType) -> None:
    """Let the multi-class Lovasz loss meet images with no labelled pixel, which make it NaN, or with one."""
    probs = torch.full((1, 2, 1, 2), 0.5)
    nothing, one = (torch.tensor([[[label, IGNORED]]]) for label in (IGNORED, 0))
    if not _works(lambda: module.lovasz_softmax(probs, one, ignore_index=IGNORED)):
        module.flatten_probs = _flat(module.flatten_probs)
    if module.lovasz_softmax(probs, nothing, ignore_index=IGNORED).dim():
        module.lovasz_softmax_flat = _of_some(module.lovasz_softmax_flat)


def _flat(flatten_probs):
    @wraps(flatten_probs)
    def flat(probs, labels, ignore_index=None):
        classes = probs.shape[1] if probs.dim() == 4 else 1
        probs, labels = flatten_probs(probs, labels, ignore_index)
        return probs.view(-1, classes), labels

    return flat


def _of_some(lovasz_softmax_flat):
    @wraps(lovasz_softmax_flat)
    def of_some(probs, labels, *args, **kwargs):
        return lovasz_softmax_flat(probs, labels, *args, **kwargs) if labels.numel() else probs.sum()

    return of_some


def repair_accuracy(module: types.ModuleType) -> None:
    """Let ``acc_seg`` of one output channel compare its sign with the labels; mmseg takes all for background."""
    if module.accuracy(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1)).item() < 50:
        replace('mmseg', 'accuracy', _of_one_channel(module.accuracy))


def _of_one_channel(accuracy):
    @wraps(accuracy)
    def of_one_channel(pred, target, *args, **kwargs):
        if pred.shape[1] == 1:
            pred = torch.cat([torch.zeros_like(pred), pred], dim=1)
        return accuracy(pred, target, *args, **kwargs)

    return of_one_channel
