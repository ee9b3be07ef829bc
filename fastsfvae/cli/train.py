"""The command ``fastsfvae train``."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from fastsfvae import training
from fastsfvae.cli.failing import fail
from fastsfvae.data.load import download_images
from fastsfvae.ground.options import UsageError, nearest, parse, require_extras, say
from fastsfvae.results import report, run_figures
from fastsfvae.training import distributed
from fastsfvae.training.checkpoint import load_config
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.methods import WITHOUT_PRIOR
from fastsfvae.training.monitors import monitors
from fastsfvae.training.tracking import TRACKERS, Tracker, tracked

_PROG = "fastsfvae train"
_INPUT_ERRORS = (UsageError, TypeError, ValueError, RuntimeError, OSError)


@dataclasses.dataclass(frozen=True)
class TrainArguments:
    """Train a Gaussian VAE; write weights, metrics and figures. It needs no data of yours."""

    config: TrainConfig
    """What is trained."""

    out: Annotated[str | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Folder of the run, which must not exist; default runs/<method>-<model>-<number>."""

    resume: bool = False
    """Continue the run in --out from its last checkpoint; --steps may be raised."""

    download: bool = False
    """Fetch the data into --data-dir first where it is not there; nothing else uses a network."""

    image_every: int = 0
    """Draw reconstructions and samples into images/ every so many steps; 0: only at the end."""

    tracker: Annotated[str | None, arg(metavar="NAMES", help_behavior_hint="")] = None
    """Also hand metrics, images and results to tensorboard, wandb or mlflow, or to several:
    wandb,mlflow. Each is an extra of its name and set up by its own environment variables."""

    tensorboard: bool = False
    """The same as tensorboard among the names of --tracker."""

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names that were asked for, each once."""
        names = [] if self.tracker is None else self.tracker.split(",")
        return tuple(dict.fromkeys(["tensorboard"] * self.tensorboard + names))


def train_command(options: list[str]) -> int:
    """Run ``fastsfvae train`` and return its exit code."""
    with contextlib.ExitStack() as outer:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(distributed.process_group())
                arguments, run = _start(options)
                # They outlive the group: results come when the other processes have left.
                trackers = outer.enter_context(tracked(run, arguments.trackers))
            except _INPUT_ERRORS as error:
                return fail(_PROG, str(error))
            code = _run_steps(arguments, run, trackers)
            if code or distributed.rank() > 0:
                return code
        results = report.evaluate_run(run)
        try:
            results.save(run.folder)
            run_figures.save_figures(run)
        except OSError as error:
            return fail(_PROG, str(error))
        for tracker in trackers:
            tracker.results(results.values, run.step)
        print(report.table(results, run.judged))
        print(f"results in {run.folder}")
    return 0


def _run_steps(arguments: TrainArguments, run: training.Run, trackers: Sequence[Tracker]) -> int:
    """Train under the eyes of the monitors that were asked for; on process 0, speak of it."""
    writes = distributed.rank() == 0
    if writes:
        start = f" after {run.config.warm_start}" if run.config.warm_start else ""
        say(f"{run.folder}: {run.config.method}{start} on {run.device}, step {run.step}")
    try:
        asked = trackers, arguments.image_every
        with monitors(run, *asked, draw=run_figures.snapshot) as watching:
            training.train(run, *watching)
    except training.NonFiniteLoss as error:
        return fail(_PROG, str(error), code=1)
    except OSError as error:
        return fail(_PROG, str(error))
    except RuntimeError as error:
        # What torch says of memory that does not suffice, or of a compiler that is not there.
        return fail(
            _PROG, f"{error} (at step {run.step}; the last checkpoint in {run.folder} is intact)"
        )
    if run.finished:
        return 0
    if writes:
        say(
            f"interrupted at step {run.step} of {run.config.steps}, state saved; continue with: "
            f"fastsfvae train --out {shlex.quote(str(run.folder))} --resume"
        )
    return 130


def _start(options: list[str]) -> tuple[TrainArguments, training.Run]:
    parsed = parse(_PROG, TrainArguments, options, TrainArguments(TrainConfig()))
    if parsed.image_every < 0:
        raise UsageError(f"--image-every {parsed.image_every} must not be negative")
    for name in parsed.trackers:
        if name not in TRACKERS:
            listed = ", ".join(TRACKERS)
            raise UsageError(f"--tracker {name!r} is none of {listed}{nearest(name, TRACKERS)}")
        require_extras((name,), name)
    if not parsed.resume:
        _prepare(parsed)
        return parsed, training.start(parsed.config, parsed.out)
    if parsed.out is None:
        raise UsageError("--resume continues the run in --out: give --out runs/<name>")
    folder = Path(parsed.out)
    # Options that are not given keep the values of the run, not this command's defaults.
    saved = TrainArguments(load_config(folder))
    parsed = parse(_PROG, TrainArguments, options, saved)
    _prepare(parsed)
    return parsed, training.resume(folder, parsed.config)


def _prepare(arguments: TrainArguments) -> None:
    """Refuse a device that is not there; fetch the data where that is asked for."""
    arguments.config.training_device()
    if arguments.config.method in WITHOUT_PRIOR:
        # Its pictures are drawn from a density that this fits.
        require_extras(("sklearn",), "train")
    if arguments.download:
        with distributed.first_process_first():
            download_images(arguments.config.data, arguments.config.data_dir)
