"""The command as a process: its environment, its streams, and what an import may not touch."""

import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest

from fastsfvae.cli import main as cli

TELL = """
import json, os, sys, torch

def tell(config):
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "LOCAL_RANK")
    found = {name: os.environ.get(name) for name in names}
    found |= {"argv": sys.argv[1:], "utf8": sys.flags.utf8_mode, "dev": sys.flags.dev_mode}
    raise ValueError(json.dumps(found))
"""
COUNT = """
import pathlib
with pathlib.Path(__file__).with_name("starts").open("a") as file:
    file.write("x")
"""
TRAIN = ["train", "--method", "sampling", "--model", "linear", "--latent-dim", "2", "--steps", "3"]
TRAIN += ["--data", "npz", "--data-dir", "a.npz", "--image-size", "8", "--batch-size", "4"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTSFVAE_CACHE", str(tmp_path / "cache"))
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", train=images[:16], test=images[16:])
    return tmp_path


def _started(folder, start, **given):
    """What the command's own process saw, and how many processes' worth of starts there were."""
    (folder / "tell_models.py").write_text(TELL)
    (folder / "sitecustomize.py").write_text(COUNT)
    (folder / "starts").write_text("")
    unset = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"PYTHONPATH": f"{folder}{os.pathsep}{os.environ['PYTHONPATH']}", **given}
    command = [sys.executable, *start, "train", "--model", "tell_models:tell", "--seed=3"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    found = json.loads(done.stderr[done.stderr.index("{") :])
    assert found.pop("argv") == ["train", "--model", "tell_models:tell", "--seed=3"]
    return found, (folder / "starts").read_text()


SCRIPT = ["-X", "utf8=1", "-c", "import sys; from fastsfvae.cli.main import main; sys.exit(main())"]


@pytest.mark.slow
@pytest.mark.parametrize("start", [["-X", "dev", "-m", "fastsfvae"], SCRIPT])
def test_idle_threads_sleep(start, here):
    found, starts = _started(here, start, OMP_NUM_THREADS="2", LOCAL_RANK="0")
    assert found["GOMP_SPINCOUNT"] == "1000" and found["LOCAL_RANK"] == "0"
    assert (found["dev"], found["utf8"]) == ("dev" in start, int(start is SCRIPT))
    assert starts == "xx"


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        {"GOMP_SPINCOUNT": "7"},
        {"OMP_WAIT_POLICY": "active"},
        # One thread has no idle ones.
        {"OMP_NUM_THREADS": "1"},
    ],
)
def test_what_the_user_has_chosen_stays(given, here):
    found, starts = _started(here, ["-m", "fastsfvae"], **{"OMP_NUM_THREADS": "2", **given})
    assert starts == "x"
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        assert found[name] == given.get(name)


def test_a_call_changes_nothing_of_its_process(here, capsys, monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    before = dict(os.environ), list(warnings.filters), warnings.showwarning, sys.stdout
    assert cli.main([*TRAIN, "--steps=0"]) == 2
    assert before == (dict(os.environ), warnings.filters, warnings.showwarning, sys.stdout)


def test_warnings_are_notes_of_one_line(here, capsys, monkeypatch):
    class Nothing(Exception):
        pass

    def command(options):
        for text in ("one\nand a half", "two", "one\nand a half"):
            warnings.warn(text, stacklevel=2)
        raise Nothing

    monkeypatch.setattr(cli, "_command", lambda name: command)
    with pytest.warns(UserWarning, match="two") as recorded, pytest.raises(Nothing):
        cli.main(["train"])
    assert capsys.readouterr().err == (
        "fastsfvae train: note: one and a half\nfastsfvae train: note: two\n"
    )
    assert len(recorded) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "fastsfvae train: one and a half\n"


_IMPORT = """
import gc, logging, os, signal, sys, warnings
import numpy as np
import torch
import matplotlib

def state():
    return {
        "environment": dict(os.environ), "path": list(sys.path), "filters": list(warnings.filters),
        "show": warnings.showwarning, "threads": (torch.get_num_threads(),
            torch.get_num_interop_threads()), "dtype": torch.get_default_dtype(),
        "seed": torch.initial_seed(), "random": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(), "errors": np.geterr(),
        "precision": (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "signals": [signal.getsignal(n) for n in signal.valid_signals()], "gc": gc.isenabled(),
        "hooks": (sys.excepthook, sys.displayhook), "logging": logging.root.handlers[:],
        "backend": matplotlib.rcParams._get_backend_or_none(), "limit": sys.getrecursionlimit(),
        "rc": {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != "backend"},
    }

before = state()
import fastsfvae, fastsfvae.evaluate, fastsfvae.training, fastsfvae.results.report
import fastsfvae.reproduce, fastsfvae.cli.main, fastsfvae.cli.train, fastsfvae.cli.measure
for name in fastsfvae.__all__:
    getattr(fastsfvae, name)
after = state()
changed = [name for name in before if before[name] != after[name]]
assert not changed, changed
"""


def test_an_import_changes_no_global_state():
    done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def _run(**given):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | given.pop("environment", {})
    command = [sys.executable, "-m", "fastsfvae", *TRAIN, "--out", "run"]
    return subprocess.Popen(command, env=environment, **given)


@pytest.mark.slow
def test_a_reader_that_has_gone_loses_no_results(here):
    reader, writer = os.pipe()
    os.close(reader)
    process = _run(stdout=writer, stderr=writer)
    os.close(writer)
    assert process.wait(120) == 0
    assert (here / "run" / "results.json").is_file()


@pytest.mark.slow
def test_streams_that_are_closed(here):
    def close():
        for stream in range(3):
            os.close(stream)

    assert _run(preexec_fn=close).wait(120) == 0
    assert (here / "run" / "results.json").is_file()
    lines = (here / "run" / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "1", "3"]


@pytest.mark.slow
def test_a_terminal_without_the_sign(here):
    ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    process = _run(stdout=subprocess.PIPE, stderr=subprocess.PIPE, environment=ascii_only)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert out.decode("ascii").splitlines()[-1] == "results in run" and b" ? " in out
