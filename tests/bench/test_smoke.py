"""The runbook's first minute: what is wrong is found, and traced to the launch that is to blame."""

import json
import time

import pytest
import torch

from bench.gpu import interpreted, launch_check, smoke
from bench.ledger import Recorder
from bench.measure import Context
from bench.peers import DECODER_LOSSES, FUSED, UNFUSED, exact_gradients, loss_and_gradients
from bench.problems import build_problem
from bench.triton_calls import Call, intercepted
from fastsfvae.kernels import gram_project
from tests._triton import INTERPRETER

TINY = "tiny"


@pytest.fixture(scope="module")
def exact():
    problem = build_problem(TINY)
    return problem, exact_gradients(problem)


def test_one_sample_and_one_weight_are_enough_to_be_found(exact):
    problem, want = exact
    assert smoke.distance(problem, want, want).worst == 0
    for at, row in ((1, 1), (2, 0)):
        got = [t.clone() for t in want]
        # As in a batch of many: the whole's error is small.
        got[at][row] *= 1.5
        assert smoke.distance(problem, got, want).samples == pytest.approx(0.5)
    got = [t.clone() for t in want]
    got[5] = got[5] * 0.9
    found = smoke.distance(problem, got, want)
    names = [name for name, _ in problem.decoder.named_parameters()]
    assert found.weights == pytest.approx(0.1) and found.weight == names[2]
    got[5][0] = float("nan")
    assert not smoke.distance(problem, got, want).worst <= 1e9


@pytest.fixture
def context(tmp_path):
    recorder = Recorder(tmp_path / "rows.csv", "cpu", "abc1234")
    return Context("cpu", True, recorder, time.monotonic() + 60, goes_on=True)


def losses(monkeypatch, spoil):
    """Every way is the torch backend's; `spoil` changes the fused one's results."""
    right = DECODER_LOSSES["fastsfvae[torch]"]
    for name in smoke.WAYS:
        monkeypatch.setitem(DECODER_LOSSES, name, right)
    calls = []

    def gradients(loss, problem, dtype):
        calls.append(dtype)
        return spoil(len(calls), loss_and_gradients(loss, problem, dtype))

    monkeypatch.setattr(smoke, "loss_and_gradients", gradients)
    monkeypatch.setattr(smoke, "_step", lambda *_: None)
    searched = []
    found = lambda *of: searched.append(of[1:4]) or "found nothing"  # noqa: E731
    monkeypatch.setattr(launch_check, "search", found)
    return searched


def test_what_is_right_is_not_searched(context, monkeypatch):
    searched = losses(monkeypatch, lambda at, results: results)
    smoke.part(context)
    rows = context.rows(smoke.OP)
    assert [row["implementation"] for row in rows] == [UNFUSED, FUSED, "fastsfvae[triton]"]
    assert not any(map(smoke.is_failure, rows)) and searched == []
    assert "from the library's: loss 0.0e+00" in rows[1]["note"]


@pytest.mark.parametrize(
    "spoil, says",
    [
        # The second way's runs are the third and the fourth.
        (lambda at, r: (r[0], r[1] * 2, *r[2:]) if at in (3, 4) else r, "wrong against float64"),
        (lambda at, r: (*r[:-1], r[-1] * float("nan")) if at in (3, 4) else r, "against float64"),
        (lambda at, r: (*r[:-1], r[-1] * 1.0001) if at == 4 else r, "wrong: differs from run to"),
    ],
)
def test_what_is_wrong_is_said_and_searched(context, monkeypatch, spoil, says):
    searched = losses(monkeypatch, spoil)
    smoke.part(context)
    wrong = [row for row in context.rows(smoke.OP) if smoke.is_failure(row)]
    assert [row["implementation"] for row in wrong] == [FUSED]
    assert says in wrong[0]["note"] and searched == [(TINY, FUSED, "bfloat16")]
    (row,) = context.rows(launch_check.OP)
    assert row["note"] == "found nothing"


def test_programs_of_a_grid():
    assert interpreted.chosen((10,), 4) == [(0, 0, 0), (3, 0, 0), (6, 0, 0), (9, 0, 0)]
    assert interpreted.chosen((2, 1), 4) == [(0, 0, 0), (1, 0, 0)]
    assert interpreted.chosen((1,), 4) == [(0, 0, 0)]


def test_errors_are_of_what_programs_change():
    before = torch.tensor([1.0, float("nan"), 3.0, 4.0])
    wanted = torch.tensor([1.0, float("nan"), 5.0, 5.0])
    after = torch.tensor([9.0, 9.0, 5.0, 6.0])
    error, count = interpreted.largest_error([before], [wanted], [after])
    assert count == 2 and error == pytest.approx((1 / 50) ** 0.5)
    after[2] = float("nan")
    assert interpreted.largest_error([before], [wanted], [after])[0] != error
    assert interpreted.largest_error([before], [before], [after]) == (0.0, 0)


def test_copies_share_memory_as_their_originals_do():
    whole = torch.arange(6.0)
    kept = launch_check.on_host({"a": whole[2:], "b": (whole[::2], 3), "c": "tf32"})
    assert kept["c"] == "tf32" and kept["b"][1] == 3
    kept["a"][0] = 10.0
    assert kept["b"][0].tolist() == [0.0, 10.0, 4.0] and whole[2] == 2.0


def test_a_launch_that_ends_the_process_is_named(tmp_path):
    call = Call("_bad_kernel", lambda: None, (4,), {"x_ptr": torch.ones(2, 3), "BLOCK": 16}, {})
    checker = launch_check.Checker(
        tmp_path / launch_check.LOG.format("tf32"), lambda *_: (0.0, 1), 1e-3, lambda: None
    )
    checker(call, lambda: None)
    with pytest.raises(ZeroDivisionError):
        checker(call, lambda: 1 / 0)
    good, bad = launch_check.read_log(tmp_path, "tf32")
    assert "note" not in good
    assert bad["note"] == "wrong: the process ended in this launch"
    assert bad["kernel"] == "_bad_kernel" and bad["shapes"] == "x_ptr 2x3 float32"
    assert bad["configuration"] == "grid 4; BLOCK=16"


@pytest.mark.parametrize("spoiled", [False, True])
@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETER, reason="needs TRITON_INTERPRET=1")
def test_a_wrong_launch_is_found_by_the_interpreter(tmp_path, spoiled):
    J, r = torch.randn(3, 5, 300), torch.randn(3, 300)
    log = tmp_path / launch_check.LOG.format("float32")
    with interpreted.Interpreter(tmp_path) as interpreter:
        checker = launch_check.Checker(log, interpreter.error, 1e-4, lambda: None)

        def around(call, go):
            def made():
                go()
                if spoiled and call.kernel == "_gram_project_bwd_kernel":
                    # As of a store that a program has missed.
                    call.arguments["dj_ptr"][2, 4, 299] = 0.0

            return checker(call, made)

        with intercepted(around):
            parts = gram_project.gram_project_fwd(J, r)
            gram_project.gram_project_bwd(J, r, *parts)
    lines = launch_check.read_log(tmp_path, "float32")
    assert [json.dumps(line["seen"]) for line in lines].count('"0 elements"') == 0
    wrong = [line["kernel"] for line in lines if line.get("note")]
    assert wrong == (["_gram_project_bwd_kernel"] if spoiled else [])


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETER, reason="runs the same in either run of the suite")
def test_a_step_is_searched_launch_by_launch(context, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = launch_check.search(context, TINY, FUSED, "bfloat16", 60)
    assert "launches looked at, 0 wrong" in found and not found.startswith("0 ")
    assert context.rows(launch_check.OP) == []
