"""Cases of layers: what counts as right, what they move; and what the library chooses by them."""

import json
import time

import pytest
import torch

from bench import cases_last_layer, cases_layers, choices, ledger
from bench.gpu import timings
from bench.launches import step
from bench.ledger import Recorder, read_rows
from bench.measure import Context, Wrong, check
from bench.problems import TOLERANCE, products
from fastsfvae.kernels._code_gate import CARDS as LIMITS
from fastsfvae.kernels._record import recorded
from fastsfvae.ops import _gpu
from fastsfvae.ops.dispatch import decide
from tests._triton import DEVICE, INTERPRETER, requires_triton

TAIL_KERNELS = ("forward", "_gram_tail_fwd_kernel"), ("backward", "_gram_tail_bwd_kernel")


def tiny_cases():
    return [
        *cases_last_layer.last_layers(DEVICE, list(cases_last_layer.TINY_LAST)),
        *cases_layers.layers(DEVICE, list(cases_layers.TINY)),
    ]


def named(case):
    return " ".join(case.labels.values())


class TestCases:
    pytestmark = requires_triton

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", cases_layers.DTYPES)
    def test_every_case_is_right(self, dtype):
        for case in tiny_cases():
            if case.dtype == dtype:
                _, columns = check(case, DEVICE)
                assert float(columns["error"]) <= TOLERANCE[dtype], named(case)

    @pytest.mark.slow
    def test_what_overwrites_its_input_finds_the_same_again(self):
        for case in tiny_cases():
            if case.mode == "forward" and case.dtype == "float32":
                runs, _ = check(case, DEVICE)
                first = [t.clone() for t in runs[0]()]
                assert all(map(torch.equal, first, runs[0]())), named(case)


@pytest.mark.skipif(INTERPRETER, reason="says what happens without it")
@pytest.mark.skipif(DEVICE == "cuda", reason="needs a CPU")
def test_a_kernel_without_a_device_is_a_row_that_says_why(tmp_path):
    recorder = Recorder(tmp_path / "rows.csv", "cpu", "abc1234")
    timings.layers(Context("cpu", True, recorder, time.monotonic() + 60))
    rows = read_rows(recorder.path)
    assert len(rows) == sum(case.dtype == "bfloat16" for case in tiny_cases())
    for row in rows:
        # On 1 x 1 the library's products need no kernel, nor does a weight's gradient.
        plain = "library" in row["implementation"] and row["op"] == cases_layers.OPERATION
        plain &= row["shape"].startswith("tiny first") or row["mode"] == "weight gradient"
        assert bool(row["p50_ms"]) == plain
        assert plain or "TRITON_INTERPRET" in row["note"]


def test_what_weighs_most_and_decides_comes_first(tmp_path, monkeypatch):
    recorder = Recorder(tmp_path / "rows.csv", "cpu", "abc1234")
    context, ran = Context("cpu", False, recorder), []
    monkeypatch.setattr(context, "run", ran.append)
    timings.layers(context)
    assert [case.dtype for case in ran] == sorted(
        (case.dtype for case in ran), key=cases_layers.DTYPES.index
    )
    of_half = [case for case in ran if case.dtype == "bfloat16"]
    names = list(dict.fromkeys((case.op, case.shape.split()[0]) for case in of_half))
    last, *others = names
    assert last == (cases_last_layer.OPERATION, "deconv5")
    assert others == [(cases_layers.OPERATION, name) for name in cases_layers.LAYERS]
    # In the order of their bytes and FLOPs, which agree, but for the one that a step has not.
    costs = {case.shape: case.bytes for case in of_half if case.mode == "backward"}
    of_step = [costs[cases_layers.label(name)] for _, name in others[:-1]]
    assert of_step == sorted(of_step, reverse=True)


@pytest.mark.parametrize("mode", cases_layers.MODES)
@pytest.mark.parametrize("name", cases_layers.TINY)
def test_every_sample_slot_and_channel_counts(name, mode):
    found = cases_layers.exact(name, "float32", "cpu")
    right = found[:1]
    if mode != "forward":
        needs = cases_layers.BACKWARDS[mode]
        right = [t for t, need in zip(found[1:], needs, strict=True) if need]
    given = name, "float32", "cpu", mode, False
    assert cases_layers.error_of(*given, right) == 0
    for at in range(len(right)):
        # The last number of all, by a hundredth of the whole.
        wrong = [t.clone() for t in right]
        wrong[at][(-1,) * wrong[at].ndim] += wrong[at].norm() / 100
        assert cases_layers.error_of(*given, wrong) == pytest.approx(1e-2)


@pytest.mark.parametrize("mode", cases_last_layer.MODES)
def test_a_wrong_last_sample_of_a_last_layer_gets_no_time(mode, monkeypatch):
    size = cases_last_layer.TINY_LAST["tiny"]
    right = cases_last_layer.exact(size, "float32", "cpu")[mode]
    # Sums are handed over in parts.
    parts = [t[None] if mode == "forward" else t for t in right]
    for wrong in (False, True):
        handed = [t.clone() for t in parts]
        if wrong:
            for t in handed:
                t[(-1,) * t.ndim] += t.norm() / 100
        for way in ("_by_kernels", "_by_library"):
            monkeypatch.setattr(cases_last_layer, way, lambda *_, h=handed: lambda: tuple(h))
        for case in cases_last_layer.last_layers("cpu", ["tiny"], ["float32"]):
            if case.mode == mode and not wrong:
                assert float(check(case, "cpu")[1]["error"]) == 0
            elif case.mode == mode:
                with pytest.raises(Wrong):
                    check(case, "cpu")


def test_bytes_and_flops_of_a_layer():
    # 1 + m = 3 slots of 2 samples; 9 positions of 4 channels, 36 of 3; 4 x 3 x 16 weights.
    size = cases_layers.TINY["tiny"]
    x, y, w, slope = 3 * 2 * 9 * 4, 3 * 2 * 36 * 3, 4 * 3 * 16, 2 * 9 * 4
    assert size.numbers == (x, y, w)
    assert size.traffic("forward", 2) == 2 * (x + w + y)
    assert size.traffic("data gradient", 2) == 2 * (y + w + slope + x)
    assert size.traffic("weight gradient", 2) == 2 * (x + y) + 4 * w
    # Both read the gradient, and the stack, which tells the slope.
    assert size.traffic("backward", 4) == 4 * (x + y + w + x) + 4 * w
    assert size.flops == 2 * (3 * 2 * 9) * 4 * 3 * 16
    first = cases_layers.TINY["tiny first"]
    x, y, w = 3 * 2 * 5, 3 * 2 * 16 * 3, 5 * 3 * 16
    assert first.numbers == (x, y, w) and first.flops == 2 * (3 * 2) * 5 * 3 * 16
    # Nothing in front, so no slope.
    assert first.traffic("data gradient", 2) == 2 * (y + w + x)
    costs = {}
    for case in cases_layers.layers("cpu", ["tiny"], ["bfloat16"]):
        costs.setdefault(case.mode, set()).add((case.bytes, case.flops))
    assert all(len(found) == 1 for found in costs.values())
    flops = {mode: found.pop()[1] for mode, found in costs.items()}
    assert flops["backward"] == 2 * flops["forward"] == flops["data gradient"] * 2


def test_bytes_and_flops_of_a_last_layer_with_its_gram():
    size = cases_last_layer.TINY_LAST["tiny"]
    x, w, n, m = 3 * 2 * 9 * 4, 4 * 3 * 16, 2 * 36 * 3, 2
    # Stack, weight and data in; J and r out. Then J, r and stack in; two gradients out.
    assert cases_last_layer.traffic(size, "forward", 2) == 2 * (x + w) + 4 * n + (2 * m + 4) * n
    assert (
        cases_last_layer.traffic(size, "backward", 2) == (2 * m + 4) * n + 2 * (2 * x + w) + 4 * w
    )
    # G and p are m + 1 products of each of the m rows; dJ and dr take m, 1 and 1.
    assert cases_last_layer.flops(size, "forward") == size.flops + 2 * n * m * (m + 1)
    assert cases_last_layer.flops(size, "backward") == 2 * size.flops + 2 * n * m * (m + 2)


def test_fused_layers_are_those_of_a_plan():
    last, inner = cases_layers.LAYERS["deconv5"], cases_layers.LAYERS["deconv4"]
    first = cases_layers.LAYERS["deconv1"]
    for dtype, product in (("bfloat16", "ieee"), ("tf32", "tf32"), ("float32", "tf32x3")):
        layer, rounds = inner.layer(dtype, product), dtype == "tf32"
        assert layer[1:5] == ("relu", (), product, True) and layer.behind == "relu"
        assert (layer.rounded, layer.grad_rounded) == (rounds, rounds)
        assert last.layer(dtype, product)[5:] == ("none", (), rounds, False)
        assert first.layer(dtype, product)[1:6] == ("none", (), product, False, "relu")
    assert list(cases_layers.implementations("deconv4", "float32")) == [
        *("fused, ieee", "fused, tf32x3", cases_layers.LIBRARY)
    ]
    assert list(cases_layers.implementations("deconv1", "bfloat16")) == [
        *("fused", cases_layers.LIBRARY, cases_layers.CONVOLUTION)
    ]


@pytest.mark.skipif(INTERPRETER, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("arch, dtype", [(89, "bfloat16"), (90, "tf32")])
def test_what_is_timed_is_the_code_of_a_step(arch, dtype, monkeypatch):
    limits, product = LIMITS[arch], "tf32" if dtype == "tf32" else "ieee"
    of_step = {launch.compilation for launch in step("celeba16", dtype, limits, 4).kernels}
    # Named, so that tensors on the CPU are taken; nothing runs.
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def names(run, *given, elsewhere=False):
        with recorded(limits) as launches:
            run(*given)
        # A step adds all sums up at its end.
        kept = [launch for launch in launches if launch.name != "_sum_parts_kernel"]
        assert elsewhere or all(launch.compilation in of_step for launch in kept)
        return [launch.name for launch in kept]

    with products(dtype):
        for name, size in cases_layers.LAYERS.items():
            size, found = size._replace(batch=4), {}
            # A step takes the last layer with its Gram.
            for mode in () if name == "deconv5" else cases_layers.MODES:
                given = size.layer(dtype, product), mode, cases_layers.draw(size, dtype, "cpu", 0)
                # Which makes both gradients at once, and none alone.
                at_once = arch == 89 and name == "deconv4" and mode.endswith("gradient")
                found[mode] = names(cases_layers._fused, *given, elsewhere=at_once)
            if name == "deconv4":
                two = found["data gradient"] + found["weight gradient"]
                both = ["tangent_back_kernel"] if arch == 89 else two
                assert found["backward"] == both and len(two) == 2
        last = cases_last_layer.LAST["deconv5"]._replace(batch=4)
        of = cases_last_layer.given(last, dtype, "cpu", 0)
        for mode, kernel in TAIL_KERNELS:
            way = cases_last_layer._by_kernels, last, dtype, product, mode, of
            assert kernel in names(lambda way=way: way[0](*way[1:])())


def layer_rows(device, milliseconds):
    """Rows of every layer's cases; the backward takes twice as long as the forward."""
    alone = cases_layers.OPERATION, cases_layers.LAYERS, cases_layers.implementations
    with_gram = (
        *(cases_last_layer.OPERATION, cases_last_layer.LAST),
        lambda name, dtype: cases_last_layer.implementations(dtype),
    )
    cases = (
        (op, n, d, i)
        for op, names, implementations in (alone, with_gram)
        for n in names
        for d in cases_layers.DTYPES
        for i in implementations(n, d)
    )
    for op, name, dtype, implementation in cases:
        # The last one would turn the choice, did it count.
        for mode, factor in (("forward", 1), ("backward", 2), ("weight gradient", 1e9)):
            yield {
                "op": op,
                "implementation": implementation,
                "shape": cases_layers.label(name),
                "dtype": dtype,
                "mode": f"{mode}, graph",
                "device": device,
                "p50_ms": str(factor * milliseconds(op, name, dtype, implementation)),
            }


LIBRARIES = cases_layers.LIBRARY, cases_last_layer.LIBRARY


def test_the_ledger_tells_which_layers_to_fuse(monkeypatch):
    def milliseconds(op, name, dtype, implementation):
        if implementation in LIBRARIES:
            return 2.0
        if implementation == cases_layers.CONVOLUTION:
            # Nobody's choice, however fast.
            return 0.1
        if name == "deconv3" or (name == "deconv5" and op == cases_layers.OPERATION):
            return 3.0
        exact = {"fused, ieee": 1.9, "fused, tf32x3": 1.5}
        return exact.get(implementation, 1.0)

    old = [
        row | {"p50_ms": "0.1"}
        for row in layer_rows("a card", milliseconds)
        if row["implementation"] in LIBRARIES
    ]
    table = choices.choose([*old, *layer_rows("a card", milliseconds)])
    assert table.keys() == {"a card"} and table["a card"]["float32"] == "tf32x3"
    found = table["a card"]["layers"]
    for product in ("tf32", "tf32x3", "half"):
        for name, size in cases_layers.LAYERS.items():
            how = "library" if name in ("deconv3", "deconv5") else "fused"
            assert found.pop(size.key(product)) == how
        last = cases_layers.LAYERS["deconv5"]
        assert found[last.key(product, of_gram=True)] == "fused"
    assert len(found) == 3
    # What the table says, the library does: of a last layer, what it says of it with its Gram.
    table = choices.choose(layer_rows("a card", milliseconds))
    monkeypatch.setitem(_gpu.MEASURED, "a card", table["a card"])
    card = _gpu.Gpu("a card", 90, 1e11, 1e12)

    def choice(*shapes, **options):
        given = {"device": card, "dtype": torch.bfloat16, **options}
        return decide("conv_transpose2d", *shapes, **given)[:2]

    assert choice((64, 4, 4), (64, 64, 4, 4), (64, 8, 8)) == ("fused", "measured on a card")
    assert choice((256, 1, 1), (256, 64, 4, 4), (64, 4, 4)) == ("fused", "measured on a card")
    last = (32, 32, 32), (32, 3, 4, 4), (3, 64, 64)
    assert choice(*last) == ("library", "measured on a card")
    assert choice(*last, of_gram=True) == ("fused", "measured with its Gram on a card")


def test_half_measured_layers_are_not_chosen():
    rows = list(layer_rows("a card", lambda *_: 1.0))
    assert choices.choose(row for row in rows if "backward" not in row["mode"]) == {}
    assert choices.choose(row | {"p50_ms": ""} for row in rows) == {}
    plain = choices.choose(row for row in rows if "tf32x3" not in row["implementation"])
    assert "float32" not in plain["a card"]
    assert not any(key.split()[3] in ("ieee", "tf32x3") for key in plain["a card"]["layers"])


def test_the_shipped_table_is_what_the_ledger_says():
    assert json.loads(choices.MEASURED.read_text()) == choices.choose(read_rows(ledger.LEDGER))
