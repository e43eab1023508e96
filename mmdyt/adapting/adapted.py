"""A Vision Transformer with parts, and what one does with it. B images."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from mmdyt.core.fit.calibrate import Calibrated, calibrate, check_per_image, token_dispatchers
from mmdyt.core.fit.evidence import fit_dispatchers
from mmdyt.core.fit.mean_update import fit_mean_updates
from mmdyt.core.fit.request import CalibrationRequest
from mmdyt.core.fit.restore import unless_refused
from mmdyt.core.fit.shares import moved_shares
from mmdyt.core.fit.token_evidence import fit_token_gates, gated
from mmdyt.core.losses import check_rate
from mmdyt.core.macs import Count, count_macs
from mmdyt.core.observe import all_branches, dynamic_branches, eval_mode, record_dispatch
from mmdyt.core.tuning import merge
from mmdyt.hosts.named import NamedLayer, left_out

from .methods import Method
from .saving import load_tuned, save_tuned


class Adapted(nn.Module):
    """What :func:`mmdyt.adapt` gives; runs as the library's network does, and gives what that gives.

    Attributes:
        vit: The library's network, whose layers are blocks; whatever else it can do, it still can.
        method: What was added to it.
        rate: The rate that was set; None where the dispatchers decide.
    """

    def __init__(self, vit: nn.Module, method: Method):
        super().__init__()
        self.vit = vit
        self.method = method
        self.rate: float | None = None

    def forward(self, *args, **kwargs):
        """Whatever the library's network gives for these."""
        return self.vit(*args, **kwargs)

    def set_rate(self, rate: float) -> None:
        """Let the mean over the branches of their shares of active patch tokens be this, in every image.

        Without a fit the shares are equal; after :meth:`fit` all are moved alike, so that they keep their order. Gates
        that wait for a fit run every token until then.

        Args:
            rate: In (0, 1].

        Raises:
            ValueError: If it is no rate, or the method has no dispatchers whose rate can be set.
        """
        check_rate(rate)
        if not dynamic_branches(self.vit):
            raise ValueError(f'rate must be None with a method that has no dispatchers, got {rate}.')
        dispatchers = token_dispatchers(self.vit)
        check_per_image(dispatchers, True)
        self.rate = float(rate)
        if self.waits:
            return
        own = {name: one.capacity for name, one in dispatchers.items() if one.capacity is not None}
        shares = dict.fromkeys(dispatchers, float(rate))
        if len(set(own.values())) > 1 and rate < 1:
            shares |= moved_shares(own, rate)
        for name, dispatcher in dispatchers.items():
            dispatcher.set_rule(capacity=shares[name])

    @property
    def waits(self) -> bool:
        """Whether there are gates that are to be fitted, and were not: every token runs."""
        deciding = [branch.dispatcher.decider for branch in dynamic_branches(self.vit).values()]
        fitted = [one for one in deciding if getattr(one, 'fitted', False)]
        return any(one.capacity is None and one.threshold == -math.inf for one in fitted)

    def fit(
        self, batches: Iterable, loss: Callable[['Adapted', Any], Tensor], rate: float | None = None
    ) -> dict[str, float]:
        """Fit gates to evidence, in closed form: what it costs the loss to skip a token, or to lose it.

        What inactive tokens get is measured first, where the method has that (``evidence``, ``context``). Then all
        branches share the rate such that one threshold holds for all of them, and keep these shares in every image.

        Args:
            batches: Some batches of training data, whatever they are made of; kept in memory meanwhile.
            loss: ``loss(model, batch)`` gives the scalar loss of a batch.
            rate: Of inference, in (0, 1]; None is that which was set.

        Returns:
            The share of the variance of the log evidence that the fit explains, by name of branch or part.

        Raises:
            ValueError: If there is nothing to fit, or no rate; nothing is changed then.
        """
        losses = [partial(loss, self, batch) for batch in batches]
        if gated(self.vit):
            return fit_token_gates(self.vit, losses)
        check_per_image(token_dispatchers(self.vit), True)
        rate = self._wanted(rate)
        with unless_refused(self.vit):
            fit_mean_updates(self.vit, losses)
            explained = fit_dispatchers(self.vit, losses)
            self._share(losses, rate)
        return explained

    def calibrate(
        self, batches: Iterable, run: Callable[['Adapted', Any], Any], rate: float | None = None
    ) -> dict[str, Calibrated]:
        """Share a rate among the branches of a trained model: one threshold for all, then each image keeps the shares.

        Args:
            batches: Some batches of training data.
            run: ``run(model, batch)`` runs the model on a batch.
            rate: As of :meth:`fit`.

        Returns:
            What was set, by branch name.
        """
        return self._share([partial(run, self, batch) for batch in batches], self._wanted(rate))

    def _wanted(self, rate: float | None) -> float:
        """A rate that is given, or that was set."""
        rate = self.rate if rate is None else rate
        if rate is None:
            raise ValueError('rate must be given, here or before, got None.')
        check_rate(rate)
        return rate

    def _share(self, forwards: list[Callable], rate: float) -> dict[str, Calibrated]:
        found = calibrate(self.vit, forwards, CalibrationRequest(rate, 'global', per_image=True))
        self.set_rate(rate)  # calibration meets it to a thousandth, on its images
        return found

    @torch.no_grad()
    def macs(self, *args, **kwargs) -> Count:
        """Multiply-adds of each image of a batch in inference: what ran is counted, all that is around the layers too.

        Args:
            *args: What :meth:`forward` gets, a batch of images first.
            **kwargs: The same.

        Returns:
            One number, or (B,) where images differ.
        """
        with eval_mode(self.vit), record_dispatch(self.vit) as record:
            self(*args, **kwargs)
            runs = {name: record.runs[name][-1] for name in all_branches(self.vit)}
        total = self._around(args, kwargs)
        for name, layer in self._layers().items():
            total = total + layer.macs({site: runs[f'{name}.dynamic.{site}'] for site in layer.branches()})
        return total

    @torch.no_grad()
    def plain_macs(self, *args, **kwargs) -> Count:
        """Multiply-adds of each image of a batch in the network as it was, without parts."""
        tokens = []
        layers = list(self._layers().values())
        handle = layers[0].register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[1]))
        try:
            around = self._around(args, kwargs)
        finally:
            handle.remove()
        return around + sum(layer.dense_macs(tokens[0]) for layer in layers)

    def _around(self, args: tuple, kwargs: dict) -> float:
        """What an image costs outside the layers."""
        images = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with eval_mode(self.vit), left_out():
            return count_macs(lambda: self(*args, **kwargs)) / len(images)

    def _layers(self) -> dict[str, NamedLayer]:
        return {name: module for name, module in self.vit.named_modules() if isinstance(module, NamedLayer)}

    def merge(self) -> list[str]:
        """Fold what merges (LoRA, SSF, ETHER) into the frozen weights; returns names of modules where that is not so.

        The network then computes the same for less; files of tuned parameters can no longer be saved or loaded.
        """
        return merge(self.vit)

    def save(self, path: str | Path) -> None:
        """Write all but the frozen network: parts, gates, thresholds, what else is tuned, and the method.

        Args:
            path: ``.safetensors``, or any other ending for a file of ``torch.save``.
        """
        save_tuned(self.vit, self.method.text(), self.rate, Path(path))

    def load(self, path: str | Path) -> None:
        """Read what :meth:`save` wrote into a network that was adapted in the same way.

        Raises:
            ValueError: If the file is of another method or network, or none; nothing is changed then.
        """
        self.rate = load_tuned(self.vit, self.method.text(), Path(path))
