"""What carrying one tangent through an operation costs."""

from __future__ import annotations

import math

from torch import Tensor, fx

# Views, and copies at most.
_FREE = frozenset(
    """
    view reshape flatten unflatten squeeze unsqueeze permute transpose t movedim expand expand_as
    contiguous clone alias to _to_copy type_as chunk split split_with_sizes tensor_split unbind
    select slice narrow pixel_shuffle pixel_unshuffle cat stack flip roll pad constant_pad_nd
    dropout feature_dropout alpha_dropout repeat _unsafe_view view_as reshape_as
    """.split()
)


def tangent_flops(operation: str, node: fx.Node, batch: int) -> int:
    """Floating point operations for one tangent of one sample.

    Products count two per multiply-add, moving data nothing, everything else one per element of
    the result.

    Args:
        operation: the ATen name, without overload.
        node: a traced node with fake tensors in meta["val"].
        batch: the batch size of the trace.
    """
    if operation in _FREE:
        return 0
    result = _shape(node)
    if operation.startswith("conv_transpose"):
        source, weight = _shape(node.args[0]), _shape(node.args[1])
        total = 2 * math.prod(source) * math.prod(weight[1:])
    elif operation.startswith("conv"):
        total = 2 * math.prod(result) * math.prod(_shape(node.args[1])[1:])
    elif operation == "linear":
        total = 2 * math.prod(result) * _shape(node.args[1])[-1]
    elif operation in ("matmul", "mm", "bmm", "mv"):
        total = 2 * math.prod(result) * _shape(node.args[0])[-1]
    elif operation in ("addmm", "baddbmm"):
        total = 2 * math.prod(result) * _shape(node.args[1])[-1]
    elif operation == "scaled_dot_product_attention":
        query, key = _shape(node.args[0]), _shape(node.args[1])
        # Scores and their product with the values, each by the product rule.
        total = 8 * math.prod(query) * key[-2]
    else:
        total = math.prod(result)
    return -(-total // batch)


def _shape(node: object) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    return tuple(int(s) for s in value.shape) if isinstance(value, Tensor) else ()
