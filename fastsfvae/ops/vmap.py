"""What torch.vmap over an operation of this library gets to read."""

from __future__ import annotations

from typing import Any, NoReturn


def refuse_vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
    """The `vmap` of an operation that has none.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "torch.vmap cannot map over the fused loss: call it for one model at a time, "
        'or give backend="reference"'
    )
