"""Gaussians through a decoder, and probes: `python -m bench.uses.uncertainty`.

    push     LinearizedGaussian.from_decoder with full covariances and its log-density, with all
             gradients, against vmap(jacrev) and vmap(jacfwd) with torch's LowRankMultivariateNormal
    kalman   kalman_update against the textbook's n x n update with the same
    full     a step of the loss with a full covariance beside one with a diagonal
    probes   "expected" with K of m = 256 tangents: the variance of the estimated trace against K,
             Hadamard rows beside independent signs; and a step's time beside a sampling step's

Values are compared with float64 before anything is timed; all candidates take turns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributions import LowRankMultivariateNormal

import fastsfvae as sf
from bench.command import make_parser
from bench.uses.table import Row, compare, publish
from fastsfvae._spread import spread_of
from fastsfvae.models import ModelConfig, build
from fastsfvae.objectives import Sampling

M, BATCH, N, NOISE_VAR = 16, 64, 784, 0.5
WIDE, PROBES, DRAWS = 256, (1, 4, 16, 64, 256), 400
# Of float32 values against float64.
TOLERANCE = 1e-3


def mlp(m: int = M) -> nn.Module:
    """Random, as wide as the digits' default."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(m, 256), nn.ReLU(), nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, N))
    )


def by_func(transform: Callable, decoder: nn.Module, z: Tensor) -> tuple[Tensor, Tensor]:
    """f(z) and J [B, n, m]."""

    def one(z: Tensor) -> tuple[Tensor, Tensor]:
        output = decoder(z[None])[0]
        return output, output

    J, output = torch.func.vmap(transform(one, has_aux=True))(z)
    return output, J


PEERS = {"vmap(jacrev)": torch.func.jacrev, "vmap(jacfwd)": torch.func.jacfwd}


def densities(decoder: nn.Module, x: Tensor, mean: Tensor, L: Tensor) -> dict[str, Callable]:
    def ours() -> Tensor:
        pushed = sf.LinearizedGaussian.from_decoder(decoder, mean, L @ L.mT, NOISE_VAR)
        return pushed.log_prob(x)

    def peer(transform: Callable) -> Tensor:
        output, J = by_func(transform, decoder, mean)
        noise = torch.full_like(output, NOISE_VAR)
        return LowRankMultivariateNormal(output, J @ L, noise).log_prob(x)

    peers = {f"{name}, LowRankMultivariateNormal": partial(peer, t) for name, t in PEERS.items()}
    return {"from_decoder": ours} | peers


def updates(decoder: nn.Module, x: Tensor, mean: Tensor, L: Tensor) -> dict[str, Callable]:
    def ours() -> Tensor:
        return sf.kalman_update(decoder, x, mean, L @ L.mT, NOISE_VAR).mean

    def peer(transform: Callable) -> Tensor:
        output, J = by_func(transform, decoder, mean)
        P = L @ L.mT
        S = J @ P @ J.mT + NOISE_VAR * torch.eye(N, dtype=x.dtype)
        gain = torch.linalg.solve(S, J @ P).mT
        return mean + (gain @ (x - output).unsqueeze(-1)).squeeze(-1)

    peers = {f"{name}, n x n": partial(peer, t) for name, t in PEERS.items()}
    return {"kalman_update": ours} | peers


def against_peers(name: str, make: Callable, rounds: int, batch: int) -> list[Row]:
    decoder = mlp()
    mean = torch.randn(batch, M)
    L = 0.3 * torch.randn(batch, M, M).tril() + 0.5 * torch.eye(M)
    x = decoder(mean).detach() + torch.randn(batch, N)
    exact = make(copy.deepcopy(decoder).double(), *(t.double() for t in (x, mean, L)))
    want = exact[next(iter(exact))]()
    mean, L = mean.requires_grad_(), L.requires_grad_()
    leaves, runs = [mean, L, *decoder.parameters()], {}
    for label, value in make(decoder, x, mean, L).items():
        error = float((value().double() - want).abs().max() / want.abs().max())
        if not error <= TOLERANCE:
            raise RuntimeError(f"{label} is wrong by {error:.1e}")
        runs[label] = lambda value=value: torch.autograd.grad(value().sum(), leaves)
    return compare(f"{name}, B = {batch}, m = {M}, n = {N}", "with gradients", runs, rounds)


def full(rounds: int) -> list[Row]:
    decoder, mean = mlp(), torch.randn(BATCH, M, requires_grad=True)
    log_var = torch.zeros(BATCH, M, requires_grad=True)
    L = torch.eye(M).repeat(BATCH, 1, 1).requires_grad_()
    x, loss_fn = torch.rand(BATCH, N), sf.SamplingFreeLoss(decoder)
    parameters = list(decoder.parameters())

    def step(spread: Tensor) -> None:
        torch.autograd.grad(loss_fn(x, mean, spread), [mean, spread, *parameters])

    runs = {"full covariance": lambda: step(L), "diagonal": lambda: step(log_var)}
    return compare(f"loss, B = {BATCH}, m = {M}", "with gradients", runs, rounds)


def variances() -> list[Row]:
    """Of the trace of diag(s) G diag(s), relative to it, for both kinds of probes."""
    torch.manual_seed(0)
    decoder, mean = mlp(WIDE), torch.randn(1, WIDE)
    log_var = torch.randn(1, WIDE) - 1
    gram = sf.pullback(decoder, mean).gram[0].double()
    s = torch.exp(0.5 * log_var[0]).double()
    A = s[:, None] * gram.detach() * s
    trace, rows = A.trace(), []
    for probes in PROBES:
        kinds: dict[str, list[Tensor]] = {"Hadamard": [], "independent signs": []}
        for _ in range(DRAWS):
            spread = spread_of(mean, log_var, probes, None)
            # All of them: the diagonal itself.
            v = torch.diag(s)[:, None] if spread is None else spread.tangents.double()
            v = v[:, 0] / s
            kinds["Hadamard"].append(torch.einsum("ki,ij,kj->", v, A, v))
            v = torch.randint(0, 2, (probes, WIDE)).double() * 2 - 1
            kinds["independent signs"].append(torch.einsum("ki,ij,kj->", v, A, v) / probes)
        for kind, found in kinds.items():
            deviation = (torch.stack(found) - trace).square().mean().sqrt() / trace
            rows.append(
                Row(
                    f"trace, m = {WIDE}", kind, "relative deviation", probes, value=float(deviation)
                )
            )
    return rows


def steps(rounds: int) -> list[Row]:
    """A whole step of the networks that train takes, m = 256."""
    torch.manual_seed(0)
    encoder, decoder = build(ModelConfig("mlp", WIDE, (1, 28, 28)))
    x, runs = torch.rand(BATCH, 1, 28, 28), {}
    parameters = [*encoder.parameters(), *decoder.parameters()]
    sampling = Sampling(decoder, noise_var=NOISE_VAR)
    losses: dict[str, Callable] = {"sampling": lambda *q: sampling(x, *q).loss}
    for probes in (*PROBES[:-1], None):
        label = "all tangents" if probes is None else f"{probes} probes"
        losses[label] = sf.SamplingFreeLoss(decoder, likelihood="expected", probes=probes)
    for label, loss in losses.items():
        given = () if label == "sampling" else (x,)
        runs[label] = lambda loss=loss, given=given: torch.autograd.grad(
            loss(*given, *encoder(x)), parameters
        )
    return compare(f"step, B = {BATCH}, m = {WIDE}", "with gradients", runs, rounds)


def main() -> None:
    parser = make_parser("uses.uncertainty", __doc__)
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    rows = against_peers("push", densities, rounds, BATCH)
    rows += against_peers("kalman", updates, rounds, 16)
    publish("uncertainty", [*rows, *full(rounds), *variances(), *steps(rounds)])


if __name__ == "__main__":
    main()
