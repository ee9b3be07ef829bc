"""The ``fastsfvae`` command."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import sys
from collections.abc import Sequence
from pathlib import Path
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

    download: bool = False
    """Fetch the data into --data-dir first where it is not there; nothing else uses a network."""

    image_every: int = 0
    """Draw reconstructions and samples into images/ every so many steps; 0: only at the end."""

    tensorboard: bool = False
    """Also write the metrics, and the images, for TensorBoard into tensorboard/."""


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
    from fastsfvae import distributed

    with distributed.process_group():
        try:
            _require_extras(_EXTRAS, "train")
            arguments, run = _start(prog, options)
        except (UsageError, TypeError, ValueError, RuntimeError, OSError) as error:
            return _fail(prog, str(error))
        code = _run_steps(prog, arguments, run)
        if code or distributed.rank() > 0:
            return code
    from fastsfvae import plots, report

    results = report.evaluate_run(run)
    try:
        results.save(run.folder)
        plots.save_figures(run)
    except OSError as error:
        return _fail(prog, str(error))
    print(report.table(results, run.config))
    print(f"results in {run.folder}")
    return 0


def _run_steps(prog: str, arguments: TrainArguments, run) -> int:
    """Train under the eyes of the monitors that were asked for; on process 0, speak of it."""
    from fastsfvae import distributed, training
    from fastsfvae.monitors import monitors

    writes = distributed.rank() == 0
    if writes:
        print(
            f"{run.folder}: {run.config.method} on {run.device}, step {run.step}", file=sys.stderr
        )
    try:
        with monitors(run, arguments.image_every, arguments.tensorboard) as watching:
            training.train(run, *watching)
    except training.NonFiniteLoss as error:
        return _fail(prog, str(error), code=1) if writes else 1
    except OSError as error:
        return _fail(prog, str(error))
    if run.finished:
        return 0
    if writes:
        print(
            f"interrupted at step {run.step} of {run.config.steps}, state saved; continue with: "
            f"fastsfvae train --out {run.folder} --resume",
            file=sys.stderr,
        )
    return 130


def _start(prog: str, options: list[str]):
    from fastsfvae import checkpoint, training

    parsed = _parse(prog, options, TrainConfig())
    if parsed.image_every < 0:
        raise UsageError(f"--image-every {parsed.image_every} must not be negative")
    if parsed.tensorboard:
        _require_extras(("tensorboard",), "tensorboard")
    if not parsed.resume:
        _download(parsed)
        return parsed, training.start(parsed.config, parsed.out)
    if parsed.out is None:
        raise UsageError("--resume continues the run in --out: give --out runs/<name>")
    folder = Path(parsed.out)
    # Options that are not given keep the values of the run, not this command's defaults.
    parsed = _parse(prog, options, checkpoint.load_config(folder))
    _download(parsed)
    return parsed, training.resume(folder, parsed.config)


def _download(arguments: TrainArguments) -> None:
    from fastsfvae import distributed
    from fastsfvae.data.load import download_images

    if arguments.download:
        with distributed.first_process_first():
            download_images(arguments.config.data, arguments.config.data_dir)


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


def _require_extras(packages: Sequence[str], extra: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{', '.join(missing)} missing: install what is needed with "
            f'pip install "fastsfvae[{extra}]"'
        )


def _fail(prog: str, message: str, code: int = 2) -> int:
    print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
    return code
