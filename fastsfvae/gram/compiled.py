"""A decoder's program as a constant of a compiled function.

The compiler cannot trace the tracer, so it evaluates `_program` while it traces, on constants
alone, and guards on the decoder as on any module that it reads. What the program computes outside
its chunk loop (the weights of weight_norm) becomes part of the compiled graph, and so do its
gradients. Imported only under a compiler, which the decorator brings in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.directed import Directed, directed_inputs
from fastsfvae.jacobian.plan.fingerprint import plain_attributes
from fastsfvae.jacobian.run.cache import Linearizer
from fastsfvae.jacobian.run.known import known_decoders
from fastsfvae.jacobian.run.sweep import Gathered, default_chunk, program_of
from fastsfvae.jacobian.validate import outer_name

# The preludes of the programs that compiled functions use, by the programs' numbers; kept, as a
# compiled function may trace them at any time.
_preludes: dict[int, tuple[Callable[..., tuple], Callable[..., tuple]]] = {}


def gather(
    decoder: Any,
    z: Tensor,
    args: tuple,
    kwargs: dict[str, Any],
    backend: str,
    tangents: Tensor | None = None,
) -> tuple[Tensor, Gathered]:
    """Find the decoder's program for every batch size and what it reads; runs under a compiler.

    Args:
        decoder: the module.
        z: ``[B, m]``.
        args: further inputs.
        kwargs: further inputs by name.
        backend: "torch" or "triton".
        tangents: directions ``[k, B, m]``, None for the unit vectors.

    Returns:
        The program's latents, and the rest.

    Raises:
        RuntimeError: a decoder that this is not possible for.
    """
    if tangents is not None:
        z, inputs_of_directed = directed_inputs(z, tangents)
        kwargs = {**kwargs, **inputs_of_directed}
    # A loop over a size makes the compiler fix it: m belongs to the decoder.
    m = _fixed(z.shape[1])
    leaves = [*args, *kwargs.values()]
    inputs = tuple(_described(leaf, z) for leaf in leaves)
    extras = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    directed = tangents is not None
    found = _program(id(decoder), directed, m, z.dtype, z.device, backend, inputs, tuple(kwargs))
    number, chunk_size, output_shape, output_dtype, names, used, plain = found
    for name, value in plain:
        # The compiler guards on what it compares, and compiles again when it changes.
        if _attribute(decoder, name) != value:
            raise RuntimeError(f"the decoder's {name} changed while its loss was compiled")
    tensors = [_attribute(decoder, name) for name in names]
    prelude, side = _preludes[number]
    statics = prelude(tensors, extras)
    sides = side(z, tensors, extras, statics)
    along = [t for t in extras if _along(t, z)]
    fixed = [t for t in extras if not _along(t, z)]
    whole = [*[tensors[index] for index in used], *fixed, *statics]
    return z, Gathered(number, chunk_size, output_shape, output_dtype, [*along, *sides], whole)


def _fixed(size: int) -> int:
    return len([None for _ in range(size)])


def _along(tensor: Tensor, z: Tensor) -> bool:
    # A branch makes the compiler decide; the comparison alone would be a symbol.
    return True if tensor.ndim > 0 and tensor.shape[0] == z.shape[0] else False


def _described(leaf: Any, z: Tensor) -> tuple:
    """A further decoder input as constants."""
    if isinstance(leaf, (list, tuple, dict)):
        raise RuntimeError(
            "under torch.compile the loss takes further decoder inputs one by one, not in a "
            f"{type(leaf).__name__}: pass tensors and numbers, or make it the decoder's attribute"
        )
    if not isinstance(leaf, Tensor):
        return (leaf,)
    along = _along(leaf, z)
    sizes = tuple(_fixed(size) for size in leaf.shape[int(along) :])
    return along, sizes, leaf.dtype, leaf.device, leaf.requires_grad


def _stand_in(description: tuple) -> Any:
    if len(description) == 1:
        return description[0]
    along, sizes, dtype, device, required = description
    shape = (2, *sizes) if along else sizes
    return torch.zeros(shape, dtype=dtype, device=device, requires_grad=required)


@torch.compiler.assume_constant_result
def _program(
    identity: int,
    directed: bool,
    m: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    inputs: tuple[tuple, ...],
    keywords: tuple[str, ...],
) -> tuple:
    """Constants: a program's number, chunk size and output, and the names of what it reads.

    The names are those of all parameters and buffers; behind them come the indices of what the body
    reads, and the plain attributes that were baked in.

    A compiler evaluates it once while it traces, on constants alone: sizes of tensors may be
    symbols, and a module is known by its id.
    """
    decoder = known_decoders.get(identity)
    if decoder is None:
        raise RuntimeError(
            "torch.compile meets this decoder for the first time: use it through SamplingFreeLoss, "
            "or call the function once before it is compiled"
        )
    leaves = [_stand_in(description) for description in inputs]
    args, named = leaves[: len(leaves) - len(keywords)], leaves[len(leaves) - len(keywords) :]
    kwargs = dict(zip(keywords, named, strict=True))
    z, target = torch.zeros(2, m, dtype=dtype, device=device), decoder
    if directed:
        target = Directed(decoder)
    # A compiler sees to numbers itself.
    linearizer = Linearizer(target, z, tuple(args), kwargs, backend, lift=False)
    program = program_of(linearizer, (2, 1))
    if program is None:
        reasons = ", ".join(linearizer.plan(2).obstacles) or "parts that depend on the batch size"
        raise RuntimeError(
            f"torch.compile cannot take this decoder's loss as one graph ({reasons}): call the "
            "loss outside the compiled function"
        )
    plan = program.plans[0]
    _preludes[program.number] = plan.prelude, plan.side
    chunk_size, names = default_chunk(linearizer), tuple(map(outer_name, linearizer.names))
    output = plan.output_shape, plan.output_dtype
    plain = plain_attributes(decoder)
    return program.number, chunk_size, *output, names, tuple(plan.body_inputs), plain


def _attribute(decoder: Any, name: str) -> Any:
    """A parameter, buffer or plain attribute by its dotted name."""
    owner: Any = decoder
    for part in name.split("."):
        owner = getattr(owner, part)
    return owner
