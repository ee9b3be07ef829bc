"""The ``fastsfvae`` command."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import sys
from collections.abc import Sequence
from typing import Annotated

from fastsfvae import __version__
from fastsfvae.config import TrainConfig

_USAGE = """\
usage: fastsfvae COMMAND [OPTIONS]

commands:
  train      train a VAE, by default on the bundled MNIST digits

fastsfvae COMMAND --help lists a command's options; fastsfvae --version prints the version."""

_EXTRAS = ("tyro", "rich", "matplotlib")


@dataclasses.dataclass(frozen=True)
class TrainArguments:
    """Train a Gaussian VAE; write weights, metrics and figures. It needs no data of yours."""

    config: TrainConfig
    """What is trained."""

    out: str | None = None
    """Folder of the run, which must not exist; default runs/<method>-<model>-<number>."""

    resume: bool = False
    """Continue the run in --out from its last checkpoint; --steps may be raised."""


class UsageError(Exception):
    """A command line that cannot be carried out; its message is one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    0: done. 1: training met a non-finite loss. 2: bad input, with one line on stderr.
    130: interrupted, with the state saved.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    match arguments:
        case [] | ["-h" | "--help"]:
            print(_USAGE)
            return 0
        case ["--version"]:
            print(__version__)
            return 0
        case ["train", *options]:
            return _train(options)
    return _fail("fastsfvae", f"unknown command {arguments[0]!r}: the commands are 'train'")


def _train(options: list[str]) -> int:
    prog = "fastsfvae train"
    try:
        _require_extras()
        from fastsfvae import training

        run = _start(prog, options)
    except (UsageError, TypeError, ValueError, RuntimeError, OSError) as error:
        return _fail(prog, str(error))
    from fastsfvae import plots, report
    from fastsfvae.progress import progress

    print(f"{run.folder}: {run.config.method} on {run.device}, step {run.step}", file=sys.stderr)
    try:
        with progress(run) as on_step:
            training.train(run, on_step)
    except training.NonFiniteLoss as error:
        return _fail(prog, str(error), code=1)
    if not run.finished:
        print(
            f"interrupted at step {run.step} of {run.config.steps}, state saved; continue with: "
            f"fastsfvae train --out {run.folder} --resume",
            file=sys.stderr,
        )
        return 130
    results = report.evaluate_run(run)
    results.save(run.folder)
    plots.save_figures(run)
    print(report.table(results, run.config))
    print(f"results in {run.folder}")
    return 0


def _start(prog: str, options: list[str]):
    from fastsfvae import checkpoint, training

    parsed = _parse(prog, options, TrainConfig())
    if not parsed.resume:
        return training.start(parsed.config, parsed.out)
    if parsed.out is None:
        raise UsageError("--resume continues the run in --out: give --out runs/<name>")
    # Options that are not given keep the values of the run, not this command's defaults.
    saved = checkpoint.load_config(training.Path(parsed.out))
    return training.resume(parsed.out, _parse(prog, options, saved).config)


def _parse(prog: str, options: list[str], default: TrainConfig) -> TrainArguments:
    """Parse with tyro; its boxed errors become one line."""
    import tyro

    class_ = Annotated[TrainArguments, tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff]
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(class_, args=options, prog=prog, default=TrainArguments(default))
    except SystemExit as exit_:
        if exit_.code == 0:
            raise
        lines = [line.strip("│ ") for line in captured.getvalue().splitlines()]
        box = [line for line in lines if not line.startswith(("╭", "╰"))]
        # What follows the first rule is a repetition of the help.
        rule = next((i for i, line in enumerate(box) if line.startswith("─")), len(box))
        # A value that TrainConfig refuses is reported in its own words.
        raise UsageError(" ".join(box[:rule]).removeprefix("Error parsing config: ")) from None


def _require_extras() -> None:
    missing = [name for name in _EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{', '.join(missing)} missing: install what training needs with "
            'pip install "fastsfvae[train]"'
        )


def _fail(prog: str, message: str, code: int = 2) -> int:
    print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
    return code
