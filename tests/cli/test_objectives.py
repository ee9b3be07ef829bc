"""The methods of the training command."""

import json

import pytest
import torch

from fastsfvae import objectives as o
from fastsfvae.cli import main as cli
from fastsfvae.training import loop
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.methods import METHODS
from fastsfvae.training.metrics_csv import METRICS
from fastsfvae.training.objective import learned_modules, make_objective

OPTIONS = {
    "sampling": (["--samples", "3"], o.Sampling, {"samples": 3, "kl_weight": 1.0}),
    "beta-vae": (["--kl-weight", "4"], o.Sampling, {"samples": 1, "kl_weight": 4.0}),
    "auto-encoder": ([], o.AutoEncoder, {}),
    "iwae": (["--samples", "4"], o.ImportanceWeighted, {"samples": 4}),
    "stl": (["--samples", "2"], o.StickingTheLanding, {"samples": 2}),
    "dreg": (["--samples", "2"], o.DoublyReparameterized, {"samples": 2}),
    "vlae": (["--mode-steps", "2"], o.VariationalLaplace, {"mode_steps": 2, "bound": "sampled"}),
    "exact-marginal": ([], o.ExactMarginal, {}),
    "free-bits": (["--free-bits", "0.3"], o.FreeBits, {"free_bits": 0.3, "samples": 1}),
    "delta-vae": (["--min-rate", "0.1"], o.Sampling, {"samples": 1, "kl_weight": 1.0}),
    "householder": (["--flows", "3"], o.Sampling, {"samples": 1}),
    "hiwae": (["--samples", "3"], o.HierarchicalImportanceWeighted, {"samples": 3}),
    "rem": (["--samples", "4"], o.ReweightedExpectationMaximization, {"version": 2, "samples": 4}),
    "rae": (
        ["--regularizer", "gradient-penalty", "--latent-weight", "0.1"],
        o.RegularizedAutoEncoder,
        {"weight": 0.1, "regularizer": "gradient-penalty", "regularizer_weight": 1e-3},
    ),
    "wae-mmd": (["--latent-weight", "5"], o.WassersteinAutoEncoder, {"weight": 5.0}),
    "swae": (
        ["--projections", "7"],
        o.SlicedWassersteinAutoEncoder,
        {"weight": 10.0, "projections": 7},
    ),
    "cwae": ([], o.CramerWoldAutoEncoder, {"weight": 1.0}),
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
    decoder = torch.nn.Linear(2, 2)
    built = make_objective(config, decoder, dict(learned_modules(config).items()))
    assert type(built) is class_
    assert vars(built).items() >= (attributes | {"noise_var": 0.2}).items()


def test_every_method_is_listed():
    assert {"sampling-free", *OPTIONS} == set(METHODS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--method auto-encoder --samples 2",
            "--samples is for sampling, beta-vae, iwae, stl, dreg, vlae, free-bits, delta-vae, "
            "householder, rem, hiwae",
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
        ("--method sampling --free-bits 0.2", "--free-bits is for free-bits"),
        ("--method free-bits --free-bits -1", "free_bits=-1.0 must be finite and not negative"),
        ("--method delta-vae --min-rate 0", "min_rate=0.0 must be finite and positive"),
        ("--method householder --flows 0", "flows=0 must be at least 1"),
        ("--method hiwae --draws antithetic --samples 2", "draws='antithetic' with method='hiwae'"),
        ("--method hiwae --warm-start precision:3", "--warm-start is for sampling-free"),
        ("--method rem --rem-version 3", "rem_version=3 must be 1 or 2"),
        ("--method swae --projections 0", "projections=0 must be at least 1"),
        ("--method rae --regularizer l1", "--regularizer 'l1' is none of l2"),
        ("--method rae --regularizer-weight nan", "regularizer_weight=nan must be finite"),
        (
            "--method rae --regularizer spectral-norm --regularizer-weight 1",
            "it has no weight, leave it out",
        ),
        ("--method sampling --latent-weight 2", "--latent-weight is for rae, wae-mmd, swae, cwae"),
        ("--method wae-mmd --batch-size 1", "give a --batch-size of at least 2"),
        (
            "--method rae --train-images 1 --batch-size 1",
            "no density can be fitted to its latents",
        ),
        ("--method beta-vae", "give --kl-weight, or --method sampling"),
    ],
)
def test_impossible_combinations(options, message, tmp_path, capsys):
    folder = tmp_path / "run"
    assert cli.main(["train", *options.split(), "--out", str(folder)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not folder.exists()
