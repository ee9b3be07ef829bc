"""The ways to train, and which settings each of them takes."""

from __future__ import annotations

from typing import Any, Literal, get_args

Method = Literal[
    "sampling-free",
    "sampling",
    "beta-vae",
    "auto-encoder",
    "iwae",
    "stl",
    "dreg",
    "vlae",
    "exact-marginal",
]
METHODS: tuple[Method, ...] = get_args(Method)

_TAKE_KL_WEIGHT = ("sampling-free", "sampling", "beta-vae")
_TAKE_SAMPLES = ("sampling", "beta-vae", "iwae", "stl", "dreg", "vlae")
# Each step of the others is the same program: `vlae` searches modes, `exact-marginal` pieces.
_FIXED = tuple(method for method in METHODS if method not in ("vlae", "exact-marginal"))
# The methods that a setting other than its default has a meaning for.
_TAKEN_BY = {
    "samples": _TAKE_SAMPLES,
    "draws": _TAKE_SAMPLES,
    "kl_weight": _TAKE_KL_WEIGHT,
    "kl_weight_schedule": _TAKE_KL_WEIGHT,
    "gamma_schedule": ("sampling-free",),
    "learned_noise_var": _FIXED,
    "compile": _FIXED,
    "cuda_graph": _FIXED,
    "mode_steps": ("vlae",),
    "bound": ("vlae",),
    "proposal": ("iwae",),
}


def check_taken(method: Method, config: Any) -> None:
    """Refuse a setting that the method would leave unread.

    Args:
        method: its name.
        config: a `TrainConfig`.

    Raises:
        ValueError: in one line that names the methods that take it.
    """
    for name, methods in _TAKEN_BY.items():
        value = getattr(config, name)
        if value != getattr(type(config), name) and method not in methods:
            shown = f"{value:g}" if isinstance(value, float) else repr(value)
            raise ValueError(
                f"{name}={shown} with method={method!r}: --{name.replace('_', '-')} is "
                f"for {', '.join(methods)}"
            )
