"""Time training steps of several configs side by side, and ask for their memory."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner, load_checkpoint, set_random_seed
from mmengine.utils import import_modules_from_strings

from mmdyt.engine.benchmark.memory import added_memory
from mmdyt.files import write_json


class Step:
    """One config, ready to train on one batch of its own data.

    Args:
        name: What it is called in a table.
        cfg: The config, checked as before training.
        seed: Of the weights that start at random, and of the batch.
    """

    def __init__(self, name: str, cfg: Config, seed: int = 0):
        self.name = name
        self.seconds: list[float] = []
        self.cfg = cfg
        set_random_seed(seed)
        import_modules_from_strings(**cfg.get('custom_imports', dict(imports=[])))
        self.scope = cfg.get('default_scope', 'mmengine')
        init_default_scope(self.scope)
        self.device = 'cuda' if torch.cuda.is_available() else 'cpu'
        self.model = MODELS.build(cfg.model)
        self.model.init_weights()
        if cfg.get('load_from'):
            load_checkpoint(self.model, cfg.load_from, map_location='cpu')
        self.model.to(self.device).train()
        self.optimizer = build_optim_wrapper(self.model, cfg.optim_wrapper)
        loader = dict(cfg.train_dataloader, num_workers=0, persistent_workers=False)
        self.batch = next(iter(Runner.build_dataloader(loader, seed=seed)))

    def run(self) -> float:
        """Seconds of one step: forward, backward, optimizer."""
        init_default_scope(self.scope)
        self._wait()
        start = time.perf_counter()
        self.model.train_step(self.batch, self.optimizer)
        self._wait()
        return time.perf_counter() - start

    def memory(self) -> float:
        """Megabytes (2^20 bytes) that a step adds at its peak: activations, gradients; not weights and optimizer.

        Of a step after the first, which makes the states of the optimizer.
        """
        init_default_scope(self.scope)
        return added_memory(lambda: self.model.train_step(self.batch, self.optimizer), torch.device(self.device))

    def _wait(self) -> None:
        if self.device == 'cuda':
            torch.cuda.synchronize()


def take_turns(steps: Sequence[Step], rounds: int) -> None:
    """Run each step once a round, so that what else the machine does falls on all alike; ``seconds`` are kept."""
    for round_ in range(rounds + 1):
        for step in steps:
            seconds = step.run()
            if round_:  # the first step allocates and warms up
                step.seconds.append(seconds)


def ratio(step: Step, base: Step) -> float:
    """How long a step takes beside ``base``: the median of the ratios within a round."""
    return statistics.median(mine / first for mine, first in zip(step.seconds, base.seconds, strict=True))


def device_name() -> str:
    """What steps are timed on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f'{platform.machine()} CPU'


class StepTimes:
    """Times of a training step beside that of one method, kept in a file.

    Args:
        file: Of JSON, made where it is missing; one that is broken is written anew.
        base: The method that others are measured by.
        rounds: Timed steps.
        load: The config of a method.
        marks: The fingerprint of a method.
        same: Whether two fingerprints may be taken for one.
    """

    def __init__(
        self,
        file: Path,
        base: str,
        rounds: int,
        load: Callable[[str], Config],
        marks: Callable[[str], Mapping[str, str]],
        same: Callable[[Mapping, Mapping], bool],
    ):
        self.file, self.base, self.rounds = file, base, rounds
        self._load, self._marks, self._same = load, marks, same
        self._step: Step | None = None

    def known(self) -> dict[str, dict]:
        """What was measured on this device with these settings, by method."""
        try:
            entries = dict(json.loads(self.file.read_text(encoding='utf-8')))
        except (OSError, TypeError, ValueError):
            entries = {}
        kept = {method: entry for method, entry in entries.items() if self._is_valid(method, entry)}
        return {self.base: dict(ratio=1.0)} | kept

    def measure(self, method: str) -> None:
        """Time a method and the base in turns."""
        step = Step(method, self._load(method))
        self._step = self._step or Step(self.base, self._load(self.base))
        self._step.seconds.clear()
        take_turns([self._step, step], self.rounds)
        entry = dict(
            ratio=ratio(step, self._step),
            seconds=statistics.median(step.seconds),
            base_seconds=statistics.median(self._step.seconds),
            rounds=self.rounds,
            device=device_name(),
            marks=[self._marks(name) for name in (method, self.base)],
        )
        kept = {name: known for name, known in self.known().items() if name != self.base}
        write_json(self.file, kept | {method: entry})

    def _is_valid(self, method: str, entry: Mapping) -> bool:
        """Whether what was measured then would be measured now."""
        try:
            if (entry['rounds'], entry['device']) != (self.rounds, device_name()) or not entry['ratio'] > 0:
                return False
            now = self._marks(method), self._marks(self.base)
            return all(self._same(*pair) for pair in zip(now, entry['marks'], strict=True))
        except (AttributeError, LookupError, OSError, TypeError, ValueError):  # broken, or a method that is no more
            return False
