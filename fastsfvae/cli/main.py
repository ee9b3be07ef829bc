"""The ``fastsfvae`` command."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from fastsfvae.ground.options import UsageError, fail, parse, require_extras
from fastsfvae.ground.provenance import VERSION
from fastsfvae.training.config import TrainConfig

_USAGE = """\
usage: fastsfvae COMMAND [OPTIONS]

commands:
  train      train a VAE, by default on the bundled MNIST digits
  evaluate   measure a run on its test images: numbers, a page with pictures
  compare    measure runs on the same images: paired differences, one picture
  reproduce  train and measure a table or figure of the paper; set it beside the paper

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
            print(VERSION)
            return 0
        case ["train", *options]:
            return _train(options)
        case ["evaluate", *options]:
            from fastsfvae.cli.measure import evaluate_command

            return evaluate_command(options)
        case ["compare", *options]:
            from fastsfvae.cli.measure import compare_command

            return compare_command(options)
        case ["reproduce", *options]:
            from fastsfvae.cli.reproduce import reproduce_command

            return reproduce_command(options)
    return fail(
        "fastsfvae",
        f"unknown command {arguments[0]!r}: the commands are 'train', 'evaluate', 'compare', "
        "'reproduce'",
    )


def _train(options: list[str]) -> int:
    prog = "fastsfvae train"
    from fastsfvae.training import distributed

    with distributed.process_group():
        try:
            require_extras(_EXTRAS, "train")
            arguments, run = _start(prog, options)
        except (UsageError, TypeError, ValueError, RuntimeError, OSError) as error:
            return fail(prog, str(error))
        code = _run_steps(prog, arguments, run)
        if code or distributed.rank() > 0:
            return code
    from fastsfvae.results import report, run_figures

    results = report.evaluate_run(run)
    try:
        results.save(run.folder)
        run_figures.save_figures(run)
    except OSError as error:
        return fail(prog, str(error))
    print(report.table(results, run.config))
    print(f"results in {run.folder}")
    return 0


def _run_steps(prog: str, arguments: TrainArguments, run) -> int:
    """Train under the eyes of the monitors that were asked for; on process 0, speak of it."""
    from fastsfvae import training
    from fastsfvae.results.run_figures import snapshot
    from fastsfvae.training import distributed
    from fastsfvae.training.monitors import monitors

    writes = distributed.rank() == 0
    if writes:
        print(
            f"{run.folder}: {run.config.method} on {run.device}, step {run.step}", file=sys.stderr
        )
    try:
        asked = arguments.tensorboard, arguments.image_every
        with monitors(run, *asked, draw=snapshot) as watching:
            training.train(run, *watching)
    except training.NonFiniteLoss as error:
        return fail(prog, str(error), code=1) if writes else 1
    except OSError as error:
        return fail(prog, str(error))
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
    from fastsfvae import training
    from fastsfvae.training import checkpoint

    parsed = parse(prog, TrainArguments, options, TrainArguments(TrainConfig()))
    if parsed.image_every < 0:
        raise UsageError(f"--image-every {parsed.image_every} must not be negative")
    if parsed.tensorboard:
        require_extras(("tensorboard",), "tensorboard")
    if not parsed.resume:
        _prepare(parsed)
        return parsed, training.start(parsed.config, parsed.out)
    if parsed.out is None:
        raise UsageError("--resume continues the run in --out: give --out runs/<name>")
    folder = Path(parsed.out)
    # Options that are not given keep the values of the run, not this command's defaults.
    saved = TrainArguments(checkpoint.load_config(folder))
    parsed = parse(prog, TrainArguments, options, saved)
    _prepare(parsed)
    return parsed, training.resume(folder, parsed.config)


def _prepare(arguments: TrainArguments) -> None:
    """Refuse a graph without a GPU; fetch the data where that is asked for."""
    device = arguments.config.resolve_device()
    if arguments.config.cuda_graph and device.type != "cuda":
        raise UsageError(f"--cuda-graph needs a GPU, this run is on the {device}: leave it out")
    from fastsfvae.data.load import download_images
    from fastsfvae.training import distributed

    if arguments.download:
        with distributed.first_process_first():
            download_images(arguments.config.data, arguments.config.data_dir)
