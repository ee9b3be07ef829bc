"""A decoder's program as a constant of a compiled function.

The compiler cannot trace the tracer, so it evaluates `_program` while it traces, on constants
alone, and guards on the decoder as on any module that it reads. What the program computes outside
its chunk loop (the weights of weight_norm) becomes part of the compiled graph, and so do its
gradients. Imported only under a compiler, which the decorator brings in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.directed import Directed, directed_inputs
from fastsfvae.jacobian.plan.fingerprint import plain_attributes
from fastsfvae.jacobian.run.cache import Linearizer
from fastsfvae.jacobian.run.known import known_decoders
from fastsfvae.jacobian.run.sweep import Gathered, default_chunk, program_of
from fastsfvae.jacobian.shared import find_shared
from fastsfvae.jacobian.validate import Shared, outer_name

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
    shared: Shared = (),
) -> tuple[Tensor, Gathered]:
    """Find the decoder's program for every batch size and what it reads; runs under a compiler.

    Args:
        decoder: the module.
        z: ``[B, m]``.
        args: further inputs.
        kwargs: further inputs by name.
        backend: "torch" or "triton".
        tangents: directions ``[k, B, m]``, None for the unit vectors.
        shared: which further inputs have no batch axis, whatever their first extent.

    Returns:
        The program's latents, and the rest.

    Raises:
        RuntimeError: a decoder that this is not possible for.
    """
    shared = find_shared(len(args), kwargs, shared)
    if tangents is not None:
        z, inputs_of_directed = directed_inputs(z, tangents)
        kwargs = {**kwargs, **inputs_of_directed}
    # A loop over a size makes the compiler fix it: m belongs to the decoder.
    m = _fixed(z.shape[1])
    leaves = [*args, *kwargs.values()]
    places: list[int | str] = [*range(len(args)), *kwargs]
    batched = [p not in shared and _along(leaf, z) for p, leaf in zip(places, leaves, strict=True)]
    inputs = tuple(_described(*pair) for pair in zip(leaves, batched, strict=True))
    pairs = zip(leaves, batched, strict=True)
    extras = [(leaf, along) for leaf, along in pairs if isinstance(leaf, Tensor)]
    directed = tangents is not None
    found = _program(id(decoder), directed, m, z.dtype, z.device, backend, inputs, tuple(kwargs))
    number, chunk_size, output_shape, output_dtype, names, used, plain = found
    for name, value in plain:
        # The compiler guards on what it compares, and compiles again when it changes.
        if _attribute(decoder, name) != value:
            raise RuntimeError(f"the decoder's {name} changed while its loss was compiled")
    tensors = [_attribute(decoder, name) for name in names]
    prelude, side = _preludes[number]
    given = [t for t, _ in extras]
    statics = prelude(tensors, given)
    sides = side(z, tensors, given, statics)
    along = [t for t, has_batch in extras if has_batch]
    fixed = [t for t, has_batch in extras if not has_batch]
    whole = [*[tensors[index] for index in used], *fixed, *statics]
    return z, Gathered(number, chunk_size, output_shape, output_dtype, [*along, *sides], whole)


def _fixed(size: int) -> int:
    return len([None for _ in range(size)])


def _along(leaf: Any, z: Tensor) -> bool:
    if not isinstance(leaf, Tensor):
        return False
    # A branch makes the compiler decide; the comparison alone would be a symbol.
    return True if leaf.ndim > 0 and leaf.shape[0] == z.shape[0] else False


def _described(leaf: Any, along: bool) -> tuple:
    """A further decoder input as constants."""
    if isinstance(leaf, (list, tuple, dict)):
        raise RuntimeError(
            "under torch.compile the loss takes further decoder inputs one by one, not in a "
            f"{type(leaf).__name__}: pass tensors and numbers, or make it the decoder's attribute"
        )
    if not isinstance(leaf, Tensor):
        return (leaf,)
    sizes = tuple(_fixed(size) for size in leaf.shape[int(along) :])
    return along, sizes, leaf.dtype, leaf.device, leaf.requires_grad


def _stand_in(description: tuple, batch: int) -> Any:
    if len(description) == 1:
        return description[0]
    along, sizes, dtype, device, required = description
    shape = (batch, *sizes) if along else sizes
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
    # A batch that no input without one has for its first extent.
    taken = {d[1][0] for d in inputs if len(d) > 1 and not d[0] and d[1]}
    batch = next(size for size in itertools.count(2) if size not in taken)
    leaves = [_stand_in(description, batch) for description in inputs]
    args, named = leaves[: len(leaves) - len(keywords)], leaves[len(leaves) - len(keywords) :]
    kwargs = dict(zip(keywords, named, strict=True))
    z, target = torch.zeros(batch, m, dtype=dtype, device=device), decoder
    if directed:
        target = Directed(decoder)
    # A compiler sees to numbers itself.
    linearizer = Linearizer(target, z, tuple(args), kwargs, backend, lift=False)
    program = program_of(linearizer, (batch, 1))
    if program is None:
        reasons = (
            ", ".join(linearizer.plan(batch).obstacles) or "parts that depend on the batch size"
        )
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
