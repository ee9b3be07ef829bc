"""The methods of the training command."""

import json

import pytest
import torch

from fastsfvae import objectives as o
from fastsfvae.cli import main as cli
from fastsfvae.training import loop
from fastsfvae.training.config import METHODS, TrainConfig
from fastsfvae.training.metrics_csv import METRICS
from fastsfvae.training.objective import make_objective

OPTIONS = {
    "sampling": (["--samples", "3"], o.Sampling, {"samples": 3, "kl_weight": 1.0}),
    "beta-vae": (["--kl-weight", "4"], o.Sampling, {"samples": 1, "kl_weight": 4.0}),
    "auto-encoder": ([], o.AutoEncoder, {}),
    "iwae": (["--samples", "4"], o.ImportanceWeighted, {"samples": 4}),
    "stl": (["--samples", "2"], o.StickingTheLanding, {"samples": 2}),
    "dreg": (["--samples", "2"], o.DoublyReparameterized, {"samples": 2}),
    "vlae": (["--mode-steps", "2"], o.VariationalLaplace, {"mode_steps": 2, "bound": "sampled"}),
    "exact-marginal": ([], o.ExactMarginal, {}),
}


@pytest.mark.parametrize("method", OPTIONS)
def test_every_method_trains(method, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    # The figures and the evaluation of 10,000 digits are tested once, elsewhere.
    monkeypatch.setattr("fastsfvae.results.run_figures.save_figures", lambda run: [])
    options, class_, attributes = OPTIONS[method]
    m = "1" if method == "exact-marginal" else "2"
    arguments = ["train", "--model", "linear", "--latent-dim", m, "--steps", "20", "--lr", "0.01"]
    folder = tmp_path / "run"
    command = [*arguments, "--method", method, *options, "--noise-var", "0.2", "--out", str(folder)]
    assert cli.main(command) == 0
    conventions = json.loads((folder / "results.json").read_text())["conventions"]
    assert conventions["method"] == method
    rows = [line.split(",") for line in (folder / METRICS).read_text().splitlines()]
    objective = [float(row[rows[0].index("objective")]) for row in rows[1:]]
    assert len(objective) == 20 and objective[-1] > objective[0]

    config = TrainConfig.from_json((folder / "config.json").read_text())
    built = make_objective(config, torch.nn.Identity())
    assert type(built) is class_
    assert vars(built).items() >= (attributes | {"noise_var": 0.2}).items()


def test_every_method_is_listed():
    assert {"sampling-free", *OPTIONS} == set(METHODS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--method auto-encoder --samples 2",
            "--samples is for sampling, beta-vae, iwae, stl, dreg, vlae",
        ),
        ("--samples 2", "samples=2 with method='sampling-free'"),
        ("--method iwae --samples 0", "samples=0 must be at least 1"),
        ("--method dreg --kl-weight 2", "kl_weight=2 with method='dreg'"),
        ("--method iwae --bound closed-form", "--bound is for vlae"),
        ("--method vlae --mode-steps 0", "mode_steps=0 must be at least 1"),
        ("--method vlae --compile", "--compile is for sampling-free, sampling"),
        (
            "--method exact-marginal --latent-dim 1 --compile",
            "--compile is for sampling-free, sampling",
        ),
        ("--method exact-marginal", "is for --latent-dim 1"),
        ("--method exact-marginal --model tanh --latent-dim 1", "give --model mlp"),
        ("--method exact-marginal --output-activation sigmoid", "--output-activation none"),
        ("--method exact-marginal --model conv --latent-dim 1", "would take too long"),
        ("--method exact-marginal --samples 2 --latent-dim 1", "--samples is for sampling"),
        ("--method beta-vae", "give --kl-weight, or --method sampling"),
    ],
)
def test_impossible_combinations(options, message, tmp_path, capsys):
    folder = tmp_path / "run"
    assert cli.main(["train", *options.split(), "--out", str(folder)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not folder.exists()
