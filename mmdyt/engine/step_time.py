"""Time training steps of several configs side by side."""

import platform
import statistics
import time
from collections.abc import Sequence

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner, load_checkpoint, set_random_seed
from mmengine.utils import import_modules_from_strings


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
