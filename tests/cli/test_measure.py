import base64
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

import fastsfvae as sf
from fastsfvae.cli import main as cli
from fastsfvae.data import digits
from fastsfvae.results import evaluation

TRAIN = ["train", "--model", "tanh", "--latent-dim", "2", "--batch-size", "64", "--out"]
QUICK = ["--images", "30", "--samples", "40", "--elbo-samples", "4", "--taylor-images", "2"]
QUICK += ["--taylor-reference", "300", "--gradient-repeats", "2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, method, seed in (("a", "sampling-free", "0"), ("b", "sampling", "1")):
        options = [*TRAIN, str(folder / name), "--method", method, "--seed", seed]
        assert cli.main([*options, "--steps", "5"]) == 0
    return folder


def _posterior(folder, images=30):
    encoder, decoder, _ = sf.load(folder)
    x = digits("test").images[:images].float() / 255
    with torch.no_grad():
        return decoder, x, *encoder(x)


def test_evaluate_writes_numbers_conventions_and_one_page(runs, capsys):
    options = ["evaluate", str(runs / "a"), *QUICK, "--proposal", "posterior"]
    options += ["--extractor", "torch.nn:Flatten"]
    with pytest.warns(UserWarning, match="30 images for 784 features"):
        assert cli.main(options) == 0
    printed, error = capsys.readouterr()
    # A warning is one line without the place in the source that a user has nothing of.
    notes = [line for line in error.splitlines() if "30 images for 784 features" in line]
    assert len(notes) == 1 and notes[0].startswith("fastsfvae evaluate: note: ")
    assert "log ML, without constant" in printed and "objective (not a bound)" in printed
    folder = runs / "a" / "evaluation-1"
    results = json.loads((folder / "evaluation.json").read_text())
    sections, conventions = results["sections"], results["conventions"]

    decoder, x, mean, log_var = _posterior(runs / "a")
    at_mean = sf.evaluate.squared_error_at_mean(decoder, x, mean)
    reconstruction = sections["Reconstruction and latent dimensions"]
    expected = sf.evaluate.mean_over_images(at_mean)
    assert reconstruction["squared error at the mean"]["value"] == pytest.approx(expected.mean)
    densities = sections["Log-densities (nats)"]
    objective = sf.sampling_free_elbo(decoder, x, mean, log_var).elbo.detach().double().mean()
    assert densities["objective (not a bound)"]["value"] == pytest.approx(float(objective))
    # The ELBO, its parts and the constant fit together.
    assert densities["sampled ELBO, without constant"]["value"] == pytest.approx(
        -reconstruction["squared error, sampled"]["value"] / (2 * conventions["noise_var"])
        - reconstruction["KL"]["value"]
    )
    assert densities["log ML"]["value"] - densities["log ML, without constant"][
        "value"
    ] == pytest.approx(conventions["constant_value"])
    assert conventions["log_ml"] == "K=40 importance weights, proposal posterior"
    assert conventions["split"] == "30 test images" and conventions["trained_steps"] == 5
    assert any("not comparable" in title for title in sections)
    assert re.fullmatch("[0-9a-f]{64}", conventions["distance_weights_sha256"])
    assert len(results["kl_per_dimension"]) == 2

    # The page holds every picture of the folder, and refers to no other file.
    page = (folder / "evaluation.html").read_text()
    embedded = re.findall(r'src="([^"]*)"', page)
    prefix = "data:image/png;base64,"
    assert all(source.startswith(prefix) for source in embedded)
    pictures = {path.read_bytes() for path in folder.glob("*.png")}
    assert {base64.b64decode(source.removeprefix(prefix)) for source in embedded} == pictures
    assert len(pictures) == 5
    for key, value in conventions.items():
        assert key in page and (not isinstance(value, int) or str(value) in page)

    # The same seed gives the same numbers, in a folder of its own.
    assert cli.main(["evaluate", str(runs / "a"), *QUICK, "--proposal", "posterior"]) == 0
    again = json.loads((runs / "a" / "evaluation-2" / "evaluation.json").read_text())
    assert again["sections"]["Log-densities (nats)"] == densities


def test_compare_gives_paired_differences(runs, capsys, tmp_path):
    out = tmp_path / "c"
    options = ["compare", str(runs / "a"), str(runs / "b"), "--images", "30", "--samples", "20"]
    assert cli.main([*options, "--out", str(out)]) == 0
    assert "squared error at the mean" in capsys.readouterr().out
    results = json.loads((out / "comparison.json").read_text())
    first, second = (
        sf.evaluate.squared_error_at_mean(decoder, x, mean)
        for decoder, x, mean, _ in (_posterior(runs / name) for name in "ab")
    )
    expected = sf.evaluate.mean_over_images(second - first)
    (found,) = results["differences"]["squared error at the mean"]
    assert found["mean"] == pytest.approx(expected.mean)
    assert found["standard_error"] == pytest.approx(expected.standard_error)
    assert "sampling-free" in results["conventions"][str(runs / "a")]
    assert [path.name for path in out.glob("*.png")] == ["side-by-side.png"]


@pytest.mark.slow
def test_compare_of_groups_knows_spreads_over_seeds(runs, capsys, tmp_path):
    comma = tmp_path / "b,1"
    shutil.copytree(runs / "b", comma)
    for seed in "01":
        options = [*TRAIN, str(tmp_path / seed), "--method", "sampling", "--steps", "5"]
        # How a run was carried out is no difference.
        options += ["--data-budget", seed]
        assert cli.main([*options, "--seed", str(2 + int(seed))]) == 0
    capsys.readouterr()
    group = f"{comma},{tmp_path / '0'},{tmp_path / '1'}"
    options = ["--images", "30", "--samples", "20", "--out"]
    assert cli.main(["compare", str(runs / "a"), group, *options, str(tmp_path / "c")]) == 0
    printed = capsys.readouterr().out
    assert "± over test images, not over seeds" in printed
    assert "± over seeds" in printed and "b,1 (3 seeds) - a" in printed
    found = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert found["runs"] == [str(runs / "a"), group]
    alone, *values = (
        sf.evaluate.squared_error_at_mean(decoder, x, mean)
        for decoder, x, mean, _ in map(
            _posterior, (runs / "a", comma, tmp_path / "0", tmp_path / "1")
        )
    )
    stacked, name = torch.stack(values), "squared error at the mean"
    (difference,) = found["differences"][name]
    expected = sf.evaluate.mean_over_images(stacked.mean(0) - alone)
    assert difference["mean"] == pytest.approx(expected.mean)
    assert difference["standard_error"] == pytest.approx(expected.standard_error)
    # A group of one has no spread over seeds, and its difference no error.
    assert found["seed_spreads"][name][0] is None and found["seed_errors"][name] == [None]
    spread = float(stacked.mean(1).std())
    assert found["seed_spreads"][name][1] == pytest.approx(spread)
    # Against two of its own runs: s1^2/3 + s2^2/2.
    pair = f"{tmp_path / '0'},{tmp_path / '1'}"
    assert cli.main(["compare", group, pair, *options, str(tmp_path / "d")]) == 0
    again = json.loads((tmp_path / "d" / "comparison.json").read_text())
    of_pair = float(stacked[1:].mean(1).std())
    expected = (spread**2 / 3 + of_pair**2 / 2) ** 0.5
    assert again["seed_errors"][name] == [pytest.approx(expected)]


@pytest.mark.slow
def test_torchrun_gives_the_numbers_of_one_process(runs, tmp_path):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    quick = [*QUICK[2:-2], "--gradient-repeats", "0", "--images", "31"]
    assert cli.main(["evaluate", str(runs / "a"), *quick, "--out", str(tmp_path / "one")]) == 0
    command = ["-m", "fastsfvae", "evaluate", str(runs / "a"), *quick, "--out"]
    done = subprocess.run(
        [*start, *command, str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results, pictures") == 1 and done.stderr.count("31 test images") == 1
    one, two = (
        json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two")
    )
    assert one["conventions"] == two["conventions"]
    for title, numbers in one["sections"].items():
        for label, number in numbers.items():
            other = two["sections"][title][label]
            for key in ("value", "standard_error", "monte_carlo_error"):
                assert (other[key] is None) == (number[key] is None), label
                if number[key] is not None:
                    assert other[key] == pytest.approx(number[key], rel=1e-4, abs=1e-5), label
    # What all processes meet is one line.
    failed = subprocess.run(
        [*start, *command, str(tmp_path / "two")], capture_output=True, text=True, timeout=200
    )
    assert failed.returncode
    assert failed.stderr.count("exists: give another folder") == 1
    assert failed.stderr.count("fastsfvae evaluate: ") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("evaluate", "Folder of the run"),
        ("evaluate nowhere", "nowhere/config.json does not exist"),
        ("evaluate {a} --samples 0", "samples=0 must be at least 1"),
        ("evaluate {a} --proposal prior", "--proposal 'prior' is none of posterior,"),
        ("evaluate {a} --gradient-repeats 1", "gradient_repeats=1"),
        ("evaluate {a} --out {a}", "exists: give another folder"),
        ("evaluate {a} --extractor nomodule:f", "extractor='nomodule:f' cannot be built"),
        ("evaluate {a} --extractor a:b --download", "give one"),
        ("compare {a}", "name at least two folders"),
    ],
)
def test_bad_command_lines(runs, capsys, arguments, message):
    before = sorted(runs.rglob("*"))
    assert cli.main(arguments.format(a=runs / "a").split()) == 2
    out, error = capsys.readouterr()
    assert not out
    assert error.count("\n") == 1 and message in error
    assert sorted(runs.rglob("*")) == before


def three_channels():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.BatchNorm2d(2))


def test_an_extractor_that_does_not_fit_costs_no_evaluation(runs, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate_trained", lambda *_: pytest.fail("was evaluated"))
    before = sorted(runs.rglob("*"))
    options = ["evaluate", str(runs / "a"), *QUICK, "--extractor", f"{__name__}:three_channels"]
    assert cli.main(options) == 2
    assert "failed on real images (2, 1, 28, 28)" in capsys.readouterr().err.splitlines()[-1]
    assert sorted(runs.rglob("*")) == before


def test_runs_that_do_not_compare(runs, capsys, tmp_path):
    other = tmp_path / "d"
    assert cli.main([*TRAIN, str(other), "--steps", "1", "--noise-var", "0.25"]) == 0
    capsys.readouterr()
    options = ["compare", str(runs / "a"), str(other), "--out", str(tmp_path / "e")]
    assert cli.main(options) == 2
    assert "noise_var=0.25" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()
