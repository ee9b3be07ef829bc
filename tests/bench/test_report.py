"""The ledger's report, the comparison of commits, and the counts behind the cost model's check."""

import subprocess
import sys

import pytest
import torch

from bench import checkout, claims, compare, ledger, memory, model, peers, report, suite
from bench.command import ROOT
from bench.ledger import Recorder, read_rows
from bench.timing import Timing, quantiles, take_turns


@pytest.fixture
def book(tmp_path):
    return Recorder(tmp_path / "ledger.csv", "cpu", "abc1234")


def write(book, implementation, p50, shape="celeba16 B=16 n=12288 m=16", **columns):
    base = {"op": "decoder+loss", "mode": "both", "dtype": "float32", "shape": shape}
    timing = None if p50 is None else Timing(p50, 0.9 * p50, 1.1 * p50)
    book.write(timing, implementation=implementation, **base | columns)


def ceilings(book, bandwidth=1e10, peak=1e11):
    base = {"op": "ceiling", "mode": "forward", "dtype": "float32"}
    book.write(Timing(1, 1, 1), implementation="copy_", bytes_per_s=str(bandwidth), **base)
    book.write(Timing(1, 1, 1), implementation="mm", flop_per_s=str(peak), **base)


def test_report_holds_the_latest_time_and_the_reason_of_each_failure(book, tmp_path):
    write(book, "fastsfvae[torch]", 5.0)
    write(book, "fastsfvae[torch]", None, peak_mib="12.5")
    write(book, "vmap(jvp)", 9.0)
    write(book, "vmap(jvp)", 8.0, ratio="1.600", ratio_to="fastsfvae[torch]")
    write(book, "tiled jvp", 7.0)
    write(book, "tiled jvp", None, note="failed: RuntimeError: out of memory")
    rows = report.on_machine(read_rows(book.path), None)
    lines = [line for line in report.markdown(rows).splitlines() if line.startswith("| ")][1:]
    assert lines == [
        # Memory is measured in a run of its own.
        "| fastsfvae[torch] | 5 (4.5 to 5.5) |  |  |  | 12.5 |  |",
        "| vmap(jvp) | 8 (7.2 to 8.8) | 1.600 x fastsfvae[torch] |  |  |  |  |",
        "| tiled jvp |  |  |  |  |  | failed: RuntimeError: out of memory |",
    ]


def test_rows_of_another_machine_stay_out(book):
    write(book, "fastsfvae[torch]", 5.0)
    write(book, "fastsfvae[torch]", 1.0, device="NVIDIA H100")
    rows = read_rows(book.path)
    assert [row["p50_ms"] for row in report.on_machine(rows, None)] == ["1"]
    assert [row["p50_ms"] for row in report.on_machine(rows, rows[0]["device"])] == ["5"]
    with pytest.raises(ValueError, match="no timed row of 'RTX'"):
        report.on_machine(rows, "RTX")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (
            ("decoder+loss", "both", "celeba16 B=64 n=12288 m=16 channels-last", "float32"),
            "decoder and loss, value and gradient: convolutional, 64x64 colour images, m = 16, "
            "batch of 64, float32",
        ),
        (
            ("training step", "step", "collapse200-sigmoid B=9 n=784 m=200 captured", "bfloat16"),
            "training step: fully connected, 28x28 digits, sigmoid output, m = 200, batch of 9, "
            "captured, bfloat16",
        ),
        (
            ("low_rank_log_prob", "forward", "B=64 n=12288 m=16", "float32"),
            "log-density, J given, value, m = 16, batch of 64, 12,288 outputs, float32",
        ),
        (("decoder+loss", "", "own B=2", "tf32"), "decoder and loss, batch of 2, own, tf32"),
    ],
)
def test_workloads_are_said_in_words(key, words):
    assert report.in_words(*key) == words


def test_plots_draw_what_is_there_and_say_what_is_missing(book, tmp_path, capsys, monkeypatch):
    for m in (8, 16, 32):
        write(book, "fastsfvae[torch]", 2.5 * m, f"celeba16 B=16 n=12288 m={m}")
    (points,) = report.scalings(read_rows(book.path))["m"].values()
    assert points == [(8, 20.0), (16, 40.0), (32, 80.0)] and report.slope(points) == pytest.approx(
        1
    )
    arguments = ["report", "--ledger", str(book.path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    report.main()
    printed = capsys.readouterr().out
    assert "peers.png: not drawn: no operation has a time" in printed
    assert "roofline.png: not drawn: no ceilings" in printed
    write(book, "vmap(jvp)", 90.0, flop_per_s="3e9", bytes_per_s="1e9")
    ceilings(book)
    report.main()
    for name in report.PLOTS:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_measured_rows_are_compared_with_their_own_ceilings(book):
    write(book, "fastsfvae[torch]", 2e4, "celeba16 B=64 n=12288 m=16")
    counts = model.report_of("celeba16")
    assert model.compared(counts, "celeba16", read_rows(book.path)) == []
    ceilings(book, bandwidth=1e30, peak=1e10)
    (line,) = model.compared(counts, "celeba16", read_rows(book.path))
    # Memory without limit: the arithmetic alone.
    seconds = counts.floor("H100", 64, "float32").flops / 1e10
    assert f"at least {1e3 * seconds:.2f} ms ({seconds / 20:.0%})" in line


def test_projection_multiplies_the_papers_steps(book):
    step = {"op": "training step", "mode": "step"}
    write(book, "fastsfvae[torch]", 36.0, "celeba16 B=64 n=12288 m=16 channels-last", **step)
    write(book, "fastsfvae[torch]", 36.0, "celeba16 B=16 n=12288 m=16 channels-last", **step)
    (line,) = model.projected(read_rows(book.path))
    assert line.endswith("fastsfvae[torch], step, float32: 10.0 hours")


def test_median_interval_is_the_binomials():
    # P(Bin(10, 1/2) <= 1) = 11/1024 <= 2.5% < P(<= 2) = 56/1024: the second from either end.
    assert compare.median_interval(range(1, 11)) == (2, 5.5, 9)
    assert compare.median_interval([3, 1, 2, 6, 5, 4]) == (1, 3.5, 6)
    with pytest.raises(ValueError, match="rounds=5: give at least 6"):
        compare.median_interval(range(5))


@pytest.mark.parametrize("factor, status", [(1.0, 0), (1.2, 1)])
def test_a_regression_beyond_noise_fails(monkeypatch, capsys, factor, status):
    noise = [0.99, 1.0, 1.01, 0.98, 1.02, 1.0, 1.0]

    def pretended(a, b, problem, rounds):
        return [10.0] * 7, [factor * value for value in noise]

    monkeypatch.setattr(compare, "ratios", pretended)
    monkeypatch.setattr(compare, "worktree", lambda commit: compare.contextlib.nullcontext())
    assert compare.main(["A", "B", "--problem", "m16"]) == status
    assert ("REGRESSION" in capsys.readouterr().out) == bool(status)


@pytest.mark.parametrize("kernels", ["kernels", "fastsfvae/kernels"])
def test_each_commit_runs_its_own_code(tmp_path, kernels):
    """Those before and after fastsfvae/kernels came to point to kernels/."""
    for name in ("fastsfvae", kernels):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"origin = 'another {name}'\n")
    code = "import bench.checkout, fastsfvae as f; from fastsfvae import kernels as k\n"
    code += "print(f.origin, k.origin)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**compare.os.environ, checkout.CHECKOUT: str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"another fastsfvae another {kernels}\n"


def test_claims_record_paired_ratios_and_refuse_what_is_wrong(book, capsys, monkeypatch):
    def wrong(decoder):
        right = claims.DECODER_LOSSES["vmap(jvp)"](decoder)
        return lambda *tensors: 1.01 * right(*tensors)

    monkeypatch.setitem(claims.DECODER_LOSSES, "wrong", wrong)
    lab = claims.Lab(book, 3)
    found = lab.times([("tiny", None, None)], ["fastsfvae[torch]", "vmap(jvp)", "wrong"])
    assert [name for _, name in found] == ["fastsfvae[torch]", "vmap(jvp)"]
    assert "wrong: not timed: wrong against float64 by 1.00e-02" in capsys.readouterr().out
    ours, peer = read_rows(book.path)
    times = list(found.values())
    assert float(peer["ratio"]) == pytest.approx(claims.paired(times[1], times[0]), abs=6e-4)
    assert float(ours["p50_ms"]) == pytest.approx(quantiles(times[0]).p50, rel=1e-3)
    assert ours["op"] == "decoder+loss" and not ours["ratio"]


def test_what_autocast_gains_is_set_beside_the_sampling_vae_s(book, capsys, monkeypatch):
    times = {("sampling", "float32"): 3.0, ("sampling", "bfloat16"): 2.0}
    times |= {("fastsfvae[torch]", "float32"): 20.0, ("fastsfvae[torch]", "bfloat16"): 16.0}
    dtypes = []

    def pretended(runs, rounds, warmup):
        for run in runs.values():
            run()
        return {key: [value] * rounds for key, value in times.items() if key in runs}

    def sampling_free(encoder, decoder):
        loss = made(encoder, decoder)

        def seen(x):
            dtypes.append(decoder[0](torch.zeros(1, 2)).dtype)
            return loss(x)

        return seen

    made = peers.STEPS["fastsfvae[torch]"]
    monkeypatch.setitem(peers.STEPS, "fastsfvae[torch]", sampling_free)
    monkeypatch.setattr(claims, "take_turns", pretended)
    claims.autocast(claims.Lab(book, 2), "tiny")
    assert set(dtypes) == {torch.float32, torch.bfloat16}
    said = capsys.readouterr().out
    assert "DOES NOT HOLD" in said and "1.25x, the sampling VAE 1.50x" in said
    rows = read_rows(book.path)
    found = {(row["implementation"], row["dtype"]): float(row["p50_ms"]) for row in rows}
    assert found == times and {row["op"] for row in rows} == {"training step"}


def test_candidates_take_turns():
    order = []
    samples = take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, 1)
    assert order == ["a", "b"] * 3 and {len(times) for times in samples.values()} == {2}


def test_memory_is_that_of_the_run_alone(monkeypatch, capsys):
    # Instead of a loss, something whose size is known.
    blocks = []

    def allocate(loss, problem, dtype):
        blocks.append(torch.ones(2**24 if len(problem.x) > 2 else 1))

    monkeypatch.setattr(memory, "loss_and_gradients", allocate)
    memory.main("mnist2", "fastsfvae[torch]", "3")
    assert int(capsys.readouterr().out) == pytest.approx(2**26, rel=0.05)


def test_memory_of_a_child_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="KeyError: 'no such workload'"):
        memory.peak_extra("no such workload", "fastsfvae[torch]")


SUITE = """
from bench.measure import Case, Prepared
from bench.suite import given
import torch

def case(name, error):
    prepared = Prepared([lambda: (torch.ones(2),)], lambda outputs: error)
    return Case("op", name, "both", "n=2", "float32", lambda: prepared)

def missing():
    raise ImportError("No module named 'peer'")

CASES = [case("fastsfvae[torch]", 0.0), case("wrong", 0.5), case("peer", 0.0)]
CASES.append(Case("op", "missing", "both", "n=2", "float32", missing))

@given(CASES, full=[case("slow", 0.0)])
def test_op(timed, case):
    timed(case)
"""


def test_suites_time_what_is_right_in_turn_with_this_library(tmp_path):
    (tmp_path / "bench_op.py").write_text(SUITE)
    rows = tmp_path / "rows.csv"
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml")]
    command += ["--rootdir", str(ROOT), "-p", "bench.conftest", "-p", "no:cacheprovider"]
    command += ["--quick", "--ledger", str(rows), str(tmp_path / "bench_op.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "2 passed, 2 skipped, 1 deselected" in done.stdout
    found = {row["implementation"]: row for row in read_rows(rows) if row["op"] == "op"}
    assert found.keys() == {"fastsfvae[torch]", "wrong", "peer", "missing"}
    assert found["wrong"]["note"] == "not timed: wrong against float64 by 5.00e-01"
    assert found["missing"]["note"] == "failed: ImportError: No module named 'peer'"
    assert not found["wrong"]["p50_ms"] and not found["missing"]["p50_ms"]
    assert float(found["peer"]["ratio"]) > 0
    assert found["peer"]["ratio_to"] == "fastsfvae[torch]"


def test_workloads_of_the_suites_are_named_once():
    # A case that stands in both subsets is run once, as a default one.
    mark = suite.given([], full=[])
    assert mark.args == ("case", [])


def test_ledger_rows_older_than_a_column_are_read(tmp_path):
    path = tmp_path / "ledger.csv"
    path.write_text(",".join(ledger.COLUMNS) + "\nop,someone,both,n=1,float32,1,1,1\n")
    (row,) = read_rows(path)
    assert row["p50_ms"] == "1" and row["note"] == "" and row.keys() == set(ledger.COLUMNS)
