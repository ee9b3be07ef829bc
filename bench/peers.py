"""Everything that this library can be replaced by, with one signature each.

    LOG_PROBS        (J [B, m, n], r [B, n], h [B, m]) -> log N(r; 0, J^T diag(h) J + cI), [B]
    DECODER_LOSSES   make(decoder) -> loss(x, mean, log_var), the batch's sum of -objective
    STEPS            make(encoder, decoder) -> loss(x), the batch's mean

A maker raises ImportError where its package is not installed. Every peer is written as its users
would write it; those that give a Jacobian hand it to LowRankMultivariateNormal.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributions import LowRankMultivariateNormal

import fastsfvae as sf
from bench.problems import GAMMA, NOISE_VAR, Problem, autocast
from fastsfvae._ranges import span
from fastsfvae.likelihoods import gaussian_kl
from fastsfvae.objectives import Sampling, SamplingFree
from fastsfvae.step_comparison import vmap_jacfwd as vmap_jacfwd

LogProb = Callable[[Tensor, Tensor, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
# z [B, m] -> (output [B, *out], J [B, m, n]).
Jacobian = Callable[[Tensor], tuple[Tensor, Tensor]]
SETTINGS = {"noise_var": NOISE_VAR, "gamma": GAMMA}
OURS, TRITON = "fastsfvae[torch]", "fastsfvae[triton]"
# With every layer that has a fused kernel on it, and with none.
FUSED, UNFUSED = "fastsfvae[triton, fused]", "fastsfvae[triton, library]"


def _ours_log_prob(backend: str) -> LogProb:
    def log_prob(jacobian: Tensor, residual: Tensor, latent_var: Tensor) -> Tensor:
        return sf.low_rank_log_prob(
            residual, jacobian, latent_var, noise_var=NOISE_VAR, backend=backend
        )

    return log_prob


def lowrank_mvn(jacobian: Tensor, residual: Tensor, latent_var: Tensor) -> Tensor:
    """torch.distributions, differentiated by autograd."""
    factor = (latent_var.sqrt().unsqueeze(-1) * jacobian).mT
    noise = torch.full_like(residual, NOISE_VAR)
    return LowRankMultivariateNormal(torch.zeros_like(residual), factor, noise).log_prob(residual)


@functools.cache
def _compiler() -> LogProb:
    # Late: the compiler takes seconds to import.
    return torch.compile(lowrank_mvn, dynamic=False)


def _compiled_mvn(jacobian: Tensor, residual: Tensor, latent_var: Tensor) -> Tensor:
    return _compiler()(jacobian, residual, latent_var)


def linear_operator(jacobian: Tensor, residual: Tensor, latent_var: Tensor) -> Tensor:
    """linear_operator's inv_quad_logdet of a low-rank root plus a constant diagonal (Woodbury)."""
    from linear_operator import operators

    n = residual.shape[-1]
    factor = (latent_var.sqrt().unsqueeze(-1) * jacobian).mT
    noise = torch.full_like(residual[:, :1], NOISE_VAR)
    covariance = operators.LowRankRootAddedDiagLinearOperator(
        operators.LowRankRootLinearOperator(factor),
        operators.ConstantDiagLinearOperator(noise, diag_shape=n),
    )
    inv_quad, log_det = covariance.inv_quad_logdet(residual.unsqueeze(-1), logdet=True)
    return -0.5 * (n * math.log(2 * math.pi) + log_det + inv_quad)


LOG_PROBS: dict[str, LogProb] = {
    TRITON: _ours_log_prob("triton"),
    OURS: _ours_log_prob("torch"),
    "LowRankMultivariateNormal": lowrank_mvn,
    "LowRankMultivariateNormal compiled": _compiled_mvn,
    # The paper's formulas in plain torch, differentiated by autograd.
    "plain closed form": _ours_log_prob("reference"),
    "linear_operator": linear_operator,
}


def vmap_jvp(decoder: nn.Module) -> Jacobian:
    """One vmap over the unit vectors of a jvp of the whole batch."""

    def jacobian(z: Tensor) -> tuple[Tensor, Tensor]:
        def push(direction: Tensor) -> tuple[Tensor, Tensor]:
            return torch.func.jvp(decoder, (z,), (direction.expand_as(z),))

        eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        output, tangents = torch.func.vmap(push, out_dims=(None, 0))(eye)
        return output, tangents.flatten(2).transpose(0, 1)

    return jacobian


def tiled_jvp(decoder: nn.Module) -> Jacobian:
    """A single jvp of the batch repeated m times, each copy with its unit vector."""

    def jacobian(z: Tensor) -> tuple[Tensor, Tensor]:
        batch, m = z.shape
        eye = torch.eye(m, dtype=z.dtype, device=z.device)
        output, tangents = torch.func.jvp(
            decoder, (z.repeat_interleave(m, 0),), (eye.repeat(batch, 1),)
        )
        return output[::m], tangents.flatten(1).unflatten(0, (batch, m))

    return jacobian


def stochman(decoder: nn.Module) -> Jacobian:
    """The nnj layers of stochman over the decoder's own weights."""
    from stochman import nnj

    layers = []
    for layer in decoder:
        if isinstance(layer, nn.Unflatten):
            layers.append(nnj.Reshape(*layer.unflattened_size))
            continue
        # Its layers are torch's with more methods: the copy shares the parameters.
        layer = copy.copy(layer)
        layer.__class__ = getattr(nnj, type(layer).__name__)
        layers.append(layer)
    network = nnj.Sequential(*layers)

    def jacobian(z: Tensor) -> tuple[Tensor, Tensor]:
        output, columns = network(z, jacobian=True)
        return output, columns.flatten(1, -2).mT

    return jacobian


def with_torch_distributions(jacobian: Callable[[nn.Module], Jacobian], decoder) -> Loss:
    """The loss of a Jacobian by LowRankMultivariateNormal and autograd."""
    decode = jacobian(decoder)

    def loss(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
        output, columns = decode(mean)
        # At least float32 and out of autocast: nobody would want a bfloat16 Gram timed.
        with torch.autocast(x.device.type, enabled=False):
            loc = output.flatten(1).to(mean.dtype)
            columns = columns.to(mean.dtype)
            log_prob = lowrank_mvn(columns, x.flatten(1) - loc, log_var.exp())
            return (gaussian_kl(mean, log_var) - log_prob).sum()

    return loss


def _ours(backend: str, decoder: nn.Module) -> Loss:
    return sf.SamplingFreeLoss(decoder, reduction="sum", backend=backend, **SETTINGS)


def _with_layers(setting: str, decoder: nn.Module) -> Loss:
    loss = _ours("triton", decoder)

    def forced(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
        with sf.fused_layers(setting):
            return loss(x, mean, log_var)

    return forced


def _compiled(jacobian: Callable[[nn.Module], Jacobian], decoder: nn.Module) -> Loss:
    return torch.compile(with_torch_distributions(jacobian, decoder), dynamic=False)


DECODER_LOSSES: dict[str, Callable[[nn.Module], Loss]] = {
    TRITON: partial(_ours, "triton"),
    FUSED: partial(_with_layers, "always"),
    UNFUSED: partial(_with_layers, "never"),
    OURS: partial(_ours, "torch"),
    "vmap(jacfwd)": partial(with_torch_distributions, vmap_jacfwd),
    "vmap(jvp)": partial(with_torch_distributions, vmap_jvp),
    "vmap(jacfwd) compiled": partial(_compiled, vmap_jacfwd),
    "vmap(jvp) compiled": partial(_compiled, vmap_jvp),
    "tiled jvp": partial(with_torch_distributions, tiled_jvp),
    "stochman nnj": partial(with_torch_distributions, stochman),
}
# Compiling takes a minute each.
EAGER = tuple(name for name in DECODER_LOSSES if "compiled" not in name)


def _posterior(encoder: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    # As training does it: out of autocast's bfloat16.
    with span("encode"):
        mean, log_var = encoder(x)
    return mean.to(x.dtype), log_var.to(x.dtype)


def _objective_step(make: Callable[[nn.Module], Callable], encoder, decoder):
    objective = make(decoder)
    return lambda x: objective(x, *_posterior(encoder, x)).loss


def _sampling_free(backend: str) -> Callable:
    make = lambda decoder: SamplingFree(decoder, backend=backend, **SETTINGS)  # noqa: E731
    return partial(_objective_step, make)


def _jacfwd_step(encoder: nn.Module, decoder: nn.Module) -> Callable[[Tensor], Tensor]:
    loss = with_torch_distributions(vmap_jacfwd, decoder)
    return lambda x: loss(x, *_posterior(encoder, x)) / len(x)


SAMPLING = "sampling"
STEPS: dict[str, Callable[[nn.Module, nn.Module], Callable[[Tensor], Tensor]]] = {
    SAMPLING: partial(_objective_step, partial(Sampling, noise_var=NOISE_VAR)),
    TRITON: _sampling_free("triton"),
    OURS: _sampling_free("torch"),
    "vmap(jacfwd)": _jacfwd_step,
}


def loss_and_gradients(loss: Loss, problem: Problem, dtype: str) -> tuple[Tensor, ...]:
    """(loss, gradients of mean, log_var and every parameter of the decoder)."""
    with autocast(dtype, problem.x.device.type):
        value = loss(problem.x, problem.mean, problem.log_var)
    return value.detach(), *torch.autograd.grad(value, problem.leaves)


def exact_gradients(problem: Problem) -> tuple[Tensor, ...]:
    """The same in float64."""
    wide = [t.detach().double() for t in (problem.x, problem.mean, problem.log_var)]
    decoder = copy.deepcopy(problem.decoder).double()
    x, mean, log_var = wide
    exact = Problem(problem.encoder, decoder, x, mean.requires_grad_(), log_var.requires_grad_())
    return loss_and_gradients(DECODER_LOSSES["vmap(jacfwd)"](decoder), exact, "float64")
