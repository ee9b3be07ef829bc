"""TF32 products without a GPU: float32 operands cut to TF32's eleven bits, then multiplied exactly.

A tensor core reads the upper 19 bits of a float32 register and ignores the others: an operand that
nobody rounded is truncated towards zero, by half a unit in its last place on average and always the
same way. Products of two such operands are exact in float32's 24 bits; sums are float32 here and
there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

# The bits of a float32 number that TF32 lacks.
_LOST = 2**13 - 1
# Operations that multiply what a layer reads by its weight, or a gradient by either, and which of
# their arguments the operands are.
_OPERANDS = {
    **dict.fromkeys(
        ("linear", "matmul", "mm", "conv2d", "conv_transpose2d", "convolution"), (0, 1)
    ),
    "addmm": (1, 2),
    "convolution_backward": (0, 1, 2),
}


def truncated(t: Tensor) -> Tensor:
    """Float32 `t` with the bits that TF32 lacks set to 0, as a tensor core reads it."""
    return (t.view(torch.int32) & ~_LOST).view(torch.float32)


def rounded(t: Tensor) -> Tensor:
    """Float32 `t` rounded to the nearest TF32 number, halves away from 0, as ``cvt.rna`` does."""
    nearest = truncated((t.view(torch.int32) + (_LOST + 1) // 2).view(torch.float32))
    return torch.where(t.isfinite(), nearest, t)


class Emulated(TorchDispatchMode):
    """Cut the operands of all layers' float32 products inside a block, the sweep's as well.

    Products of two batches of matrices are the Gram's and the factorisation's, which no setting
    makes TF32.

    Args:
        cut: `truncated` or `rounded`.
    """

    def __init__(self, cut: Callable[[Tensor], Tensor]):
        super().__init__()
        self._cut = cut

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastsfvae":
            # The products lie in what the operator calls.
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        operands = _OPERANDS.get(func.overloadpacket.__name__, ())
        if func.overloadpacket.__name__ == "matmul" and min(t.ndim for t in args[:2]) > 2:
            operands = ()
        cut = [self._cut_or_keep(a) if i in operands else a for i, a in enumerate(args)]
        return func(*cut, **kwargs)

    def _cut_or_keep(self, operand: Any) -> Any:
        # Tracing a decoder multiplies tensors without values.
        is_plain = type(operand) in (Tensor, torch.nn.Parameter) and operand.dtype == torch.float32
        return self._cut(operand.detach()) if is_plain else operand
