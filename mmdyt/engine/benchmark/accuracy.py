"""What a comparison of methods knows of the accuracy of the variants that were timed."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from mmdyt.core.part import Dispatcher
from mmdyt.core.part import parts as parts_of

ALIKE = 0.02  # activation rates: a model is as good as it was found to be at about the rate that is timed


def method_names(backbone, method: str | None) -> dict[str, str | None]:
    """What ``tools/compare.py`` calls the methods that the variants of a model belong to.

    Args:
        backbone: Of the model.
        method: As it was named on the command line, with its options; None is the config's own.

    Returns:
        A name for each of ``dense`` (a linear probe runs the plain ViT), ``adapter`` and ``dyt``; None where a variant
        is no method of its own.
    """
    parts = list(parts_of(backbone))
    dispatchers = [part for part in parts if isinstance(part, Dispatcher)]
    if not dispatchers:
        return dict(dense='linear', adapter=method or 'adapter', dyt=None)
    fitted = any(getattr(part, 'fitted', False) for part in dispatchers)
    kinds = {type(part).__name__ for part in parts if part not in dispatchers and part.word != 'substitute'}
    adapter = 'adapter' if kinds == {'Adapter'} else None  # with other parts it is no method of a comparison
    return dict(dense='linear', adapter=adapter, dyt=method or ('evidence' if fitted else 'dyt'))


def read_comparison(name: str, file: Path) -> dict:
    """The results of ``tools/compare.py``.

    Raises:
        ValueError: If the file does not hold them.
    """
    try:
        content = json.loads(file.read_text(encoding='utf-8'))
        {row['method']: (row['mean'], row['low'], row['high'], row['rate']) for row in content['methods']}
    except (LookupError, OSError, TypeError, ValueError) as error:
        raise ValueError(f'{name} must name a compare.json of tools/compare.py, got {file}.') from error
    return content


def points(result: Mapping, comparison: Mapping) -> tuple[dict[str, list[dict]], list[str]]:
    """Latency and accuracy of the variants that both files know.

    A dispatched variant counts where it was timed at the rate, to 0.02, at which it was tested.

    Args:
        result: Of ``tools/benchmark.py``.
        comparison: Of ``tools/compare.py``.

    Returns:
        Points for each device, dtype and batch, and the variants that are left out, with the reason.
    """
    known = {row['method']: row for row in comparison['methods'] if row['mean'] is not None}
    panels: dict[str, list[dict]] = {}
    left_out: dict[str, None] = {}
    for row, name in _named(result):
        method = known.get(result['methods'][row['model']])
        if method is None:
            left_out[f'{name}: not in the comparison'] = None
        elif row['model'] == 'dyt' and (method['rate'] is None or abs(method['rate'] - row['measured_rate']) > ALIKE):
            left_out[f'{name}: timed at a rate of {row["measured_rate"]:.3f}, tested at {method["rate"]}'] = None
        else:
            panel = f'{row["device"]}, {row["dtype"]}, batch {row["batch"]}: latency (ms)'
            point = dict(name=name, **row['latency_ms'], **{key: method[key] for key in ('mean', 'low', 'high')})
            drawn = panels.setdefault(panel, [])
            if name not in [other['name'] for other in drawn]:  # two words for one executor
                drawn.append(point)
    return panels, list(left_out)


def _named(result: Mapping) -> Iterator[tuple[Mapping, str]]:
    """Each row, and a name that tells it from the others of its panel."""
    for row in result['rows']:
        words = [
            result['methods'][row['model']] or row['model'],
            row['executor'],
            row['compiled'] and 'compiled',
            row.get('cuda_graph') and 'graph',
        ]
        if row['model'] == 'dyt':
            words.insert(1, f'{row["dispatch"]} {row["measured_rate"]:.2f}')
        yield row, ' '.join(word for word in words if word)
