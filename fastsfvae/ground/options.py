"""What the commands share: options, missing packages, errors of one line."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

Arguments = TypeVar("Arguments")


class UsageError(Exception):
    """A command line that cannot be carried out; its message is one line."""


def parse(
    prog: str,
    class_: type[Arguments],
    options: Sequence[str],
    default: Arguments | None = None,
) -> Arguments:
    """Parse options into a dataclass with tyro; its boxed errors become one line.

    Raises:
        UsageError: for options that do not fit.
        SystemExit: behind --help.
    """
    import tyro

    conf = tyro.conf
    shape: Any = Annotated[
        class_, conf.OmitArgPrefixes, conf.FlagCreatePairsOff, conf.PositionalRequiredArgs
    ]
    captured = io.StringIO()
    given: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(shape, args=list(options), prog=prog, **given)
    except SystemExit as exit_:
        if exit_.code == 0:
            raise
        lines = [line.strip("│ ") for line in captured.getvalue().splitlines()]
        box = [line for line in lines if not line.startswith(("╭", "╰"))]
        # What follows the first rule is a repetition of the help.
        rule = next((i for i, line in enumerate(box) if line.startswith("─")), len(box))
        # A value that a configuration refuses is reported in its own words.
        message = " ".join(box[:rule])
        for name in ("config", "settings"):
            message = message.removeprefix(f"Error parsing {name}: ")
        raise UsageError(message) from None


def require_extras(packages: Sequence[str], extra: str) -> None:
    """Raise UsageError unless all packages are installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{', '.join(missing)} missing: install what is needed with "
            f'pip install "fastsfvae[{extra}]"'
        )


def fail(prog: str, message: str, code: int = 2) -> int:
    """Write one line to stderr; return the exit code."""
    print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
    return code
