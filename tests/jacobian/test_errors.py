"""What is refused, in one line that names the culprit and the fix; and what is warned about."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsfvae.jacobian.rules.fallback as fallback
from fastsfvae.gram.pullback import pullback
from fastsfvae.jacobian.api import decode_with_jacobian
from tests.jacobian.rule_cases import apply
from tests.jacobian.test_rules import compare

M = 4


def linear():
    return nn.Linear(M, 3)


def returns(function):
    class Decoder(nn.Linear):
        def forward(self, z):
            return function(super().forward(z))

    return Decoder(M, 3)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 3 * g


def blocks(*layers):
    return nn.Sequential(nn.Linear(M, 4), nn.Unflatten(1, (4, 1, 1)), nn.Sequential(*layers))


Z = torch.randn(3, M)
REFUSED = {
    "not_callable": (lambda: 3, Z, TypeError, "decoder must be an nn.Module"),
    "integer_z": (linear, Z.long(), TypeError, "z must be a floating point tensor, got torch.int"),
    "latents": (linear, Z[:, :3], RuntimeError, r"fails on z of shape \(3, 3\).*takes m = 3"),
    "flat_z": (linear, Z[0], ValueError, r"\[B, m\].*got shape \(4,\)"),
    "empty_batch": (linear, Z[:0], ValueError, r"B, m >= 1, got shape \(0, 4\)"),
    "dtype": (linear, Z.double(), ValueError, "z is torch.float64 but the decoder's weight"),
    "device": (linear, Z.to("meta"), ValueError, "z is on meta but the decoder's weight is on cpu"),
    "tuple": (lambda: returns(lambda h: (h, h)), Z, TypeError, "one tensor, got tuple"),
    "batch": (lambda: returns(lambda h: h.t()), Z[:2], ValueError, r"B = 2.*shape \(3, 2\)"),
    "scalar": (lambda: returns(lambda h: h.sum()), Z, ValueError, r"got shape \(\)"),
    "integer": (
        lambda: returns(lambda h: h.argmax(1)),
        Z,
        TypeError,
        "floating point, got torch.i",
    ),
    "branch": (
        lambda: returns(lambda h: h if h.sum() > 0 else -h),
        Z,
        RuntimeError,
        "depends on the values",
    ),
    "nonzero": (
        lambda: returns(lambda h: h[h > 0].reshape(3, -1)),
        Z,
        RuntimeError,
        "depends on the values",
    ),
    "data": (lambda: returns(lambda h: h * h.data), Z, RuntimeError, r"use \.detach"),
    "function": (lambda: returns(Double.apply), Z, RuntimeError, "autograd.Function 'Double'"),
    "batch_norm": (
        lambda: blocks(nn.ReLU(), nn.BatchNorm2d(4)),
        Z,
        RuntimeError,
        r"decoder\[2\]\[1\] normalises by batch statistics.*decoder\[2\]\[1\]\.eval\(\).*GroupNorm",
    ),
    # PyTorch itself refuses one sample, without the layer's name.
    "batch_norm_of_one_sample": (
        lambda: nn.Sequential(nn.Linear(M, 4), nn.BatchNorm1d(4)),
        Z[:1],
        RuntimeError,
        r"decoder\[1\] normalises by batch statistics.*decoder\[1\]\.eval\(\).*GroupNorm",
    ),
    "batch_norm_without_statistics": (
        lambda: blocks(nn.BatchNorm2d(4, track_running_stats=False)).eval(),
        Z,
        RuntimeError,
        "batch statistics",
    ),
    "instance_norm": (
        lambda: nn.Sequential(
            nn.Linear(M, 8), nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, track_running_stats=True)
        ),
        Z,
        RuntimeError,
        r"decoder\[2\] updates its running statistics",
    ),
    "dropout": (lambda: blocks(nn.Dropout(0.1)), Z, RuntimeError, r"decoder\[2\]\[0\] draws at random"),
    "dropout_functional": (
        lambda: returns(lambda h: F.dropout(h, 0.1)),
        Z,
        RuntimeError,
        r"decoder\.eval\(\)",
    ),
    "rrelu": (lambda: blocks(nn.RReLU()), Z, RuntimeError, r"draws at random .*rrelu"),
    "attention_dropout": (
        lambda: returns(lambda h: F.scaled_dot_product_attention(*[h[:, None]] * 3, dropout_p=0.5)),
        Z,
        RuntimeError,
        "drops out attention weights",
    ),
    "data_parallel": (lambda: nn.DataParallel(linear()), Z, TypeError, r"pass its \.module"),
    "buffer_write": (lambda: WritesBuffer(), Z, RuntimeError, "parameter, buffer or constant"),
}


class WritesBuffer(nn.Linear):
    def __init__(self):
        super().__init__(M, 3)
        self.register_buffer("last", torch.zeros(3))

    def forward(self, z):
        h = super().forward(z)
        self.last.copy_(h.sum(0))
        return h * self.last


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    build, z, error, message = REFUSED[name]
    with pytest.raises(error, match=message) as caught:
        decode_with_jacobian(build(), z)
    assert "\n" not in str(caught.value)


def test_a_failing_decoder_is_no_traceback_in_the_log():
    logged = []
    handler = logging.Handler()
    handler.emit = logged.append
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(handler)
    try:
        # The batch is a number, not the symbol that it is traced with.
        with pytest.raises(RuntimeError, match=r"got \[3, 3\] X \[4, 3\]"):
            decode_with_jacobian(linear(), Z[:, :3])
        assert not logged
        logger.error("of others")
        assert len(logged) == 1
    finally:
        logger.removeHandler(handler)


def test_distributed_wrapper_is_refused():
    torch.distributed.init_process_group("gloo", "tcp://127.0.0.1:29512", world_size=1, rank=0)
    try:
        wrapped = nn.parallel.DistributedDataParallel(linear())
        with pytest.raises(TypeError, match="wrap the module that computes the loss instead"):
            decode_with_jacobian(wrapped, Z)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "all"])
def test_chunk_size(size):
    with pytest.raises(ValueError, match="chunk_size must be None or an int >= 1"):
        decode_with_jacobian(linear(), Z, chunk_size=size)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 3, dtype=torch.uint8), TypeError, "got torch.uint8; convert images"),
        (torch.zeros(2, 3), ValueError, r"z's B = 3, got shape \(2, 3\)"),
        (torch.zeros(3, 5), ValueError, r"x has shape \(3, 5\) but the decoder returns \(3, 3\)"),
        (torch.zeros(3, 3, device="meta"), ValueError, "x is on meta but z is on cpu"),
    ],
)
def test_pullback_data(x, error, message):
    with pytest.raises(error, match=message):
        pullback(linear(), Z, x)


def test_unknown_backend_and_triton_without_gpu(monkeypatch):
    with pytest.raises(ValueError, match="backend='cuda' is not one of 'auto', 'torch'"):
        decode_with_jacobian(linear(), Z, backend="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="triton"):
        decode_with_jacobian(linear(), Z, backend="triton")


def test_unknown_operation_is_differentiated_and_named_once():
    fallback._warned.clear()
    module = apply((12,), torch.special.i0e)()
    z = torch.randn(3, M, dtype=torch.float64)
    with pytest.warns(UserWarning, match="aten.special_i0e.* has no tangent rule"):
        compare(module, z)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(module, z)


def test_unknown_operation_without_forward_mode(monkeypatch):
    def unavailable(*args):
        raise NotImplementedError

    monkeypatch.setattr(fallback, "_forward_mode", unavailable)
    z = torch.randn(3, M, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compare(apply((12,), torch.special.i0e)(), z)
        compare(apply((4, 4), lambda h: torch.linalg.inv(h.exp() + 9 * torch.eye(4)))(), z)


class Igamma(nn.Module):
    def forward(self, h):
        return torch.igamma(h.exp(), h.exp())


def test_operation_that_cannot_be_differentiated():
    module = nn.Sequential(nn.Linear(M, 4), Igamma())
    message = r"aten.igamma.* in decoder\[1\]: .*cannot differentiate"
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match=message):
        warnings.simplefilter("ignore")
        decode_with_jacobian(module, Z)


def test_operation_that_cannot_be_traced():
    with pytest.raises(RuntimeError, match=r"uses aten.geqrf.*cannot be traced"):
        decode_with_jacobian(returns(lambda h: torch.geqrf(h)[0]), Z)


def test_norm_with_a_weight_that_depends_on_z():
    with pytest.raises(RuntimeError, match=r"layer_norm has no tangent rule .*and multiply"):
        decode_with_jacobian(returns(lambda h: F.layer_norm(h, (3,), h[0])), Z)


def test_forward_hooks_are_warned_about():
    class Hooked(nn.Linear):
        pass

    module = Hooked(M, 3)
    module.register_forward_hook(lambda layer, args, output: output * 3)
    with pytest.warns(UserWarning, match="forward hooks of decoder run only when"):
        jacobian = decode_with_jacobian(module, Z)[1]
    torch.testing.assert_close(jacobian, 3 * module.weight.t().expand(3, M, 3))


def test_compiled_decoder_is_unwrapped():
    module = linear()
    ours = decode_with_jacobian(torch.compile(module), Z)[1]
    torch.testing.assert_close(ours, module.weight.t().expand(3, M, 3))
