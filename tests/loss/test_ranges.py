"""Named ranges: what they cover, and that they cost nothing while they are off."""

import timeit

import pytest
import torch

import fastsfvae as sf
from bench import profile
from bench.problems import build_problem
from fastsfvae import _ranges as ranges
from fastsfvae._ranges import ranged, recording, span


def test_a_step_is_covered_by_its_ranges():
    found = profile.shares("mnist2", "fastsfvae[torch]", 16, "cpu")
    layers = [name for name in found if name.startswith("linear")]
    assert any("backward" in name for name in layers) and not all(
        "backward" in name for name in layers
    )
    named = {"encode", "solve", "gram", "gram backward", "backward", "optimizer", "step"}
    assert named <= found.keys()
    # Ranges lie inside the step.
    assert all(0 < ms <= found["step"] for ms in found.values())


def test_words_are_joined_and_empty_ones_left_out():
    with recording(), torch.profiler.profile() as profiler, span("linear", "", "backward"):
        torch.ones(2).sum()
    assert "linear backward" in {event.key for event in profiler.key_averages()}


def test_ranges_end_where_the_block_does_not_return():
    @ranged("broken")
    def broken():
        raise ValueError("no")

    with recording(), pytest.raises(ValueError, match="no"):
        broken()
    assert not ranges._on


def test_ranges_that_are_off_cost_less_than_a_hundredth_of_the_smallest_step(monkeypatch):
    problem = build_problem("mnist2", 16)
    loss_fn = sf.SamplingFreeLoss(problem.decoder)

    def step():
        loss_fn(problem.x, problem.mean, problem.log_var).backward()

    step()
    seconds = min(timeit.repeat(step, number=1, repeat=5))
    entered = []
    monkeypatch.setattr(ranges, "_range", lambda name: entered.append(name) or ranges._nothing)
    with recording():
        step()
    assert len(entered) >= 10

    def nothing():
        with span("linear", "backward"):
            pass

    each = min(timeit.repeat(nothing, number=1000, repeat=5)) / 1000
    assert len(entered) * each < 0.01 * seconds
