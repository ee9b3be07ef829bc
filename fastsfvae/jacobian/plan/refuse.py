"""What a decoder may not do, told from its trace."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
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
# What takes z apart or gives it another shape, before anything is computed from it.
_PARTS = frozenset(
    """
    view reshape flatten unflatten unsqueeze squeeze expand permute transpose t chunk split select
    slice getitem unbind narrow clone contiguous alias detach to _to_copy sym_size
    directed
    """.split()
)
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
        f"train it with {layer}.eval() and running statistics, set by a few plain forward passes "
        "in training mode beforehand (its weight and bias are trained all the same), or use "
        "GroupNorm"
    )


def failure(
    error: BaseException, z: Tensor, batch: Any, path: str, nodes: Iterable[fx.Node], first: int
) -> str:
    """The line for a decoder that PyTorch cannot run.

    Args:
        error: raised by PyTorch.
        z: the latents.
        batch: the symbol for their number, which messages may show.
        path: of the module that ran.
        nodes: of the unfinished graph.
        first: the place of z among its placeholders.
    """
    shape = tuple(z.shape)
    reason = first_line(error).replace(str(batch), str(shape[0]))
    if reason.startswith(".numpy()"):
        return (
            f"{layer_name(path)} leaves PyTorch for NumPy, where a trace cannot follow: "
            "write it in PyTorch operations"
        )
    if "SymInt" in reason:
        return (
            f"{layer_name(path)} needs the batch size as a plain number ({reason}): write int() "
            "around it, as in int(z.shape[0])"
        )
    where = f" in {layer_name(path)}" if path else ""
    said = f"the decoder fails on z of shape {shape}{where}: {reason}"
    if re.search("dtype|device", reason) or not _fails_on_z(nodes, first):
        return said
    image = re.search(r"\bor (\d)D \(batched\)", reason)
    if image:
        ones = ", 1" * (int(image[1]) - 2)
        return f"{said} (put nn.Unflatten(1, ({shape[1]}{ones})) in front of it)"
    return f"{said} (check that it takes m = {shape[1]} latents)"


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def _fails_on_z(nodes: Iterable[fx.Node], first: int) -> bool:
    """Whether nothing has been computed from z yet, but for other shapes and parts of it."""
    given = [node for node in nodes if node.op == "placeholder"]
    if len(given) <= first:
        return False
    reached = {given[first]}
    for node in nodes:
        # What has no value is what fails.
        if reached.isdisjoint(node.all_input_nodes) or "val" not in node.meta:
            continue
        if getattr(node.target, "__name__", str(node.target)).partition(".")[0] not in _PARTS:
            return False
        reached.add(node)
    return True


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
        name = type(node).__name__.removesuffix("Backward")
        if name == "CheckpointFunction":
            raise RuntimeError(
                "the decoder uses a reentrant torch.utils.checkpoint, whose backward no tangent "
                "rule can see: pass use_reentrant=False"
            )
        # A custom operator's is generated; the trace has the operator itself.
        if isinstance(node, BackwardCFunction) and not name.startswith("GeneratedBackwardFor"):
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
