"""Decoder and loss, forward and backward, against peers: `python -m bench.decoder_loss`.

Every candidate computes one training step's loss and all its gradients from given (mean, log_var);
values and gradients are checked against each other before any is timed. The peers give
LowRankMultivariateNormal the Jacobian of vmap(jacfwd) or of vmap(jvp) over the unit vectors.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributions import LowRankMultivariateNormal

import fastsfvae as sf
from bench import ledger
from bench.timing import interleave
from fastsfvae.models import ModelConfig, build

NOISE_VAR = 0.5
COLOUR, DIGIT = (3, 64, 64), (1, 28, 28)
# DESIGN's workloads: model, m, B, image shape, output activation.
WORKLOADS = {
    "celeba16": ("conv", 16, 64, COLOUR, "none"),
    "celeba32": ("conv", 32, 64, COLOUR, "none"),
    "celeba64": ("conv", 64, 64, COLOUR, "none"),
    "celeba16-sigmoid": ("conv", 16, 64, COLOUR, "sigmoid"),
    "mnist2": ("mlp", 2, 64, DIGIT, "none"),
    "collapse200": ("mlp", 200, 1000, DIGIT, "none"),
    "tanh": ("tanh", 50, 20, DIGIT, "none"),
}

Step = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def problem(name: str, batch: int | None = None) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """(decoder, x, mean, log_var) in float32, the latents with gradients wanted."""
    model, m, default, shape, activation = WORKLOADS[name]
    torch.manual_seed(0)
    config = ModelConfig(model, latent_dim=m, image_shape=shape, output_activation=activation)
    _, decoder = build(config)
    size = batch or default
    latents = torch.randn(size, m), torch.randn(size, m) - 2
    return decoder, torch.rand(size, *shape), *(t.requires_grad_() for t in latents)


def ours(decoder: nn.Module, x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """This library, torch backend."""
    loss = sf.SamplingFreeLoss(decoder, noise_var=NOISE_VAR, gamma=1.0, backend="torch")
    return loss(x, mean, log_var)


def _objective(output: Tensor, jacobian: Tensor, x: Tensor, mean: Tensor, log_var: Tensor):
    factor = jacobian.flatten(1, -2) * (0.5 * log_var).exp().unsqueeze(1)
    loc = output.flatten(1)
    noise = torch.full_like(loc, NOISE_VAR)
    log_prob = LowRankMultivariateNormal(loc, factor, noise).log_prob(x.flatten(1))
    kl = 0.5 * (log_var.exp() + mean.square() - 1 - log_var).sum(-1)
    return (kl - log_prob).mean()


def jacfwd(decoder: nn.Module, x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """One jacfwd a sample, under vmap."""

    def one(z: Tensor) -> tuple[Tensor, Tensor]:
        y = decoder(z[None])[0]
        return y, y

    jacobian, output = torch.func.vmap(torch.func.jacfwd(one, has_aux=True))(mean)
    return _objective(output, jacobian, x, mean, log_var)


def jvp(decoder: nn.Module, x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """One vmap over the unit vectors of a jvp of the whole batch."""

    def push(direction: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(decoder, (mean,), (direction.expand_as(mean),))

    eye = torch.eye(mean.shape[1], dtype=mean.dtype, device=mean.device)
    output, jacobian = torch.func.vmap(push, out_dims=(None, -1))(eye)
    return _objective(output, jacobian, x, mean, log_var)


CANDIDATES: dict[str, Step] = {
    "fastsfvae[torch]": ours,
    "vmap(jacfwd)": jacfwd,
    "vmap(jvp)": jvp,
}


def run(step: Step, tensors: tuple) -> tuple[Tensor, ...]:
    """One step: (loss, gradients of mean, log_var and every parameter)."""
    decoder, x, mean, log_var = tensors
    loss = step(decoder, x, mean, log_var)
    return loss, *torch.autograd.grad(loss, [mean, log_var, *decoder.parameters()])


def disagreement(step: Step, tensors: tuple) -> float:
    """Largest difference from this library's results in float64, relative to each one's largest.

    On the first two samples, so that float64 does not take longer than the run.
    """
    decoder, *data = tensors
    few = tuple(t.detach()[:2].requires_grad_(t.requires_grad) for t in data)
    got = run(step, (decoder, *few))
    exact = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in few)
    want = run(ours, (decoder.double(), *exact))
    decoder.float()
    pairs = zip(got, want, strict=True)
    return max(float((g - w).detach().abs().max() / w.detach().abs().max()) for g, w in pairs)


def main() -> None:
    """Print the table and append its rows to the ledger."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", choices=WORKLOADS, action="append", help="default: celeba16")
    parser.add_argument("--batch", type=int, help="default: the workload's own")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="also the peers' compiled forms")
    parser.add_argument("--no-ledger", action="store_true")
    options = parser.parse_args()
    candidates = dict(CANDIDATES)
    if options.compile:
        for name in list(CANDIDATES)[1:]:
            candidates[f"{name} compiled"] = torch.compile(CANDIDATES[name])
    for name in options.workload or ["celeba16"]:
        tensors = problem(name, options.batch)
        for label, step in list(candidates.items()):
            error = disagreement(step, tensors)
            if error > 1e-3:
                print(f"{label}: not timed, its error against float64 is {error:.1e}")
                del candidates[label]
        steps = {label: partial(run, step, tensors) for label, step in candidates.items()}
        timings = interleave(steps, options.rounds)
        shape = f"{name} B={len(tensors[1])}"
        print(f"\n{shape} float32, forward+backward, {torch.get_num_threads()} threads")
        best = timings["fastsfvae[torch]"].p50
        for label, t in timings.items():
            print(
                f"{label:24s} {t.p50:9.1f} ms  ({t.p20:.1f} to {t.p80:.1f})  {t.p50 / best:5.2f}x"
            )
        if not options.no_ledger:
            device = ledger.device_name("cpu")
            ledger.append("decoder_loss", "step", shape, "float32", timings, device)


if __name__ == "__main__":
    main()
