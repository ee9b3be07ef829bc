"""The choice between fused kernels and the library's products: settings, table, model."""

import contextlib

import pytest
import torch

from fastsfvae.ops import _gpu
from fastsfvae.ops._gpu import Gpu
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


def test_the_model_compares_the_layer_with_the_ridge_by_hand():
    # 2 * (32 * 256) * (3 * 16) FLOPs over 2 bytes each of x and the result: 35 a byte.
    flops = 2 * 32 * 256 * 3 * 16
    size = 2 * (32 * 256 + 3 * 1024)
    assert round(flops / size) == 35
    # bfloat16: 512 FLOPs a clock * 1e11 clocks over 1e12 bytes a second.
    assert layer(ADA)[:2] == ("fused", "model: 35 FLOP/byte, below 51 of half; not measured")
    # float32 has half of the ridge, and half of the intensity.
    with cudnn("tf32"):
        why = "model: 17 FLOP/byte, below 26 of tf32; not measured"
        assert layer(ADA, torch.float32) == ("fused", why, "tf32")
    assert layer(ADA, channels=(64, 64)).how == "library"
    # Ten times the memory: the same layer is bound by arithmetic.
    assert layer(ADA._replace(bandwidth=1e13)).how == "library"
    # A device with eight times the tensor cores is bound by memory for longer.
    assert layer(ADA._replace(capability=90), channels=(64, 64)).how == "fused"


def test_exact_float32_products_are_the_faster_of_two_by_the_peaks():
    hopper = ADA._replace(capability=90)
    with cudnn("ieee"):
        # 4096 / 2 / 3 FLOPs a clock by three TF32 products against 256; on RTX cards 512 / 2 / 3.
        assert "below 68 of tf32x3" in layer(hopper, torch.float32).why
        assert "below 26 of ieee" in layer(ADA, torch.float32).why
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


def test_linear_counts_outputs_by_its_second_axis():
    choice = decide("linear", (7, 256), (512, 256), (7, 512), device=ADA, dtype=torch.bfloat16)
    flops, size = 2 * 7 * 512 * 256, 2 * (7 * 256 + 7 * 512)
    assert choice.why.startswith(f"model: {flops / size:.0f} FLOP/byte")


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
