"""The paper's neighbourhood: its judges, their extractor, and what the table leaves out."""

import csv
import math

import numpy as np
import pytest
import torch

from fastsfvae import training
from fastsfvae.cli import main as cli
from fastsfvae.data.load import load_labels
from fastsfvae.models import Encoder
from fastsfvae.reproduce import Options, choose, extractor, neighbours, runtime, tables
from fastsfvae.reproduce.cells import Result
from fastsfvae.reproduce.extractor import FEATURES, classifier_of
from fastsfvae.reproduce.judges import (
    AT_MEAN,
    COLLAPSED,
    ELBO,
    FID,
    KID,
    KL,
    LOG_ML,
    MISMATCH,
    QUANTITIES,
    SAMPLED,
    Judges,
)
from fastsfvae.reproduce.runtime import STEP_RATIO, STEP_TIME
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.methods import DETERMINISTIC, METHODS, WITHOUT_PRIOR

OF_DENSITIES = {LOG_ML, ELBO, KL, SAMPLED, COLLAPSED}
SETS = ("digits", "fashion-mnist")
JUDGES = Judges(samples=20, images=20, generated=100, extractor_steps=5)


def test_every_method_has_its_place():
    cells = choose("neighbours", Options())
    of_sets = [{c.config.method for c in cells if c.config.data == d} for d in SETS]
    shown = of_sets[0]
    assert of_sets == [shown] * 2 and {cell.config.data for cell in cells} == {*SETS}
    # The exact marginal is for one latent, where there is no neighbourhood.
    assert shown == {*METHODS} - {"exact-marginal"}
    assert all(cell.seeds == 3 for cell in cells if "step time" not in cell.name)
    rae = {c.config.regularizer for c in cells if c.config.method == "rae"}
    assert rae == {"l2", "gradient-penalty", "spectral-norm"}


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "sampling"},
        {"method": "householder"},
        {"method": "delta-vae"},
        {"method": "auto-encoder"},
        {"method": "rae"},
        {"method": "cwae"},
    ],
    ids=lambda settings: settings["method"],
)
def test_a_method_is_judged_by_what_it_has(settings, tmp_path):
    config = TrainConfig(**settings, model="linear", latent_dim=2, steps=30, train_images=500)
    run = training.start(config, tmp_path / "run")
    training.train(run)
    run.model.eval()
    found = JUDGES(run)
    missing = {*QUANTITIES} - {*found}
    expected = OF_DENSITIES if config.method in DETERMINISTIC else set()
    assert missing == expected | ({MISMATCH} if config.method in WITHOUT_PRIOR else set())
    assert all(math.isfinite(value) for value in found.values())
    # The same once more, from the extractor that the first call has left.
    assert (tmp_path / "classifier-digits-5.safetensors").is_file()
    assert JUDGES(run) == found


def test_the_extractor_tells_digits_apart_and_is_kept(tmp_path):
    config = TrainConfig()
    before = torch.random.get_rng_state()
    network = classifier_of(config, 150, tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())
    assert extractor.accuracy(network, config) > 0.7
    images = config.load_images("test")[:500] / 255
    features = network(images)
    assert features.shape == (500, FEATURES)
    # In units of their root mean square.
    assert features.square().mean().sqrt().item() == pytest.approx(1, abs=0.1)
    (path,) = tmp_path.iterdir()
    written = path.stat().st_mtime_ns
    again = classifier_of(config, 150, tmp_path)
    assert path.stat().st_mtime_ns == written
    assert torch.equal(again(images), features)
    assert torch.equal(load_labels("digits", "", "test")[:3], torch.tensor([2, 6, 6]))


def test_the_quick_table_and_its_picture(tmp_path, capsys, monkeypatch):
    few = ("sampling", "Householder, 4", "RAE, L2", "SWAE")
    monkeypatch.setattr(neighbours, "METHODS", {k: neighbours.METHODS[k] for k in few})
    assert cli.main(["reproduce", "neighbours", "--quick", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    rows = {line.split(" | ")[0][2:]: line for line in shown.splitlines() if line[:2] == "| "}
    assert "| - | - | - |" in rows["RAE, L2"] and " - " not in rows["sampling"]
    assert "rae have no prior" in shown and "no density of x" in shown
    assert "NOT comparable with published FID" in shown
    with (tmp_path / "neighbours-quick.csv").open(newline="") as file:
        written = {(row["cell"], row["quantity"]) for row in csv.DictReader(file)}
    assert {(name, KID) for name in few} <= written and ("SWAE", LOG_ML) not in written
    assert (tmp_path / "neighbours-quick.png").read_bytes().startswith(b"\x89PNG")


def _result(name, values, seconds=None):
    """A run with values of quantities after 100, 200, 400 steps; or the time of its step."""
    cells = {cell.name: cell for cell in choose("neighbours", Options(steps=400))}
    if seconds is not None:
        ratio = {STEP_TIME: 1e3 * seconds, STEP_RATIO: seconds / 0.01}
        return Result(cells[f"{name}, step time"], 0, None, {"measured": {"1": ratio}})
    measured = {
        str(step): {quantity: curve[i] for quantity, curve in values.items()}
        for i, step in enumerate((100, 200, 400))
    }
    return Result(cells[name], 0, None, {"measured": measured})


def test_equal_seconds_are_interpolated_and_what_is_missing_stays_blank():
    curve = {LOG_ML: [-500.0, -490.0, -480.0], AT_MEAN: [40.0, 30.0, 20.0], KID: [3.0, 2.0, 1.0]}
    errors = {k: v for k, v in curve.items() if k != LOG_ML} | {FID: [1.0] * 3}
    results = [
        _result("sampling", curve),
        _result("SWAE", errors),
        _result("STL", curve),
        _result("sampling", None, 0.01),
        _result("SWAE", None, 0.02),
    ]
    lines = neighbours.NEIGHBOURS.reading(results).splitlines()
    rows = {
        line.split(" | ")[0][2:]: line.strip("| ").split(" | ")[1:] for line in lines if "|" in line
    }
    assert rows["trained by"] == ["time of a step", "1 s", "2 s", "3 s"]
    at = -500 + 10 * (1 + math.log(1.5) / math.log(2))
    assert rows["sampling"] == [
        *("1.00", "-500 / 40 / 3", "-490 / 30 / 2"),
        f"{at:.4g} / {20 + 10 * (1 - math.log2(1.5)):.4g} / {1 + 1 - math.log2(1.5):.4g}",
    ]
    # Of half as many steps; not yet measured after one second.
    assert rows["SWAE"][:3] == ["2.00", "- / - / -", "- / 40 / 3"]
    assert "STL" not in rows


def test_the_mismatch_of_latents_that_are_the_priors_is_zero(tmp_path, monkeypatch):
    """Of an encoder that gives N(0, I) for every image."""
    config = TrainConfig(method="sampling", model="linear", latent_dim=3, steps=1, train_images=64)
    run = training.start(config, tmp_path / "run")
    training.train(run)
    with torch.no_grad():
        for parameter in run.encoder.parameters():
            parameter.zero_()
    found = []
    for seed in range(30):
        run.config = TrainConfig(**{**vars(run.config), "seed": seed})
        found.append(Judges(samples=2, images=2, generated=200, extractor_steps=1)(run)[MISMATCH])
    assert abs(np.mean(found)) < 3 * np.std(found) / math.sqrt(len(found))
    assert np.std(found) < 0.02


def test_summaries_leave_out_what_a_run_has_not(tmp_path):
    summaries = tables.summarise([_result("SWAE", {AT_MEAN: [3.0, 2.0, 1.0]})])
    assert {s.quantity for s in summaries} == {AT_MEAN}


@pytest.mark.parametrize("method", ["householder", "delta-vae", "rae", "cwae"])
def test_a_step_is_timed_beside_one_on_the_networks_as_they_were(method, tmp_path, monkeypatch):
    spectral = {"regularizer": "spectral-norm"} if method == "rae" else {}
    config = TrainConfig(
        method=method, model="linear", latent_dim=2, steps=1, train_images=64, **spectral
    )
    run = training.start(config, tmp_path / "run")
    seen = []
    timed = runtime._timed_step
    monkeypatch.setattr(runtime, "_timed_step", lambda *args: seen.append(args[1]) or timed(*args))
    found = runtime.StepTime(steps=1)(run)
    assert found[STEP_TIME] > 0 and found[STEP_RATIO] > 0
    own, plain = seen[:2]
    assert own.encoder is run.encoder and own.decoder is run.decoder
    if method == "cwae":
        assert plain is own
    else:
        assert isinstance(plain.encoder, Encoder) and len(list(plain.decoder.buffers())) == 0
        assert {id(p) for p in plain.decoder.parameters()}.isdisjoint(
            {id(p) for p in own.decoder.parameters()}
        )
