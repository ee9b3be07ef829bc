"""The observation noise's variance as one more weight of a run."""

import csv
import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

import fastsfvae as sf
from fastsfvae import training
from fastsfvae.cli import main as cli
from fastsfvae.objectives import (
    AutoEncoder,
    DoublyReparameterized,
    ImportanceWeighted,
    NoiseVariance,
    Sampling,
    SamplingFree,
    StickingTheLanding,
)
from fastsfvae.training import loop
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.metrics_csv import METRICS

CONFIG = TrainConfig(
    method="sampling",
    warm_start="precision:3",
    learned_noise_var=True,
    model="tanh",
    latent_dim=3,
    batch_size=8,
    steps=8,
    seed=5,
    lr=0.01,
)


def _rows(folder):
    with (folder / METRICS).open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    "make",
    [
        Sampling,
        ImportanceWeighted,
        StickingTheLanding,
        DoublyReparameterized,
        AutoEncoder,
        SamplingFree,
    ],
)
def test_the_gradient_in_c_is_that_of_the_objective(make):
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    mean, log_var, x = (torch.randn(4, k, dtype=torch.float64) for k in (3, 3, 5))
    settings = {} if make in (AutoEncoder, SamplingFree) else {"samples": 2}

    def loss(noise_var):
        objective = make(decoder, noise_var=noise_var, **settings)
        return objective(x, mean, log_var, generator=torch.Generator().manual_seed(0)).loss

    learned = NoiseVariance(0.3).double()
    value = loss(learned)
    torch.testing.assert_close(value, loss(learned().item()), rtol=1e-7, atol=0)
    value.backward()
    h = 1e-4
    ends = [loss(0.3 * math.exp(sign * h)).item() for sign in (1, -1)]
    assert learned.log.grad.item() == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5)


def test_one_variance_goes_through_the_start_and_the_method(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    run = training.start(CONFIG, tmp_path / "run")
    training.train(run)
    values = [float(row["noise_var"]) for row in _rows(tmp_path / "run")]
    assert len(set(values)) == len(values) and min(values) > 0 and values[-1] < 0.5
    assert values[-1] == run.noise_var == run.judged.noise_var
    start, rest = (phase.objective for phase in run.phases)
    assert start.loss.noise_var.item() == rest.noise_var().item() == run.noise_var
    # One weight more than without.
    plain = training.start(replace(CONFIG, learned_noise_var=False), tmp_path / "plain")
    counts = [sum(p.numel() for p in r.model.parameters()) for r in (run, plain)]
    assert counts[0] == counts[1] + 1
    assert len(run.optimizer.param_groups[0]["params"]) == len(list(run.model.parameters()))


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_it_resumes_to_the_bit(stop, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    training.train(training.start(CONFIG, tmp_path / "whole"))

    def interrupt(run, row):
        if run.step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    training.train(training.start(CONFIG, tmp_path / "parts"), interrupt)
    training.train(training.resume(tmp_path / "parts"))
    assert _rows(tmp_path / "parts") == _rows(tmp_path / "whole")


def test_a_run_is_judged_by_what_it_learned(tmp_path, capsys):
    command = ["train", "--method", "sampling", "--learned-noise-var", "--model", "tanh"]
    command += ["--latent-dim", "3", "--train-images", "64", "--steps", "5", "--lr", "0.05"]
    assert cli.main([*command, "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    encoder, decoder, config = sf.load(tmp_path / "run")
    c = config.noise_var
    assert config.learned_noise_var and 0 < c != 0.5
    assert f"c {c:g} (learned)" in out
    report = json.loads((tmp_path / "run" / "results.json").read_text())
    assert report["conventions"]["noise_var"] == c
    assert report["conventions"]["learned_noise_var"] is True
    constant = -392 * math.log(2 * math.pi * c)
    assert report["conventions"]["constant_value"] == pytest.approx(constant, rel=1e-12)
    # A mean over images of the ELBO from its parts, at that variance.
    parts = report["splits"]["test"]
    error, kl = (parts[name]["mean"] for name in ("squared error, sampled", "KL"))
    assert parts["sampled ELBO"]["mean"] == pytest.approx(constant - error / 2 / c - kl, rel=1e-6)
    evaluate = ["evaluate", str(tmp_path / "run"), "--samples", "20", "--images", "20"]
    evaluate += ["--taylor-images", "0", "--gradient-repeats", "0", "--elbo-samples", "2"]
    assert cli.main([*evaluate, "--out", str(tmp_path / "judged")]) == 0
    found = json.loads((tmp_path / "judged" / "evaluation.json").read_text())
    assert found["conventions"]["noise_var"] == c
    # Another one has another c: densities are compared whole.
    other = ["--seed", "1", "--out", str(tmp_path / "other")]
    assert cli.main([*command, *other]) == 0
    runs = [str(tmp_path / name) for name in ("run", "other")]
    quick = ["--samples", "20", "--elbo-samples", "2", "--images", "20"]
    assert cli.main(["compare", *runs, *quick, "--out", str(tmp_path / "compared")]) == 0
    found = json.loads((tmp_path / "compared" / "comparison.json").read_text())
    assert "log ML" in found["means"] and "log ML, without constant" not in found["means"]
    assert "noise_var" in found["conventions"][runs[0]]
    # And runs that differ in their seed are one group all the same.
    group = ["compare", ",".join(runs), runs[0], *quick, "--out", str(tmp_path / "group")]
    assert cli.main(group) == 0


def test_it_is_refused_where_it_has_no_meaning(tmp_path, capsys):
    command = ["train", "--method", "vlae", "--learned-noise-var", "--out", str(tmp_path / "run")]
    assert cli.main(command) == 2
    assert "--learned-noise-var is for sampling-free, sampling" in capsys.readouterr().err
