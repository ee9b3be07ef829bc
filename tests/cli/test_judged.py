"""Runs without a density of x, or with a full covariance, through all commands."""

import json
import math

import pytest
import torch

import fastsfvae as sf
from fastsfvae.cli import main as cli
from fastsfvae.results import pictures

pytestmark = pytest.mark.slow
LEFT_OUT = ("log ML", "sampled ELBO", "KL", "squared error, sampled")
RUNS = {
    "sampling": [],
    "householder": ["--flows", "2"],
    "delta-vae": ["--min-rate", "0.3"],
    "hiwae": ["--samples", "2"],
    "rae": ["--regularizer", "spectral-norm"],
    "cwae": ["--latent-weight", "2"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for method, options in RUNS.items():
        command = ["train", "--method", method, *options, "--model", "tanh", "--latent-dim", "2"]
        command += ["--steps", "25", "--train-images", "300"]
        assert cli.main([*command, "--out", str(folder / method)]) == 0
    return folder


def _results(runs, method):
    return json.loads((runs / method / "results.json").read_text())


@pytest.mark.parametrize("method", ["rae", "cwae"])
def test_training_leaves_out_what_does_not_apply(runs, method):
    found = _results(runs, method)
    test = found["splits"]["test"]
    assert test.keys() == {"objective", "squared error at the mean"}
    assert found["collapse"]["collapsed"] is None and found["collapse"]["latent_dim"] == 2
    assert found["log_ml_bias"] is None and "log_ml" not in found["conventions"]
    reason = found["conventions"]["not_judged"]
    assert reason.startswith(f"method {method} decodes the mean alone: no density of x")


def test_the_conventions_have_the_methods_own_settings(runs):
    own = {name: _results(runs, name)["conventions"] for name in RUNS}
    assert own["householder"]["flows"] == 2 and own["delta-vae"]["min_rate"] == 0.3
    rae = {k: own["rae"][k] for k in ("latent_weight", "regularizer", "regularizer_weight")}
    # What the zeros stand for.
    expected = {"latent_weight": 0.01, "regularizer": "spectral-norm", "regularizer_weight": 0.0}
    assert rae == expected
    assert own["cwae"]["latent_weight"] == 2 and "flows" not in own["sampling"]
    assert "log ML" in _results(runs, "householder")["splits"]["test"]


def test_a_loaded_run_is_what_the_method_made_of_the_networks(runs):
    x = torch.rand(50, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        encoder, _, config = sf.load(runs / "householder")
        mean, factor = encoder(x)
        assert factor.shape == (50, 2, 2) and config.flows == 2
        inner_mean, log_var = encoder.encoder(x)
        torch.testing.assert_close(mean.norm(dim=1), inner_mean.norm(dim=1))
        log_det = 2 * torch.linalg.slogdet(factor).logabsdet
        torch.testing.assert_close(log_det, log_var.sum(1))

        encoder, _, _ = sf.load(runs / "delta-vae")
        mean, log_var = encoder(x)
        each = 0.5 * (mean.square() + log_var.exp() - 1 - log_var)
        assert each.min() >= 0.3 - 1e-5 and mean.min() > 0

        _, decoder, _ = sf.load(runs / "rae")
        layers = [layer for layer in decoder if isinstance(layer, torch.nn.Linear)]
        norms = [torch.linalg.matrix_norm(layer.weight, ord=2).item() for layer in layers]
        assert norms == pytest.approx([1.0] * len(layers), rel=0.05)


def _evaluation(runs, method, capsys, *options):
    capsys.readouterr()
    command = [
        "evaluate",
        str(runs / method),
        "--images",
        "20",
        "--out",
        str(runs / "out" / method),
    ]
    command += ["--samples", "50", "--elbo-samples", "2", *options]
    assert cli.main(command) == 0
    page = (runs / "out" / method / "evaluation.html").read_text()
    return json.loads((runs / "out" / method / "evaluation.json").read_text()), page


def test_evaluation_without_a_density(runs, capsys):
    found, page = _evaluation(runs, "rae", capsys)
    labels = {label for section in found["sections"].values() for label in section}
    assert labels == {"squared error at the mean", "dimensions active", "dimensions in all"}
    assert "no density of x" in found["verdict"] and "Gaussians fitted to" not in found["verdict"]
    assert found["kl_per_dimension"] == [] and "Mean KL divergence" not in page
    assert "log ML:" not in capsys.readouterr().out


def test_evaluation_of_a_full_covariance(runs, capsys):
    few = ["--taylor-images", "2", "--gradient-repeats", "2"]
    found, _ = _evaluation(runs, "householder", capsys, *few)
    assert math.isfinite(found["sections"]["Log-densities (nats)"]["log ML"]["value"])
    assert "full covariance" in found["conventions"]["not_judged"]
    assert not {"Covariance of the likelihood", "Linearisation (paper, Table 1)"} & {
        *found["sections"]
    }
    assert len(found["kl_per_dimension"]) == 2


@pytest.mark.parametrize("order", [("sampling", "cwae"), ("rae", "sampling")])
def test_comparison_with_a_run_without_a_density(runs, capsys, order):
    out = runs / "-".join(order)
    command = [
        "compare",
        *(str(runs / name) for name in order),
        "--images",
        "20",
        "--samples",
        "20",
    ]
    assert cli.main([*command, "--out", str(out)]) == 0
    found = json.loads((out / "comparison.json").read_text())
    assert list(found["means"]) == ["squared error at the mean"] and not found["weights"]
    assert "no density of x" in found["verdict"]
    assert f"{order[1]} has a squared error at the mean" in found["verdict"]
    first, second = (found["means"]["squared error at the mean"][i]["mean"] for i in (0, 1))
    difference = found["differences"]["squared error at the mean"][0]["mean"]
    assert difference == pytest.approx(second - first)


def test_pictures_of_a_deterministic_run_have_no_draw(runs):
    encoder, decoder, _ = sf.load(runs / "rae")
    x = torch.rand(4, 1, 28, 28)
    assert list(pictures.reconstructions(encoder, decoder, x, None)) == ["test image", "f(mean)"]
    for name in ("samples.png", "reconstructions.png", "curves.png", "manifold.png"):
        assert (runs / "rae" / name).is_file()
