"""What a layer's products read, and what stands in front of them. No Triton here, for operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Gather:
    """Which inputs an output reads, with which of the weight's taps; see `_implicit_gemm`.

    Attributes:
        kernel: rows and columns of the weight.
        taps: of them, rows and columns that one output uses at most.
        stride: input rows from one output of a phase to the next.
        phases: outputs of one phase are this many rows apart.
        offset: input row of tap 0, at output 0 of phase 0.
        step: input rows from one tap to the next.
        first_w: the weight's row of tap 0 in phase 0.
        step_w: the weight's rows from one tap to the next.
    """

    kernel: int = 1
    taps: int = 1
    stride: int = 1
    phases: int = 1
    offset: int = 0
    step: int = 1
    first_w: int = 0
    step_w: int = 1


POINTWISE = Gather()


def window(kernel: int, stride: int, padding: int) -> Gather:
    """A convolution; the data gradient of a transposed one."""
    return Gather(kernel, kernel, stride, offset=-padding)


def mirrored(kernel: int, padding: int) -> Gather:
    """The data gradient of a convolution with stride 1."""
    return Gather(kernel, kernel, offset=padding, step=-1)


def doubling(kernel: int) -> Gather:
    """A transposed convolution with kernel 3 or 4, stride 2, padding 1; a convolution's gradient.

    Kernel 3 is kernel 4 without its last row and column.
    """
    return Gather(kernel, taps=2, phases=2, step=-1, first_w=1, step_w=2)


class Geometry(NamedTuple):
    """A layer whose dense weight is ``[outer, taps, inner]``.

    Attributes:
        forward: of its product.
        backward: of the transposed one.
        inner_is_input: whether inner is the layer's input and `forward` a `window`; else inner is
            its output and `backward` the window. The weight's gradient reads by the window.
    """

    forward: Gather
    backward: Gather
    inner_is_input: bool


class Front(NamedTuple):
    """What becomes of a layer's input before it is multiplied, and of its result.

    Attributes:
        kind: of the activation in front: "none" or a key of `PARAMETERS`.
        params: that kind's parameters; compiled in.
        precision: how float32 products are formed: "ieee", "tf32x3" or "tf32".
        applied: whether the stack lies behind that activation already, whose result tells its slope
            (`reads_result`). Then products take it as it is, and the data gradient alone goes
            through the activation.
        behind: the activation that the forward applies to its result: "none" or one whose result
            tells its slope. The gradient that the backward is given is in front of it.
        behind_params: that kind's parameters.
        rounded: whether whoever made the stack has rounded it to TF32.
        grad_rounded: likewise the gradient of the result.
    """

    kind: str = "none"
    params: Sequence[float] = ()
    precision: str = "ieee"
    applied: bool = False
    behind: str = "none"
    behind_params: Sequence[float] = ()
    rounded: bool = False
    grad_rounded: bool = False

    @property
    def on_load(self) -> tuple[str, Sequence[float]]:
        """Kind and parameters of the activation that is applied as a product loads the stack."""
        return ("none", ()) if self.applied else (self.kind, self.params)

    def rounds(self, full: bool) -> tuple[str, str]:
        """To what products of float32 numbers (`full`) round stack and gradient as they load them.

        Returns:
            "tf32" or "none", each: tensor cores would cut off what nobody has rounded, and what an
            activation is made into on load nobody has.
        """
        tf32 = full and self.precision == "tf32"
        stack = tf32 and not (self.rounded and self.on_load[0] == "none")
        gradient = tf32 and not self.grad_rounded
        return "tf32" if stack else "none", "tf32" if gradient else "none"
