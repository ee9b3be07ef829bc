import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from fastsfvae import training
from fastsfvae.cli import main as cli
from fastsfvae.data.load import DATA_SETS
from fastsfvae.evaluate import mean_over_images
from fastsfvae.reproduce import EXPERIMENTS
from fastsfvae.results.report import RESULTS
from fastsfvae.training.methods import METHODS

FAST = ["train", "--method", "sampling", "--model", "tanh", "--batch-size", "16"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_train_and_resume(tmp_path, capsys):
    options = [*FAST, "--latent-dim", "2", "--seed", "3", "--kl-weight", "0.5"]
    assert cli.main([*options, "--steps", "30"]) == 0
    folder = tmp_path / "runs" / "sampling-tanh-1"
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint.safetensors",
        "config.json",
        "curves.png",
        "manifold.png",
        "metrics.csv",
        "reconstructions.png",
        "results.json",
        "samples.png",
    }
    for figure in folder.glob("*.png"):
        assert figure.read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "config.json").read_text())["kl_weight"] == 0.5

    out, error = capsys.readouterr()
    assert "step 30/30" in error and "steps/s" in error and "s left" in error
    results = json.loads((folder / RESULTS).read_text())
    test = results["splits"]["test"]
    constant = results["conventions"]["constant_value"]
    row = next(line for line in out.splitlines() if line.startswith("log ML, without constant"))
    assert f"{test['log ML']['mean'] - constant:.2f} ± " in row
    # log p(x) >= ELBO up to Monte Carlo error, and the decoder's noise costs something.
    assert test["log ML"]["mean"] > test["sampled ELBO"]["mean"]
    assert results["conventions"]["seed"] == 3

    # A second run takes the next name; the first goes on with its own settings.
    assert cli.main([*FAST, "--steps", "1"]) == 0
    assert (tmp_path / "runs" / "sampling-tanh-2").is_dir()
    assert cli.main(["train", "--out", str(folder), "--resume", "--steps", "50"]) == 0
    config = json.loads((folder / "config.json").read_text())
    assert (config["steps"], config["seed"], config["latent_dim"]) == (50, 3, 2)
    assert "step 50/50" in capsys.readouterr().err


def test_the_objective_is_not_called_a_bound(tmp_path, capsys):
    options = ["train", "--model", "tanh", "--latent-dim", "3", "--steps", "2", "--out", "a"]
    assert cli.main(options) == 0
    out = capsys.readouterr().out
    assert "objective (not a bound)" in out and "sampled ELBO" in out
    assert out.count("ELBO") == out.count("sampled ELBO")
    results = json.loads((tmp_path / "a" / RESULTS).read_text())
    assert results["conventions"]["likelihood"] == "precision"
    assert not (tmp_path / "a" / "manifold.png").exists()

    # The figures of the table are those of the saved model.
    import fastsfvae as sf
    from fastsfvae.data import digits

    encoder, decoder, _ = sf.load(tmp_path / "a")
    x = digits("test").images.float() / 255
    with torch.no_grad():
        mean, log_var = encoder(x)
        error = (decoder(mean) - x).double().square().sum((1, 2, 3))
        terms = sf.sampling_free_elbo(decoder, x, mean, log_var)
    test = results["splits"]["test"]
    for name, values in {"squared error at the mean": error, "objective": terms.elbo}.items():
        expected = mean_over_images(values)
        assert test[name]["mean"] == pytest.approx(expected.mean, rel=1e-6)
        assert test[name]["standard_error"] == pytest.approx(expected.standard_error, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("foo", "unknown command 'foo'"),
        ("train --method foo", "--method 'foo' is none of sampling-free, sampling, "),
        ("train --method sampeling", ": did you mean sampling?"),
        ("train --bogus 1", "unknown option '--bogus'"),
        ("train --latent-dims 3", "unknown option '--latent-dims': did you mean --latent-dim?"),
        ("train --steps 3 --steps=4", "--steps is given twice"),
        ("train --compile=True", "--compile takes no value: leave out '=True'"),
        ("train --out=", "--out is empty"),
        ("trian", "did you mean train?"),
        ("train --steps x", "--steps"),
        ("train --latent-dim 0", "latent_dim=0 must be at least 1"),
        ("train --batch-size 10000", "batch_size=10000 but there are 9000 training images"),
        ("train --batch-size 0", "batch_size=0 must be at least 1"),
        ("train --gamma 1.5", "gamma=1.5 must lie in [0, 1]"),
        ("train --gamma nan", "gamma=nan must lie in [0, 1]"),
        ("train --noise-var 0", "noise_var=0.0 must be finite and positive"),
        ("train --lr -1", "lr=-1.0 must be finite and positive"),
        ("train --seed -1", "seed=-1"),
        ("train --likelihood foo", "--likelihood 'foo' is none of precision, "),
        ("train --model foo", "model='foo' is not one of"),
        ("train --model no_module:f", "cannot be imported"),
        ("train --device foo", "device='foo' is not a device"),
        ("train --out exists", "--out exists exists"),
        ("train --resume", "give --out"),
        ("train --resume --out none", "none/config.json does not exist"),
        ("train --resume --out exists", "exists/config.json does not exist"),
    ],
)
def test_bad_command_lines(tmp_path, capsys, arguments, message):
    (tmp_path / "exists").mkdir()
    assert cli.main(arguments.split()) == 2
    out, error = capsys.readouterr()
    assert not out
    assert error.count("\n") == 1 and message in error
    assert [path.name for path in tmp_path.rglob("*")] == ["exists"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where there is no CUDA")
@pytest.mark.parametrize(
    ("option", "message"), [("--device=cuda", "no CUDA"), ("--backend=triton", "TRITON_INTERPRET")]
)
def test_no_gpu(tmp_path, capsys, monkeypatch, option, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cli.main(["train", option]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert not list(tmp_path.iterdir())


def test_non_finite_loss(tmp_path, capsys):
    # Adam's first step is as long as the learning rate: the second loss overflows.
    assert cli.main([*FAST, "--lr", "1e30", "--steps", "30", "--out", "a"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "not finite at step 2 (loss=" in error and "a/failed.safetensors" in error
    assert (tmp_path / "a" / "failed.safetensors").exists()


def test_missing_extras(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "rich" else find(name)
    )
    assert cli.main(FAST) == 2
    error = capsys.readouterr().err
    assert 'rich missing: install what is needed with pip install "fastsfvae[train]"' in error
    assert not list(tmp_path.iterdir())


def test_help_and_version(capsys):
    assert cli.main(["--version"]) == 0
    assert cli.main([]) == 0
    assert "usage: fastsfvae COMMAND" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", "--help"])
    assert exit_.value.code == 0
    assert "--noise-var FLOAT" in capsys.readouterr().out


@pytest.mark.parametrize("columns", ["80", "120"])
@pytest.mark.parametrize("command", ["train", "evaluate", "compare", "reproduce"])
def test_help_speaks_of_values_as_a_user_writes_them(command, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    for odd in ("None", "{}", ",}", "{,", "(default: )", "STR|"):
        assert odd not in out
    if command == "reproduce":
        assert all(name in out for name in EXPERIMENTS)
    if command == "train":
        # Long lists of choices are wrapped.
        text = "".join(out.replace("│", "").split())
        for name, choices in (("method", METHODS), ("data", DATA_SETS), ("init", ("torch",))):
            listed = text.partition(f"--{name}{{")[2].partition("}")[0].split(",")
            assert listed[: len(choices)] == [*choices]


@pytest.mark.slow
def test_interrupted_command_is_resumed(tmp_path):
    # A real signal to a real process, as Ctrl-C sends it.
    script = (
        "import os, signal, sys\n"
        "from fastsfvae.cli.main import main\n"
        "from fastsfvae.objectives import Sampling\n"
        "plain = Sampling.__call__\n"
        "def call(self, *args, **kwargs):\n"
        "    self.calls = getattr(self, 'calls', 0) + 1\n"
        "    if self.calls == 7:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return plain(self, *args, **kwargs)\n"
        "Sampling.__call__ = call\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", script, *FAST, "--steps", "20", "--out", "a"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130, done.stderr
    assert "interrupted at step 7 of 20, state saved" in done.stderr
    assert "Traceback" not in done.stderr
    run = training.resume(tmp_path / "a")
    training.train(run)
    assert run.finished
