"""What a precision costs: values, gradients and a training run against float64, on the digits.

    python -m bench.precision --steps 500
    python -m bench.precision --bias
    python -m bench.precision --scales

The default MLP (m = 16) is trained in each precision from the same weights on the same batches.
Values and gradients are those of one batch at the weights that float64 ended at, rounded to
float32, so that every precision starts from the same numbers. Writes bench/results/precision.csv
and prints a markdown table; what needs a GPU is measured where one is, and TF32 is emulated on a
CPU besides (bench/tf32.py).

With --bias, how far emulated TF32 products move J, the loss and its gradient one way: celeba16's
decoder as initialised, 16 samples, against float64. Writes bench/results/tf32_bias.csv.

With --scales, what float16 tangents lose below their range and above it, by the `loss_scale` that
the gradients are finished at, against float64; at the loss's own size and at 1e-5 of it (the weight
of a term beside others, given as `sample_weight`). Writes bench/results/loss_scale.csv.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastsfvae as sf
from bench import tf32
from bench.problems import build_problem, products
from fastsfvae import models
from fastsfvae.data import digits
from fastsfvae.ground.atomic import write_text
from fastsfvae.ground.provenance import commit, device_name

RESULTS = Path(__file__).parent / "results"
NOISE_VAR, BATCH = 0.5, 64
BIASED, BIASED_BATCH = "celeba16", 16
# Of the measurement of loss scales: workloads with their batches, the samples' weights, scales.
SCALED = (("mnist2", 64), ("celeba16", 16))
SHARES = (1.0, 1e-5)
SCALES = tuple(2.0**power for power in (0, 4, 8, 12, 16))
# Steps whose mean is the final loss.
LAST = 50


class Precision(NamedTuple):
    """How numbers are held.

    Attributes:
        dtype: of the parameters and the data.
        autocast: of the layers' products, values and tangents; None for `dtype`.
        products: of float32 numbers in cuBLAS and cuDNN, "ieee" or "tf32".
        cut: what emulation does to their operands.
    """

    dtype: torch.dtype
    autocast: torch.dtype | None = None
    products: str = "ieee"
    cut: Callable[[Tensor], Tensor] | None = None


EXACT = "float64"
PRECISIONS = {
    EXACT: Precision(torch.float64),
    "float32": Precision(torch.float32),
    "float32, TF32 products": Precision(torch.float32, products="tf32"),
    "TF32 emulated, truncated": Precision(torch.float32, cut=tf32.truncated),
    "TF32 emulated, rounded": Precision(torch.float32, cut=tf32.rounded),
    "bfloat16 autocast": Precision(torch.float32, torch.bfloat16),
    "float16 autocast": Precision(torch.float32, torch.float16),
}


class Trained(NamedTuple):
    """A model and what became of its loss."""

    encoder: nn.Module
    decoder: nn.Module
    final_loss: float
    seconds: float


@contextmanager
def held(precision: Precision, device: str) -> Iterator[None]:
    """Compute in a precision within the block."""
    enabled = precision.autocast is not None
    emulated = nullcontext() if precision.cut is None else tf32.Emulated(precision.cut)
    with products(precision.products), torch.autocast(device, precision.autocast, enabled):
        with emulated:
            yield


def fresh_model(seed: int, precision: Precision, device: str) -> tuple[nn.Module, nn.Module]:
    """(encoder, decoder) of the same weights in every precision."""
    torch.manual_seed(seed)
    encoder, decoder = models.build(models.ModelConfig())
    return encoder.to(device, precision.dtype), decoder.to(device, precision.dtype)


def train(images: Tensor, steps: int, seed: int, precision: Precision) -> Trained:
    """Train on batches that depend on the seed alone.

    Args:
        images: uint8 ``[N, 1, 28, 28]``, on the device.
        steps: of Adam, at its default rate.
        seed: of the weights and of the order.
        precision: what to compute in.
    """
    device = images.device.type
    encoder, decoder = fresh_model(seed, precision, device)
    loss_of = sf.SamplingFreeLoss(decoder, noise_var=NOISE_VAR)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()])
    order = torch.Generator().manual_seed(seed)
    losses, started = [], time.perf_counter()
    for _ in range(steps):
        rows = torch.randint(len(images), (BATCH,), generator=order).to(images.device)
        x = images[rows].to(precision.dtype) / 255
        with held(precision, device):
            loss = loss_of(x, *encoder(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    final = float(torch.stack(losses[-LAST:]).double().mean())
    return Trained(encoder, decoder, final, time.perf_counter() - started)


def held_out_elbo(trained: Trained, images: Tensor) -> float:
    """Sampled ELBO in nats an image, in float64 and with the same noise for every model."""
    encoder, decoder = (copy.deepcopy(m).double() for m in (trained.encoder, trained.decoder))
    x = images.double() / 255
    with torch.no_grad():
        mean, log_var = encoder(x)
    generator = torch.Generator(x.device).manual_seed(0)
    settings = {"noise_var": NOISE_VAR, "samples": 10, "generator": generator}
    return float(sf.evaluate.sampled_elbo(decoder, x, mean, log_var, **settings).elbo.mean())


def values_and_gradients(
    decoder: nn.Module, tensors: tuple[Tensor, ...], precision: Precision
) -> tuple[Tensor, Tensor]:
    """(objective [B], the gradients of its mean in (x, mean, log_var) and the weights), float64."""
    decoder = copy.deepcopy(decoder).to(precision.dtype)
    leaves = [t.to(precision.dtype).requires_grad_() for t in tensors]
    with held(precision, leaves[0].device.type):
        loss = sf.SamplingFreeLoss(decoder, noise_var=NOISE_VAR)
        value, terms = loss(*leaves, return_terms=True)
    gradients = torch.autograd.grad(value, [*leaves, *decoder.parameters()])
    return terms.elbo.double(), torch.cat([g.double().flatten() for g in gradients])


def measure(steps: int, seed: int, device: str, names: list[str]) -> list[dict[str, object]]:
    """A row for each precision, float64 first."""
    train_images, test_images = (digits(split).images.to(device) for split in ("train", "test"))
    runs = {}
    for name in names:
        runs[name] = train(train_images, steps, seed, PRECISIONS[name])
        print(f"{name}: {runs[name].seconds:.0f} s", flush=True)
    # Numbers that every precision holds exactly.
    decoder = copy.deepcopy(runs[EXACT].decoder).float()
    x = (test_images[:BATCH].double() / 255).float()
    with torch.no_grad():
        mean, log_var = (t.float() for t in runs[EXACT].encoder(x.double()))
    found = {
        name: values_and_gradients(decoder, (x, mean, log_var), PRECISIONS[name]) for name in names
    }
    rows, (values, gradient) = [], found[EXACT]
    best = held_out_elbo(runs[EXACT], test_images)
    for name, run in runs.items():
        mine, of_mine = found[name]
        rows.append(
            {
                "precision": name,
                "steps": steps,
                "seed": seed,
                "value_error_nats": float((mine - values).abs().max()),
                "gradient_error": float((of_mine - gradient).norm() / gradient.norm()),
                "final_loss": run.final_loss,
                "final_loss_change": run.final_loss - runs[EXACT].final_loss,
                "held_out_elbo": held_out_elbo(run, test_images),
                "held_out_elbo_change": held_out_elbo(run, test_images) - best,
                "device": device_name(device),
                "torch": torch.__version__,
                "commit": commit(),
            }
        )
    return rows


def measure_bias() -> list[dict[str, object]]:
    """A row for float32 and for each emulated precision: norms over float64's, less 1."""
    decoder, x, mean, log_var = build_problem(BIASED, BIASED_BATCH)[1:]
    inputs = tuple(t.detach() for t in (x, mean, log_var))

    def found(precision: Precision) -> dict[str, Tensor]:
        of_dtype = copy.deepcopy(decoder).to(precision.dtype)
        with held(precision, "cpu"):
            J = sf.decode_with_jacobian(of_dtype, inputs[1].to(precision.dtype))[1]
        elbo, gradient = values_and_gradients(decoder, inputs, precision)
        return {"jacobian": J.detach().double(), "loss": -elbo, "gradient": gradient}

    exact, rows = found(PRECISIONS[EXACT]), []
    for name, precision in PRECISIONS.items():
        if name != "float32" and precision.cut is None:
            continue
        row: dict[str, object] = {"precision": name, "decoder": BIASED, "batch": BIASED_BATCH}
        for key, value in found(precision).items():
            want = exact[key]
            # An error across it, as of a ReLU that flips, changes its size in the second order.
            row[f"{key}_bias"] = float(value.norm() / want.norm() - 1)
            row[f"{key}_error"] = float((value - want).norm() / want.norm())
        rows.append(row | {"torch": torch.__version__, "commit": commit()})
    return rows


def measure_scales() -> list[dict[str, object]]:
    """A row for each decoder, weight of the samples and scale; of all gradients as one vector."""
    rows = []
    for (name, batch), share in itertools.product(SCALED, SHARES):
        problem = build_problem(name, batch)
        tensors = [t.detach() for t in (problem.x, problem.mean, problem.log_var)]

        def gradient(
            precision: Precision, scale: float, problem=problem, tensors=tensors, share=share
        ):
            decoder = copy.deepcopy(problem.decoder).to(precision.dtype)
            leaves = [t.to(precision.dtype).requires_grad_() for t in tensors]
            loss_fn = sf.SamplingFreeLoss(decoder, noise_var=NOISE_VAR, reduction="sum")
            weights = torch.full((len(leaves[0]),), share / len(leaves[0]), dtype=precision.dtype)
            with held(precision, "cpu"):
                loss = loss_fn(*leaves, sample_weight=weights, loss_scale=scale)
            # As a scaler has it: up before the backward, down before the step.
            found = torch.autograd.grad(loss * scale, [*leaves, *decoder.parameters()])
            return torch.cat([g.double().flatten() / scale for g in found])

        exact = gradient(PRECISIONS[EXACT], 1.0)
        for scale in SCALES:
            mine = gradient(PRECISIONS["float16 autocast"], scale)
            finite = bool(mine.isfinite().all())
            rows.append(
                {
                    "decoder": name,
                    "batch": batch,
                    "weight": share,
                    "loss_scale": scale,
                    "gradient_error": float((mine - exact).norm() / exact.norm())
                    if finite
                    else "not finite",
                    "underflowed": float(((mine == 0) & (exact != 0)).double().mean()),
                    "torch": torch.__version__,
                    "commit": commit(),
                }
            )
    return rows


def markdown_of_scales(rows: list[dict[str, object]]) -> str:
    """A table of `measure_scales`."""
    lines = ["| decoder, B, weight | loss_scale | gradient, relative error | entries that are 0 |"]
    lines.append("|---|---|---|---|")
    for row in rows:
        error = row["gradient_error"]
        said = f"{error:.1e}" if isinstance(error, float) else error
        where = f"{row['decoder']}, {row['batch']}, {row['weight']:g}"
        cells = where, f"{row['loss_scale']:g}", said, f"{row['underflowed']:.2%}"
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def markdown_of_bias(rows: list[dict[str, object]]) -> str:
    """A table of `measure_bias`."""
    keys = ("jacobian", "loss", "gradient")
    lines = ["| precision | " + " | ".join(f"{key}: bias, error" for key in keys) + " |"]
    lines.append("|---" * (1 + len(keys)) + "|")
    for row in rows:
        cells = (f"{row[f'{key}_bias']:+.1e}, {row[f'{key}_error']:.1e}" for key in keys)
        lines.append(f"| {row['precision']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def markdown(rows: list[dict[str, object]]) -> str:
    """The table of the README; what was left out is named."""
    lines = [
        "| precision | largest error of a value, nats | gradient, relative | final loss "
        "| sampled ELBO, held out |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        changes = (
            f"{row['final_loss']:.3f} ({row['final_loss_change']:+.1e}) "
            f"| {row['held_out_elbo']:.3f} ({row['held_out_elbo_change']:+.1e})"
        )
        errors = f"{row['value_error_nats']:.1e} | {row['gradient_error']:.1e}"
        lines.append(f"| {row['precision']} | {errors} | {changes} |")
    for name in PRECISIONS.keys() - {row["precision"] for row in rows}:
        lines.append(f"| {name} | not measured on a GPU yet | | | |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure, write, print."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.precision", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bias", action="store_true", help="emulated TF32's bias alone")
    parser.add_argument("--scales", action="store_true", help="float16 by loss_scale alone")
    parser.add_argument("--out", type=Path, help="the CSV file")
    options = parser.parse_args()
    if options.bias:
        rows = measure_bias()
        _write(options.out or RESULTS / "tf32_bias.csv", rows)
        print(markdown_of_bias(rows))
        return
    if options.scales:
        rows = measure_scales()
        _write(options.out or RESULTS / "loss_scale.csv", rows)
        print(markdown_of_scales(rows))
        return
    names = [n for n, p in PRECISIONS.items() if options.device != "cpu" or p.products == "ieee"]
    rows = measure(options.steps, options.seed, options.device, names)
    _write(options.out or RESULTS / "precision.csv", rows)
    print(markdown(rows))


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


if __name__ == "__main__":
    main()
