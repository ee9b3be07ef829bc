"""The static cost model against hand-worked layers and against PyTorch's own count."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastsfvae as sf
from bench.problems import build_problem
from fastsfvae.jacobian.cost import CARDS, Card, step_floor


def decoder():
    return nn.Sequential(
        nn.Linear(3, 32), nn.ReLU(), nn.Unflatten(1, (8, 2, 2)), nn.ConvTranspose2d(8, 4, 4, 2, 1)
    )


def test_floor_of_hand_worked_layers():
    report = sf.check_decoder(decoder(), torch.randn(2, 3))
    # 3 inputs + 2 outputs for each of the 3 tangents.
    moved = {layer.op: layer.elements for layer in report.layers if layer.elements}
    assert moved == {
        "linear": 3 * (3 * 3 + 2 * 32),
        "conv_transpose2d": 3 * (3 * 32 + 2 * 64),
    }
    # 4 tangents with the value, 5 samples, forward and twice that backward; then G and M J.
    linear, relu, conv = 2 * 3 * 32, 32, 2 * 32 * 4 * 16
    gram = 4 * 5 * 9 * 64
    bytes_of = [2 * 20 * (3 * 3 + 2 * 32), 0, 2 * 20 * (3 * 32 + 2 * 64), 2 * 5 * 3 * 3 * 64]
    # The linear layer and the Gram matrix wait for memory, the others for arithmetic.
    slow = Card("slow", bandwidth=100.0, float32=1e3, bfloat16=5e2)
    floor = step_floor(report.layers, 3, 64, 5, slow, "bfloat16")
    assert floor.flops == 60 * (linear + relu + conv) + gram
    assert floor.bytes == sum(bytes_of)
    arithmetic = [60 * linear / 5e2, 60 * relu / 5e2, 60 * conv / 5e2, gram / 5e2]
    seconds = sum(max(a, b / 100) for a, b in zip(arithmetic, bytes_of, strict=True))
    assert bytes_of[0] / 100 > arithmetic[0] and arithmetic[2] > bytes_of[2] / 100
    assert floor.seconds == pytest.approx(seconds)


@pytest.mark.parametrize("workload", ["celeba16", "tanh"])
def test_arithmetic_is_what_pytorch_counts(workload):
    problem = build_problem(workload, 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        problem.decoder(problem.mean)
    report = sf.check_decoder(problem.decoder, problem.mean.detach())
    layers = [layer for layer in report.layers if layer.elements]
    m = problem.mean.shape[1]
    assert sum(layer.flops for layer in layers) == m * counter.get_total_flops()


def test_a_floor_scales_with_the_batch_and_shrinks_with_the_dtype():
    report = sf.check_decoder(decoder(), torch.randn(2, 3))
    small, large = (report.floor("RTX 4090", batch, "float32") for batch in (8, 64))
    assert large.seconds == pytest.approx(8 * small.seconds)
    assert report.floor("RTX 4090", 64, "bfloat16").bytes == pytest.approx(large.bytes / 2)


def test_unknown_cards_and_dtypes_are_refused_in_one_line():
    report = sf.check_decoder(decoder(), torch.randn(2, 3))
    with pytest.raises(ValueError, match="'RTX 2080' is unknown: give one of RTX 3090"):
        report.floor("RTX 2080")
    with pytest.raises(ValueError, match="Quadro RTX 6000 has no 'bfloat16' .* float32$"):
        report.floor("Quadro RTX 6000", 64, "bfloat16")
    with pytest.raises(ValueError, match="no 'float16' products: give one of float32, tf32"):
        CARDS["H100"].rate("float16")
