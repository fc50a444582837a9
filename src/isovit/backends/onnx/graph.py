"""ONNX graphs, whatever made them: one pair of names, fused attention, a file that can be moved."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from isovit.backends.onnx.layout import ABOUT, BATCH, HEADER, INPUT, OUTPUT, header
from isovit.errors import InputError
from isovit.spec.config import Config

ONE_FILE_BYTES = 2_000_000_000
"""Weights above this lie in a file beside the graph: a protobuf message ends at 2 GiB."""


def finish(model: ir.Model, config: Config, *, fused_attention: bool = False) -> ir.Model:
    """Give a graph isovit's names and metadata, and take out what its exporter noted there.

    Args:
        model: with one input and one output; is changed.
        config: of what it computes.
        fused_attention: whether to put an Attention operator for every softmax attention.

    Raises:
        InputError: if there is no attention to fuse.
    """
    drop_dropout(model)
    if fused_attention and not fuse_attention(model):
        raise InputError("the model has no softmax attention to fuse")
    passes.ClearMetadataAndDocStringPass()(model)  # among it are paths of the machine
    passes.RemoveUnusedOpsetsPass()(model)
    for value, name in ((model.graph.inputs[0], INPUT), (model.graph.outputs[0], OUTPUT)):
        value.name = name
        assert value.shape is not None
        if not isinstance(value.shape[0], int):
            value.shape = ir.Shape([BATCH, *value.shape[1:]])
    opsets = [onnx.helper.make_opsetid(*item) for item in model.opset_imports.items()]
    model.ir_version = onnx.helper.find_min_ir_version_for(opsets)
    model.doc_string = ABOUT
    model.metadata_props.update({HEADER: header("onnx", config), "layout": "NHWC"})
    return model


def drop_dropout(model: ir.Model) -> None:
    """Take out every Dropout that does nothing, as jax2onnx leaves them in."""
    for node in model.graph:
        given = node.inputs[0] if node.op_type == "Dropout" else None
        if given is not None and not _is_on(node):
            behind = node.outputs[0]
            ir.convenience.replace_all_uses_with(behind, given, replace_graph_outputs=True)
    passes.RemoveUnusedNodesPass()(model)


def _is_on(dropout: ir.Node) -> bool:
    """Whether a Dropout is, or may be, in training mode."""
    training = dropout.inputs[2] if len(dropout.inputs) > 2 else None
    constant = training.const_value if training is not None else None
    return training is not None and (constant is None or bool(constant.numpy().any()))


def fuse_attention(model: ir.Model) -> int:
    """Put an Attention operator in the place of every softmax(q·kᵀ)·v.

    The scale stays where it is, on q.

    Returns:
        How many there were.
    """
    found = [s for s in model.graph if s.op_type == "Softmax" and _fuse(model.graph, s)]
    passes.RemoveUnusedNodesPass()(model)
    return len(found)


def _fuse(graph: ir.Graph, softmax: ir.Node) -> bool:
    (weights,), given = softmax.outputs, softmax.inputs[0]
    scores = given.producer() if given is not None else None
    product = _only_user(weights)
    if scores is None or scores.op_type != "MatMul" or _only_user(scores.outputs[0]) is not softmax:
        return False
    if product is None or product.op_type != "MatMul" or product.inputs[0] is not weights:
        return False
    q, k_transposed, v = scores.inputs[0], scores.inputs[1], product.inputs[1]
    assert k_transposed is not None
    if v is None or v.shape is None or len(v.shape) not in (3, 4):
        return False
    rank = len(v.shape)
    last_two_swapped = [*range(rank - 2), rank - 1, rank - 2]
    made = k_transposed.producer()
    if made and made.op_type == "Transpose" and _axes(made) == last_two_swapped:
        k = made.inputs[0]
    else:
        swap = ir.node("Transpose", [k_transposed], attributes={"perm": last_two_swapped})
        graph.insert_before(product, swap)
        k = swap.outputs[0]
    one_head = {"q_num_heads": 1, "kv_num_heads": 1} if rank == 3 else {}
    fused = ir.node("Attention", [q, k, v], attributes={"scale": 1.0, **one_head})
    (before,), (behind,) = product.outputs, fused.outputs
    behind.shape, behind.type = before.shape, before.type
    graph.insert_before(product, fused)
    ir.convenience.replace_all_uses_with(before, behind, replace_graph_outputs=True)
    return True


def _only_user(value: ir.Value) -> ir.Node | None:
    users = list(value.consumers())
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def _axes(transpose: ir.Node) -> list[int]:
    return list(cast("ir.Attr", transpose.attributes["perm"]).as_ints())


def write(model: ir.Model, path: Path) -> None:
    """Write a graph and check the file; weights of 2 GB and more go to ``path`` + ``.data``.

    Raises:
        onnx.checker.ValidationError: if it is no valid ONNX.
    """
    tensors = (value.const_value for value in model.graph.initializers.values())
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    beside = data_path(path).name if size > ONE_FILE_BYTES else None
    ir.save(model, path, external_data=beside)
    onnx.checker.check_model(path, full_check=True)


def data_path(path: Path) -> Path:
    """Where the weights of a large model lie; the graph names the file, so both move together."""
    return path.with_name(f"{path.name}.data")
