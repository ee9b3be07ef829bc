"""What a decoder and its latents must be, refused in one clear line otherwise."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from fastsfvae import _checks

# Further decoder inputs that all samples share: names, and positions behind z.
Shared: TypeAlias = Collection[int | str]

Given = TypeVar("Given")

_WRAPPERS = {
    "DistributedDataParallel": "wrap the module that computes the loss instead",
    "FullyShardedDataParallel": "wrap the module that computes the loss instead",
    "FSDPModule": "shard the module that computes the loss instead",
    "DataParallel": "pass its .module and use DistributedDataParallel around the loss",
}

# The name of a module inside of what is derived from it; in no message.
_INNER = "_inner"
# Of a user's z where a plan takes something else for its latents.
LATENTS = "_latents"


def outer_name(path: str) -> str:
    """A path or a parameter's name as it is in the module that something was derived from."""
    return ".".join(part for part in path.split(".") if part != _INNER)


def layer_name(path: str) -> str:
    """How messages call the module at a path, as it would be written: ``decoder.blocks[2]``."""
    name = "decoder"
    for part in filter(None, outer_name(path).split(".")):
        if part.isdigit():
            name += f"[{part}]"
        else:
            name += f".{part}" if part.isidentifier() else f"[{part!r}]"
    return name


class Derived(nn.Module):
    """A function that calls a module, which its parameters and its plans belong to.

    Args:
        inner: the module, or another function of it.
    """

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.add_module(_INNER, inner)

    @property
    def inner(self) -> nn.Module:
        """The module."""
        return self._modules[_INNER]  # type: ignore[return-value]

    def positions(self, count: int) -> list[int]:
        """Where a user gave so many further inputs, behind z."""
        inner = self.inner
        return inner.positions(count) if isinstance(inner, Derived) else [*range(count)]


class Method(Derived):
    """A method of a module as a module, so that its parameters are known by name."""

    def __init__(self, owner: nn.Module, function: Callable[..., Any]):
        super().__init__(owner)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        return self.function(self.inner, *args, **kwargs)


def unwrap(
    decoder: Callable[..., Any], kwargs: dict[str, Any] | None = None
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The decoder itself, from what torch.compile, functools.partial or a method make of it.

    Args:
        decoder: as the user gave it.
        kwargs: the further inputs by name, to which those of a partial are added.

    Returns:
        (decoder, kwargs): an nn.Module wherever its parameters can be reached.

    Raises:
        TypeError: not callable, or wrapped for data-parallel training: gradients taken past such
            a wrapper would not be synchronised.
    """
    kwargs = kwargs or {}
    if not callable(decoder):
        raise TypeError(f"decoder must be an nn.Module or a callable, got {type(decoder).__name__}")
    if isinstance(decoder, functools.partial) and not decoder.args:
        return unwrap(decoder.func, {**decoder.keywords, **kwargs})
    owner = getattr(decoder, "__self__", None)
    if isinstance(owner, nn.Module):
        refuse_wrappers(owner)
        function = getattr(decoder, "__func__", None)
        if decoder in (owner.forward, owner.__call__) or function is None:
            return owner, kwargs
        return Method(owner, function), kwargs
    if isinstance(decoder, nn.Module):
        module = uncompiled(decoder)
        refuse_wrappers(module)
        return module, kwargs
    return decoder, kwargs


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that torch.compile was given, where it was; the wrapper where it has hooks."""
    while type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules:
        hooks = module._forward_hooks, module._forward_pre_hooks
        if any(hooks) or module._backward_hooks or module._backward_pre_hooks:
            return module
        module = module._modules["_orig_mod"]  # type: ignore[assignment]
    return module


def refuse_wrappers(module: nn.Module, name: str = "the decoder") -> None:
    """Refuse a module that is wrapped for data-parallel training.

    Raises:
        TypeError: names the wrapper and what to do.
    """
    for kind in type(module).__mro__:
        if kind.__name__ in _WRAPPERS and kind.__module__.startswith("torch."):
            raise TypeError(
                f"{name} is wrapped in {kind.__name__}, past which gradients are not "
                f"synchronised: {_WRAPPERS[kind.__name__]}"
            )


def copied(caller: str, given: Given) -> Given:
    """A deep copy of modules, for a function that leaves them as they are.

    Raises:
        RuntimeError: names the function and what to do.
    """
    try:
        return copy.deepcopy(given)
    except (TypeError, RuntimeError) as error:
        raise RuntimeError(
            f"{caller} works on a copy of what it is given, which cannot be made ({error}): keep "
            "what copy.deepcopy refuses out of its attributes"
        ) from error


def check_latents(z: Tensor) -> None:
    """Refuse what is no batch of latents.

    Raises:
        TypeError: z is not a floating point tensor.
        ValueError: z is not a non-empty [B, m].
    """
    _checks.tensors(z=z)
    if not z.is_floating_point():
        raise TypeError(f"z must be a floating point tensor, got {z.dtype}")
    shape = tuple(z.shape)
    if len(shape) > 2 and set(shape[2:]) == {1}:
        ones = ", 1" * (len(shape) - 2)
        raise ValueError(
            f"z must be [B, m], got shape {shape}; for a decoder that takes [B, m{ones}] put "
            f"nn.Unflatten(1, ({shape[1]}{ones})) in front of it and pass z.flatten(1)"
        )
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"z must be [B, m] with B, m >= 1, got shape {shape}")


def check_tangents(tangents: Tensor | None, z: Tensor) -> None:
    """Refuse what are no directions ``[k, B, m]`` of latents ``[B, m]``; None stands for none.

    Raises:
        TypeError: no floating-point tensor, or of another dtype than z.
        ValueError: another shape or device.
    """
    check_latents(z)
    if tangents is None:
        return
    _checks.floating("tangents", tangents)
    if tangents.dtype != z.dtype:
        raise TypeError(f"tangents are {tangents.dtype} but z is {z.dtype}: convert one of them")
    if tangents.dim() != 3 or tangents.shape[1:] != z.shape or not tangents.shape[0]:
        B, m = z.shape
        raise ValueError(
            f"tangents have shape {tuple(tangents.shape)}: give [k, B, m] with k >= 1 and the "
            f"[B, m] of z, [{B}, {m}]"
        )
    _checks.same_device(("z", z), ("tangents", tangents))


def check_inputs(z: Tensor, names: list[str], tensors: list[Tensor]) -> None:
    """Refuse latents that no decoder here can take.

    Raises:
        TypeError: z is not a floating point tensor.
        ValueError: z is not a non-empty [B, m], or the decoder's parameters are on another device
            or, outside autocast, of another dtype.
    """
    check_latents(z)
    # The first one decides: what comes later may be converted on the way.
    for path, tensor in zip(names, tensors, strict=True):
        name = layer_name(path) if "." in path else f"the decoder's {path}"
        if tensor.device != z.device:
            raise ValueError(
                f"z is on {z.device} but {name} is on {tensor.device}; move one of them"
            )
        if not tensor.is_floating_point():
            continue
        if tensor.dtype != z.dtype and not torch.is_autocast_enabled(z.device.type):
            raise ValueError(
                f"z is {z.dtype} but {name} is {tensor.dtype}; "
                "convert one of them, or use torch.autocast"
            )
        break


def check_chunk_size(chunk_size: int | None) -> None:
    """Refuse a chunk size that is not None or an int >= 1.

    Raises:
        ValueError: anything else.
    """
    whole = isinstance(chunk_size, int) and not isinstance(chunk_size, bool)
    if chunk_size is not None and not (whole and chunk_size >= 1):
        raise ValueError(f"chunk_size must be None or an int >= 1, got {chunk_size!r}")


def check_output(output: Any, z: Tensor) -> None:
    """Refuse what a decoder must not return.

    Raises:
        TypeError: not one floating point tensor.
        ValueError: not [B, ...].
    """
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the decoder must return one tensor, got {type(output).__name__}; wrap it in a "
            "module that returns only the mean"
        )
    if not output.is_floating_point():
        raise TypeError(f"the decoder must return real floating point, got {output.dtype}")
    if output.ndim < 2 or output.shape[0] != z.shape[0]:
        raise ValueError(
            f"the decoder's output must be [B, ...] with B = {int(z.shape[0])}, "
            f"got shape {tuple(int(size) for size in output.shape)}"
        )


def check_target(x: Tensor | None, z: Tensor) -> None:
    """Refuse data that cannot be compared with a decoder's output at z.

    Raises:
        TypeError: x is not None or a floating point tensor.
        ValueError: x has another batch size or device than z.
    """
    if x is None:
        return
    _checks.tensors(x=x)
    if not x.is_floating_point():
        raise TypeError(
            f"x must be a floating point tensor, got {x.dtype}; convert images with / 255"
        )
    if x.ndim < 2 or x.shape[0] != z.shape[0]:
        raise ValueError(
            f"x must be [B, *out] with z's B = {z.shape[0]}, got shape {tuple(x.shape)}"
        )
    if x.device != z.device:
        raise ValueError(f"x is on {x.device} but z is on {z.device}; move one of them")


def check_shape(x: Tensor | None, shape: tuple[int, ...]) -> None:
    """Refuse data that are not like a decoder's output of that shape.

    Raises:
        ValueError: x has other extents behind the batch's.
    """
    if x is not None and list(x.shape[1:]) != list(shape[1:]):
        raise ValueError(
            f"x has shape {tuple(x.shape)} but the decoder returns {tuple(shape)}: they must match"
        )
