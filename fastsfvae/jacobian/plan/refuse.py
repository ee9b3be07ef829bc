"""What a decoder may not do, told from its trace."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, fx, nn
from torch.autograd.function import BackwardCFunction

from fastsfvae.jacobian.plan.fingerprint import modules_with_paths
from fastsfvae.jacobian.validate import layer_name as layer_name
from fastsfvae.jacobian.validate import refuse_wrappers

# The position of the "training" argument: there these mix samples or draw at random.
TRAINING_ARGUMENT = {
    "batch_norm": 5,
    "instance_norm": 5,
    "dropout": 2,
    "feature_dropout": 2,
    "alpha_dropout": 2,
    "feature_alpha_dropout": 2,
    "native_dropout": 2,
    "rrelu": 3,
}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_warned_hooks: set[type] = set()


def refuse_training_mode(operation: str, node: fx.Node, path: str) -> None:
    """Refuse batch statistics and dropout, which make J that of another function.

    Raises:
        RuntimeError: names the layer and the fix.
    """
    args: Any = node.args
    layer = layer_name(path)
    fix = f"call {layer}.eval()"
    if operation == "scaled_dot_product_attention":
        probability = args[4] if len(args) > 4 else node.kwargs.get("dropout_p", 0.0)
        if probability:
            raise RuntimeError(f"{layer} drops out attention weights at random: {fix}")
        return
    place = TRAINING_ARGUMENT.get(operation)
    if place is None or len(args) <= place or not args[place]:
        return
    if operation == "batch_norm":
        raise _batch_statistics(path)
    if operation == "instance_norm":
        if args[3] is not None:
            raise RuntimeError(
                f"{layer} updates its running statistics, which a trace cannot: {fix}, "
                "or set track_running_stats=False"
            )
        return
    if operation == "rrelu" or args[1]:
        raise RuntimeError(f"{layer} draws at random in training mode ({operation}): {fix}")


def refuse_batch_statistics(module: nn.Module, path: str) -> None:
    """Refuse a BatchNorm that is about to run on batch statistics.

    On a batch of one it would raise a message of its own before there is an operation to refuse.

    Raises:
        RuntimeError: names the layer and the fix.
    """
    if isinstance(module, _BATCH_NORMS) and (module.training or module.running_mean is None):
        raise _batch_statistics(path)


def _batch_statistics(path: str) -> RuntimeError:
    layer = layer_name(path)
    return RuntimeError(
        f"{layer} normalises by batch statistics, so samples have no Jacobian of their own: "
        f"call {layer}.eval() (with running statistics), or use GroupNorm"
    )


def refuse_custom_functions(output: Tensor) -> None:
    """Refuse autograd.Functions: a trace sees their forward, never their backward.

    Raises:
        RuntimeError: names the function.
    """
    pending, seen = [output.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction):
            name = type(node).__name__.removesuffix("Backward")
            raise RuntimeError(
                f"the decoder uses the autograd.Function {name!r}, whose backward no tangent rule "
                'can see: write it in PyTorch operations, or use backend="reference"'
            )
        pending.extend(source for source, _ in node.next_functions)


def refuse_or_warn_about_hooks(decoder: nn.Module) -> None:
    """Say once per module type that its forward hooks run only when the decoder is traced.

    Raises:
        RuntimeError: names a module with backward hooks, which would never run.
        TypeError: names a module that is wrapped for data-parallel training.
    """
    for path, module in modules_with_paths(decoder):
        refuse_wrappers(module, layer_name(path))
        if module._backward_hooks or module._backward_pre_hooks:
            raise RuntimeError(
                f"the backward hooks of {layer_name(path)} would not run, since its Jacobian is "
                "differentiated by rules: remove them, or hook its parameters (register_hook)"
            )
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        foreign = [h for h in hooks if not type(h).__module__.startswith("torch.nn.utils.")]
        if foreign and type(module) not in _warned_hooks:
            _warned_hooks.add(type(module))
            warnings.warn(
                f"the forward hooks of {layer_name(path)} run only when the decoder is traced: "
                "what they compute is kept, what else they do is not repeated",
                UserWarning,
                stacklevel=2,
            )
