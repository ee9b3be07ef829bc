"""What is measured of a card: its rows, what bounds others, what is told beside the model."""

import contextlib
import gc
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch

from bench import ceilings, kernel_model, model
from bench.ceilings import AFTER, BEFORE, CARD, L2, NODE, PRODUCTS, WITHIN
from bench.ledger import COLUMNS, Recorder, ceiling, read_rows
from bench.measure import Case, Context, Prepared
from bench.timing import Timing, time_graph


@pytest.fixture
def context(tmp_path):
    recorder = Recorder(tmp_path / "rows.csv", "cpu", "abc1234")
    return Context("cpu", True, recorder, time.monotonic() + 60)


def rows_of(context):
    return read_rows(context.recorder.path)


def test_the_part_runs_without_a_gpu(context):
    ceilings.part(context)
    rows = rows_of(context)
    assert [(row["implementation"], row["mode"]) for row in rows] == [
        ("copy_", "forward"),
        (CARD, BEFORE),
        *[("mm", "forward")] * 3,
        *((CARD, WITHIN), (CARD, AFTER), (NODE, "forward"), (L2, "forward")),
    ]
    assert {row["op"] for row in rows} == {"ceiling"}
    for row in rows:
        told = row["implementation"] in (CARD, L2)
        assert row["note"].startswith("not measured: no") if told else float(row["p50_ms"]) > 0
    # A second call has nothing to add.
    goes_on = Context("cpu", True, context.recorder, context.deadline, goes_on=True)
    ceilings.part(goes_on)
    assert rows_of(context) == rows


def test_before_the_suites_of_a_cpu_it_measures_what_they_are_held_to(context, monkeypatch):
    context.quick, ran = False, []
    monkeypatch.setattr(context, "run", lambda case: ran.append(case) or {})
    ceilings.part(context)
    assert [case.implementation for case in ran] == ["copy_", "mm", "mm", "mm"]
    assert rows_of(context) == []


def test_ceilings_become_shares(context):
    ceilings.part(context)
    later = Context("cpu", True, context.recorder, context.deadline)
    assert later.limit.keys() == {"copy", *PRODUCTS}
    seconds = float(rows_of(context)[0]["p50_ms"]) / 1e3
    assert later.limit["copy"] == pytest.approx(2 * 4 * 2**16 / seconds, rel=1e-3)
    later.limit = {"copy": 1e9, "float32": 1e12}
    x = torch.ones(3)
    # 1 ms of traffic and 2 ms of arithmetic: the larger is the floor.
    names = "op", "someone", "forward", "n=3", "float32"
    case = Case(*names, lambda: Prepared([lambda: (x,)]), bytes=1e6, flops=2e9)
    columns = later.columns(case, Timing(8.0, 7.0, 9.0))
    assert float(columns["share_of_ceiling"]) == 0.25
    assert float(columns["bytes_per_s"]) == pytest.approx(1.25e8)


def test_a_graph_of_several_runs_is_divided_by_their_number(pretended_cuda):
    ran = []
    timing = time_graph([lambda i=i: ran.append(i) or () for i in range(3)], 1e-9)
    assert timing == Timing(2.0, 2.0, 2.0)
    # Twice to warm up, once to capture; only replays are timed.
    assert ran == [0, 1, 2] * 3 and len(pretended_cuda) >= 6


@pytest.mark.parametrize("collects", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_no_garbage_is_collected_in_a_capture(pretended_cuda, monkeypatch, collects, fails):
    order = []

    @contextlib.contextmanager
    def graph(_):
        order.append("begins")
        yield
        order.append("ends")

    def run():
        order.append(gc.isenabled())
        if fails and "begins" in order:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    if not collects:
        gc.disable()
    try:
        with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
            time_graph([run], 1e-9)
        assert gc.isenabled() == collects
    finally:
        gc.enable()
    # Twice to warm up.
    captured = ["begins", False, *["ends"] * (not fails)]
    assert order == [collects, collects, *captured]


def test_a_copy_in_l2_and_a_small_kernel_are_one_of_many(context, pretended_cuda):
    context.device = "cuda"
    context.run(ceilings.l2_case("cpu", 2**20))
    context.run(ceilings.node_case("cpu"))
    copy, node = rows_of(context)
    # A quarter of L2 is read, and as much written.
    numel = 2**20 // 16
    assert copy["shape"] == f"n={numel}, L2 of 1 MiB" and copy["mode"] == "forward, graph"
    assert float(copy["p50_ms"]) == 6 / 50 and float(node["p50_ms"]) == 6 / 100
    assert float(copy["bytes_per_s"]) == pytest.approx(2 * 4 * numel / (6e-3 / 50), rel=1e-3)
    assert not node["bytes_per_s"] and not node["share_of_ceiling"]
    # Neither bounds anything.
    assert ceiling(copy) is ceiling(node) is None


ANSWER = "1980 MHz, 2619 MHz, 345.10 W, 45, 0x0000000000000004\n"
FARES = "SM 1980 MHz, memory 2619 MHz, 345.10 W, 45 C, held back by software power cap"


@pytest.mark.parametrize("refused", ["nothing", "events", "the card's name", "all"])
def test_the_card_is_asked_how_it_fares(pretended_cuda, monkeypatch, refused):
    asked = []

    def run(command, **_):
        asked.append(command)
        text = " ".join(command)
        refuses = {"events": "clocks_event", "the card's name": "--id", "all": "nvidia-smi"}
        if refuses.get(refused, "no such word") in text:
            return SimpleNamespace(returncode=2, stdout='Field "x" is not a valid one.', stderr="")
        return SimpleNamespace(returncode=0, stdout=ANSWER, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    told = ceilings.how_it_fares("cuda")
    if refused == "all":
        assert told.startswith("nvidia-smi does not tell (failed: ValueError: Field")
        assert told.endswith("by the driver at most SM 1755 MHz, memory 2619 MHz")
    else:
        assert told == FARES
    assert asked[0][2:] == ["--format=csv,noheader", "--id=GPU-00-11"]
    assert all(command[1].startswith("--query-gpu=clocks.sm,clocks.mem") for command in asked)
    assert len(asked) == {"nothing": 1, "events": 3, "the card's name": 2, "all": 4}[refused]


def test_without_the_drivers_tool_torch_tells(context, pretended_cuda, monkeypatch):
    monkeypatch.setenv("PATH", "")
    told = ceilings.how_it_fares("cuda")
    assert told.startswith("nvidia-smi does not tell (failed: FileNotFoundError")
    assert "at most SM 1755 MHz" in told
    # Whatever else goes wrong is a note too.
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: 1 / 0)
    ceilings._tell(context, BEFORE, lambda: ceilings.how_it_fares("cuda"))
    assert rows_of(context)[0]["note"] == "failed: ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    "bits, words",
    [
        ("0x0000000000000000", "nothing"),
        ("0x0000000000000060", "software thermal slowdown, hardware thermal slowdown"),
        ("0x0000000000001001", "idle, 0x1000"),
        ("[N/A]", "[N/A]"),
    ],
)
def test_what_holds_the_clocks_back(bits, words):
    assert ceilings._held_back(bits) == f"held back by {words}"


def made_up(implementation, device="NVIDIA H100 80GB HBM3", **columns):
    base = {"op": "ceiling", "mode": "forward", "dtype": "float32", "device": device}
    return dict.fromkeys(COLUMNS, "") | base | {"implementation": implementation, **columns}


def test_measured_ceilings_beside_the_models_guesses():
    rows = [
        made_up("copy_", device="NVIDIA L4", p50_ms="1", bytes_per_s="2.5e11"),
        # Of an earlier call.
        made_up("copy_", p50_ms="1", bytes_per_s="1e12"),
        made_up("copy_", p50_ms="1", bytes_per_s="3e12"),
        made_up("mm", p50_ms="1", flop_per_s="5e13"),
        made_up("mm", dtype="tf32", note="failed: RuntimeError: no"),
        made_up("mm", dtype="bfloat16", p50_ms="1", flop_per_s="7.5e14"),
        made_up(CARD, mode=BEFORE, note="SM 345 MHz, memory 2619 MHz, 70 W, 30 C, held back by x"),
        made_up(CARD, mode=WITHIN, note=FARES),
        # 6 us a copy, 1.5 of them a small kernel's time.
        made_up(L2, mode="forward, graph", p50_ms="0.006", bytes_per_s="4.2e12"),
        made_up(NODE, mode="forward, graph", p50_ms="0.0015"),
        made_up("someone", op="woodbury", device="another", p50_ms="1"),
    ]
    guesses = kernel_model.guesses_of("NVIDIA H100 80GB HBM3")
    clock, l2 = guesses.clock, guesses.l2
    assert ceilings.compared(rows) == [
        ["device memory, copied", "3 TB/s", "3.35 TB/s", "0.90"],
        ["L2, copied", "4.2 TB/s", f"{l2 / 1e12:.4g} TB/s", f"{4.2e12 / l2:.2f}"],
        [
            *("L2, copied, less a small kernel's time", "5.6 TB/s"),
            *(f"{l2 / 1e12:.4g} TB/s", f"{5.6e12 / l2:.2f}"),
        ],
        ["bfloat16 products", "750 TFLOP/s", "989.4 TFLOP/s", "0.76"],
        ["TF32 products", "", "494.7 TFLOP/s", ""],
        ["float32 products", "50 TFLOP/s", "66.9 TFLOP/s", "0.75"],
        [
            *("clock within bfloat16 products", "1980 MHz"),
            *(f"{clock / 1e6:.4g} MHz", f"{1.98e9 / clock:.2f}"),
        ],
        ["a small kernel of a graph", "1.5 us", "2 us", "0.75"],
    ]
    # Another card's guesses are blank, and what it did not measure is no line.
    assert ceilings.compared(rows[:1]) == [["device memory, copied", "0.25 TB/s", "", ""]]
    assert ceilings.compared(rows[-1:]) == ceilings.compared([]) == []
    # Nor does it take what the driver says of its most for a clock that was measured.
    most = "nvidia-smi does not tell (x); by the driver at most SM 1980 MHz, memory 1 MHz"
    assert ceilings.compared([made_up(CARD, mode=WITHIN, note=most)]) == []


def test_what_does_not_bound_is_no_part_of_a_measured_card():
    rows = [
        made_up("copy_", p50_ms="1", bytes_per_s="3e12"),
        made_up("mm", p50_ms="1", flop_per_s="5e13"),
        made_up(L2, p50_ms="0.006", bytes_per_s="4.2e12"),
        made_up(NODE, p50_ms="0.0015"),
        made_up(CARD, mode=WITHIN, note=FARES),
    ]
    (card,) = model.measured_cards(rows).values()
    assert (card.bandwidth, card.float32) == (3e12, 5e13)


def test_every_modelled_card_has_its_guesses():
    for card in kernel_model.MODELLED:
        guesses = kernel_model.guesses_of(f"NVIDIA GeForce {card}")
        assert guesses.sheet.name == card and guesses.launch == kernel_model.LAUNCH_SECONDS
    assert kernel_model.guesses_of("NVIDIA L4") is None
