"""Checks of public arguments: one clear line that quotes what was given and says what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Likelihood: TypeAlias = Literal["precision", "mixture", "normalized", "expected"]
Reduction: TypeAlias = Literal["mean", "sum", "none"]
Backend: TypeAlias = Literal["auto", "torch", "triton", "reference"]
LIKELIHOODS: tuple[Likelihood, ...] = get_args(Likelihood)
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
BACKENDS: tuple[Backend, ...] = get_args(Backend)


def choice(name: str, value: str, options: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `options`."""
    if value not in options:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, options))}")


def _number(name: str, value: float | Tensor) -> bool:
    """Whether `value` is a Python number, which can be range-checked without a host sync."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}: give a number or a 0-d tensor"
            )
        if not value.dtype.is_floating_point:
            raise ValueError(f"{name} has dtype {value.dtype}: give a floating-point tensor")
        return False
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} is not a number: give a float or a 0-d tensor")
    return True


def noise_var(value: float | Tensor) -> None:
    """Raise unless c is a 0-d tensor or a finite positive number."""
    if _number("noise_var", value) and not (math.isfinite(value) and value > 0):
        raise ValueError(f"noise_var={value!r} must be finite and positive (it is c, a variance)")


def gamma(value: float | Tensor) -> None:
    """Raise unless gamma is a 0-d tensor or a number in [0, 1]."""
    if _number("gamma", value) and not 0 <= value <= 1:
        raise ValueError(f"gamma={value!r} must lie in [0, 1]")


def kl_weight(value: float | Tensor) -> None:
    """Raise unless kl_weight is a 0-d tensor or a finite number >= 0."""
    if _number("kl_weight", value) and not (math.isfinite(value) and value >= 0):
        raise ValueError(f"kl_weight={value!r} must be finite and not negative")


def loss_scale(value: float | Tensor) -> None:
    """Raise unless the scale is a 0-d tensor or a finite positive number."""
    if _number("loss_scale", value) and not (math.isfinite(value) and value > 0):
        raise ValueError(f"loss_scale={value!r} must be finite and positive")


def in_range(name: str, value: float | Tensor) -> float | Tensor:
    """A setting; in place of a tensor's that is out of range NaN, as its value is not read here.

    A capture records nothing of it. The formulas see to noise_var by themselves.
    """
    if not isinstance(value, Tensor) or name not in _ALLOWED:
        return value
    if value.is_cuda and not torch.compiler.is_compiling():
        if torch.cuda.is_current_stream_capturing():
            return value
    # NaN outside, and 0 of what it is inside.
    return torch.lerp(value, _ALLOWED[name](value.detach()), 0.0)


# Functions with finite values on what a setting may be, and NaN elsewhere.
_ALLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "gamma": lambda gamma: gamma.sqrt().asin(),
    "kl_weight": torch.sqrt,
}


def prior_var(value: float | Tensor | None) -> None:
    """Raise unless the prior's variance is None, a 0-d tensor or a finite positive number."""
    if value is None or not _number("prior_var", value):
        return
    if not (math.isfinite(value) and value > 0):
        raise ValueError(
            f"prior_var={value!r} must be finite and positive (a variance), or None for no prior"
        )


def not_negative(name: str, value: float, otherwise: str = "") -> None:
    """Raise unless `value` is a finite number >= 0; `otherwise` says what else it may be."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} is not a number: give one that is >= 0{otherwise}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value!r} must be finite and not negative{otherwise}")


def damping(value: float | Tensor, dtype: torch.dtype) -> None:
    """Raise unless damping is a 0-d tensor, 0, or a finite number > 0 that `dtype` can hold."""
    if not _number("damping", value):
        return
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"damping={value!r} must be finite and not negative")
    if 0 < value < torch.finfo(dtype).tiny:
        raise ValueError(f"damping={value!r} is no normal number of {dtype}: give more, or 0")


def settings(
    noise_var_: float | Tensor,
    gamma_: float | Tensor,
    kl_weight_: float | Tensor,
    likelihood: str,
) -> None:
    """Raise for a setting of the objective that is out of range."""
    noise_var(noise_var_)
    gamma(gamma_)
    kl_weight(kl_weight_)
    choice("likelihood", likelihood, LIKELIHOODS)


def probes(value: int | None, likelihood: str) -> None:
    """Raise unless probes are None, or an int >= 1 for the likelihood that can take them."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"probes={value!r} must be None or an int >= 1")
    if likelihood != "expected":
        raise ValueError(
            f'probes={value} estimate a trace, which likelihood="{likelihood}" does not have: use '
            'likelihood="expected", or probes=None'
        )


def tensors(**named: Tensor) -> None:
    """Raise TypeError unless all of these are tensors."""
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}: give a torch.Tensor")


def floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is a real floating-point tensor."""
    tensors(**{name: tensor})
    if not tensor.dtype.is_floating_point:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}: convert it to a floating-point dtype"
            + (" (images: x.float() / 255)" if tensor.dtype == torch.uint8 else "")
        )


def same_device(first: tuple[str, Tensor], *others: tuple[str, Tensor]) -> None:
    """Raise ValueError unless all the named tensors lie on the first one's device."""
    for name, tensor in others:
        if tensor.device != first[1].device:
            raise ValueError(
                f"{name} is on {tensor.device} but {first[0]} is on {first[1].device}: "
                "move them to one device"
            )


def latent(
    mean: Tensor,
    log_var: Tensor,
    factor: bool = False,
    names: tuple[str, str] = ("mean", "log_var"),
) -> None:
    """Raise unless mean and log_var are floating [B, m] of one shape with B, m >= 1.

    With `factor`, log_var may be a covariance's factor [B, m, m] as well.
    """
    first, second = names
    floating(first, mean)
    floating(second, log_var)
    is_factor = factor and log_var.shape == (*mean.shape, *mean.shape[1:])
    if mean.dim() != 2 or not (mean.shape == log_var.shape or is_factor):
        raise ValueError(
            f"{first} {tuple(mean.shape)} and {second} {tuple(log_var.shape)} must both be [B, m]"
            + (", or log_var a factor [B, m, m] of the covariance" if factor else "")
        )
    if 0 in mean.shape:
        raise ValueError(f"{first} has shape {tuple(mean.shape)}: the batch is empty")
    same_device((first, mean), (second, log_var))


def batch(x: Tensor, mean: Tensor) -> None:
    """Raise unless x is floating, on mean's device, with mean's batch size."""
    floating("x", x)
    if x.dim() < 2 or x.shape[0] != mean.shape[0]:
        raise ValueError(
            f"x {tuple(x.shape)} and mean {tuple(mean.shape)} must share their batch axis: "
            "x is [B, *out], mean is [B, m]"
        )
    same_device(("mean", mean), ("x", x))


def low_rank(residual: Tensor, jacobian: Tensor, latent_var: Tensor) -> None:
    """Raise unless residual [B, n], jacobian [B, m, n] and latent_var [B, m] fit together."""
    named = ("residual", residual), ("jacobian", jacobian), ("latent_var", latent_var)
    for name, tensor in named:
        floating(name, tensor)
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in named)
    if [t.dim() for _, t in named] != [2, 3, 2]:
        raise ValueError(f"{shapes}: give residual [B, n], jacobian [B, m, n], latent_var [B, m]")
    B, m, n = jacobian.shape
    if residual.shape != (B, n) or latent_var.shape != (B, m):
        raise ValueError(
            f"{shapes} do not fit together: give residual [B, n], jacobian [B, m, n] "
            "(tangent-major), latent_var [B, m]"
        )
    if 0 in jacobian.shape:
        raise ValueError(f"{shapes}: the batch, m or n is empty")
    same_device(*named)
