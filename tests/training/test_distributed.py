"""Training in two processes against one that takes the joined batch."""

import csv
import functools
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastsfvae import training
from fastsfvae.training import distributed, loop
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.metrics_csv import METRICS

CONFIG = TrainConfig(model="tanh", latent_dim=3, batch_size=8, steps=50, seed=5)


def _rows(folder):
    with (folder / METRICS).open(newline="") as file:
        return [
            {k: float(v) for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)
        ]


def _gradients_at_first_step(path):
    def monitor(run, row):
        if run.step == 1:
            torch.save([p.grad.clone() for p in run.model.parameters()], path)

    return monitor


def _interrupt(run, row):
    if run.step == 20:
        os.kill(os.getpid(), signal.SIGINT)


def _threads():
    return [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]


def _worker(rank, folder, port):
    torch.set_num_threads(1)
    loop.LOG_EVERY = 1
    # What torchrun tells its processes; the store is its own, as the fixture's is here.
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with distributed.process_group():
        _train(rank, folder)
    # A thread of the group that frees a tensor while the interpreter ends aborts the process.
    assert "python" in "".join(_threads()) and "gloo" not in "".join(_threads())


def _train(rank, folder):
    run = training.start(CONFIG, folder / "two")
    training.train(run, _gradients_at_first_step(folder / "two.pt"))

    # Only process 0 runs monitors and so gets the signal; both must stop.
    parts = training.start(replace(CONFIG, method="sampling"), folder / "parts")
    training.train(parts, _interrupt)
    assert parts.step == 20
    training.train(training.resume(folder / "parts"))
    training.train(training.start(replace(CONFIG, method="sampling"), folder / "whole"))

    broken = training.start(replace(CONFIG, method="sampling"), folder / "broken")
    plain = broken.model.objective
    if rank == 1:
        broken.model.objective = lambda x, *rest, **k: plain(x * float("nan"), *rest, **k)
    with pytest.raises(training.NonFiniteLoss, match=r"at step 1 \(loss=nan, .*; 4 of 8 images: "):
        training.train(broken)
    with pytest.raises(ValueError, match="batch_size=7 is shared by 2 processes"):
        training.start(replace(CONFIG, batch_size=7), folder / "odd")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(_worker, (folder, store.port), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def single(folder):
    every, loop.LOG_EVERY = loop.LOG_EVERY, 1
    try:
        training.train(
            training.start(CONFIG, folder / "one"), _gradients_at_first_step(folder / "one.pt")
        )
    finally:
        loop.LOG_EVERY = every
    return folder


@pytest.mark.slow
def test_gradients_equal_one_process_on_the_joined_batch(single):
    ours, theirs = (torch.load(single / name) for name in ("two.pt", "one.pt"))
    assert len(ours) == len(theirs) == 12
    for mine, want in zip(ours, theirs, strict=True):
        assert (mine - want).abs().max() <= 1e-6 * want.abs().max()


def test_the_loss_curve_equals_one_process(single):
    ours, theirs = _rows(single / "two"), _rows(single / "one")
    assert len(ours) == len(theirs) == 50
    for mine, want in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(want["loss"], rel=1e-6)
        # Rounding grows over the steps, and shows in a term as small as the KL first.
        assert mine == pytest.approx(want, rel=1e-5)


def test_an_interrupted_run_of_two_processes_is_resumed(folder):
    assert len(_rows(folder / "parts")) == 50
    assert _rows(folder / "parts") == _rows(folder / "whole")


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shares_partition_a_batch(monkeypatch, world):
    monkeypatch.setattr(distributed, "size", lambda: world)
    batch, shares = torch.arange(8), []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(batch[distributed.rows(8)])
    assert torch.equal(torch.cat(shares), batch)


# Named after the rank: both processes write at their end.
_THREADS_AT_EXIT = """
import atexit, os, pathlib

@atexit.register
def write():
    if "RANK" in os.environ:
        names = [p.read_text() for p in pathlib.Path("/proc/self/task").glob("*/comm")]
        pathlib.Path(__file__).with_name(os.environ["RANK"]).write_text("".join(names))
"""


def test_torchrun_trains_one_model(tmp_path_factory, tmp_path):
    """The documented command: one run, one folder, one table, and no thread that outlives it."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(_THREADS_AT_EXIT)
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["--method", "sampling", "--model", "linear", "--latent-dim", "2", "--steps", "30"]
    run = functools.partial(
        subprocess.run,
        [*command, "-m", "fastsfvae", "train", *options, "--batch-size", "16", "--out", "a"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )
    done = run()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results in a") == 1 and done.stderr.count("step 30/30") == 1
    assert [row["step"] for row in _rows(tmp_path / "a")] == [1, 25, 30]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    # A thread of the group that frees a tensor while the interpreter ends aborts the process.
    for rank in "01":
        threads = (site / rank).read_text()
        assert "python" in threads and "gloo" not in threads
    # What both processes meet is one line.
    again = run()
    assert again.returncode and again.stderr.count("fastsfvae train: ") == 1
