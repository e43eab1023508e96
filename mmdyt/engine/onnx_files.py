"""Exported models as ONNX files, run and quantised by onnxruntime. What that takes is optional: extra ``export``."""

import importlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from mmdyt.engine.export import INPUT, OUTPUT, Facts

OPSETS = range(18, 24)  # torch's exporter starts from 18
LIBRARIES = ('onnx', 'onnxscript', 'onnxruntime')


def check_libraries() -> None:
    """Refuse to go on without the optional libraries.

    Raises:
        ImportError: Naming the first that is missing.
    """
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"{name} must be installed for ONNX files, got {error}. pip install -e '.[export]'"
            ) from error


def write_onnx(program: ExportedProgram, facts: Facts, path: Path, opset: int) -> None:
    """Write an ``.onnx`` with the facts in its metadata, each as JSON.

    Args:
        program: The graph.
        facts: What goes with it.
        path: Of the file.
        opset: Version of ONNX's operators.
    """
    import onnx

    found = torch.onnx.export(
        program,
        (),
        dynamo=True,
        opset_version=opset,
        input_names=[INPUT],
        output_names=[OUTPUT],
        custom_translation_table={torch.ops.aten.sort.stable: _stable_sort()},
        verbose=False,
    ).model_proto
    found.graph.input[0].type.tensor_type.shape.dim[0].dim_param = 'batch'
    found.graph.output[0].type.tensor_type.shape.dim[0].dim_param = 'batch'
    onnx.helper.set_model_props(found, {name: json.dumps(fact) for name, fact in asdict(facts).items()})
    onnx.save(found, path)


def _stable_sort() -> Callable:
    """What torch's exporter lacks. Of equal values TopK takes those first that come first, so it is stable too."""
    from onnxscript import opset18 as op

    def sort(x, stable=None, dim=-1, descending=False):
        size = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]), axis=0)
        return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)

    return sort


def quantize(path: Path, out: Path) -> None:
    """Write a copy of an ONNX file whose linear layers multiply in 8 bits; activations are scaled as they come.

    The dispatchers' gates stay as they are: they cost nothing, and a coarser score would run other tokens.

    Args:
        path: The file.
        out: The file to write.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(path).graph
    gates = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2 and 1 in tensor.dims}
    quantize_dynamic(
        path,
        out,
        op_types_to_quantize=['MatMul', 'Gemm'],
        per_channel=True,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=[node.name for node in graph.node if gates & {*node.input}],
    )


def open_onnx(path: Path, threads: int = 1) -> Callable[[Tensor], Tensor]:
    """An ONNX file as a function of images (B, 3, H, W), run on the CPU.

    Args:
        path: Of the file.
        threads: Of onnxruntime.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])

    def run(images: Tensor) -> Tensor:
        (scores,) = session.run([OUTPUT], {INPUT: images.numpy()})
        return torch.from_numpy(scores)

    return run
