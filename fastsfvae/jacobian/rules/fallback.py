"""Tangents of an operation that has no rule, by differentiating that one operation.

torch.func's forward mode gives J; gradients of J go through its formula, and are wrong wherever it
holds constant what depends on the arguments, as it does in norms and factorisations. So only those
operations are admitted whose gradients have been held to finite differences.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastsfvae.jacobian.rules.jet import Jet, full_tangent, is_differentiable
from fastsfvae.jacobian.validate import layer_name

# By tests/jacobian/test_fallback.py, on the oldest and on the newest torch.
ADMITTED = frozenset(
    """
    addbmm addmv addr convolution _convolution dot frexp linalg_matrix_sqrth linalg_polar
    vdot _adaptive_avg_pool2d _adaptive_avg_pool3d log_sigmoid_forward _prelu_kernel
    reflection_pad1d reflection_pad2d reflection_pad3d
    replication_pad1d replication_pad2d replication_pad3d
    _unsafe_index _unsafe_index_put _unsafe_masked_index _unsafe_masked_index_put_accumulate
    binary_cross_entropy binary_cross_entropy_with_logits huber_loss mse_loss nll_loss_forward
    nll_loss2d_forward smooth_l1_loss
    embedding_dense_backward gelu_backward _log_softmax_backward_data
    max_pool2d_with_indices_backward select_backward sigmoid_backward slice_backward
    _softmax_backward_data tanh_backward threshold_backward
    """.split()
)
_NORMS = frozenset(
    """
    layer_norm group_norm instance_norm batch_norm rms_norm native_layer_norm native_group_norm
    native_batch_norm cudnn_batch_norm _native_batch_norm_legit _fused_rms_norm
    """.split()
)
_warned: set[str] = set()


def generic_rule(operation: Callable[..., Any], path: str) -> Callable[..., Any]:
    """A rule for an operation: the same arguments with Jets, the same results with Jets.

    Args:
        operation: an operator overload.
        path: the module that runs it, for messages.

    Raises:
        RuntimeError: the operation's gradients would be wrong, or nobody knows.
    """
    _refuse_unknown(operation, path)
    _load_forward_mode()
    name = f"{operation} in {layer_name(path)}"

    def forward(*args: Any, **kwargs: Any) -> Any:
        _warn_once(name)
        leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=lambda x: isinstance(x, Jet))
        jets = [leaf for leaf in leaves if isinstance(leaf, Jet)]

        def call(*primals: Tensor) -> Any:
            given = iter(primals)
            filled = [next(given) if isinstance(leaf, Jet) else leaf for leaf in leaves]
            filled_args, filled_kwargs = pytree.tree_unflatten(filled, spec)
            return operation(*filled_args, **filled_kwargs)

        return _linearize(call, jets, name)

    return forward


@functools.cache
def _load_forward_mode() -> None:
    """Bring in what PyTorch loads with its forward mode, and not what it warns itself of there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def _refuse_unknown(operation: Any, path: str) -> None:
    if operation.namespace != "aten":
        raise RuntimeError(
            f"{operation}{where(path)} is a custom operation without a tangent rule: register one "
            f'with fastsfvae.jacobian.rules.registry.rule("{operation}"), write it in operations '
            'of PyTorch that have rules, or use backend="reference"'
        )
    name = operation._schema.name.partition("::")[2]
    if name in _NORMS:
        raise RuntimeError(
            f"{name}{where(path)} has no tangent rule for these arguments (a weight that depends "
            "on z?): normalise without a weight and multiply"
        )
    if name not in ADMITTED:
        raise RuntimeError(
            f"{name}{where(path)} has no tangent rule for these arguments: write it in operations "
            'that have rules, or use backend="reference"'
        )


def _linearize(call: Callable[..., Any], jets: list[Jet], name: str) -> Any:
    primals = tuple(jet.primal for jet in jets)
    outputs = call(*primals)
    several = isinstance(outputs, (tuple, list))
    results = list(outputs) if several else [outputs]
    smooth = [i for i, r in enumerate(results) if is_differentiable(r)]

    def differentiable(*inputs: Tensor) -> tuple[Tensor, ...]:
        values = call(*inputs)
        return tuple(values[i] for i in smooth) if several else (values,)

    def push(*directions: Tensor) -> tuple[Tensor, ...]:
        return torch.func.jvp(differentiable, primals, directions)[1]

    try:
        moved = torch.func.vmap(push)(*map(full_tangent, jets))
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise RuntimeError(
            f"no tangents can be carried through {name}: it has no rule, and PyTorch cannot "
            f"differentiate it forward ({reason})"
        ) from error
    for index, tangent in zip(smooth, moved, strict=True):
        results[index] = Jet(results[index], tangent)
    return results if several else results[0]


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
