"""Every method in every mode of training: right, or refused in one line before data is read."""

import csv
import functools
import itertools
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fastsfvae import training
from fastsfvae.cli import main as cli
from fastsfvae.data import digits
from fastsfvae.data.pixels import to_unit
from fastsfvae.results import run_figures
from fastsfvae.training import distributed, loop
from fastsfvae.training import run as run_module
from fastsfvae.training.checkpoint import load_checkpoint, load_config
from fastsfvae.training.methods import METHODS
from fastsfvae.training.metrics_csv import METRICS
from fastsfvae.training.seeds import NOISE, iterate_orders, mix_seed

BATCH, SEED = 8, 5
OPTIONS = {
    "sampling-free": ["--gamma-schedule", "linear:0.9"],
    "sampling": ["--samples", "4", "--draws", "orthogonal", "--kl-weight-schedule", "linear:0"],
    "beta-vae": ["--kl-weight", "4"],
    "auto-encoder": [],
    "iwae": ["--samples", "3"],
    "stl": ["--samples", "2"],
    "dreg": ["--samples", "4", "--draws", "antithetic"],
    "vlae": ["--samples", "2", "--draws", "antithetic"],
    "exact-marginal": [],
    "free-bits": ["--free-bits", "0.05", "--samples", "2"],
    "delta-vae": ["--min-rate", "0.2", "--kl-weight-schedule", "linear:0"],
    "householder": ["--flows", "2", "--samples", "2", "--draws", "antithetic"],
    "hiwae": ["--samples", "3"],
    "rem": ["--samples", "3"],
    "rae": [],
    "wae-mmd": [],
    "swae": ["--projections", "5"],
    "cwae": [],
}
# What is not the others' model, a smooth one of two latents.
MODELS = {"exact-marginal": ["--model", "mlp", "--latent-dim", "1"]}
# Beside the methods: the first two steps of three by another one.
WARM = "warm start"
OPTIONS[WARM] = ["--method", "sampling", "--warm-start", "precision:2", *OPTIONS["sampling"]]
OPTIONS[WARM] += ["--learned-noise-var"]
LINEARIZED = "linearized proposal"
OPTIONS[LINEARIZED] = ["--method", "iwae", "--proposal", "linearized", "--samples", "3"]
GRADIENT, SPECTRAL = "gradient penalty", "spectral norm"
OPTIONS[GRADIENT] = ["--method", "rae", "--regularizer", "gradient-penalty"]
OPTIONS[SPECTRAL] = ["--method", "rae", "--regularizer", "spectral-norm"]
FIRST_VERSION = "rem, version 1"
OPTIONS[FIRST_VERSION] = ["--method", "rem", "--rem-version", "1", "--samples", "3"]
MODES = {
    "eager": [],
    "bf16": ["--precision", "bf16"],
    "compile": ["--compile"],
    "compile, bf16": ["--compile", "--precision", "bf16"],
    "graph": ["--cuda-graph"],
    "DDP": [],
    "DDP, bf16": ["--precision", "bf16"],
    "DDP, compile": ["--compile"],
}
# What is refused, of what is not right everywhere; all other cells must be right.
SEARCHING = ("vlae", "exact-marginal")
COMPILED = [mode for mode in MODES if "compile" in mode]
REFUSED = {
    cell: "--compile is for sampling-free, sampling"
    for cell in itertools.product(SEARCHING, COMPILED)
}
REFUSED |= {(LINEARIZED, mode): "leave out --compile" for mode in COMPILED}
if not torch.cuda.is_available():
    no_gpu = "--cuda-graph needs a GPU, this run is on the cpu"
    REFUSED |= {(method, "graph"): no_gpu for method in OPTIONS}
REFUSED[LINEARIZED, "graph"] = "leave out --compile and --cuda-graph"
for searching in (*SEARCHING, "householder"):
    REFUSED[searching, "graph"] = "--cuda-graph is for sampling-free, sampling, beta-vae"
CELLS = list(itertools.product(OPTIONS, MODES))
ALONE = [cell for cell in CELLS if cell not in REFUSED and "DDP" not in cell[1]]
TOGETHER = [cell for cell in CELLS if cell not in REFUSED and "DDP" in cell[1]]
BF16 = torch.finfo(torch.bfloat16).eps
# A compiler takes their float32 sums in another order, of a gradient that is rounded to bfloat16
# next: where that falls on the border between two numbers, to the other one.
REORDERED = ("householder", "hiwae", "swae")


def _command(data, method, mode, folder, steps):
    options = ["--data", "npz", "--data-dir", str(data), "--image-size", "14"]
    options += MODELS.get(method, ["--model", "tanh", "--latent-dim", "2"])
    options += ["--batch-size", str(BATCH), "--seed", str(SEED)]
    options += ["--schedule-steps", "3", "--noise-var", "0.1", "--steps", str(steps)]
    options += ["--method", method] if method in METHODS else []
    options += [*OPTIONS[method], *MODES[mode]]
    return ["train", *options, "--out", str(folder)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    os.environ["FASTSFVAE_CACHE"] = str(folder / "cache")
    images = digits("train").images[:40, 0, ::2, ::2].numpy()
    np.savez(folder / "images.npz", train=images[:32], test=images[32:])
    yield folder / "images.npz"
    del os.environ["FASTSFVAE_CACHE"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """A row for every step; no figures, which are tested elsewhere."""
    torch._dynamo.reset()
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    monkeypatch.setattr("fastsfvae.results.run_figures.save_figures", lambda run: [])


def _rows(folder):
    with (folder / METRICS).open(newline="") as file:
        rows = csv.DictReader(file)
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def _gradients(folder):
    """Of the first step, flat: after one, Adam's first moment is a tenth of them."""
    moments = load_checkpoint(folder / "checkpoint.safetensors")["optimizer"]["state"]
    found = [moments[i]["exp_avg"].flatten() * 10 for i in sorted(moments)]
    return torch.cat(found)


def _expected(folder, world, precision):
    """(loss, gradients) of the first step by hand, from what each process draws and takes."""
    plain = {"compile": False, "cuda_graph": False, "precision": precision}
    run, _ = run_module._prepare(replace(load_config(folder), **plain))
    for schedule, value in run.scheduled.values():
        value.fill_(schedule.at(0))
    order = next(iterate_orders(32, BATCH, SEED, 0))[0]
    buffers, losses = {b: b.clone() for b in run.model.buffers()}, []
    for rank in range(world):
        # Each process has its own.
        for buffer, first in buffers.items():
            buffer.copy_(first)
        share = order.view(world, -1)[rank]
        noise = torch.Generator(run.device).manual_seed(mix_seed(SEED, NOISE, rank))
        losses.append(run.model(to_unit(run.images[share]), noise).loss / world)
    loss = sum(losses)
    loss.backward()
    gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
    return loss.item(), torch.cat([g.flatten() for g in gradients]).cpu()


def _assert_first_step(folder, world, precision, reordered=False):
    """Loss and gradients are the ones by hand; under bf16, those of float32 but for rounding."""
    loss, gradients = float(_rows(folder)[0]["loss"]), _gradients(folder)
    expected, slope = _expected(folder, world, precision)
    # Sums of some thousand float32 terms in another order.
    assert loss == pytest.approx(expected, rel=2e-6)
    rounding = BF16 if reordered and precision == "bf16" else 1e-5
    assert (gradients - slope).norm() <= rounding * slope.norm()
    if precision == "bf16":
        expected, slope = _expected(folder, world, "float32")
        assert 0 < abs(loss - expected) <= 2 * BF16 * abs(expected)
        assert 0 < (gradients - slope).norm() <= 2 * BF16 * slope.norm()


def _assert_resumed(data, method, mode, tmp_path):
    """One step, then two more, are three: to the bit."""
    resume = ["train", "--out", str(tmp_path / "run"), "--resume", "--steps", "3"]
    assert cli.main(resume) == 0
    assert cli.main(_command(data, method, mode, tmp_path / "whole", 3)) == 0
    _assert_same(tmp_path / "run", tmp_path / "whole")


def _assert_same(run, whole):
    assert [row["step"] for row in _rows(run)] == ["1", "2", "3"]
    assert _rows(run) == _rows(whole)
    ours, theirs = (load_checkpoint(folder / "checkpoint.safetensors") for folder in (run, whole))
    for part in ("encoder", "decoder"):
        assert all(torch.equal(ours[part][k], v) for k, v in theirs[part].items())


def test_the_table_has_every_method():
    assert OPTIONS.keys() == {*METHODS, WARM, LINEARIZED, GRADIENT, SPECTRAL, FIRST_VERSION}


@pytest.mark.parametrize(("method", "mode"), [c for c in CELLS if c in REFUSED])
def test_a_mode_is_refused_where_it_is_parsed(method, mode, tmp_path, capsys):
    # The data is not there: what is refused is refused before it is looked for.
    command = _command(tmp_path / "none.npz", method, mode, tmp_path / "run", 1)
    assert cli.main(command) == 2
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1 and REFUSED[method, mode] in error
    assert not list(tmp_path.iterdir())


def test_compilation_without_a_compiler_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    command = ["train", "--compile", "--model", "linear", "--device", "cpu"]
    assert cli.main([*command, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "no-such-compiler is missing: leave it out" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_torch_raises_in_a_step_is_one_line(data, tmp_path, capsys, monkeypatch):
    def fail(self, *_):
        raise RuntimeError("no memory\nis left")

    monkeypatch.setattr(run_module.Model, "forward", fail)
    assert cli.main(_command(data, "sampling", "eager", tmp_path / "run", 1)) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("fastsfvae train: no memory is left (at step 0; the last checkpoint in ")
    monkeypatch.undo()
    monkeypatch.setattr("fastsfvae.results.run_figures.save_figures", lambda run: [])
    assert cli.main(["train", "--resume", "--out", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(("method", "mode"), [c for c in ALONE if c[1] != "compile"])
def test_a_mode_is_right(method, mode, data, tmp_path, monkeypatch):
    # What inductor is given; its own code is run below.
    plain = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(run_module.Model, "compile", plain)
    assert cli.main(_command(data, method, mode, tmp_path / "run", 1)) == 0
    precision = "bf16" if "bf16" in mode else "float32"
    reordered = "compile" in mode and method in REORDERED
    _assert_first_step(tmp_path / "run", 1, precision, reordered)
    _assert_resumed(data, method, mode, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m, mode in ALONE if mode == "compile"])
def test_compiled_code_is_right(method, data, tmp_path):
    assert cli.main(_command(data, method, "compile", tmp_path / "run", 1)) == 0
    _assert_first_step(tmp_path / "run", 1, "float32")


# --- two processes


def _worker(rank, data, folder, port):
    """All cells that two processes train together, by the command."""
    torch.set_num_threads(1)
    loop.LOG_EVERY = 1
    run_figures.save_figures = lambda run: []
    run_module.Model.compile = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    train = training.train

    def train_and_keep(run, *monitors):
        train(run, *monitors)
        weights = [p.detach().clone() for p in run.model.parameters()]
        torch.save(weights, folder / f"weights-{run.config.method}-{len(kept)}-{rank}.pt")
        kept.append(run)

    training.train, kept = train_and_keep, []
    # What torchrun tells its processes; the store is its own, as the fixture's is here.
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with distributed.process_group():
        for method, mode in TOGETHER:
            torch._dynamo.reset()
            run, whole = (folder / f"{method}-{mode}-{name}" for name in ("run", "whole"))
            codes = [cli.main(_command(data, method, mode, run, 1))]
            distributed.wait()
            _keep_first_step(rank, run)
            if mode == "DDP":
                codes += [cli.main(["train", "--out", str(run), "--resume", "--steps", "3"])]
                codes += [cli.main(_command(data, method, mode, whole, 3))]
            assert not any(codes)
            distributed.wait()


def _keep_first_step(rank, folder):
    if rank == 0:
        shutil.copytree(folder, folder.with_name(f"{folder.name}-first"))
    distributed.wait()


@pytest.fixture(scope="module")
def together(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(_worker, (data, folder, store.port), nprocs=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("method", "mode"), TOGETHER)
def test_two_processes_are_right(method, mode, together):
    run = together / f"{method}-{mode}"
    precision = "bf16" if "bf16" in mode else "float32"
    _assert_first_step(run.with_name(f"{run.name}-run-first"), 2, precision)
    if mode == "DDP":
        _assert_same(*(run.with_name(f"{run.name}-{name}") for name in ("run", "whole")))


@pytest.mark.slow
def test_two_processes_have_the_same_weights(together):
    ours = sorted(together.glob("weights-*-0.pt"))
    # One run a cell; where it is resumed, two more.
    assert len(ours) == len(TOGETHER) + 2 * len(OPTIONS)
    for path in ours:
        pairs = zip(torch.load(path), torch.load(str(path)[:-4] + "1.pt"), strict=True)
        assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
