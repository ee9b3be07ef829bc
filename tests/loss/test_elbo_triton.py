"""The objective on the Triton backend: values and every gradient against the float64 oracle."""

import pytest
import torch
from torch import nn

import fastsfvae as sf
from tests._triton import DEVICE, requires_triton

pytestmark = requires_triton


def problem(m, activation, dtype, device):
    torch.manual_seed(m)
    layers = nn.Linear(m, 12), activation(), nn.Linear(12, 30), activation(), nn.Linear(30, 35)
    decoder = nn.Sequential(*layers, nn.Unflatten(1, (5, 7)))
    x, mean, log_var = torch.rand(3, 5, 7), torch.randn(3, m), torch.randn(3, m) - 1
    tensors = [t.to(device, dtype) for t in (x, mean, log_var)]
    tensors += [torch.tensor(v, device=device, dtype=dtype) for v in (0.5, 0.75)]
    return decoder.to(device, dtype), [t.requires_grad_() for t in tensors]


def evaluate(decoder, tensors, likelihood, backend):
    x, mean, log_var, noise_var, gamma = tensors
    terms = sf.sampling_free_elbo(
        *(decoder, x, mean, log_var), noise_var=noise_var, gamma=gamma, likelihood=likelihood,
        backend=backend,
    )  # fmt: skip
    wanted = [*tensors[: 4 if likelihood == "expected" else 5], *decoder.parameters()]
    cotangent = torch.tensor([0.3, -1.2, 0.8], dtype=x.dtype, device=x.device)
    return [terms.elbo, *torch.autograd.grad(terms.elbo @ cotangent, wanted)]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.SiLU])
@pytest.mark.parametrize("likelihood", ["precision", "mixture", "normalized", "expected"])
@pytest.mark.parametrize("m", [1, 5, 18])
def test_objective_and_gradients(m, likelihood, activation):
    decoder, tensors = problem(m, activation, torch.float32, DEVICE)
    got = evaluate(decoder, tensors, likelihood, "triton")
    plain = evaluate(decoder, tensors, likelihood, "reference")
    exact = problem(m, activation, torch.float64, DEVICE)
    want = evaluate(*exact, likelihood, "reference")
    eps = torch.finfo(torch.float32).eps
    # One scale for all: a gradient whose terms cancel has rounding of their size.
    scale = max(oracle.abs().max() for oracle in want[1:])
    for mine, peer, oracle in zip(got, plain, want, strict=True):
        worst = (mine.double() - oracle).abs().max()
        assert worst <= 2 * (peer.double() - oracle).abs().max() + 8 * eps * max(
            scale, oracle.abs().max()
        )


def test_second_order_is_refused_with_the_way_out():
    decoder, (x, mean, log_var, *_) = problem(2, nn.Tanh, torch.float32, DEVICE)
    value = sf.sampling_free_elbo(decoder, x, mean, log_var, backend="triton").elbo.sum()
    with pytest.raises(RuntimeError, match='backend="torch"'):
        torch.autograd.grad(value, mean, create_graph=True)
