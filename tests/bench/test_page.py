"""The runbook's page: of rows alone, the largest loss first, and nothing hidden that failed."""

import csv

import pytest

from bench.gpu import kernel_profile, page, sections
from bench.ledger import COLUMNS, Recorder
from bench.peers import FUSED, SAMPLING, TRITON, UNFUSED

SHAPE = "celeba16 B=64 n=12288 m=16 channels-last"


@pytest.fixture
def recorder(tmp_path):
    return Recorder(tmp_path / "rows.csv", "cpu", "abc1234")


def times(ms):
    return {"p50_ms": str(ms), "p20_ms": str(ms), "p80_ms": str(ms)}


def text_of(recorder):
    page.write(recorder.path.parent, recorder.path.name)
    return (recorder.path.parent / page.PAGE).read_text()


def kernels(recorder, *rows):
    """A kernels' table as the profile writes it."""
    path = recorder.path.parent / kernel_profile.TABLE
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, kernel_profile.COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(recorder.provenance | row for row in rows)


def ceilings(recorder):
    copy, product = ({"op": "ceiling", "implementation": name} for name in ("copy_", "mm"))
    recorder.write(**copy, dtype="float32", bytes_per_s="2e12", **times(1))
    recorder.write(**product, dtype="bfloat16", flop_per_s="5e14", **times(1))


def test_an_empty_run_has_a_page(tmp_path):
    assert page.write(tmp_path, "rows.csv") == ["no rows"]
    assert "Nothing was measured" in (tmp_path / page.PAGE).read_text()


def test_what_is_wrong_comes_first_then_the_largest_loss(recorder):
    step = {"step": "loss", "implementation": TRITON, "dtype": "bfloat16", "launch": "graph"}
    # At 2 TB/s and 500 TFLOP/s: floors of 9 and 5 us.
    kernels(
        recorder,
        step | {"kernel": "small_loss", "us": 10, "bytes": 18e6},
        step | {"kernel": "large_loss", "us": 20, "bytes": 2e6, "flops": 25e8},
        step | {"kernel": "no_floor", "us": 90},
        step | {"kernel": "another", "implementation": SAMPLING, "us": 900, "bytes": 2e6},
    )
    ceilings(recorder)
    smoke = {"op": "smoke", "mode": "both, graph", "shape": SHAPE, "dtype": "tf32"}
    recorder.write(**smoke, implementation=UNFUSED, note="loss 1e-7")
    recorder.write(**smoke, implementation=FUSED, note="wrong against float64; samples 1.0")
    recorder.write(
        *(), op="launches", implementation="bad_kernel", mode="kernel by kernel", dtype="tf32",
        note="wrong by 1; grid 7; BLOCK=16",
    )  # fmt: skip
    layer = {"op": "tangent_conv_transpose relu", "mode": "forward, graph", "shape": "deconv3"}
    recorder.write(**layer, dtype="tf32", implementation="fused, tf32", **times(3.0))
    recorder.write(**layer, dtype="tf32", implementation="activation kernel + library", **times(2))
    text = text_of(recorder)
    assert "- 2 cases of loss and gradients at full size, 1 wrong" in text
    todo = text.split("## ")[2]
    said = ["wrong against float64", "bad_kernel", "large_loss", "small_loss", "1.50 times as fast"]
    places = [todo.index(words) for words in said]
    assert places == sorted(places)
    assert "20.0 us where its floor is 5.0: 15.0 us" in todo
    assert "no_floor" not in todo and "another" not in todo and "loss 1e-7" not in todo
    assert "no_floor" in text and "another" in text


def test_peers_are_compared_with_the_fastest_of_this_library(recorder):
    loss = {"op": "decoder+loss", "mode": "both, eager", "shape": SHAPE, "dtype": "tf32"}
    recorder.write(**loss, implementation=TRITON, **times(4))
    recorder.write(**loss | {"mode": "both, graph"}, implementation=FUSED, **times(2))
    recorder.write(**loss, implementation="vmap(jacfwd)", **times(30), peak_mib="812")
    recorder.write(**loss, implementation="stochman nnj", note="failed: ModuleNotFoundError: no")
    text = text_of(recorder)
    short, line = [line for line in text.splitlines() if "vmap(jacfwd)" in line]
    assert f"tf32: 2 ms ({FUSED}, both, graph) here" in short and "15.00 times as long" in short
    assert "| 30 | 15.0x | 812 |" in line
    assert "## What failed" in text and text.count("ModuleNotFoundError") == 2


def test_only_the_last_run_is_shown_and_of_a_case_the_last_row(recorder):
    step = {"op": "training step", "mode": "step, graph", "shape": SHAPE, "dtype": "tf32"}
    Recorder(recorder.path, "cpu", "old").write(**step, implementation=TRITON, **times(7.125))
    recorder.write(**step, implementation=TRITON, **times(6.125))
    recorder.write(**step, implementation=TRITON, **times(5.125))
    text = text_of(recorder)
    assert "5.125" in text and "6.125" not in text and "7.125" not in text


def test_every_row_is_told_somewhere(recorder):
    for at, op in enumerate(("woodbury", "sweep", "tests", "training on digits", "profile")):
        labels = {"implementation": f"who{at}", "mode": "forward", "shape": "n=3", "dtype": "tf32"}
        recorder.write(op=op, **labels, **times(at + 1), note=f"note{at}")
    recorder.write(op="part", implementation="smoke", note="done in 7 s")
    text = text_of(recorder)
    assert all(f"who{at}" in text for at in range(5)) and "done in 7 s" in text
    assert set(COLUMNS) >= {"op", "note"}


def test_cells_do_not_break_a_table():
    assert sections.table(("a",), [["x | y"]]) == ["| a |", "| --- |", "| x / y |"]
    assert sections.table(("a",), []) == []


def test_pictures_are_drawn_of_what_there_is(recorder):
    pytest.importorskip("matplotlib")
    step = {"step": "loss", "implementation": TRITON, "dtype": "bfloat16", "launch": "graph"}
    rates = {"gb_per_s": 1500, "tflop_per_s": 80}
    kernels(recorder, step | rates | {"kernel": "a_kernel 64x3", "us": 10, "bytes": 18e6})
    recorder.write(
        op="ceiling", implementation="copy_", dtype="float32", bytes_per_s="2e12", **times(1)
    )
    product = {"op": "ceiling", "implementation": "mm", "dtype": "bfloat16"}
    recorder.write(**product, flop_per_s="6e14", **times(1))
    left_out = page.write(recorder.path.parent, recorder.path.name)
    assert [line.partition(":")[0] for line in left_out] == ["peers.png"]
    text = (recorder.path.parent / page.PAGE).read_text()
    for name in ("kernels.png", "roofline.png"):
        assert f"({name})" in text and (recorder.path.parent / name).stat().st_size > 5_000
