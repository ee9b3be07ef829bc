"""Transposed convolutions of the paper's decoder: `pytest bench/bench_tangent_conv_transpose.py`.

ReLU and the layer behind it, fused, against the activation's kernel and the library's convolution.
"""

from bench.cases_layers import LAYERS, layers
from bench.suite import DEVICE, given

# In the interpreter there is nothing to time.
NAMES, TYPICAL = (list(LAYERS), ["deconv3"]) if DEVICE == "cuda" else ([], [])


@given(layers(DEVICE, TYPICAL, ["bfloat16"]), full=layers(DEVICE, NAMES))
def test_tangent_conv_transpose(timed, case):
    timed(case)
