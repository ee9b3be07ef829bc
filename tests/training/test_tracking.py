"""What trackers are handed, where a resumed run goes on with them, and what their faults do."""

import csv
import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import types
from dataclasses import asdict, replace

import pytest

from fastsfvae import training
from fastsfvae.cli import main as cli
from fastsfvae.results.run_figures import snapshot
from fastsfvae.training import loop, tracking
from fastsfvae.training.checkpoint import FolderLock
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.monitors import Scalars, monitors
from fastsfvae.training.tracking import TRACKERS_FILE, tracked

SMALL = TrainConfig(model="tanh", method="sampling", latent_dim=3, batch_size=8, steps=100, seed=5)
OPTIONS = ["train", "--method", "sampling", "--model", "tanh", "--batch-size", "8"]
RESULTS = {"test/squared error, sampled": 3.5, "collapse/active": 2}


class Recorded:
    """A tracker that keeps what it is given, and fails where it is told to."""

    identity = "known"
    made: list = []

    def __init__(self, run, known, failing=""):
        self.known, self.failing, self.calls = known, failing, []
        Recorded.made.append(self)

    def _take(self, method, *given):
        if method == self.failing:
            raise ConnectionError(f"no route to {method}\nand much more")
        self.calls.append((method, *given))

    def scalars(self, values, step):
        self._take("scalars", values, step)

    def figure(self, name, figure, step):
        self._take("figure", name, step)

    def results(self, values, step):
        self._take("results", values, step)

    def close(self, complete):
        self._take("close", complete)


@pytest.fixture
def recorded(monkeypatch):
    Recorded.made = []
    monkeypatch.setitem(tracking.TRACKERS, "wandb", Recorded)
    monkeypatch.setattr("fastsfvae.cli.train.require_extras", lambda packages, extra: None)
    return Recorded.made


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: float(v) for name, v in row.items()} for row in csv.DictReader(file)]


def stop_at(step):
    def monitor(run, row):
        if run.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return monitor


def killed_at(step):
    """As kill -9 leaves a run: nothing of what came after the checkpoint is saved."""

    def monitor(run, row):
        if run.step == step:
            raise KeyboardInterrupt

    return monitor


def train_in_two(folder, name, monkeypatch):
    """Checkpoint at 40, killed at 60, taken up with more steps; the whole is `SMALL`."""
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY", 40)
    run = training.start(replace(SMALL, schedule_steps=100, steps=80), folder)
    with pytest.raises(KeyboardInterrupt), tracked(run, [name]) as trackers:
        with monitors(run, trackers, image_every=20, draw=snapshot) as watching:
            training.train(run, *watching, killed_at(60))
    run = training.resume(folder, replace(run.config, steps=100))
    assert run.step == 40
    with tracked(run, [name]) as trackers:
        with monitors(run, trackers, image_every=20, draw=snapshot) as watching:
            training.train(run, *watching)
        for tracker in trackers:
            tracker.results(RESULTS, run.step)
    return run


# --- the command


def test_what_the_command_hands_over(recorded, tmp_path, capsys):
    options = [*OPTIONS, "--steps", "50", "--image-every", "25", "--out", str(tmp_path / "run")]
    assert cli.main([*options, "--train-images", "100", "--tracker", "wandb"]) == 0
    (tracker,) = recorded
    scalars = {step: values for method, values, step in tracker.calls[:-2] if method == "scalars"}
    written = {row.pop("step"): row for row in rows(tmp_path / "run")}
    assert [*scalars] == [1, 25, 50] == [*written]
    for step, values in scalars.items():
        assert written[step] == pytest.approx(values | {"seconds": written[step]["seconds"]})
    assert [call for call in tracker.calls if call[0] == "figure"] == [
        ("figure", "images", 25),
        ("figure", "images", 50),
    ]
    (_, results, step), closed = tracker.calls[-2:]
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    mean, error = stored["splits"]["test"]["log ML"].values()
    assert (results["test/log ML"], results["test/log ML, standard error"]) == (mean, error)
    assert results["collapse/active"] == stored["collapse"]["active"]
    assert results["log_ml_bias"] == stored["log_ml_bias"] and step == 50
    assert closed == ("close", True)


@pytest.mark.parametrize("failing", ["scalars", "figure", "results", "close"])
def test_a_tracker_that_fails_ends_no_training(failing, recorded, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(tracking.TRACKERS, "wandb", lambda *run: Recorded(*run, failing=failing))
    run = training.start(replace(SMALL, steps=50), tmp_path / "run")
    with tracked(run, ["wandb"]) as (tracker,):
        with monitors(run, [tracker], image_every=20, draw=snapshot) as watching:
            training.train(run, *watching)
        tracker.results(RESULTS, run.step)
    said = [line for line in capsys.readouterr().err.splitlines() if "wandb" in line]
    assert said == [
        f"wandb failed at {failing} (no route to {failing} and much more): nothing more is written "
        "to it, and the run goes on"
    ]
    assert [row["step"] for row in rows(run.folder)] == [1, 25, 50]
    # What came before its fault, and nothing behind it.
    before = {
        "scalars": [],
        "figure": ["scalars"],
        "results": ["scalars", "figure", "scalars", "figure", "scalars"],
        "close": ["scalars", "figure", "scalars", "figure", "scalars", "results"],
    }
    assert [call[0] for call in recorded[0].calls] == before[failing]


def test_a_tracker_that_cannot_start(recorded, tmp_path, capsys, monkeypatch):
    def broken(run, known):
        raise KeyError("no API key\nconfigured")

    monkeypatch.setitem(tracking.TRACKERS, "wandb", broken)
    folder = tmp_path / "run"
    assert cli.main([*OPTIONS, "--tracker", "wandb", "--out", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "wandb could not be started ('no API key" in error
    assert f"--out {folder} --resume" in error
    # Nothing was trained, and the way out that it names is one.
    monkeypatch.setitem(tracking.TRACKERS, "wandb", Recorded)
    run = training.resume(folder)
    with tracked(run, ["wandb"]):
        assert (run.step, recorded[0].known) == (0, "")
    run.lock.release()


@pytest.mark.parametrize(
    "options, message",
    [
        ("--tracker wanb", "--tracker 'wanb' is none of tensorboard, wandb, mlflow: did you mean"),
        ("--tracker wandb,", "--tracker '' is none of tensorboard, wandb, mlflow"),
        ("--tracker mlflow,WANDB", "--tracker 'WANDB' is none of"),
        ("--tracker", "--tracker needs a value"),
    ],
)
def test_unknown_trackers(options, message, tmp_path, capsys):
    assert cli.main([*OPTIONS, *options.split(), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_named_before_anything_is_trained(name, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda x: None if x == name else find(x))
    assert cli.main([*OPTIONS, "--tracker", name, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert f'{name} missing: install what is needed with pip install "fastsfvae[{name}]"' in error
    assert error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_no_package_is_imported_that_was_not_asked_for(tmp_path):
    code = """
import sys
from fastsfvae import training
from fastsfvae.cli import train
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.monitors import monitors
from fastsfvae.training.tracking import tracked

run = training.start(TrainConfig(model="tanh", method="sampling", steps=2), sys.argv[1])
with tracked(run, []) as trackers, monitors(run, trackers) as watching:
    training.train(run, *watching)
print({"wandb", "mlflow", "tensorboard"} & sys.modules.keys())
"""
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_tensorboard_is_asked_for_by_either_name():
    from fastsfvae.cli.train import TrainArguments

    def trackers(**given):
        return TrainArguments(SMALL, **given).trackers

    assert trackers() == ()
    assert trackers(tensorboard=True) == ("tensorboard",)
    assert trackers(tensorboard=True, tracker="mlflow,tensorboard") == ("tensorboard", "mlflow")


# --- a run that goes on


def test_an_interrupted_run_is_not_complete_and_goes_on(recorded, tmp_path):
    run = training.start(SMALL, tmp_path / "run")
    with tracked(run, ["wandb"]) as trackers:
        training.train(run, *map(Scalars, trackers), stop_at(30))
    assert json.loads((run.folder / TRACKERS_FILE).read_text()) == {"wandb": "known"}
    run = training.resume(run.folder)
    with tracked(run, ["wandb"]) as trackers:
        training.train(run, *map(Scalars, trackers))
    first, second = recorded
    assert (first.known, second.known) == ("", "known")
    assert (first.calls[-1], second.calls[-1]) == (("close", False), ("close", True))
    steps = [[call[2] for call in tracker.calls[:-1]] for tracker in recorded]
    assert steps == [[1, 25], [50, 75, 100]]


def test_a_run_whose_last_loss_is_not_finite_is_not_complete(recorded, tmp_path):
    # Adam's first step is as long as the learning rate: the second loss overflows.
    run = training.start(replace(SMALL, lr=1e30, steps=2), tmp_path / "run")
    with tracked(run, ["wandb"]):
        with pytest.raises(training.NonFiniteLoss):
            training.train(run)
    assert run.finished and recorded[0].calls == [("close", False)]


def test_a_damaged_file_of_identities(tmp_path):
    run = training.start(SMALL, tmp_path / "run")
    for text in ("[1]", '{"wandb": 3}', "{"):
        (run.folder / TRACKERS_FILE).write_text(text)
        with pytest.raises(ValueError, match=f"{TRACKERS_FILE} is damaged .*: restore it, or move"):
            with tracked(run, ["tensorboard"]):
                pass
    run.lock.release()


def test_only_process_0_tracks(recorded, tmp_path, monkeypatch):
    run = training.start(SMALL, tmp_path / "run")
    monkeypatch.setattr(tracking.distributed, "rank", lambda: 1)
    with tracked(run, ["wandb"]) as trackers:
        assert trackers == [] == recorded
    run.lock.release()
    FolderLock(run.folder).release()


# --- the packages themselves


def test_tensorboard_holds_results_and_settings(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train_in_two(tmp_path / "run", "tensorboard", monkeypatch)
    events = accumulator.EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    (active,) = events.Scalars("results/collapse/active")
    assert (active.step, active.value) == (100, 2)
    assert [scalar.step for scalar in events.Scalars("kl")] == [1, 25, 50, 75, 100]
    (text,) = events.Tensors("config/text_summary")
    assert '"latent_dim": 3' in text.tensor_proto.string_val[0].decode()


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    run = train_in_two(tmp_path / "digits", "mlflow", monkeypatch)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("fastsfvae")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("digits", "FINISHED")
    assert json.loads((run.folder / TRACKERS_FILE).read_text()) == {"mlflow": found.info.run_id}
    # As it was started; --resume has given it more steps.
    assert found.data.params == {
        k: str(v) for k, v in asdict(replace(run.config, steps=80)).items()
    }
    for name in ("objective", "kl", "loss"):
        history = client.get_metric_history(found.info.run_id, name)
        assert [m.step for m in history] == [1, 25, 50, 75, 100]
        # Those up to the kill are the first process's, which the second would have repeated.
        assert [m.value for m in history] == pytest.approx([row[name] for row in rows(run.folder)])
    (metric,) = client.get_metric_history(found.info.run_id, "test/squared error sampled")
    assert (metric.value, metric.step) == (3.5, 100)
    artifacts = [file.path for file in client.list_artifacts(found.info.run_id, "images")]
    assert artifacts == [f"images/step-{step:07}.png" for step in (20, 40, 60, 80, 100)]


def wandb_records(path):
    """The records of a .wandb file: blocks of 32 KiB, records with their length, maybe in parts."""
    from wandb.proto import wandb_internal_pb2

    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


@pytest.mark.slow
def test_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = train_in_two(tmp_path / "digits", "wandb", monkeypatch)
    identity = json.loads((run.folder / TRACKERS_FILE).read_text())["wandb"]
    folders = sorted((run.folder / "wandb").glob(f"offline-run-*-{identity}"))
    parts = [[*wandb_records(folder / f"run-{identity}.wandb")] for folder in folders]
    history: list[dict] = [{}, {}]
    summary: dict = {}
    for part, records in enumerate(parts):
        (started,) = [record.run for record in records if record.HasField("run")]
        assert (started.run_id, started.project) == (identity, "fastsfvae")
        assert (started.display_name, started.resume) == ("digits", part == 1)
        for record in records:
            values = {item.key or item.nested_key[0]: item for item in record.history.item}
            if values:
                history[part][record.history.step.num] = values
            summary |= {item.key: item.value_json for item in record.summary.update}
        config = {i.key: i.value_json for r in records for i in r.config.update}
        assert (config["steps"], config["seed"]) == (("80", "5"), ("100", "5"))[part]
    assert [[*part] for part in history] == [[1, 20, 25, 40, 50, 60], [50, 60, 75, 80, 100]]
    # Without a server each part is whole from its checkpoint on; the second holds the same values.
    seen = {step: v for part in history for step, v in part.items() if "objective" in v}
    for row in rows(run.folder):
        assert json.loads(seen[row["step"]]["objective"].value_json) == row["objective"]
    assert all("images" in history[1][step] for step in (60, 80, 100))
    assert summary["test/squared error, sampled"] == "3.5"


class FakeRun:
    """What a server that has steps up to 60 makes of a run that is taken up at 40."""

    def __init__(self, starting_step, **given):
        self.given, self.starting_step, self.logged = given, starting_step, []
        self.id = given["id"] or "made"
        self.config = self

    def update(self, values, allow_val_change):
        self.settings = values, allow_val_change

    def log(self, values, step):
        self.logged.append(step)

    def finish(self, exit_code):
        self.exit_code = exit_code


def test_wandb_is_taken_up_where_its_server_is(tmp_path, monkeypatch):
    runs = []

    def init(**given):
        runs.append(FakeRun(starting_step=61 if runs else 0, **given))
        return runs[-1]

    fake = types.SimpleNamespace(init=init, Image=lambda picture: picture.size)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for name in ("WANDB_NAME", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    run = training.start(replace(SMALL, steps=80), tmp_path / "digits")
    for _ in range(2):
        with tracked(run, ["wandb"]) as (tracker,):
            for step in (25, 50, 75):
                tracker.scalars({"kl": 1.0}, step)
    first, second = runs
    expected = {"project": "mine", "name": "digits", "dir": str(run.folder)}
    assert first.given == expected | {"id": None, "resume": None}
    assert second.given == expected | {"id": "made", "resume": "allow"}
    assert (first.logged, second.logged) == ([25, 50, 75], [75])
    assert first.settings == (asdict(run.config), True) and first.exit_code == 1
    run.lock.release()
