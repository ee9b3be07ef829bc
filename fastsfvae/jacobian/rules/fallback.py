"""Tangents of an operation that has no rule, by differentiating that one operation.

Forward mode where PyTorch has it. Otherwise the transpose of the transpose: the pullback is linear
in its cotangent, and its own pullback is the pushforward. Operations whose derivative formulas
treat saved statistics as constants (the norms) get wrong gradients in both ways: those have rules.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastsfvae.jacobian.rules.jet import Jet, full_tangent, is_differentiable
from fastsfvae.jacobian.validate import layer_name

# Their formulas treat saved statistics as constants: J would be right, its gradients wrong.
_WRONG_GRADIENTS = frozenset(
    """
    layer_norm group_norm instance_norm batch_norm rms_norm native_layer_norm native_group_norm
    native_batch_norm cudnn_batch_norm _native_batch_norm_legit _fused_rms_norm
    """.split()
)
_warned: set[str] = set()


def generic_rule(operation: Callable[..., Any], path: str) -> Callable[..., Any]:
    """A rule for any operation: the same arguments with Jets, the same results with Jets.

    Args:
        operation: an operator overload.
        path: the module that runs it, for messages.

    Raises:
        RuntimeError: a normalisation, whose gradients PyTorch would get wrong.
    """
    name = str(operation).removeprefix("aten.").partition(".")[0]
    if name in _WRONG_GRADIENTS:
        raise RuntimeError(
            f"{name}{where(path)} has no tangent rule for these arguments (a weight that depends "
            "on z?): normalise without a weight and multiply"
        )

    def forward(*args: Any, **kwargs: Any) -> Any:
        _warn_once(str(operation))
        leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=lambda x: isinstance(x, Jet))
        jets = [leaf for leaf in leaves if isinstance(leaf, Jet)]

        def call(*primals: Tensor) -> Any:
            given = iter(primals)
            filled = [next(given) if isinstance(leaf, Jet) else leaf for leaf in leaves]
            filled_args, filled_kwargs = pytree.tree_unflatten(filled, spec)
            return operation(*filled_args, **filled_kwargs)

        return _linearize(call, jets, str(operation), path)

    return forward


def _linearize(call: Callable[..., Any], jets: list[Jet], name: str, path: str) -> Any:
    primals = [jet.primal for jet in jets]
    tangents = tuple(full_tangent(jet) for jet in jets)
    outputs = call(*primals)
    several = isinstance(outputs, (tuple, list))
    results = list(outputs) if several else [outputs]
    smooth = [i for i, r in enumerate(results) if is_differentiable(r)]

    def differentiable(*inputs: Tensor) -> tuple[Tensor, ...]:
        values = call(*inputs)
        return tuple(values[i] for i in smooth) if several else (values,)

    try:
        moved = _forward_mode(differentiable, primals, tangents)
    except (RuntimeError, NotImplementedError):
        try:
            moved = _transposed_twice(differentiable, primals, tangents)
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).strip().split("\n")[0]
            raise RuntimeError(
                f"no tangents can be carried through {name}{where(path)}: it has no rule, and "
                f"PyTorch cannot differentiate it forward or twice ({reason})"
            ) from error
    for index, tangent in zip(smooth, moved, strict=True):
        results[index] = Jet(results[index], tangent)
    return results if several else results[0]


def _transposed_twice(function, primals, tangents) -> tuple[Tensor, ...]:
    outputs, pullback = torch.func.vjp(function, *primals)[:2]
    pushforward = torch.func.vjp(pullback, tuple(torch.zeros_like(y) for y in outputs))[1]
    return torch.func.vmap(lambda *t: pushforward(t)[0])(*tangents)


def _forward_mode(function, primals, tangents) -> tuple[Tensor, ...]:
    def push(*directions: Tensor) -> tuple[Tensor, ...]:
        return torch.func.jvp(function, tuple(primals), directions)[1]

    return torch.func.vmap(push)(*tangents)


def where(path: str) -> str:
    """How messages add the module at a path."""
    return f" in {layer_name(path)}" if path else ""


def _warn_once(name: str) -> None:
    if name not in _warned:
        _warned.add(name)
        warnings.warn(
            f"{name} has no tangent rule: its derivative is taken generically, which is slower",
            UserWarning,
            stacklevel=2,
        )
