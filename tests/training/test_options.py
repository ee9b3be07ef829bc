"""Schedules, precision, compilation, pictures, and what a run refuses."""

import csv
import functools
import json
import math
import os
import resource
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastsfvae import graphed, training
from fastsfvae.cli import main as cli
from fastsfvae.objectives import SamplingFree, Terms
from fastsfvae.results.run_figures import snapshot
from fastsfvae.training import capture, loop
from fastsfvae.training import run as run_module
from fastsfvae.training.checkpoint import CHECKPOINT, CONFIG, FolderLock, load_config
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.metrics_csv import METRICS
from fastsfvae.training.monitors import monitors
from fastsfvae.training.schedules import Schedule
from fastsfvae.training.tracking import tracked

SMALL = TrainConfig(model="tanh", latent_dim=3, batch_size=8, steps=60, seed=5)


def _rows(folder, without=("seconds",)):
    with (folder / METRICS).open(newline="") as file:
        rows = csv.DictReader(file)
        return [{k: float(v) for k, v in row.items() if k not in without} for row in rows]


# --- schedules


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("constant", [0.5] * 7),
        # Figure 1: three phases; 7 steps do not divide by 3.
        ("steps:0.95,0.67", [0.95, 0.95, 0.95, 0.67, 0.67, 0.5, 0.5]),
        ("linear:0.2", [0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5]),
        ("linear:1,0.2", [1, 0.733333, 0.466667, 0.2, 0.3, 0.4, 0.5]),
        # Half-way at the middle; (1 - cos 30 degrees)/2 = 0.0669873 of the way after one step.
        ("cosine:1.5", [1.5, 1.4330127, 1.25, 1.0, 0.75, 0.5669873, 0.5]),
    ],
)
def test_schedules(text, expected):
    schedule = Schedule.parse("gamma_schedule", text, last=0.5, length=7)
    assert [schedule.at(step) for step in range(7)] == pytest.approx(expected, abs=1e-6)
    assert schedule.at(6) == schedule.at(1000) == 0.5


def test_the_objective_follows_its_schedule_and_keeps_its_length(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    config = replace(SMALL, steps=5, gamma_schedule="steps:0.95,0.67")
    run = training.start(replace(config, kl_weight_schedule="linear:0"), tmp_path / "run")
    seen = []

    def watch(run, row):
        seen.append((run.objective.loss.gamma.item(), run.objective.loss.kl_weight.item()))

    training.train(run, watch)
    longer = training.resume(run.folder, replace(run.config, steps=7))
    training.train(longer, watch)
    gammas, weights = (0.95, 0.95, 0.67, 0.67, 0.5, 0.5, 0.5), (0, 0.25, 0.5, 0.75, 1, 1, 1)
    assert seen == [pytest.approx(pair, rel=1e-6) for pair in zip(gammas, weights, strict=True)]
    rows = _rows(run.folder)
    assert [row["gamma"] for row in rows] == list(gammas)
    assert [row["kl_weight"] for row in rows] == list(weights)
    for row in rows:
        by_hand = row["log_likelihood"] - row["kl_weight"] * row["kl"]
        # Means of eight float32 terms, each rounded.
        assert row["objective"] == pytest.approx(by_hand, rel=1e-6)


def test_a_scheduled_gamma_is_not_compiled_again():
    torch._dynamo.reset()
    torch.manual_seed(0)
    gamma = torch.tensor(0.9)
    objective = SamplingFree(nn.Sequential(nn.Linear(2, 4), nn.Tanh()), gamma=gamma)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(objective.loss, backend=counter, fullgraph=True)
    x, mean, log_var = torch.rand(3, 4), torch.randn(3, 2), torch.randn(3, 2)
    for value in (0.9, 0.4, 0.1):
        gamma.fill_(value)
        # Two roundings of an order that a compiler may choose.
        torch.testing.assert_close(compiled(x, mean, log_var), objective.loss(x, mean, log_var))
    assert counter.frame_count == 1


# --- how a step runs


def test_bf16_rounds_the_networks_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    runs = {}
    for precision in ("float32", "bf16"):
        config = replace(SMALL, steps=2, precision=precision)
        runs[precision] = training.start(config, tmp_path / precision)
        training.train(runs[precision])
        parameters = runs[precision].model.parameters()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in parameters)
    exact, rounded = (_rows(run.folder)[0] for run in runs.values())
    eps = torch.finfo(torch.bfloat16).eps
    # r^2 of outputs near 0 against pixels up to 1: at most 2 eps relative, of each pixel's part.
    assert 0 < abs(rounded["squared_error"] / exact["squared_error"] - 1) < 2 * eps
    assert 0 < abs(rounded["kl"] - exact["kl"]) < 4 * eps * max(exact["kl"], 1)


def test_compiled_training_equals_eager(tmp_path, monkeypatch):
    # Inductor takes a compiler and most of a minute; what it is given is the same.
    torch._dynamo.reset()
    compile_ = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(run_module.Model, "compile", compile_)
    for method in ("sampling-free", "sampling"):
        for compile in (False, True):
            config = replace(SMALL, steps=25, method=method, compile=compile)
            run = training.start(config, tmp_path / f"{method}-{compile}")
            training.train(run)
        eager, compiled = (_rows(tmp_path / f"{method}-{flag}") for flag in (False, True))
        assert [row["step"] for row in eager] == [1, 25]
        for theirs, ours in zip(eager, compiled, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


def test_the_captured_step_trains_as_the_plain_one(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    config = replace(SMALL, steps=8, gamma_schedule="linear:0.9")
    training.train(training.start(config, tmp_path / "plain"))

    def make(*arguments, **settings):
        return graphed.make_graphed_step(*arguments, **settings, capture=False)

    monkeypatch.setattr(capture, "make_graphed_step", make)
    # Without a GPU a graph is refused, and Adam has no captured form.
    monkeypatch.setattr(TrainConfig, "training_device", TrainConfig.resolve_device)
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda p, capturable, **rest: adam(p, **rest))
    captured = training.start(replace(config, cuda_graph=True), tmp_path / "captured")
    training.train(captured, _stop_at(4))
    assert captured.step == 4
    captured = training.resume(captured.folder)
    for group in captured.optimizer.param_groups:
        group["capturable"] = False
    training.train(captured)
    assert captured.phase.graphed is not None
    assert _rows(captured.folder) == _rows(tmp_path / "plain")


def _stop_at(step):
    def monitor(run, row):
        if run.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return monitor


# --- what is watched


def test_pictures_and_tensorboard_leave_the_training_as_it_is(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    config = replace(SMALL, steps=50, gamma_schedule="linear:0.9")
    training.train(training.start(config, tmp_path / "plain"))

    watched = training.start(config, tmp_path / "watched")
    for monitor in (_stop_at(30), _stop_at(None)):
        with tracked(watched, ["tensorboard"]) as trackers:
            with monitors(watched, trackers, image_every=20, draw=snapshot) as watching:
                training.train(watched, *watching, monitor)
        watched = training.resume(watched.folder)
    rows = _rows(watched.folder)
    assert rows == _rows(tmp_path / "plain")
    pictures = sorted(path.name for path in (watched.folder / "images").iterdir())
    assert pictures == ["step-0000020.png", "step-0000040.png"]

    events = event_accumulator.EventAccumulator(str(watched.folder / "tensorboard"))
    events.Reload()
    assert [image.step for image in events.Images("images")] == [20, 40]
    for name in (*Terms._fields, "gamma"):
        scalars = {scalar.step: scalar.value for scalar in events.Scalars(name)}
        # TensorBoard keeps float32.
        assert scalars == {row["step"]: pytest.approx(row[name], rel=1e-6) for row in rows}


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--gamma-schedule foo", "gamma_schedule='foo' is not a schedule: give constant"),
        ("--gamma-schedule linear", "'linear' is not a schedule"),
        ("--gamma-schedule linear:x", "'linear:x' is not a schedule"),
        ("--gamma-schedule linear:1.5", "gamma=1.5 must lie in [0, 1]"),
        ("--gamma-schedule steps:.9,.8 --steps 2", "has 3 values but takes 2 steps"),
        ("--method sampling --gamma-schedule linear:.9", "--gamma-schedule is for sampling-free"),
        ("--method iwae --kl-weight-schedule linear:0", "--kl-weight-schedule is for sampling-"),
        ("--kl-weight-schedule linear:-1", "kl_weight=-1.0 must be finite and not negative"),
        ("--schedule-steps -1", "schedule_steps=-1 must not be negative"),
        ("--data-budget -1", "data_budget=-1.0 must be finite"),
        ("--image-every -1", "--image-every -1 must not be negative"),
        ("--compile --cuda-graph", "compile and cuda_graph exclude each other"),
        ("--cuda-graph --method vlae", "--cuda-graph is for sampling-free"),
        ("--cuda-graph --device cpu", "--cuda-graph needs a GPU, this run is on the cpu"),
    ],
)
def test_impossible_options(options, message, tmp_path, capsys):
    arguments = ["train", "--model", "tanh", *options.split(), "--out", str(tmp_path / "run")]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_two_runs_with_one_folder(tmp_path, capsys):
    run = training.start(replace(SMALL, method="sampling", steps=30), tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    # The first has not trained yet: it holds the folder.
    for options in (["--resume", "--steps", "40"], []):
        assert cli.main(["train", "--out", str(run.folder), *options]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert ("is being trained by another process" if options else "exists") in error
    assert before == {path.name: path.read_bytes() for path in run.folder.iterdir()}
    training.train(run)
    FolderLock(run.folder).release()
    # Who comes second while both are starting is refused by the file system.
    with pytest.raises(FileExistsError, match="--out .* exists"):
        run_module._make_folder(run.config, run.folder)


def test_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "LOG_EVERY", 5)
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY", 20)
    config = replace(SMALL, method="sampling", steps=60)
    whole, cut = (training.start(config, tmp_path / name) for name in ("whole", "cut"))
    training.train(whole)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(run, row):
        if run.step == 30:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    try:
        with pytest.raises(OSError, match=f"{CHECKPOINT} could not be written .* is intact"):
            training.train(cut, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in cut.folder.iterdir()) == [CHECKPOINT, CONFIG, METRICS]
    resumed = training.resume(cut.folder)
    assert resumed.step == 20
    training.train(resumed)
    assert _rows(cut.folder) == _rows(whole.folder)


def test_configuration_of_another_version(tmp_path):
    run = training.start(replace(SMALL, method="sampling", steps=25), tmp_path / "run")
    training.train(run)
    path = run.folder / CONFIG
    fields = json.loads(path.read_text())
    older = {k: v for k, v in fields.items() if "schedule" not in k and k != "precision"}
    path.write_text(json.dumps(older))
    assert load_config(run.folder) == replace(run.config, schedule_steps=0)
    training.train(training.resume(run.folder, replace(load_config(run.folder), steps=30)))
    assert [row["step"] for row in _rows(run.folder)] == [1, 25, 30]
    path.write_text(json.dumps(fields | {"novelty": 1}))
    with pytest.raises(ValueError, match="novelty is not known to this version") as caught:
        training.resume(run.folder)
    assert "\n" not in str(caught.value)


def test_a_non_finite_loss_names_its_images(tmp_path):
    run = training.start(replace(SMALL, method="sampling", steps=30), tmp_path / "run")
    objective, numbers = run.objective, []

    def broken(x, mean, log_var, *, generator):
        terms = objective(x, mean, log_var, generator=generator)
        if run.step == 3:
            bad = torch.zeros(8)
            bad[[2, 5]] = math.nan
            numbers.append(x[[2, 5]])
            per_image = (term + bad for term in terms[1:])
            return Terms(terms.loss + bad.sum(), *per_image)
        return terms

    run.model.objective = broken
    with pytest.raises(training.NonFiniteLoss, match="at step 4 .* 2 of 8 images: ") as caught:
        training.train(run)
    listed = str(caught.value).split("images: ")[1].split(")")[0]
    images = run.config.load_images("train")[np.array(listed.split(", "), dtype=int)]
    torch.testing.assert_close(images / 255, numbers[0])
