"""Runs, conversions and checkpoints that are killed at random moments, or fought over."""

import csv
import multiprocessing
import os
import random
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

from fastsfvae import training
from fastsfvae.data.load import load_images
from fastsfvae.training import loop
from fastsfvae.training.checkpoint import load_checkpoint, save_checkpoint
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.metrics_csv import METRICS

# Children start in a hundredth of a second: the server that forks them has imported everything,
# also what the first optimiser imports by itself.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.training.test_faults", "torch._dynamo"])

CONFIG = TrainConfig(model="tanh", latent_dim=2, batch_size=4, steps=200, seed=5)


@pytest.fixture
def kills(request):
    # The first child waits for the server: what is timed is not to.
    _time(time.sleep, 0)
    return request.config.getoption("--kills")


@pytest.fixture
def survives(tally):
    """A context that counts a killer's faults, and a lost run if what is left is not right."""

    @contextmanager
    def counted(subject, killer):
        lost = 1
        try:
            yield
            lost = 0
        finally:
            tally(f"kill -9 while {subject}", "faults", killer.died)
            tally(f"kill -9 while {subject}", "lost runs", lost)

    return counted


@dataclass
class Killer:
    """Starts a function in children and kills each at a random moment of its time.

    Attributes:
        longest: seconds until the latest kill.
        random: of the moments.
        died: children that were killed before they had finished.
    """

    longest: float
    random: random.Random
    died: int = 0

    def attempt(self, function, *arguments) -> bool:
        """Whether the child finished before it was killed; it must not fail by itself."""
        child = CONTEXT.Process(target=function, args=arguments)
        child.start()
        child.join(self.random.uniform(0, self.longest))
        child.kill()
        child.join()
        assert child.exitcode in (0, -9)
        self.died += child.exitcode != 0
        return child.exitcode == 0


def _time(function, *arguments):
    """Run in a child to the end; return its seconds, the start-up included."""
    started = time.monotonic()
    child = CONTEXT.Process(target=function, args=arguments)
    child.start()
    child.join()
    assert child.exitcode == 0
    return time.monotonic() - started


# --- kill -9


def _train(folder):
    torch.set_num_threads(1)
    loop.LOG_EVERY, loop.CHECKPOINT_EVERY = 5, 20
    known = (folder / "config.json").exists()
    training.train(training.resume(folder) if known else training.start(CONFIG, folder))


def _rows(folder):
    """The metrics but for the seconds, as text: equality is to the bit."""
    with (folder / METRICS).open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def _same(first, second):
    """Whether two states are equal to the bit."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[k], second[k]) for k in first)
    return first == second


def _assert_same_run(folder, whole):
    assert _rows(folder) == _rows(whole)
    states = (load_checkpoint(run / "checkpoint.safetensors") for run in (folder, whole))
    first, second = ({**state, "seconds": 0} for state in states)
    assert _same(first, second)


@pytest.mark.slow
def test_killed_training_is_resumed_as_if_it_had_not_been(tmp_path, kills, survives):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    killer = Killer(_time(_train, whole), random.Random(1))
    with survives("training", killer):
        while killer.died < kills:
            if killer.attempt(_train, folder):
                _assert_same_run(folder, whole)
                shutil.rmtree(folder)
            # Under way it can be resumed at once; what is left of an attempt to start can go.
            elif not (folder / "config.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
        _time(_train, folder)
        _assert_same_run(folder, whole)
    assert not list(folder.glob("*.tmp"))


def _convert(folder, cache):
    torch.set_num_threads(1)
    os.environ["FASTSFVAE_CACHE"] = str(cache)
    return load_images("folder", str(folder), "train", channels=3, size=32)


def _write_images(folder, count):
    """Write PNG files; return their pixels as the set holds them."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    folder.mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index:04}.png")
    return pixels.transpose(0, 3, 1, 2)


def test_a_killed_conversion_is_done_again(tmp_path, kills, survives):
    pixels = _write_images(tmp_path / "train", 800)
    cache = tmp_path / "cache"
    killer = Killer(_time(_convert, tmp_path, cache), random.Random(2))
    shutil.rmtree(cache)
    unfinished = 0
    with survives("converting", killer):
        while killer.died < kills:
            killer.attempt(_convert, tmp_path, cache)
            unfinished += bool(list(cache.glob("*.tmp")))
            if list(cache.glob("*.json")):
                # The record is the last thing that is written: with it the set is whole.
                np.testing.assert_array_equal(_convert(tmp_path, cache).numpy(), pixels)
                shutil.rmtree(cache)
        np.testing.assert_array_equal(_convert(tmp_path, cache).numpy(), pixels)
    assert unfinished
    assert {path.suffix for path in cache.iterdir()} == {".npy", ".json", ".lock"}


def _save_for_ever(path, first):
    torch.set_num_threads(1)
    for number in range(first, 10**9):
        save_checkpoint(path, {"a": torch.full((50_000,), float(number)), "number": number})


def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path, kills, survives):
    path, killer, last = tmp_path / "checkpoint.safetensors", Killer(0.5, random.Random(3)), 0
    save_checkpoint(path, {"a": torch.zeros(50_000), "number": 0})
    with survives("saving", killer):
        while killer.died < kills:
            assert not killer.attempt(_save_for_ever, path, last + 1)
            state = load_checkpoint(path)
            assert state["a"].eq(state["number"]).all() and state["number"] >= last
            last = state["number"]
    assert last > kills


# --- at the same time


def _race(function, *arguments, children=3):
    """Run a function in children that start together; return their exit codes."""
    running = [CONTEXT.Process(target=function, args=arguments) for _ in range(children)]
    for child in running:
        child.start()
    for child in running:
        child.join()
    return sorted(child.exitcode for child in running)


def _compete(folder, log, steps):
    torch.set_num_threads(1)
    try:
        if steps == CONFIG.steps:
            run = training.start(CONFIG, folder)
        else:
            run = training.resume(folder, replace(CONFIG, steps=steps, schedule_steps=CONFIG.steps))
        training.train(run)
    except (OSError, ValueError) as error:
        with log.open("a") as file:
            print(error, file=file)
        os._exit(2)


@pytest.mark.slow
def test_one_of_several_runs_has_the_folder(tmp_path):
    folder, alone, log = tmp_path / "run", tmp_path / "alone", tmp_path / "log"
    assert _race(_compete, folder, log, CONFIG.steps) == [0, 2, 2]
    refusal = f"--out {folder} exists: give another folder, or continue it with --resume\n"
    assert log.read_text() == 2 * refusal
    assert _race(_compete, alone, log, CONFIG.steps, children=1) == [0]
    _assert_same_run(folder, alone)

    # One that comes after another has finished finds nothing left to do.
    log.unlink()
    codes = _race(_compete, folder, log, CONFIG.steps + 50)
    assert codes[0] == 0
    refusal = f"{folder} is being trained by another process: wait for it, or give another --out\n"
    assert log.read_text() == codes.count(2) * refusal
    assert _race(_compete, alone, log, CONFIG.steps + 50, children=1) == [0]
    _assert_same_run(folder, alone)


def _convert_and_check(folder, cache, pixels):
    np.testing.assert_array_equal(_convert(folder, cache).numpy(), pixels)


def test_one_of_several_conversions_is_used_by_all(tmp_path):
    pixels = _write_images(tmp_path / "train", 300)
    assert _race(_convert_and_check, tmp_path, tmp_path / "cache", pixels) == [0, 0, 0]
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1
    assert not list((tmp_path / "cache").glob("*.tmp"))
