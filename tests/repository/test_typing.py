"""What a type checker tells a user: a right script passes, each misspelled word does not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

RIGHT = """\
import torch
from torch import Tensor, nn

import fastsfvae as sf
from fastsfvae.hub import TrainedVAE


class Mine(TrainedVAE):
    pass


def train(encoder: nn.Module, decoder: nn.Module, x: Tensor) -> Tensor:
    optimizer = torch.optim.Adam(decoder.parameters(), capturable=True)
    loss_fn = sf.SamplingFreeLoss(
        decoder, likelihood="expected", reduction="sum", backend="torch", noise_var=0.5
    )
    mean, log_var = encoder(x)
    # PyTorch's own Tensor.backward has no types.
    loss = loss_fn(x, mean, log_var)
    torch.autograd.grad(loss, [*decoder.parameters()])
    loss, terms = loss_fn(x, mean, log_var, return_terms=True)
    reached: Tensor = terms.squared_error + loss
    either = loss_fn(x, mean, log_var, return_terms=bool(len(x)))
    reached = reached + (either[0] if isinstance(either, tuple) else either)
    step: sf.GraphedStep = sf.make_graphed_step(encoder, loss_fn, optimizer, x, capture=False)
    step(x)
    compared: sf.StepComparison = sf.compare_step(
        encoder, decoder, x, x, likelihood="expected", shared=(0,), seconds=1.0
    )
    return reached * compared.to_sampling


def measure(decoder: nn.Module, x: Tensor, mean: Tensor, log_var: Tensor) -> float:
    elbo: sf.Elbo = sf.sampling_free_elbo(decoder, x, mean, log_var, likelihood="mixture")
    output, jacobian = sf.decode_with_jacobian(decoder, mean, backend="reference")
    pulled: sf.Pullback = sf.pullback(decoder, mean, x, chunk_size=4)
    fit: sf.Fit = sf.fit_latents(decoder, x, mean, prior_var=1.0, damping=0.1, weight=x)
    density: Tensor = sf.low_rank_log_prob(
        (x - output).flatten(1), jacobian.flatten(2), log_var.exp(), noise_var=0.5
    )
    volume: Tensor = sf.log_volume(decoder, mean, damping=0.1, reduction="mean")
    volumes, lost = sf.log_volume(decoder, mean, return_lost=True)
    density = density + volume + volumes + lost + sf.isometry_loss(decoder, mean, over="sample")
    gaussian = sf.LinearizedGaussian(output, jacobian, log_var.exp(), 0.5)
    pushed = sf.LinearizedGaussian.from_decoder(decoder, mean, log_var.exp(), 0.5)
    update = sf.kalman_update(decoder, x, mean, log_var.exp(), 0.5)
    density = density + pushed.log_prob(x.flatten(1)) + update.log_prob + update.cov.sum()
    _, derivatives = sf.jvp(decoder, mean, mean)
    _, back = sf.vjp(decoder, mean + fit.z, derivatives)
    values: Tensor = sf.singular_directions(decoder, mean + back, 2).values
    density = density + values.sum() + fit.squared_error
    metric = sf.metric(decoder, backend="torch")
    gram, slope = metric(mean, derivative=True)
    density = density + metric(mean).sum() + gram.sum() + slope.sum()
    with sf.fused_layers("never"):
        report: sf.DecoderReport = sf.check_decoder(decoder, mean)
    log_ml = sf.evaluate.log_marginal_likelihood(
        decoder, x, mean, log_var, noise_var=0.5, samples=9, proposal="defensive"
    )
    encoder, other, config = sf.load("runs/one")
    exported: TrainedVAE = TrainedVAE.from_run("runs/one")
    mine: Mine = Mine.from_pretrained("user/one", revision="main")
    exported.save_pretrained("one", license="mit")
    address: str = mine.push_to_hub("user/one", private=True)
    density = density + exported.forward(x) + float(len(address)) + mine.config.noise_var
    total = elbo.elbo + pulled.gram.sum() + density + gaussian.mean.sum() + log_ml.estimate
    return float(total.sum()) + float(report.ok) + config.noise_var
"""

# A line that is wrong in one word, and a part of what is said about it.
WRONG = {
    'sf.SamplingFreeLoss(decoder, likelihood="precisoin")': "likelihood",
    'sf.SamplingFreeLoss(decoder, reduction="avg")': "reduction",
    'sf.SamplingFreeLoss(decoder, backend="cuda")': "backend",
    "sf.SamplingFreeLoss(decoder, gama=0.5)": "gama",
    'sf.sampling_free_elbo(decoder, x, x, x, likelihood="normalised")': "likelihood",
    'sf.sampling_free_elbo(decoder, x, x, x, backend="gpu")': "backend",
    'sf.low_rank_log_prob(x, x, x, noise_var=1.0, likelihood="mix")': "likelihood",
    'sf.decode_with_jacobian(decoder, x, backend="jax")': "backend",
    'sf.pullback(decoder, x, backend="tritn")': "backend",
    'sf.compare_step(decoder, decoder, x, likelihood="precisoin")': "likelihood",
    "sf.compare_step(decoder, decoder, x, gama=0.5)": "gama",
    "sf.compare_step(decoder, decoder, x).seconds": "seconds",
    'sf.log_volume(decoder, x, reduction="all")': "log_volume",
    'sf.isometry_loss(decoder, x, over="all")': "over",
    'sf.metric(decoder, backend="tritn")': "backend",
    "sf.kalman_update(decoder, x, x, x)": "noise_var",
    "sf.metric(decoder)(x, derivative=True).sum()": "sum",
    'sf.fit_latents(decoder, x, x, backend="gpu")': "backend",
    'sf.fit_latents(decoder, x, x, damping="marquardt")': "damping",
    'sf.fused_layers("sometimes")': "fused_layers",
    'sf.evaluate.log_marginal_likelihood(decoder, x, x, x, noise_var=1.0, proposal="prior")': (
        "proposal"
    ),
    "sf.SamplingFreeLoss(decoder)(x, x, x).elbo": "elbo",
    "sf.SamplingFreeLoss(decoder)(x, x, x, return_terms=True).backward()": "backward",
    "sf.SamplingFreeLos(decoder)": "SamplingFreeLos",
    'sf.load("runs/one", build=nn.Linear)': "build",
    "sf.evaluate.sampled_elb(decoder)": "sampled_elb",
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What mypy --strict says of both scripts, by file and line."""
    pytest.importorskip("mypy")
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "right.py").write_text(RIGHT)
    head = ["import torch", "from torch import nn", "import fastsfvae as sf"]
    head += ["decoder, x = nn.Linear(2, 2), torch.rand(2, 2)"]
    (folder / "wrong.py").write_text("\n".join([*head, *WRONG]) + "\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(folder / "cache")]
    done = subprocess.run(
        # Outside the tree, whose settings are not a user's.
        [*command, "right.py", "wrong.py"],
        cwd=folder,
        env={"MYPYPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    lines: dict[tuple[str, int], str] = {}
    for name, line, text in re.findall(r"^(\S+):(\d+): error: (.*)$", done.stdout, re.MULTILINE):
        lines[name, int(line)] = lines.get((name, int(line)), "") + text
    assert lines, done.stdout + done.stderr
    return lines, len(head)


def test_a_right_script_passes(told):
    lines, _ = told
    assert {place: text for place, text in lines.items() if place[0] != "wrong.py"} == {}


@pytest.mark.parametrize("number, line", [*enumerate(WRONG)])
def test_a_wrong_word_is_told(told, number, line):
    lines, head = told
    assert WRONG[line] in lines.get(("wrong.py", head + number + 1), "nothing")


def _checked(command, folder):
    """What a checker says of the examples."""
    examples = sorted(map(str, (ROOT / "examples").glob("*.py")))
    done = subprocess.run(
        [sys.executable, "-m", *command, *examples],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_examples_pass_mypy_strict(tmp_path):
    for module in ("mypy", "diffusers", "lightning", "zuko"):
        pytest.importorskip(module)
    # Without types are Tensor.backward, an optimizer's step, zuko and diffusers.
    excused = ["--untyped-calls-exclude=torch", "--ignore-missing-imports"]
    said = _checked(
        ["mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), *excused], tmp_path
    )
    assert "no issues found" in said


def test_the_examples_pass_pyright_strict(tmp_path):
    for module in ("pyright", "diffusers", "lightning", "zuko"):
        pytest.importorskip(module)
    # Started beside pyproject.toml, which says which rules third-party packages cannot meet.
    assert 'typeCheckingMode = "strict"' in (ROOT / "pyproject.toml").read_text()
    said = _checked(["pyright", "--pythonpath", sys.executable], ROOT)
    assert "0 errors" in said
