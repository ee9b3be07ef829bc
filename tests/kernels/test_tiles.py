"""Tiles that were measured, or are tried, in place of those that launchers choose."""

import json
from dataclasses import fields

import pytest
import torch
import triton

from fastsfvae.kernels import _tiles
from fastsfvae.kernels._gram_project_tile import Tile as GramProjectTile
from fastsfvae.kernels._gram_tail_tile import Tile as GramTailTile
from fastsfvae.kernels._launch import DeviceLimits
from fastsfvae.kernels._record import recorded
from fastsfvae.kernels._stack_geometry import Front, Geometry, doubling, window
from fastsfvae.kernels._stack_layer import layer_bwd, layer_fwd
from fastsfvae.kernels._stack_sums import Partial
from fastsfvae.kernels._stack_tile import Tile
from fastsfvae.kernels._stack_walk import weight_constexprs
from fastsfvae.kernels._tiles import asking, measured, trying
from fastsfvae.kernels.gram_project import gram_project_bwd, gram_project_fwd
from fastsfvae.kernels.gram_tail import empty_rows, gram_tail_partials
from fastsfvae.kernels.gram_tail_backward import gram_tail_bwd
from tests._triton import INTERPRETER, requires_triton
from tests.kernels.stack_layers import draw

RTX_4090 = DeviceLimits(128, 89, "NVIDIA GeForce RTX 4090")
# Whose kernels are recorded in place of being run.
compiled = pytest.mark.skipif(INTERPRETER, reason="the interpreter compiles nothing")
DOUBLING = Geometry(doubling(4), window(4, stride=2, padding=1), inner_is_input=False)


def forward(channels_out, kind="none", dtype=torch.float32):
    stack, weight, bias = draw(0, dtype, (3, 2, 4, 3, 5), (4, channels_out, 4, 4), (channels_out,))
    return (layer_fwd(DOUBLING, stack, weight, bias, (6, 10), Front(kind)),)


def backward(*needs):
    stack, weight, grad = draw(0, torch.float32, (3, 2, 4, 3, 5), (4, 16, 4, 4), (3, 2, 16, 6, 10))
    gradients = layer_bwd(DOUBLING, grad, stack, weight, Front("relu"), needs)
    return tuple(t for t in gradients if t is not None)


def project(back):
    J, r, M, u, g_rr = draw(0, torch.float32, (2, 5, 70), (2, 70), (2, 5, 5), (2, 5), (2,))
    return gram_project_bwd(J, r, M, u, g_rr) if back else gram_project_fwd(J, r)


def tail(back):
    T, weight, r, M, u, g_rr = draw(
        0, torch.float32, (5, 2, 9, 3, 4), (9, 3, 4, 4), (2, 3, 6, 8), (2, 5, 5), (2, 5), (2,)
    )
    Z = empty_rows(T)
    if not back:
        return tuple(t.sum(0) for t in gram_tail_partials(T, weight, r, Z=Z))
    gram_tail_partials(T, weight, r, Z=Z)
    of_weight = Partial(weight.numel(), T.device)
    pulled = gram_tail_bwd(T, weight, r, Z, M, u, g_rr, rooms=of_weight)
    return pulled.T, pulled.r, of_weight.parts[:, : weight.numel()].sum(0)


# Of each family of kernels a launch, other fields of its tile, and what is then compiled in.
FAMILIES = {
    "tangent_product": (
        lambda: backward(True, False, False),
        {"block_m": 32, "block_n": 32, "block_k": 32, "num_warps": 8},
        {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32},
    ),
    "tangent_doubling": (
        lambda: forward(16),
        {"block_m": 16, "block_n": 32, "block_k": 32, "num_stages": 4},
        {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "UNIT": 8},
    ),
    "tangent_narrow": (
        lambda: forward(3),
        {"block_m": 16, "block_k": 32, "maxnreg": 96},
        {"BLOCK_M": 16, "BLOCK_K": 32},
    ),
    "tangent_weight": (
        lambda: backward(False, True, True),
        {"block_m": 32, "block_n": 32, "block_k": 64, "num_warps": 2},
        {"BLOCK_M": 32, "PRODUCT_M": 32, "BLOCK_N": 32, "BLOCK_K": 64, "POSITIONS": 16},
    ),
    "gram_tail_fwd": (
        lambda: tail(False),
        {"tile_x": 1, "block_c": 32, "num_warps": 4},
        {"CELLS": 1, "BLOCK_C": 32, "GROUPS": 1},
    ),
    "gram_tail_bwd": (
        lambda: tail(True),
        {"tile_x": 4, "block_c": 32, "num_warps": 4, "maxnreg": 200},
        {"POSITIONS": 4, "BLOCK_C": 32},
    ),
    "gram_project_fwd": (
        lambda: project(False),
        {"block_m": 32, "block_n": 32, "maxnreg": 128},
        {"BLOCK_M": 32, "BLOCK_N": 32},
    ),
    "gram_project_bwd": (
        lambda: project(True),
        {"block_m": 32, "block_n": 16, "num_stages": 2},
        {"BLOCK_M": 32, "BLOCK_N": 16},
    ),
}


def asked_by(run, family):
    """The launch of a family that a run makes, by its name, and its tile."""
    with asking() as asked:
        run()
    ((key, found),) = ((k, a) for k, a in asked.items() if a.kernel == family)
    return key, found


def launched(run, family, limits=RTX_4090):
    """Constexprs and options of a family's launches."""
    with recorded(limits) as launches:
        run()
    of = [x for x in launches if family in x.name]
    assert of
    return [
        ({x.kernel.arg_names[at]: v for (at,), v in x.constants.items()}, x.options) for x in of
    ]


@compiled
@pytest.mark.parametrize("family", FAMILIES)
def test_other_fields_change_what_is_launched_and_what_follows_from_them(family):
    run, other, compiled_in = FAMILIES[family]
    with recorded(RTX_4090):
        key, _ = asked_by(run, family)
    assert key.startswith(f"{family} dtype=float32 product=ieee ")
    before = launched(run, family)
    with trying({key: other}):
        after = launched(run, family)
    options = {
        name: value
        for name, value in other.items()
        if name.islower() and not name.startswith(("block", "tile"))
    }
    for (was, old), (now, new) in zip(before, after, strict=True):
        assert {name: now[name] for name in compiled_in} == compiled_in
        assert any(was[name] != now[name] for name in compiled_in)
        assert options.items() <= new.items() and (old != new or not options)
    assert launched(run, family) == before


@pytest.mark.parametrize("family", FAMILIES)
class TestResults:
    pytestmark = requires_triton

    @pytest.mark.slow
    def test_other_fields_give_the_same_result(self, family, poisoned_empty):
        run, other, _ = FAMILIES[family]
        want = run()
        key, _ = asked_by(run, family)
        with trying({key: other}), asking() as asked:
            got = run()
        # It is the tile before that is told.
        assert asked[key].tile != _tiles.changed(asked[key].tile, other, asked[key].blocks)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5 * float(w.abs().max()))


@compiled
def test_copies_past_l1():
    def run():
        stack, weight, bias = draw(0, torch.bfloat16, (3, 2, 16, 3, 5), (16, 16, 4, 4), (16,))
        grad = stack.new_zeros(3, 2, 16, 6, 10)
        layer_fwd(DOUBLING, stack, weight, bias, (6, 10), Front())
        layer_bwd(DOUBLING, grad, stack, weight, Front())

    with recorded(DeviceLimits(4, 86)), asking() as asked:
        run()
    assert {a.kernel for a in asked.values()} == {
        "tangent_doubling",
        "tangent_product",
        "tangent_weight",
    }
    for family, name, values in (
        ("tangent_doubling", "BY_L1", (True, False)),
        ("tangent_product", "BY_L1", (True, False)),
        ("tangent_weight", "VECTOR", (4, 8)),
    ):
        ((before, _),) = launched(run, family)
        with trying(dict.fromkeys(asked, {"by_l1": False})):
            ((after, _),) = launched(run, family)
        assert (before[name], after[name]) == values


@compiled
def test_the_table_changes_its_device_and_compiler_alone():
    run, other, compiled_in = FAMILIES["tangent_doubling"]
    with recorded(RTX_4090):
        key, asked = asked_by(run, "tangent_doubling")
    before = launched(run, "tangent_doubling")

    def table(version, **tiles):
        return {RTX_4090.name: {"triton": version, "tiles": tiles or {key: other}}}

    version = ".".join(triton.__version__.split(".")[:2])
    with measured(table(version)):
        ((constants, options),) = launched(run, "tangent_doubling")
        assert {name: constants[name] for name in compiled_in} == compiled_in
        assert options["num_stages"] == 4
        # A sweep begins at the measured tile.
        with recorded(RTX_4090), asking() as told:
            run()
        assert told[key].tile.num_stages == 4
        unknown, namesake = DeviceLimits(128, 89), DeviceLimits(128, 89, "NVIDIA H100 NVL")
        assert launched(run, "tangent_doubling", unknown) == before
        assert launched(run, "tangent_doubling", namesake) == before
    for others in (table("3.5"), table(version, **{key.replace("H=3", "H=4"): other})):
        with measured(others):
            assert launched(run, "tangent_doubling") == before
    with measured(table(version, **{key: {"block_m": 48}})):
        with pytest.raises(ValueError, match="block_m=48"):
            launched(run, "tangent_doubling")


def test_no_launch_is_named_where_nothing_is_known(monkeypatch):
    monkeypatch.setattr(_tiles, "key_of", lambda *_: pytest.fail("named"))
    with measured({"another": {"triton": _tiles.version(), "tiles": {}}}):
        assert not _tiles.tunes(RTX_4090)
        if not INTERPRETER:
            launched(FAMILIES["tangent_product"][0], "tangent_product")


@compiled
@pytest.mark.parametrize(
    "family, refused",
    [
        ("tangent_product", {"block_m": 48}),
        ("tangent_product", {"block_k": 8}),
        ("tangent_product", {"num_warps": 3}),
        ("tangent_product", {"num_stages": 0}),
        ("tangent_product", {"num_warps": 16, "maxnreg": 255}),
        ("tangent_product", {"by_l1": 2}),
        ("tangent_product", {"tile_x": 2}),
        ("tangent_narrow", {"block_n": 32}),
        ("tangent_weight", {"maxnreg": None}),
        ("gram_tail_fwd", {"block_m": 32}),
        ("gram_tail_fwd", {"tile_y": 2}),
        ("gram_tail_bwd", {"block_c": 4}),
        ("gram_project_fwd", {"maxnreg": 300}),
    ],
)
def test_what_a_kernel_cannot_take_is_refused(family, refused):
    run = FAMILIES[family][0]
    with recorded(RTX_4090):
        key, _ = asked_by(run, family)
    ((name, value), *_) = reversed(refused.items())
    with trying({key: refused}), pytest.raises(ValueError, match=f"{name}={value}"):
        launched(run, family)


def test_tf32_on_hopper_takes_32_rows_or_twice_as_many():
    given = window(4, 2, 1), (16, 16), 64, (32, 32, 32), torch.float32, Front(precision="tf32")
    hopper = DeviceLimits(132, 90)
    with asking() as asked:
        weight_constexprs(*given, False, hopper)
    (key,) = asked
    for rows, product in ((32, 32), (64, 32)):
        with trying({key: {"block_m": rows}}):
            constexprs, _ = weight_constexprs(*given, False, hopper)
        assert constexprs["PRODUCT_M"] == product
    with trying({key: {"block_m": 128}}), pytest.raises(ValueError, match="block_m=128"):
        weight_constexprs(*given, False, hopper)


def test_the_file_is_of_tiles():
    names = {f.name for tile in (Tile, GramTailTile, GramProjectTile) for f in fields(tile)}
    for device, of in json.loads(_tiles.TILES.read_text()).items():
        assert device and of.keys() == {"triton", "torch", "commit", "date", "tiles"}
        assert of["triton"].count(".") == 1 and of["tiles"]
        for key, tile in of["tiles"].items():
            assert key.split(" ")[0] in FAMILIES and key.split(" ")[1].startswith("dtype=")
            assert names >= tile.keys() >= {"num_warps", "num_stages", "maxnreg"}
