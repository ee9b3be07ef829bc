"""What is differentiated generically: gradients of J against finite differences; refusals."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsfvae as sf
from fastsfvae.jacobian.rules import fallback
from fastsfvae.jacobian.rules.catalogue import NOT_DIFFERENTIABLE
from fastsfvae.jacobian.rules.registry import RULES, rule
from fastsfvae.jacobian.run.cache import Linearizer
from tests.jacobian.one_operator import RIGHT, M, OneOperator, is_smooth, judge_decoder

aten = torch.ops.aten


def n(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def u(*shape):
    return 0.2 + 0.6 * torch.rand(*shape, dtype=torch.float64)


PLACES, MASK = torch.tensor([2, 0, 1, 2]), torch.tensor([True, False, True])


def convolve(x, w, b):
    return aten.convolution(x, w, b, [1], [1], [1], False, [0], 1)


def _convolve(x, w, b):
    return aten._convolution(x, w, b, [1], [1], [1], False, [0], 1, False, False, True, True)


def padded(name):
    axes = int(name[-2])
    return lambda: (lambda x: getattr(aten, name)(x, [1, 1] * axes), [n(2, *[3] * axes)])


def loss(function, target=n, *options):
    return lambda: (lambda x, y: function(x, y, *options), [n(6), target(6)])


PADS = [f"{kind}_pad{k}d" for kind in ("reflection", "replication") for k in (1, 2, 3)]
# For each operation a call and its arguments: floating ones depend on z, and then only the first.
CASES = {
    "addbmm": lambda: (aten.addbmm, [n(4, 5), n(2, 4, 3), n(2, 3, 5)]),
    "addmv": lambda: (aten.addmv, [n(4), n(4, 3), n(3)]),
    "addr": lambda: (aten.addr, [n(4, 3), n(4), n(3)]),
    "convolution": lambda: (convolve, [n(2, 3, 5), n(4, 3, 3), n(4)]),
    "_convolution": lambda: (_convolve, [n(2, 3, 5), n(4, 3, 3), n(4)]),
    "dot": lambda: (aten.dot, [n(4), n(4)]),
    "vdot": lambda: (aten.vdot, [n(4), n(4)]),
    "frexp": lambda: (lambda x: aten.frexp(x)[0], [n(5)]),
    "linalg_matrix_sqrth": lambda: (
        lambda a: aten.linalg_matrix_sqrth(a @ a.mT + torch.eye(3)),
        [n(3, 3)],
    ),
    "linalg_polar": lambda: (aten.linalg_polar, [n(4, 3)]),
    "_adaptive_avg_pool2d": lambda: (
        lambda x: aten._adaptive_avg_pool2d(x, [2, 2]),
        [n(2, 3, 5)],
    ),
    "_adaptive_avg_pool3d": lambda: (
        lambda x: aten._adaptive_avg_pool3d(x, [2, 2, 2]),
        [n(2, 3, 5, 4)],
    ),
    "log_sigmoid_forward": lambda: (lambda x: aten.log_sigmoid_forward(x)[0], [n(4)]),
    "_prelu_kernel": lambda: (aten._prelu_kernel, [n(5), u(1)]),
    **{
        f"{kind}_pad{k}d": padded(f"{kind}_pad{k}d")
        for kind in ("reflection", "replication")
        for k in (1, 2, 3)
    },
    "_unsafe_index": lambda: (lambda x, i: aten._unsafe_index(x, [None, i]), [n(4, 3), PLACES]),
    "_unsafe_index_put": lambda: (
        lambda x, v, i: aten._unsafe_index_put(x, [None, i], v, True),
        [n(4, 3), n(4, 4), PLACES],
    ),
    "_unsafe_masked_index": lambda: (
        lambda x, i, m: aten._unsafe_masked_index(x, m, [i], 0.5),
        [n(3), PLACES[:3], MASK],
    ),
    "_unsafe_masked_index_put_accumulate": lambda: (
        lambda x, v, i, m: aten._unsafe_masked_index_put_accumulate(x, m, [i], v),
        [n(3), n(3), PLACES[:3], MASK],
    ),
    "binary_cross_entropy": lambda: (aten.binary_cross_entropy, [u(4), u(4)]),
    "binary_cross_entropy_with_logits": loss(aten.binary_cross_entropy_with_logits, u),
    "huber_loss": loss(aten.huber_loss, n, 0, 0.7),
    "mse_loss": loss(aten.mse_loss),
    "smooth_l1_loss": loss(aten.smooth_l1_loss, n, 0, 0.7),
    "nll_loss_forward": lambda: (F.nll_loss, [n(4, 3), PLACES]),
    "nll_loss2d_forward": lambda: (
        F.nll_loss,
        [n(2, 3, 2, 2), PLACES.view(1, 2, 2).expand(2, 2, 2)],
    ),
    "embedding_dense_backward": lambda: (
        lambda g, i: aten.embedding_dense_backward(g, i, 4, -1, False),
        [n(4, 3), PLACES],
    ),
    "gelu_backward": lambda: (aten.gelu_backward, [n(4), n(4)]),
    "_log_softmax_backward_data": lambda: (
        lambda g, y: aten._log_softmax_backward_data(g, y, -1, torch.float64),
        [n(4, 3), u(4, 3)],
    ),
    "_softmax_backward_data": lambda: (
        lambda g, y: aten._softmax_backward_data(g, y, -1, torch.float64),
        [n(4, 3), u(4, 3)],
    ),
    "max_pool2d_with_indices_backward": lambda: (
        lambda g, x, i: aten.max_pool2d_with_indices_backward(
            g, x, [2, 2], [2, 2], [0, 0], [1, 1], False, i
        ),
        [n(2, 2, 2), n(2, 4, 4), torch.tensor([0, 2, 9, 11]).view(1, 2, 2).repeat(2, 1, 1)],
    ),
    "select_backward": lambda: (lambda g: aten.select_backward(g, [2, 6], 1, 1), [n(2)]),
    "slice_backward": lambda: (lambda g: aten.slice_backward(g, [2, 6], 1, 1, 3, 1), [n(2, 2)]),
    "sigmoid_backward": lambda: (aten.sigmoid_backward, [n(4), n(4)]),
    "tanh_backward": lambda: (aten.tanh_backward, [n(4), n(4)]),
    "threshold_backward": lambda: (
        lambda g, x: aten.threshold_backward(g, x, 0.0),
        [n(4), n(4)],
    ),
}


def test_every_admitted_operation_has_a_case_and_no_rule():
    assert set(CASES) == fallback.ADMITTED
    assert not fallback.ADMITTED & (set(RULES) | NOT_DIFFERENTIABLE)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:.*has no tangent rule")
def test_gradients_against_finite_differences(name):
    if not hasattr(aten, name):
        pytest.skip(f"torch {torch.__version__} has no {name}")
    torch.manual_seed(0)
    function, leaves = CASES[name]()

    def call(*args):
        out = function(*args)
        return out if isinstance(out, tuple) else [out]

    smooth = [index for index, leaf in enumerate(leaves) if is_smooth(leaf)]
    for moving in {tuple(smooth), tuple(smooth[:1])}:
        decoder = OneOperator(call, leaves, moving, smooth, batched=False)
        steps = Linearizer(decoder, torch.zeros(1, M, dtype=torch.float64)).plan(1).steps
        assert name in {step.op for step in steps if step.handled == "fallback"}
        verdict = judge_decoder(decoder, name)
        assert verdict.kind == RIGHT, verdict


class Sparsely(nn.Module):
    """A module whose only operation has no rule."""

    def forward(self, h):
        return F.huber_loss(h, torch.zeros_like(h), "none", 0.3)


def decoder_with(module):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(M, 6), nn.Sequential(nn.Tanh(), module))


def test_the_warning_names_the_module_once():
    fallback._warned.clear()
    decoder, z = decoder_with(Sparsely()), torch.randn(3, M)
    message = r"^aten.huber_loss.default in decoder\[1\]\[1\] has no tangent rule: its derivative"
    with pytest.warns(UserWarning, match=message):
        sf.decode_with_jacobian(decoder, z)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sf.decode_with_jacobian(decoder, z)


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, h):
        return self.function(h)


def test_what_is_not_admitted_is_refused():
    decoder = decoder_with(Applied(lambda h: torch.igamma(h.exp(), h.exp())))
    message = r'^igamma in decoder\[1\]\[1\] has no tangent rule .*, or use backend="reference"$'
    with pytest.raises(RuntimeError, match=message):
        sf.decode_with_jacobian(decoder, torch.randn(3, M))


@pytest.fixture(scope="module")
def cubed():
    """A custom operation with a registered derivative."""

    @torch.library.custom_op("fastsfvae_tests::cubed", mutates_args=())
    def cube(x: torch.Tensor) -> torch.Tensor:
        return x**3

    cube.register_fake(torch.empty_like)
    cube.register_autograd(
        lambda context, grad: grad * 3 * context.saved_tensors[0] ** 2,
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
    )
    return cube


def test_custom_operations_are_refused_or_have_a_rule(cubed):
    decoder, z = decoder_with(Applied(lambda h: cubed(h))), torch.randn(3, M)
    name = "fastsfvae_tests.cubed.default"
    message = rf'^{name} in decoder\[1\]\[1\] is a custom operation .*rule\("{name}"\)'
    with pytest.raises(RuntimeError, match=message) as caught:
        sf.decode_with_jacobian(decoder, z)
    assert "\n" not in str(caught.value)

    @rule(name, composed=True)
    def _cubed(x):
        return RULES["pow"].forward(x, 3)

    try:
        report = sf.check_decoder(decoder, z)
        assert report.ok and {layer.handled for layer in report.layers} == {"rule"}
    finally:
        del RULES[name]
