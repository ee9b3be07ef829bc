"""A decoder's program as a constant of a compiled function.

The compiler cannot trace the tracer, so it evaluates `plan` while it traces, and guards on the
decoder as on any module that it reads. Imported only then: the decorator brings in the compiler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsfvae.fused import known_decoders
from fastsfvae.jacobian.linearize import Linearizer
from fastsfvae.jacobian.sweep import default_chunk, program_of


@torch.compiler.assume_constant_result
def plan(
    identity: int, m: int, dtype: torch.dtype, device: torch.device, backend: str
) -> tuple[int, int, tuple[int, ...], tuple[str, ...]]:
    """A program for every batch size: its number, chunk size, output shape and parameters' names.

    A compiler evaluates it once while it traces, on constants alone: sizes of tensors may be
    symbols, and a module is known by its id.
    """
    decoder = known_decoders.get(identity)
    if decoder is None:
        raise RuntimeError(
            "torch.compile meets this decoder for the first time: use it through SamplingFreeLoss, "
            "or call the function once before it is compiled"
        )
    linearizer = Linearizer(decoder, torch.zeros(2, m, dtype=dtype, device=device), backend=backend)
    program = program_of(linearizer, (2, 1))
    if program is None or program.plans[0].signature[1]:
        raise RuntimeError(
            "torch.compile cannot take this decoder's loss as one graph: it has operations without "
            f"an adjoint, or computed weights ({linearizer.plan(2).obstacles}); call the loss "
            "outside the compiled function"
        )
    names = tuple(linearizer.names[index] for index in program.plans[0].body_inputs)
    return program.number, default_chunk(linearizer), program.plans[0].output_shape, names


def attribute(decoder: Any, name: str) -> Tensor:
    """A parameter or buffer by its dotted name."""
    owner: Any = decoder
    for part in name.split("."):
        owner = getattr(owner, part)
    return owner
