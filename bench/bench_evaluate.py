"""Log marginal likelihood of the digits: `python -m bench.bench_evaluate`.

Times 5,000 importance samples of 1,000 digits (or what is asked for) with the default MLP decoder,
m = 16, untrained, and the bare decoder on latents in passes of 1,000 beside it: the share of its
rate that the estimate reaches. CPU only: nothing here waits for a device.
"""

from __future__ import annotations

import argparse
import time

import torch

from fastsfvae import evaluate
from fastsfvae.data import digits
from fastsfvae.data.pixels import to_unit
from fastsfvae.models import ModelConfig, build

_BARE_ROWS = 1000
_BARE_PASSES = 100


def bare_rate(decoder, m: int) -> float:
    z = torch.randn(_BARE_ROWS, m)
    with torch.no_grad():
        decoder(z)
        started = time.perf_counter()
        for _ in range(_BARE_PASSES):
            decoder(z)
    return _BARE_ROWS * _BARE_PASSES / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.bench_evaluate",
        description="Time the log marginal likelihood of digits.",
    )
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--proposal", choices=evaluate.PROPOSALS, default="posterior")
    options = parser.parse_args()

    torch.manual_seed(0)
    config = ModelConfig()
    encoder, decoder = build(config)
    x = to_unit(digits("test").images[: options.images])
    with torch.no_grad():
        mean, log_var = encoder(x)
    # Before and after, so that a slow spell of the machine does not flatter either.
    before = bare_rate(decoder, config.latent_dim)
    started = time.perf_counter()
    evaluate.log_marginal_likelihood(
        *(decoder, x, mean, log_var),
        noise_var=0.5,
        samples=options.samples,
        proposal=options.proposal,
    )
    seconds = time.perf_counter() - started
    bare = (before + bare_rate(decoder, config.latent_dim)) / 2
    rate = options.images * options.samples / seconds
    print(
        f"{options.images} images, {options.samples} samples, {options.proposal}: {seconds:.1f} s, "
        f"{rate:,.0f} decodes/s, {rate / bare:.0%} of the bare decoder's {bare:,.0f} "
        f"({torch.get_num_threads()} threads)"
    )


if __name__ == "__main__":
    main()
