import csv
import math
import os
import signal
from dataclasses import replace

import pytest
import torch

import fastsfvae as sf
from fastsfvae import training
from fastsfvae.data import digits
from fastsfvae.data.batches import ImageSet
from fastsfvae.objectives import Sampling, SamplingFree
from fastsfvae.training import loop
from fastsfvae.training import run as run_module
from fastsfvae.training.checkpoint import load_checkpoint, save_checkpoint
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.metrics_csv import METRICS
from fastsfvae.training.seeds import iterate_orders
from fastsfvae.training.state_file import pack

SMALL = TrainConfig(model="tanh", latent_dim=3, batch_size=8, steps=60, seed=5)


def _rows(folder):
    """The metrics but for the seconds, as text: equality is to the bit."""
    with (folder / METRICS).open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def _interrupt_at(step):
    def on_step(run, row):
        if run.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step


# --- data


def test_digits():
    train, test = digits("train"), digits("test")
    assert train.images.shape == (9000, 1, 28, 28) and test.images.shape == (1000, 1, 28, 28)
    assert train.images.dtype == torch.uint8 and train.labels.dtype == torch.int64
    both = torch.cat([train.images, test.images]).flatten(1)
    # All are distinct, so no test image was trained on; all ten digits occur in both.
    assert len(both.unique(dim=0)) == 10_000
    assert train.labels.unique().tolist() == test.labels.unique().tolist() == list(range(10))
    # The mean variance per image that any constant reconstruction leaves.
    pixels = both.double() / 255
    assert pixels.var(0, correction=0).sum().item() == pytest.approx(52.7, abs=0.1)


def test_padded_digits():
    padded = digits("test", padding=2).images
    assert torch.equal(padded[..., 2:-2, 2:-2], digits("test").images)
    assert padded.sum() == digits("test").images.sum()
    with pytest.raises(ValueError, match="split='valid'"):
        digits("valid")
    with pytest.raises(ValueError, match="padding=-1"):
        digits("test", padding=-1)


def test_batches_are_permutations_that_any_step_can_start():
    images = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1)

    def iterate(first_step=0, seed=1):
        return ImageSet(images, "cpu").batches(iterate_orders(10, 3, seed, first_step))

    batches = iterate()
    steps = [next(batches) for _ in range(9)]
    for epoch in range(3):
        values = torch.cat(steps[3 * epoch : 3 * epoch + 3]).flatten()
        assert len(values.unique()) == 9
    assert not torch.equal(torch.cat(steps[:3]), torch.cat(steps[3:6]))
    for first in range(9):
        resumed = iterate(first)
        assert torch.equal(next(resumed), steps[first])
    assert not torch.equal(next(iterate(seed=2)), steps[0])


# --- objectives


def _batch(seed=0):
    torch.manual_seed(seed)
    decoder = torch.nn.Sequential(
        torch.nn.Linear(3, 6), torch.nn.Tanh(), torch.nn.Linear(6, 8), torch.nn.Unflatten(1, (2, 4))
    ).double()
    tensors = torch.rand(5, 2, 4), torch.randn(5, 3), torch.randn(5, 3)
    return decoder, *(t.double().requires_grad_() for t in tensors)


def _assert_same_gradients(first, second, inputs):
    for a, b in zip(
        torch.autograd.grad(first, inputs), torch.autograd.grad(second, inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("samples", [1, 4])
def test_sampling_objective_against_torch_distributions(samples):
    decoder, x, mean, log_var = _batch()
    c, beta = 0.3, 1.7
    terms = Sampling(decoder, noise_var=c, kl_weight=beta, samples=samples)(
        x, mean, log_var, generator=torch.Generator().manual_seed(1)
    )
    noise = torch.randn(
        samples, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    posterior = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    prior = torch.distributions.Normal(torch.zeros(3).double(), torch.ones(3).double())
    kl = torch.distributions.kl_divergence(posterior, prior).sum(-1)
    outputs = torch.stack([decoder(mean + posterior.stddev * draw) for draw in noise])
    log_density = torch.distributions.Normal(outputs, math.sqrt(c)).log_prob(x)
    log_likelihood = log_density.sum((-1, -2)).mean(0)
    objective = log_likelihood - beta * kl
    torch.testing.assert_close(terms.objective, objective.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.log_likelihood, log_likelihood.detach())
    torch.testing.assert_close(terms.kl, kl.detach())
    torch.testing.assert_close(
        terms.squared_error, (outputs - x).square().sum((-1, -2)).mean(0).detach()
    )
    inputs = [x, mean, log_var, *decoder.parameters()]
    _assert_same_gradients(terms.loss, -objective.mean(), inputs)


def test_sampling_free_objective_is_the_loss():
    decoder, x, mean, log_var = _batch()
    settings = {"noise_var": 0.3, "gamma": 0.7, "kl_weight": 1.7, "likelihood": "mixture"}
    terms = SamplingFree(decoder, **settings)(x, mean, log_var)
    oracle = sf.sampling_free_elbo(decoder, x, mean, log_var, backend="reference", **settings)
    torch.testing.assert_close(terms.objective, oracle.elbo.detach(), rtol=1e-11, atol=1e-11)
    for name in ("log_likelihood", "kl", "squared_error"):
        expected = getattr(oracle, name).detach()
        torch.testing.assert_close(getattr(terms, name), expected, rtol=1e-11, atol=1e-11)
    inputs = [x, mean, log_var, *decoder.parameters()]
    _assert_same_gradients(terms.loss, -oracle.elbo.mean(), inputs)


# --- the loop


@pytest.mark.parametrize("method", ["sampling", "sampling-free"])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, method):
    config = replace(SMALL, method=method)
    whole = training.start(config, tmp_path / "whole")
    training.train(whole)
    assert [row["step"] for row in _rows(whole.folder)] == ["1", "25", "50", "60"]

    # Interrupted within a window of averaged steps, then within the next.
    parts = training.start(config, tmp_path / "parts")
    training.train(parts, _interrupt_at(13))
    assert parts.step == 13 and [row["step"] for row in _rows(parts.folder)] == ["1"]
    for stop in (31, 10**9):
        torch.manual_seed(99)
        parts = training.resume(tmp_path / "parts")
        training.train(parts, _interrupt_at(stop))
    assert parts.finished
    assert _rows(parts.folder) == _rows(whole.folder)
    for name in ("encoder", "decoder"):
        pairs = zip(
            getattr(whole, name).parameters(), getattr(parts, name).parameters(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs)


def test_model_randomness_is_resumed(tmp_path, monkeypatch):
    # A Dropout in the encoder draws from torch's global generator.
    original = run_module.build_networks

    def with_dropout(config):
        encoder, decoder = original(config)
        encoder.trunk.insert(1, torch.nn.Dropout(0.5))
        return encoder, decoder

    monkeypatch.setattr(run_module, "build_networks", with_dropout)
    config = replace(SMALL, method="sampling", steps=30)
    whole, parts = (training.start(config, tmp_path / name) for name in ("whole", "parts"))
    torch.manual_seed(0)
    training.train(whole)
    torch.manual_seed(0)
    training.train(parts, _interrupt_at(11))
    torch.manual_seed(1)
    training.train(training.resume(parts.folder))
    assert _rows(parts.folder) == _rows(whole.folder)


def test_rows_after_the_checkpoint_are_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY", 25)
    config = replace(SMALL, method="sampling")

    class Killed(Exception):
        pass

    def kill(run, row):
        if run.step == 55:
            raise Killed

    # Checkpoints at 25 and 50; what is written later must not appear twice.
    run = training.start(config, tmp_path / "run")
    with pytest.raises(Killed):
        training.train(run, kill)
    with (run.folder / METRICS).open("a") as file:
        file.write("55,1.0,0,0,0,0,0\n")
    training.train(training.resume(run.folder))
    training.train(training.start(config, tmp_path / "whole"))
    assert _rows(run.folder) == _rows(tmp_path / "whole")


def test_steps_can_be_raised_and_nothing_else(tmp_path):
    run = training.start(replace(SMALL, steps=25), tmp_path / "run")
    training.train(run)
    longer = training.resume(run.folder, replace(run.config, steps=50))
    training.train(longer)
    training.train(training.start(replace(SMALL, steps=50), tmp_path / "whole"))
    assert _rows(run.folder) == _rows(tmp_path / "whole")
    with pytest.raises(ValueError, match="lr=0.1 but .* was trained with 0.001"):
        training.resume(run.folder, replace(longer.config, lr=0.1))
    with pytest.raises(ValueError, match="steps=40 but .* is already at step 50"):
        training.resume(run.folder, replace(longer.config, steps=40))


def test_training_learns(tmp_path):
    run = training.start(replace(SMALL, batch_size=64, steps=200, lr=3e-3), tmp_path / "run")
    training.train(run)
    errors = [float(row["squared_error"]) for row in _rows(run.folder)]
    # The mean image leaves 52.7; three dimensions must explain a quarter of that.
    assert errors[-1] < 0.75 * 52.7 < errors[0]
    assert run.seconds > 0


@pytest.mark.parametrize("interrupted", [False, True])
def test_non_finite_loss_names_its_step_and_spares_the_checkpoint(tmp_path, interrupted):
    run = training.start(replace(SMALL, method="sampling", steps=25), tmp_path / "run")
    training.train(run)
    good = (run.folder / "checkpoint.safetensors").read_bytes()
    run = training.resume(run.folder, replace(run.config, steps=50))
    objective = run.objective

    def broken(x, mean, log_var, *, generator):
        # Steps count from one; the call after 31 finished ones is step 32.
        return objective(
            x * (math.nan if run.step == 31 else 1), mean, log_var, generator=generator
        )

    run.model.objective = broken
    with pytest.raises(training.NonFiniteLoss, match="at step 32 \\(loss=nan, .* kl=\\d") as caught:
        training.train(run, *([_interrupt_at(40)] if interrupted else []))
    assert "\n" not in str(caught.value)
    assert (run.folder / "checkpoint.safetensors").read_bytes() == good
    assert load_checkpoint(run.folder / "failed.safetensors")["step"] == (40 if interrupted else 50)


def test_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists: give another folder"):
        training.start(SMALL, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


def test_a_decoder_that_cannot_run_leaves_nothing_behind(tmp_path, monkeypatch):
    original = run_module.build_networks

    def with_batch_norm(config):
        encoder, decoder = original(config)
        decoder.insert(1, torch.nn.BatchNorm1d(200))
        return encoder, decoder

    monkeypatch.setattr(run_module, "build_networks", with_batch_norm)
    with pytest.raises((RuntimeError, ValueError), match="decoder.1. normalises") as caught:
        training.start(SMALL, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


# --- files


def test_load_gives_the_trained_model(tmp_path):
    run = training.start(replace(SMALL, method="sampling", steps=5), tmp_path / "run")
    training.train(run)
    state = torch.get_rng_state()
    encoder, decoder, config = sf.load(run.folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert config == run.config
    assert not encoder.training and not decoder.training
    x, z = torch.rand(2, 1, 28, 28), torch.randn(2, 3)
    with torch.no_grad():
        assert torch.equal(torch.stack(encoder(x)), torch.stack(run.encoder(x)))
        assert torch.equal(decoder(z), run.decoder(z))


class _Foreign:
    pass


@pytest.mark.parametrize("damage", ["missing", "cut", "text", "format", "code", "shape", "config"])
def test_damaged_and_foreign_files(tmp_path, damage):
    run = training.start(replace(SMALL, method="sampling", steps=1), tmp_path / "run")
    training.train(run)
    path = run.folder / "checkpoint.safetensors"
    state = load_checkpoint(path)
    message = {
        "missing": "checkpoint.safetensors does not exist",
        "cut": "damaged or not a checkpoint",
        "text": "damaged or not a checkpoint",
        "code": "damaged or not a checkpoint",
        "format": "not a checkpoint of fastsfvae .its format is 'another', not ",
        "shape": "does not hold this decoder's weights",
        "config": "config.json is not a run's configuration",
    }[damage]
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "text":
        path.write_text("hello")
    elif damage == "code":
        torch.save({"format": "fastsfvae checkpoint 1", "decoder": _Foreign()}, path)
    elif damage == "format":
        path.write_bytes(b"".join(pack({"decoder": {}}, "another")))
    elif damage == "shape":
        save_checkpoint(path, {**state, "decoder": {"0.weight": torch.zeros(1)}})
    else:
        (run.folder / "config.json").write_text('{"lr": 1}')
    for function in (sf.load, training.resume):
        with pytest.raises(ValueError, match=message) as caught:
            function(run.folder)
        assert "\n" not in str(caught.value)


def test_configuration_survives_json():
    config = TrainConfig(gamma=1, seed=3, model="conv")
    assert TrainConfig.from_json(config.to_json()) == config
    for text in ("[]", "{}", "nonsense", config.to_json().replace("3", '"3"')):
        with pytest.raises(ValueError):
            TrainConfig.from_json(text)
