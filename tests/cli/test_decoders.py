"""Commands on decoders that cannot be linearised, or are not finite everywhere."""

import json
import math

import pytest
import torch
from torch import nn

from fastsfvae import evaluate
from fastsfvae.cli import main as cli
from fastsfvae.cli.measure import CompareArguments
from fastsfvae.models import Encoder
from fastsfvae.results import evaluation


class Doubled(torch.autograd.Function):
    """What has a gradient, and no tangents that the library could know."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Decoder(nn.Module):
    def __init__(self, m, last):
        super().__init__()
        self.layer, self.last = nn.Linear(m, 784), last

    def forward(self, z):
        return self.last(self.layer(z), z).unflatten(1, (1, 28, 28))


def _networks(config, last):
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(784, 2 * config.latent_dim))
    return Encoder(trunk), Decoder(config.latent_dim, last)


def opaque(config):
    return _networks(config, lambda y, z: Doubled.apply(y))


def overflowing(config):
    return _networks(config, lambda y, z: torch.where(z[:, :1] > 1.5, math.inf, y))


def _train(folder, model, method):
    options = ["train", "--method", method, "--model", f"{__name__}:{model}", "--steps", "2"]
    options += ["--latent-dim", "2", "--batch-size", "8", "--out", str(folder)]
    return cli.main(options)


def test_all_commands_take_one_proposal():
    proposals = {evaluation.Settings().proposal, CompareArguments([]).proposal}
    assert proposals == {"defensive"}


def test_a_run_is_measured_where_its_decoder_cannot_be_linearised(tmp_path, capsys):
    assert _train(tmp_path / "run", "opaque", "sampling") == 0
    printed = capsys.readouterr().out
    assert (
        "K=100 importance weights, proposal posterior, as defensive fails (the decoder" in printed
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "autograd.Function 'Doubled'" in results["conventions"]["log_ml"]
    assert 'proposal="posterior" needs no Jacobian' in results["conventions"]["log_ml"]
    assert math.isfinite(results["splits"]["test"]["log ML"]["mean"])
    # What needs the Jacobian is refused at once, before the importance weights.
    options = ["evaluate", str(tmp_path / "run"), "--images", "4", "--proposal", "posterior"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "log_marginal_likelihood", lambda *_, **__: pytest.fail("ran"))
        assert cli.main(options) == 2
    assert "autograd.Function 'Doubled'" in capsys.readouterr().err.splitlines()[-1]


def test_infinite_draws_leave_every_number_that_there_is(tmp_path, capsys):
    # Means lie below the edge, some draws of nearly every posterior beyond it.
    assert _train(tmp_path / "run", "overflowing", "sampling-free") == 0
    options = ["evaluate", str(tmp_path / "run"), "--images", "6", "--samples", "300"]
    options += ["--taylor-images", "2", "--taylor-reference", "300", "--gradient-repeats", "2"]
    assert cli.main(options) == 0
    verdict = capsys.readouterr().out.splitlines()[-3]
    assert verdict.startswith("log ML -") and "inf" not in verdict and "NOT" not in verdict
    folder = tmp_path / "run" / "evaluation-1"
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["verdict"] == verdict in (folder / "evaluation.html").read_text()
    densities = found["sections"]["Log-densities (nats)"]
    assert math.isfinite(densities["log ML"]["monte_carlo_error"])
    assert densities["images with fewer than 10"]["value"] == 0
    assert densities["images with fewer than 30, error too small"]["value"] == 0
    assert -0.1 < densities["log ML, estimated bias"]["value"] < 0
    # The ELBO is -inf, which JSON has no number for.
    assert densities["sampled ELBO"]["value"] is None
    assert densities["sampled ELBO"]["standard_error"] is None
    linearisation = found["sections"]["Linearisation (paper, Table 1)"]
    assert linearisation["images left out, not finite"]["value"] == 2
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["splits"]["test"]["sampled ELBO"]["mean"] is None

    # A single image has no spread.
    options = ["compare", *[str(tmp_path / "run")] * 2, "--images", "1", "--samples", "20"]
    assert cli.main([*options, "--out", str(tmp_path / "c")]) == 0
    found = json.loads((tmp_path / "c" / "comparison.json").read_text())
    (difference,) = found["differences"]["log ML, without constant"]
    assert difference == {"mean": 0.0, "standard_error": None}
    assert "±" not in found["verdict"]
