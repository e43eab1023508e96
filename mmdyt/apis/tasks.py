"""Several tasks on one base in memory: tuned-only files, switched by name."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn as nn
from mmengine.config import Config

from mmdyt.preflight.checkpoints import check_exists, read_checkpoint

from .loading import load
from .prediction import Prediction, Skipped
from .predictor import Predictor
from .reading import Source, is_single


def load_tasks(
    files: Mapping[str, str | Path],
    configs: Mapping[str, str | Path | Config] | None = None,
    device: str | torch.device = 'cpu',
) -> 'Tasks':
    """Load tuned-only files of one base; see :class:`Tasks`.

    Args:
        files: By names of your own.
        configs: For files that are not to be read with the config that they carry.
        device: To predict on.

    Raises:
        ValueError: If a file is whole, or its base is another.
    """
    tasks = Tasks()
    for name, file in files.items():
        tasks.add(name, file, (configs or {}).get(name))
    return tasks.to(device)


class Tasks:
    """Models that differ in what was tuned and share the tensors of their frozen base.

    Each has its own parts, head, class names, pipeline and rate, so the methods may differ, too. All are ready at any
    time: nothing is swapped in or out, and nothing has to be put back.

    ``tasks('cat.jpg', 'pets')`` predicts with one task, ``tasks(['a.jpg', 'b.jpg'], ['pets', 'cars'])`` a mixed batch.
    ``tasks['pets']`` is the :class:`~mmdyt.apis.predictor.Predictor` of one, whose rate can be set.
    """

    def __init__(self):
        self._models: dict[str, Predictor] = {}
        self._bases: dict[str, dict[str, list[str]]] = {}  # of each task: fingerprint by names of tensors
        self._shared: dict[str, torch.Tensor] = {}

    @property
    def names(self) -> list[str]:
        """Of the tasks."""
        return list(self._models)

    def __getitem__(self, name: str) -> Predictor:
        """The model of a task."""
        if name not in self._models:
            raise KeyError(f'task must be one of {self.names}, got {name!r}.')
        return self._models[name]

    def add(self, name: str, file: str | Path, config: str | Path | Config | None = None) -> 'Tasks':
        """Load one more task.

        Args:
            name: A new one.
            file: A tuned-only file.
            config: As of :func:`mmdyt.apis.load`.

        Raises:
            ValueError: If the name is taken, the file is whole, or its base is not that of the others.
        """
        if name in self._models:
            raise ValueError(f'name must be a new one, got {name!r} again.')
        check_exists('checkpoint', str(file))
        about = read_checkpoint(str(file)).get('tuned')
        if about is None:
            raise ValueError(f'checkpoint must be a tuned-only file of mmdyt, got {file}.')
        hashes = about['base']['tensors']
        if not hashes:
            raise ValueError(f'checkpoint must leave its base out, got {file}, which holds all weights.')
        for other, known in self._bases.items():
            different = [key for key in hashes if key in known and known[key] != hashes[key]]
            if different or not set(hashes) & set(known):
                raise ValueError(
                    f'tasks must have one base, got another in {file} than in that of {other!r}: {len(different)} '
                    f'tensors differ{", first " + different[0] if different else ""}.'
                )
        model = load(file, config, self.device)
        self._models[name], self._bases[name] = model, hashes
        self._share(name)
        return self

    def remove(self, name: str) -> 'Tasks':
        """Forget a task; the base stays as long as there is one."""
        self[name]
        del self._models[name], self._bases[name]
        used = {key for hashes in self._bases.values() for key in hashes}
        self._shared = {key: tensor for key, tensor in self._shared.items() if key in used}
        return self

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next((model.device for model in self._models.values()), torch.device('cpu'))

    def to(self, device: str | torch.device) -> 'Tasks':
        """Move all models to a device."""
        for model in self._models.values():
            model.to(device)
        self._shared = {}
        for name in self._models:
            self._share(name)
        return self

    def tensors(self) -> list[torch.Tensor]:
        """What is in memory, each tensor once."""
        found = {}
        for model in self._models.values():
            for tensor in (*model.host.parameters(), *model.host.buffers()):
                found[tensor.data_ptr(), tensor.shape] = tensor
        return list(found.values())

    def __call__(
        self, inputs: Source | Sequence[Source], task: str | Sequence[str], batch_size: int = 1, top: int = 5
    ) -> Prediction | list[Prediction]:
        """Predict one input or several, with one task or each with its own.

        Args:
            inputs: As of :class:`~mmdyt.apis.predictor.Predictor`; a list of files and arrays where tasks are mixed.
            task: A name, or one for each input.
            batch_size: How many run at once; in a mixed batch, of one task.
            top: How many classes are wanted.

        Raises:
            BadFileError: If a file is missing or broken.
            KeyError: If there is no such task.
            ValueError: If there are not as many tasks as inputs, or an input does not suit its model.
        """
        if isinstance(task, str):
            return self[task](inputs, batch_size, top)
        if is_single(inputs) or not isinstance(inputs, list | tuple) or len(inputs) != len(task):
            number = len(inputs) if isinstance(inputs, list | tuple) else 'one'
            raise ValueError(f'task must be one name, or one for each of the inputs, got {len(task)} for {number}.')
        models = {name: self[name] for name in dict.fromkeys(task)}  # refuses before it starts
        found: list[Prediction] = [None] * len(inputs)
        for name, model in models.items():
            places = [i for i, own in enumerate(task) if own == name]
            for i, prediction in zip(places, model.each([inputs[i] for i in places], batch_size, top), strict=True):
                if isinstance(prediction, Skipped):
                    raise prediction.error
                found[i] = prediction
        return found

    def _share(self, name: str) -> None:
        """Put the tensors of the base that others hold into a model; where it is the first, they are its own."""
        host = self._models[name].host
        own = dict((*host.named_parameters(), *host.named_buffers()))
        for key in self._bases[name]:
            _put(host, key, self._shared.setdefault(key, own[key]))


def _put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    place, _, leaf = name.rpartition('.')
    setattr(model.get_submodule(place), leaf, tensor)
