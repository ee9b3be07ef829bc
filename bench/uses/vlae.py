"""Variational Laplace beside the other objectives on the digits: `python -m bench.uses.vlae`.

The default MLP, m = 16, c = 0.5, Adam at 1e-3, batches of 64; one seed. First all for the same
steps, their seconds counted; then the cheaper ones again for as many steps as take the seconds of
`vlae`. Judged on 500 test digits by the sampled ELBO (20 draws of q) and the log marginal
likelihood (500 weights of "defensive", and of "laplace" beside it), with the effective sample
sizes. Writes bench/results/uses/vlae.csv.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

import fastsfvae as sf
from bench.command import make_parser
from bench.uses.table import Row, publish
from fastsfvae.data import digits
from fastsfvae.models import ModelConfig, build
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.objective import make_objective

M, NOISE_VAR, BATCH, TEST = 16, 0.5, 64, 500
METHODS: dict[str, dict[str, Any]] = {
    "sampling": {"method": "sampling"},
    "sampling-free, precision": {"method": "sampling-free"},
    "sampling-free, expected": {"method": "sampling-free", "likelihood": "expected"},
    "vlae, sampled": {"method": "vlae"},
    "vlae, closed form": {"method": "vlae", "bound": "closed-form"},
}


def train(settings: dict[str, Any], steps: int, images: Tensor) -> tuple[Any, Any, float]:
    """Encoder, decoder and the seconds that the steps took."""
    torch.manual_seed(0)
    config = TrainConfig(noise_var=NOISE_VAR, latent_dim=M, steps=steps, **settings)
    encoder, decoder = build(ModelConfig("mlp", M, (1, 28, 28)))
    objective = make_objective(config, decoder)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    generator, start = torch.Generator().manual_seed(1), 0.0
    for step in range(steps):
        if step == 5:
            # Traces are not counted.
            start = time.perf_counter()
        x = images[torch.randint(len(images), (BATCH,), generator=generator)]
        loss = objective(x, *encoder(x), generator=generator).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder, decoder, (time.perf_counter() - start) * steps / (steps - 5)


def judge(name: str, steps: int, images: Tensor, test: Tensor) -> tuple[list[Row], float]:
    encoder, decoder, seconds = train(METHODS[name], steps, images)
    with torch.no_grad():
        posterior = encoder(test)
    given = decoder, test, *posterior
    options: dict[str, Any] = {"noise_var": NOISE_VAR}
    bound = sf.evaluate.sampled_elbo(
        *given, samples=20, generator=torch.Generator().manual_seed(2), **options
    )
    found = {"sampled ELBO": bound.elbo.mean()}
    for proposal in ("posterior", "defensive", "laplace"):
        weights = sf.evaluate.log_marginal_likelihood(
            *given,
            samples=500,
            proposal=proposal,
            generator=torch.Generator().manual_seed(3),
            **options,
        )
        found[f"log ML, {proposal}"] = weights.estimate.mean()
        found[f"effective samples of 500, {proposal}"] = weights.effective_samples.median()
    case = f"digits, {steps} steps"
    rows = [
        Row(case, name, quantity, steps, 1e3 * seconds / steps, value=float(value))
        for quantity, value in found.items()
    ]
    return rows, seconds


def main() -> None:
    parser = make_parser("uses.vlae", __doc__)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    images, test = (digits(s).images.unsqueeze(1).float() / 255 for s in ("train", "test"))
    images, test = images.view(-1, 1, 28, 28), test[:TEST].view(-1, 1, 28, 28)
    rows, seconds = [], {}
    for name in METHODS:
        found, seconds[name] = judge(name, options.steps, images, test)
        rows += found
    for name in METHODS:
        if not name.startswith("vlae"):
            steps = round(options.steps * seconds["vlae, sampled"] / seconds[name])
            rows += judge(name, steps, images, test)[0]
    publish("vlae", rows)


if __name__ == "__main__":
    main()
