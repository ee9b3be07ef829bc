"""The choice between fused kernels and the library's products: settings, table, model."""

import contextlib

import pytest
import torch

from fastsfvae.ops import _gpu, _layer_model
from fastsfvae.ops._gpu import Gpu
from fastsfvae.ops._layer_model import fused_times, library_seconds
from fastsfvae.ops.dispatch import decide, fused_layers, layer_key, state

# Round numbers: 100 multiprocessors at 1 GHz, 1 TB/s.
ADA = Gpu("a card", 89, 100e9, 1e12)
CPU = torch.device("cpu")


def layer(device, dtype=torch.bfloat16, channels=(32, 3), **options):
    """A transposed convolution, kernel 4 and stride 2, of 16 x 16 values."""
    x, weight, out = (channels[0], 16, 16), (*channels, 4, 4), (channels[1], 32, 32)
    return decide("conv_transpose2d", x, weight, out, device=device, dtype=dtype, **options)


@contextlib.contextmanager
def cudnn(precision):
    """Float32 products of convolutions, set for a block."""
    products = torch.backends.cudnn.conv
    before, products.fp32_precision = products.fp32_precision, precision
    try:
        yield
    finally:
        products.fp32_precision = before


@pytest.fixture(autouse=True)
def no_setting(monkeypatch):
    monkeypatch.delenv("FASTSFVAE_FUSED", raising=False)


@pytest.fixture
def issued(monkeypatch):
    """Round numbers of FLOPs an instruction."""
    table = {
        "80": {"half": 100.0, "tf32": 60.0, "ieee": 10.0},
        "90": {"half": 50.0, "tf32": 60.0, "ieee": 10.0},
    }
    monkeypatch.setattr(_layer_model, "ISSUED", table)


# 2 * (32 * 256) * (3 * 16) FLOPs, over 2 bytes each of x and the result.
FLOPS, X, OUT = 2 * 32 * 256 * 3 * 16, 2 * 32 * 256, 2 * 3 * 1024


def test_a_fused_kernel_is_bound_by_the_slowest_of_four(issued):
    assert fused_times(ADA, "half", FLOPS, X, OUT) == pytest.approx(
        {
            # bfloat16: 512 FLOPs a clock of a multiprocessor, at 1e11 clocks.
            "arithmetic": FLOPS / (512 * 1e11),
            # Four instructions a clock, of 100 FLOPs each.
            "issue": FLOPS / (400 * 1e11),
            "L2": 3 * (X + OUT) / (14 * 1e11),
            "memory": (X + OUT) / 1e12,
        }
    )
    # Three TF32 products for one, at a third of the FLOPs an instruction.
    times = fused_times(ADA, "tf32x3", FLOPS, X, OUT)
    assert times["arithmetic"] == pytest.approx(FLOPS / (512 / 6 * 1e11))
    assert times["issue"] == pytest.approx(FLOPS / (4 * 20 * 1e11))
    # A card between two that are known is as the one before it; data centres' have a faster L2.
    assert fused_times(ADA, "half", FLOPS, X, OUT)["issue"] == FLOPS / (4 * 100 * 1e11)
    hopper = ADA._replace(capability=90)
    assert fused_times(hopper, "half", FLOPS, X, OUT)["issue"] == FLOPS / (4 * 50 * 1e11)
    assert fused_times(hopper, "half", FLOPS, X, OUT)["L2"] == 3 * (X + OUT) / (24 * 1e11)


def test_the_library_pays_for_the_activations_pass_and_for_its_share_of_the_peak(issued):
    # Bound by L2: 3 / 1.4 of memory's time.
    library = library_seconds(ADA, "half", FLOPS, X, OUT)
    assert library == pytest.approx(3 * (X + OUT) / 1.4e12 + 2 * X / 1e12)
    library = library_seconds(ADA, "half", 10 * FLOPS, X, OUT)
    assert library == pytest.approx(10 * FLOPS / (0.6 * 512 * 1e11) + 2 * X / 1e12)
    # It has no products of three TF32 ones.
    exact = library_seconds(ADA, "ieee", 10 * FLOPS, X, OUT)
    assert library_seconds(ADA, "tf32x3", 10 * FLOPS, X, OUT) == exact


def test_the_model_takes_the_faster_one(issued):
    times = fused_times(ADA, "half", FLOPS, X, OUT)
    share = times["L2"] / library_seconds(ADA, "half", FLOPS, X, OUT)
    why = f"model: fused {share:.2f} of the library's time, bound by L2; not measured"
    assert layer(ADA)[:2] == ("fused", why)
    # More instructions for as many FLOPs, and the library is faster.
    _layer_model.ISSUED["80"]["half"] = 5.0
    assert layer(ADA).how == "library" and "bound by issue" in layer(ADA).why
    # A slow memory makes the activation's pass dear again.
    assert layer(ADA._replace(bandwidth=1e11)).how == "fused"
    with cudnn("tf32"):
        assert (
            layer(ADA, torch.float32).why.startswith("model")
            and layer(ADA, torch.float32).product == "tf32"
        )


def test_exact_float32_products_are_the_faster_of_two_by_the_peaks():
    hopper = ADA._replace(capability=90)
    with cudnn("ieee"):
        # 4096 / 2 / 3 FLOPs a clock by three TF32 products against 256; on RTX cards 512 / 2 / 3.
        products = [
            layer(ADA._replace(capability=c), torch.float32).product for c in (80, 86, 89, 90, 120)
        ]
        assert products == ["tf32x3", "ieee", "ieee", "tf32x3", "ieee"]
        with fused_layers("always"):
            assert layer(hopper, torch.float32).product == "tf32x3"
            assert layer(CPU, torch.float32).product == "ieee"
            assert layer(hopper, torch.bfloat16).product == "ieee"
    with cudnn("tf32"):
        assert layer(hopper, torch.float32).product == "tf32"


def test_the_packages_table_knows_every_supported_card():
    assert set(_layer_model.ISSUED) == {"80", "86", "89", "90", "120"}
    for of in _layer_model.ISSUED.values():
        # No instruction of plain float32 does more than 64, nor a tensor-core one of these cards
        # more than 64 x 256 x 16 products a warpgroup.
        assert 0 < of["ieee"] < 64 < of["tf32"] < of["half"] < 2 * 64 * 256 * 16 / 4


def test_linear_layers_follow_cublas_and_not_cudnn():
    sizes = (256,), (512, 256), (512,)
    with cudnn("tf32"):
        assert decide("linear", *sizes, device=ADA, dtype=torch.float32).product == "ieee"
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert decide("linear", *sizes, device=ADA, dtype=torch.float32).product == "tf32"
    finally:
        matmul.fp32_precision = before


def test_linear_counts_outputs_by_its_second_axis(issued):
    sizes = (7, 256), (512, 256), (7, 512)
    counted = 2 * 7 * 512 * 256, 2 * 7 * 256, 2 * 7 * 512
    share = max(fused_times(ADA, "half", *counted).values()) / library_seconds(
        ADA, "half", *counted
    )
    choice = decide("linear", *sizes, device=ADA, dtype=torch.bfloat16)
    assert choice.why.startswith(f"model: fused {share:.2f} of the library's time")


@pytest.mark.parametrize("setting, how", [("always", "fused"), ("never", "library")])
def test_block_and_environment_force_either(setting, how, monkeypatch):
    for device in (CPU, ADA):
        with fused_layers(setting):
            assert layer(device)[:2] == (how, f"fused_layers({setting!r})")
    monkeypatch.setenv("FASTSFVAE_FUSED", setting)
    assert layer(ADA)[:2] == (how, f"FASTSFVAE_FUSED={setting}")
    with fused_layers("auto"):
        assert layer(ADA).why.startswith("model")
    assert layer(ADA).how == how
    # No setting makes Triton's tensor-core code exist.
    assert layer(ADA._replace(capability=75)).how == "library"


def test_blocks_nest_and_end_with_an_error():
    with fused_layers("always"):
        with pytest.raises(KeyError), fused_layers("never"):
            assert state()[0] == "never"
            raise KeyError
        assert state()[0] == "always"
    assert state()[0] == "auto"


def test_what_was_measured_overrides_the_model(monkeypatch):
    key = layer_key("conv_transpose2d", (32, 16, 16), (32, 3, 4, 4), "half")
    table = {"layers": {key: "library"}, "float32": "tf32x3"}
    monkeypatch.setitem(_gpu.MEASURED, "a card", table)
    assert layer(ADA)[:2] == ("library", "measured on a card")
    assert layer(ADA._replace(name="another")).how == "fused"
    with cudnn("ieee"):
        choice = layer(ADA, torch.float32)
        assert choice.why.startswith("model") and choice.product == "tf32x3"


def test_a_last_layer_goes_by_what_was_measured_with_its_gram(monkeypatch):
    sizes = "conv_transpose2d", (32, 16, 16), (32, 3, 4, 4), "half"
    table = {"layers": {layer_key(*sizes): "library"}}
    monkeypatch.setitem(_gpu.MEASURED, "a card", table)
    # Alone, where with its Gram nobody has measured it.
    assert layer(ADA, of_gram=True)[:2] == ("library", "measured on a card")
    table["layers"][layer_key(*sizes, of_gram=True)] = "fused"
    assert layer(ADA, of_gram=True)[:2] == ("fused", "measured with its Gram on a card")
    assert layer(ADA)[:2] == ("library", "measured on a card")
    with cudnn("tf32"):
        assert layer(ADA, torch.float32, of_gram=True).why.startswith("model")


def test_a_driver_that_does_not_tell_leaves_the_library():
    silent = layer(ADA._replace(bandwidth=0.0))
    assert silent[:2] == ("library", "the driver does not tell the memory's speed")


def test_the_interpreter_takes_the_library():
    assert layer(CPU)[:2] == ("library", "the interpreter is slow")


def test_nothing_to_take_in_leaves_the_library():
    assert layer(ADA, activated=False)[:2] == ("library", "no activation to take in")
    with fused_layers("always"):
        assert layer(ADA, activated=False).how == "fused"


def test_an_unknown_setting_is_named(monkeypatch):
    monkeypatch.setenv("FASTSFVAE_FUSED", "sometimes")
    with pytest.raises(ValueError, match="FASTSFVAE_FUSED=sometimes is not one of auto, always"):
        layer(CPU)
    with pytest.raises(ValueError, match=r"fused_layers\('yes'\) is not one of"):
        fused_layers("yes").__enter__()
