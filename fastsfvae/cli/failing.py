"""How a command of several processes says what went wrong."""

from __future__ import annotations

from fastsfvae.ground import options
from fastsfvae.training import distributed


def fail(prog: str, message: str, code: int = 2) -> int:
    """`options.fail` on one of the processes; return the exit code on all."""
    return options.fail(prog, message, code) if distributed.speaks_of_failure() else code
