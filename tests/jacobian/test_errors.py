"""What is refused, in one line that names the culprit and the fix; and what is warned about."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastsfvae as sf
import fastsfvae.jacobian.rules.fallback as fallback
from fastsfvae.gram.pullback import pullback
from fastsfvae.jacobian.api import decode_with_jacobian
from fastsfvae.jacobian.validate import layer_name
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


class apply_function(nn.Module):  # noqa: N801
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, h):
        return self.function(h)


def blocks(*layers):
    return nn.Sequential(nn.Linear(M, 4), nn.Unflatten(1, (4, 1, 1)), nn.Sequential(*layers))


Z = torch.randn(3, M)
REFUSED = {
    "not_callable": (lambda: 3, Z, TypeError, "decoder must be an nn.Module"),
    "integer_z": (linear, Z.long(), TypeError, "z must be a floating point tensor, got torch.int"),
    "latents": (linear, Z[:, :3], RuntimeError, r"fails on z of shape \(3, 3\).*takes m = 3"),
    "latents_after_a_view": (
        lambda: nn.Sequential(nn.Identity(), nn.Flatten(), linear()),
        Z[:, :3],
        RuntimeError,
        r"in decoder\[2\]: .*takes m = 3 latents",
    ),
    "image_latents": (
        lambda: nn.ConvTranspose2d(M, 3, 2),
        Z[:, :, None, None],
        ValueError,
        r"z must be \[B, m\].*takes \[B, m, 1, 1\] put nn\.Unflatten\(1, \(4, 1, 1\)\) in front",
    ),
    "latents_of_an_image": (
        lambda: nn.Sequential(nn.ConvTranspose2d(M, 3, 2)),
        Z,
        RuntimeError,
        r"in decoder\[0\]: .*put nn\.Unflatten\(1, \(4, 1, 1\)\) in front",
    ),
    "list": (linear, Z.tolist(), TypeError, "z is a list: give a torch.Tensor"),
    "flat_z": (linear, Z[0], ValueError, r"\[B, m\].*got shape \(4,\)"),
    "empty_batch": (linear, Z[:0], ValueError, r"B, m >= 1, got shape \(0, 4\)"),
    "dtype": (linear, Z.double(), ValueError, "z is torch.float64 but the decoder's weight"),
    "dtype_of_a_layer": (
        lambda: nn.Sequential(linear()),
        Z.double(),
        ValueError,
        r"but decoder\[0\]\.weight is torch.float32",
    ),
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
    "vmap": (
        lambda: nn.Sequential(linear(), apply_function(torch.vmap(torch.sin))),
        Z,
        RuntimeError,
        r"decoder\[1\] uses torch\.func \(vmap\).*for a whole batch",
    ),
    "grad": (
        lambda: returns(torch.func.grad(lambda h: h.sin().sum())),
        Z,
        RuntimeError,
        r"decoder uses torch\.func \(grad",
    ),
    "jvp": (
        lambda: returns(lambda h: torch.func.jvp(torch.sin, (h,), (h,))[1]),
        Z,
        RuntimeError,
        r"decoder uses torch\.func \(",
    ),
    "numpy": (
        lambda: returns(lambda h: h * torch.from_numpy(h.detach().numpy())),
        Z,
        RuntimeError,
        "decoder leaves PyTorch for NumPy",
    ),
    "reentrant_checkpoint": (
        lambda: returns(lambda h: checkpoint(torch.sin, h, use_reentrant=True)),
        Z,
        RuntimeError,
        "pass use_reentrant=False",
    ),
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
    "dropout": (
        lambda: blocks(nn.Dropout(0.1)),
        Z,
        RuntimeError,
        r"decoder\[2\]\[0\] draws at random",
    ),
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
    assert "\n" not in str(caught.value) and "0x" not in str(caught.value)


def test_advice_is_given_only_where_it_is_the_cause():
    """What fails behind the first layer says nothing of the latents, nor does a dtype."""
    module = nn.Sequential(linear(), nn.Linear(5, 2))
    with pytest.raises(RuntimeError, match=r"in decoder\[1\]: a and b must have") as caught:
        decode_with_jacobian(module, Z)
    assert "latents" not in str(caught.value) and "Unflatten" not in str(caught.value)
    for function in (lambda h: h @ torch.ones(5, 5), lambda h: h.view(7, 7)):
        with pytest.raises(RuntimeError, match="decoder fails") as caught:
            decode_with_jacobian(returns(function), Z)
        assert "latents" not in str(caught.value)


def test_layers_are_named_as_they_are_written():
    assert layer_name("") == "decoder"
    assert layer_name("0.blocks.12.conv") == "decoder[0].blocks[12].conv"
    assert layer_name("parts.a-b.0") == "decoder.parts['a-b'][0]"


def test_how_to_train_with_batch_norm_is_what_works():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(M, 6), nn.BatchNorm1d(6), nn.Tanh()).double()
    z = torch.randn(8, M, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="a few plain forward passes in training mode"):
        decode_with_jacobian(module, z)
    for _ in range(3):
        module(z)
    module[1].eval()
    decode_with_jacobian(module, z)[1].square().sum().backward()
    assert module[1].weight.grad.abs().min() > 0
    assert module[1].running_mean.abs().min() > 0


def _gaussian(**changed):
    given = {"loc": torch.rand(3, 5), "jacobian": torch.rand(3, M, 5), "latent_var": LOG_VAR.exp()}
    return sf.LinearizedGaussian(**{**given, **changed}, noise_var=0.1)


def _low_rank(**changed):
    given = {"residual": torch.rand(3, 5), "jacobian": torch.rand(3, M, 5), "latent_var": -LOG_VAR}
    return sf.low_rank_log_prob(**{**given, **changed}, noise_var=0.1)


LOG_VAR = torch.full((3, M), -1.0)
DATA = {"x": torch.rand(3, 3), "mean": Z, "log_var": LOG_VAR}
LATENTS = {"mean": Z, "log_var": LOG_VAR}
C = {"noise_var": 0.1}
TAKES_TENSORS = {
    "loss": (lambda **a: sf.SamplingFreeLoss(linear())(**a), {**DATA, "sample_weight": Z[:, 0]}),
    "elbo": (lambda **a: sf.sampling_free_elbo(linear(), **a), DATA),
    "pullback": (lambda **a: sf.pullback(linear(), **a), {"z": Z, "x": DATA["x"]}),
    "jacobian": (lambda **a: sf.decode_with_jacobian(linear(), **a), {"z": Z}),
    "check": (lambda **a: sf.check_decoder(linear(), **a), {"z": Z}),
    "low rank": (_low_rank, dict.fromkeys(("residual", "jacobian", "latent_var"))),
    "gaussian": (_gaussian, dict.fromkeys(("loc", "jacobian", "latent_var"))),
    "log_prob": (lambda **a: _gaussian().log_prob(**a), {"value": None}),
    "importance": (
        lambda **a: sf.evaluate.log_marginal_likelihood(linear(), **a, **C, samples=4),
        DATA,
    ),
    "sampled": (lambda **a: sf.evaluate.sampled_elbo(linear(), **a, **C), DATA),
    "gap": (lambda **a: sf.evaluate.objective_gap(linear(), **a, **C), DATA),
    "error": (
        lambda **a: sf.evaluate.squared_error_at_mean(linear(), **a),
        {"x": DATA["x"], "mean": Z},
    ),
    "conditioning": (lambda **a: sf.evaluate.conditioning(linear(), **a, **C), LATENTS),
    "collapse": (sf.evaluate.posterior_collapse, LATENTS),
    "mean": (sf.evaluate.mean_over_images, {"values": None}),
    "monte carlo": (sf.evaluate.monte_carlo_error, {"standard_error": None}),
    "taylor": (lambda **a: sf.evaluate.taylor_quality(linear(), **a), LATENTS),
    "gradients": (lambda **a: sf.evaluate.gradient_error(linear(), **a, **C), DATA),
    "step": (
        lambda **a: sf.make_graphed_step(linear(), None, None, **a, capture=False),
        {"x": DATA["x"]},
    ),
}


@pytest.mark.parametrize("name", TAKES_TENSORS)
def test_lists_and_tuples_are_no_tensors(name):
    function, given = TAKES_TENSORS[name]
    for key in given:
        for other in ([[1.0, 2.0]], (torch.ones(2),)):
            # What has no value here has one in the function.
            others = {k: v for k, v in given.items() if v is not None and k != key}
            with pytest.raises(TypeError, match=f"{key} is a .*: give a torch.Tensor"):
                function(**others, **{key: other})


@pytest.mark.slow
def test_no_deprecation_of_torch_reaches_the_user():
    """In a process of its own: some are said once."""
    program = """
import warnings
warnings.simplefilter("error", FutureWarning)
warnings.simplefilter("error", DeprecationWarning)
import torch
from torch import nn
import fastsfvae as sf
class Decoder(nn.Linear):
    def forward(self, z):
        h = super().forward(z)
        return nn.functional.huber_loss(h, torch.zeros_like(h), reduction="none")
x, mean, log_var = torch.rand(5, 4), torch.randn(5, 3), torch.zeros(5, 3)
sf.SamplingFreeLoss(Decoder(3, 4))(x, mean, log_var).backward()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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


def test_an_operation_without_a_rule_is_named_once():
    fallback._warned.clear()
    module = apply((12,), lambda h: F.huber_loss(h, torch.zeros_like(h), reduction="none"))()
    z = torch.randn(3, M, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"aten.huber_loss.* in decoder.*has no tangent rule"):
        compare(module, z)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(module, z)


class Igamma(nn.Module):
    def forward(self, h):
        return torch.igamma(h.exp(), h.exp())


def test_operation_that_cannot_be_differentiated():
    module = nn.Sequential(nn.Linear(M, 4), Igamma())
    with pytest.raises(RuntimeError, match=r"igamma in decoder\[1\] has no tangent rule"):
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
