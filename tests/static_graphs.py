"""Whether an exported graph is static: nothing in it waits for data, and no size but that of the batch is open."""

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

WAITING = ('item', '_local_scalar_dense', 'nonzero', 'masked_select', 'unique', 'bincount', '_assert_scalar')


def export_any_batch(model: nn.Module, example: Tensor) -> ExportedProgram:
    """The model exported for batches of any size; the example has at least two images, since one is a special case."""
    return export(model, (example,), dynamic_shapes=({0: Dim('batch')},))


def not_static(program: ExportedProgram) -> list[str]:
    """Operators that wait for data, and results whose shape depends on more than the number of images."""
    (images,) = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == 'USER_INPUT']
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    nodes = [node for graph in graphs for node in graph.nodes]
    batch = next(node for node in nodes if node.name == images).meta['val'].shape[0].node.expr.free_symbols
    found = [str(n.target) for n in nodes if any(f'.{w}.' in f'.{n.target}.'.replace('aten.', '') for w in WAITING)]
    for node in nodes:
        values = node.meta.get('val')
        for value in values if isinstance(values, list | tuple) else [values]:
            sizes = value.shape if isinstance(value, Tensor) else [value]
            symbols = set().union(*(s.node.expr.free_symbols for s in sizes if isinstance(s, torch.SymInt)))
            if symbols - batch:
                found.append(f'shape of {node.name}')
    return found
