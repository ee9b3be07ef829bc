"""Experiment tracking: a run's metrics, pictures and results in TensorBoard, wandb or MLflow.

Each package is imported where its tracker is asked for, and nowhere else.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from fastsfvae.ground.atomic import write_text
from fastsfvae.ground.options import one_line, say
from fastsfvae.training import distributed
from fastsfvae.training.run import Run

# The run's identity with each tracker that has one of its own, for --resume.
TRACKERS_FILE = "trackers.json"
PROJECT = "fastsfvae"
# Of the metrics that MLflow has, the one that tells how far it has come: all rows hold it.
_ALWAYS = "objective"


class Tracker(Protocol):
    """What follows a run. Values are Python numbers, keyed by name.

    Attributes:
        identity: what it is taken up again by on --resume; "" where it needs none.
    """

    identity: str

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Take the metrics of a step."""
        ...

    def figure(self, name: str, figure: Any, step: int) -> None:
        """Take a matplotlib figure of a step."""
        ...

    def results(self, values: Mapping[str, float], step: int) -> None:
        """Take what the run was judged by at its end."""
        ...

    def close(self, complete: bool) -> None:
        """Write what is left; `complete` says whether the run has come to its end."""
        ...


class TensorBoard:
    """Event files in tensorboard/; what was written after the checkpoint is written again."""

    identity = ""

    def __init__(self, run: Run, known: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = str(run.folder / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=run.step + 1)
        if run.step == 0:
            self._writer.add_text("config", f"```\n{run.config.to_json()}```", 0)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def figure(self, name: str, figure: Any, step: int) -> None:
        """See `Tracker`."""
        self._writer.add_figure(name, figure, step, close=False)

    def results(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self.scalars({f"results/{name}": value for name, value in values.items()}, step)

    def close(self, complete: bool) -> None:
        """See `Tracker`."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, whose files lie in the run's folder unless WANDB_DIR is set."""

    def __init__(self, run: Run, known: str) -> None:
        import wandb

        self._image = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", _name(run)),
            dir=os.environ.get("WANDB_DIR", str(run.folder)),
            id=known or os.environ.get("WANDB_RUN_ID"),
            resume="allow" if known else None,
        )
        self.identity = self._run.id
        # A resumed run may have more steps, or another device.
        self._run.config.update(asdict(run.config), allow_val_change=True)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._log(dict(values), step)

    def figure(self, name: str, figure: Any, step: int) -> None:
        """See `Tracker`."""
        from PIL import Image

        picture = io.BytesIO()
        # Of a figure wandb itself would ask for pyplot, and with it for a window system.
        figure.savefig(picture, format="png", dpi=100)
        self._log({name: self._image(Image.open(picture))}, step)

    def results(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._run.summary.update(dict(values))

    def close(self, complete: bool) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=0 if complete else 1)

    def _log(self, values: dict[str, Any], step: int) -> None:
        # What came after the checkpoint is there already, with the same values.
        if step >= self._run.starting_step:
            self._run.log(values, step=step)


class MLflow:
    """A run of MLflow, where MLFLOW_TRACKING_URI says; parameters are those it started with."""

    def __init__(self, run: Run, known: str) -> None:
        import mlflow
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, mlflow.MlflowClient()
        self._reached = -1
        if known:
            self.identity = known
            # What came after the checkpoint is there already, with the same values.
            history = self._client.get_metric_history(known, _ALWAYS)
            self._reached = max((metric.step for metric in history), default=-1)
            self._client.update_run(known, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        self.identity = self._client.create_run(experiment, run_name=_name(run)).info.run_id
        settings = asdict(run.config).items()
        params = [Param(key, str(value)) for key, value in settings]
        self._client.log_batch(self.identity, params=params)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        if step > self._reached:
            self._log(values, step)

    def figure(self, name: str, figure: Any, step: int) -> None:
        """See `Tracker`."""
        self._client.log_figure(self.identity, figure, f"{name}/step-{step:07}.png")

    def results(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        # It allows no other characters in a name.
        allowed = {re.sub(r"[^\w\-. /]", "", name): value for name, value in values.items()}
        self._log(allowed, step)

    def close(self, complete: bool) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self.identity, "FINISHED" if complete else "KILLED")

    def _log(self, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self.identity, metrics=metrics)


# By name, which is that of the package and of the extra as well.
TRACKERS: dict[str, Callable[[Run, str], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
}


# What most often keeps one from being started.
_SET_BY = {
    "tensorboard": "what it asks for",
    "wandb": "WANDB_API_KEY, or WANDB_MODE=offline",
    "mlflow": "MLFLOW_TRACKING_URI, such as a server's address",
}


@contextmanager
def tracked(run: Run, names: Sequence[str]) -> Iterator[list[Tracker]]:
    """Give a run's trackers, and close them; none on a process that does not write.

    One that fails later on ends no training: that is said in one line, and nothing more is written
    to it. metrics.csv and results.json have everything.

    Args:
        run: what is trained; on --resume it goes on where it was tracked before.
        names: keys of `TRACKERS`.

    Raises:
        RuntimeError: where a tracker cannot be started, in one line.
        ValueError: for a damaged file of the run's identities.
    """
    trackers: list[Tracker] = []
    complete = False
    try:
        for name in names if distributed.rank() == 0 else ():
            trackers.append(_Lasting(name, _start(name, run)))
        yield trackers
        # A last window that is not finite has never been closed.
        complete = run.finished and not run.window
    finally:
        for tracker in trackers:
            tracker.close(complete)


def _start(name: str, run: Run) -> Tracker:
    identities = _read_identities(run.folder)
    try:
        tracker = TRACKERS[name](run, identities.get(name, ""))
    # The package's own, of any class: no account, no server, a store that it was not built for.
    except Exception as error:
        raise RuntimeError(
            f"{name} could not be started ({one_line(error)}): set {_SET_BY[name]}, then go on "
            f"with --out {shlex.quote(str(run.folder))} --resume"
        ) from error
    if tracker.identity:
        identities[name] = tracker.identity
        write_text(run.folder / TRACKERS_FILE, json.dumps(identities, indent=2) + "\n")
    return tracker


class _Lasting:
    """A tracker whose failure ends no training.

    It is not asked again: a server that is away would hold up every row as long as its client
    retries.
    """

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker, self._failed = name, tracker, False
        self.identity = tracker.identity

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._try("scalars", values, step)

    def figure(self, name: str, figure: Any, step: int) -> None:
        """See `Tracker`."""
        self._try("figure", name, figure, step)

    def results(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._try("results", values, step)

    def close(self, complete: bool) -> None:
        """See `Tracker`."""
        self._try("close", complete)

    def _try(self, method: str, *given: Any) -> None:
        if self._failed:
            return
        try:
            getattr(self._tracker, method)(*given)
        except Exception as error:
            self._failed = True
            say(
                f"{self._name} failed at {method} ({one_line(error)}): nothing more is written to "
                "it, and the run goes on"
            )


def _name(run: Run) -> str:
    return run.folder.absolute().name


def _read_identities(folder: Path) -> dict[str, str]:
    path = folder / TRACKERS_FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or not all(isinstance(x, str) for x in found.values()):
            raise ValueError("it should hold the run's identity with each tracker")
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): restore it, or move it away to be tracked as a new run"
        ) from error
    return found
