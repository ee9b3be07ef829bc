"""A run whose first steps are another objective's: one optimiser, one history, exact resume."""

import csv
import functools
import json
import os
import signal
from dataclasses import replace

import pytest
import torch

from fastsfvae import graphed, training
from fastsfvae.cli import main as cli
from fastsfvae.data.pixels import to_unit
from fastsfvae.graphed import GraphedStep
from fastsfvae.objectives import Sampling, SamplingFree
from fastsfvae.training import capture, loop
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.metrics_csv import METRICS
from fastsfvae.training.run import _prepare
from fastsfvae.training.schedules import WarmStart
from fastsfvae.training.seeds import NOISE, iterate_orders, mix_seed

START = 4
CONFIG = TrainConfig(
    method="sampling",
    warm_start=f"precision:{START}",
    samples=2,
    draws="antithetic",
    model="tanh",
    latent_dim=3,
    batch_size=8,
    steps=9,
    seed=5,
)


@pytest.fixture(autouse=True)
def _every_step(monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)


def _rows(folder):
    with (folder / METRICS).open(newline="") as file:
        rows = csv.DictReader(file)
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def _train(config, folder, *monitors):
    run = training.start(config, folder)
    training.train(run, *monitors)
    return run


def _weights(run):
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def _by_hand(config):
    """The same in a user's own loop: two losses, one optimiser."""
    run, _ = _prepare(replace(config, warm_start=""))
    c, settings = config.noise_var, {"likelihood": "precision", "gamma": config.gamma}
    start = SamplingFree(run.decoder, noise_var=c, **settings)
    rest = Sampling(run.decoder, noise_var=c, samples=2, draws="antithetic")
    orders = iterate_orders(len(run.images), config.batch_size, config.seed, 0)
    for step, rows in zip(range(config.steps), next(orders), strict=False):
        generator = torch.Generator().manual_seed(mix_seed(config.seed, NOISE, step))
        x = to_unit(run.images[rows])
        mean, log_var = run.encoder(x)
        objective = start if step < START else rest
        run.optimizer.zero_grad()
        objective(x, mean, log_var, generator=generator).loss.backward()
        run.optimizer.step()
    return run


def test_it_is_two_losses_behind_one_optimizer(tmp_path):
    run = _train(CONFIG, tmp_path / "run")
    assert torch.equal(_weights(run), _weights(_by_hand(CONFIG)))
    plain = _train(replace(CONFIG, warm_start=""), tmp_path / "plain")
    assert not torch.equal(_weights(run), _weights(plain))
    assert isinstance(run.objective, Sampling) and run.model.objective is run.objective


@pytest.mark.parametrize("stop", [1, START - 1, START, START + 1])
def test_it_resumes_on_either_side_of_the_switch(stop, tmp_path):
    whole = _train(CONFIG, tmp_path / "whole")

    def interrupt(run, row):
        if run.step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    first = _train(CONFIG, tmp_path / "parts", interrupt)
    assert first.step == stop
    second = training.resume(tmp_path / "parts")
    training.train(second)
    assert torch.equal(_weights(second), _weights(whole))
    assert _rows(tmp_path / "parts") == _rows(tmp_path / "whole")


def test_no_row_of_the_metrics_averages_over_two_objectives(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 6)
    _train(CONFIG, tmp_path / "run")
    assert [row["step"] for row in _rows(tmp_path / "run")] == ["1", "4", "6", "9"]


def test_schedules_go_through_both(tmp_path):
    config = replace(CONFIG, kl_weight_schedule="linear:0", schedule_steps=6)
    run = training.start(config, tmp_path / "run")
    seen = []

    def look(run, row):
        weight = run.scheduled["kl_weight"][1]
        seen.append(weight.item())
        of_start, of_rest = (phase.objective for phase in run.phases)
        assert of_start.loss.kl_weight is weight and of_rest.kl_weight is weight

    training.train(run, look)
    assert seen == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])


def test_each_phase_has_a_graph_of_its_own(tmp_path, monkeypatch):
    """By steps that are not captured, which need no GPU; test_modes has those that are."""
    plain = _train(CONFIG, tmp_path / "plain")
    captured = []
    monkeypatch.setattr(GraphedStep, "capture", lambda self, *given: captured.append(given))
    make = functools.partial(graphed.make_graphed_step, capture=False)
    monkeypatch.setattr(capture, "make_graphed_step", make)
    monkeypatch.setattr(TrainConfig, "training_device", TrainConfig.resolve_device)
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda p, capturable, **rest: adam(p, **rest))
    run = _train(replace(CONFIG, cuda_graph=True), tmp_path / "run")
    assert all(phase.graphed is not None for phase in run.phases)
    # The second one's noise is an input.
    assert [noise.shape for _, noise in captured] == [(2, 8, 3)]
    assert _rows(tmp_path / "run") == _rows(tmp_path / "plain")
    assert torch.equal(_weights(run), _weights(plain))


@pytest.mark.parametrize("method", ["auto-encoder", "iwae", "dreg", "stl", "beta-vae"])
def test_a_step_with_its_noise_as_an_input_is_the_plain_one(method, monkeypatch):
    extra = {"kl_weight": 4.0} if method == "beta-vae" else {}
    draws = {"samples": 1, "draws": "iid"} if method == "auto-encoder" else {}
    config = replace(CONFIG, method=method, warm_start="", **extra, **draws)
    (plain, _), (run, _) = _prepare(config), _prepare(config)
    monkeypatch.setattr(GraphedStep, "capture", lambda self, *given: None)
    x = to_unit(run.images[:8])
    step = capture.capture_objective(run.objective, run.encoder, run.optimizer, x, 3, None)
    for seed in range(3):
        generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
        terms = plain.model(x, generators[0])
        plain.optimizer.zero_grad()
        terms.loss.backward()
        plain.optimizer.step()
        assert all(map(torch.equal, step(x, generators[1]), terms))
    assert torch.equal(_weights(run), _weights(plain))


# --- the command


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--warm-start", "precision"], "warm_start='precision' is not LIKELIHOOD:STEPS"),
        (["--warm-start", "100"], "is not LIKELIHOOD:STEPS: give e.g. precision:100 (one of "),
        (["--warm-start", "gauss:100"], "(one of precision, mixture, normalized, expected)"),
        (["--warm-start", "precision:0"], "is not LIKELIHOOD:STEPS"),
        (["--warm-start", "precision:-5"], "is not LIKELIHOOD:STEPS"),
        (["--warm-start", "precision:1e2"], "is not LIKELIHOOD:STEPS"),
        (["--warm-start", "precision:9"], "nothing is left for method='sampling'"),
        (["--draws", "antithetic"], "draws='antithetic' with samples=1: they come in pairs"),
        (["--draws", "orthogonal", "--samples", "34"], "give at most 32"),
        (["--draws", "sobol", "--samples", "2"], "draws"),
        (["--method", "dreg", "--draws", "orthogonal", "--samples", "2"], "would bias"),
        (["--method", "auto-encoder", "--draws", "antithetic"], "--draws is for sampling, beta"),
        (["--gamma-schedule", "linear:0.9", "--warm-start", "precision:2"], "--gamma-schedule is"),
    ],
)
def test_what_is_refused(options, said, tmp_path, capsys):
    method = [] if "--method" in options else ["--method", "sampling"]
    command = ["train", *method, "--steps", "9", *options, "--out", str(tmp_path / "run")]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_another_start_is_refused_on_resume(tmp_path, capsys):
    _train(CONFIG, tmp_path / "run")
    command = ["train", "--out", str(tmp_path / "run"), "--resume", "--warm-start", "expected:4"]
    assert cli.main(command) == 2
    assert "was trained with 'precision:4'" in capsys.readouterr().err


def test_results_name_the_start_and_the_draws(tmp_path, capsys):
    command = ["train", "--method", "sampling", "--model", "tanh", "--latent-dim", "3"]
    command += ["--warm-start", "expected:2", "--draws", "antithetic", "--samples", "2"]
    command += ["--train-images", "64", "--steps", "5", "--out", str(tmp_path / "run")]
    assert cli.main(command) == 0
    out, error = capsys.readouterr()
    assert "method sampling, 2 antithetic draws, warm start expected:2, c 0.5" in out
    assert "sampling after expected:2 on cpu" in error
    conventions = json.loads((tmp_path / "run" / "results.json").read_text())["conventions"]
    assert conventions["warm_start"] == "expected:2" and conventions["draws"] == "antithetic"


def test_reading_a_start():
    assert WarmStart.parse("expected:250") == ("expected", 250)
    assert WarmStart.parse("").steps == 0
