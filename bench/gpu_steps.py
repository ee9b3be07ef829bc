"""The decoder's objective with its Jacobian, whole training steps, and a short training."""

from __future__ import annotations

import copy
import csv
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastsfvae as sf
from bench.gpu_measure import Case, Context, autocast, products, relative_error
from bench.timing import Timing
from fastsfvae import training
from fastsfvae.config import TrainConfig
from fastsfvae.elbo import gaussian_kl
from fastsfvae.models import ModelConfig, build
from fastsfvae.objectives import Objective, Sampling, SamplingFree

PRECISIONS = ("tf32", "float32", "bfloat16")
NOISE_VAR = 0.5
# Samples that are computed again in float64.
CHECKED = 4

Tensors = tuple[Tensor, Tensor, Tensor]
Loss = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def _ours(backend: str) -> Loss:
    def loss(decoder, x, mean, log_var):
        settings = {"noise_var": NOISE_VAR, "gamma": 1.0, "backend": backend}
        return sf.SamplingFreeLoss(decoder, reduction="sum", **settings)(x, mean, log_var)

    return loss


def _with_torch_distributions(output, jacobian, x, mean, log_var) -> Tensor:
    """The same objective by LowRankMultivariateNormal; jacobian is ``[B, m, n]``."""
    # At least float32 and out of autocast: a bfloat16 Gram is not what anyone would want timed.
    with torch.autocast(x.device.type, enabled=False):
        factor = (torch.exp(0.5 * log_var).unsqueeze(-1) * jacobian.to(mean.dtype)).mT
        loc = output.flatten(1).to(mean.dtype)
        normal = torch.distributions.LowRankMultivariateNormal(
            loc, factor, torch.full_like(loc, NOISE_VAR)
        )
        return (gaussian_kl(mean, log_var) - normal.log_prob(x.flatten(1))).sum()


def vmap_jacfwd(decoder, x, mean, log_var) -> Tensor:
    """torch.func.vmap(jacfwd), sample by sample."""

    def decode(z):
        output = decoder(z.unsqueeze(0)).squeeze(0)
        return output, output

    jacobian, output = torch.func.vmap(torch.func.jacfwd(decode, has_aux=True))(mean)
    jacobian = jacobian.flatten(1, -2).mT
    return _with_torch_distributions(output, jacobian, x, mean, log_var)


def vmap_jvp(decoder, x, mean, log_var) -> Tensor:
    """torch.func.vmap(jvp), one tangent direction of the whole batch at a time."""

    def push(direction):
        return torch.func.jvp(decoder, (mean,), (direction.expand_as(mean),))

    directions = torch.eye(mean.shape[1], device=mean.device, dtype=mean.dtype)
    output, tangents = torch.func.vmap(push, out_dims=(None, 0))(directions)
    jacobian = tangents.flatten(2).transpose(0, 1)
    return _with_torch_distributions(output, jacobian, x, mean, log_var)


DECODER_LOSSES: dict[str, Loss] = {
    "fastsfvae[triton]": _ours("triton"),
    "fastsfvae[torch]": _ours("torch"),
    "vmap(jacfwd)+LowRankMultivariateNormal": vmap_jacfwd,
    "vmap(jvp)+LowRankMultivariateNormal": vmap_jvp,
}


def _problem(context: Context, m: int) -> tuple[nn.Module, nn.Module, Tensors]:
    """(encoder, decoder, (x, mean, log_var)) of the paper's B.1, channels-last."""
    name, shape, batch = ("mlp", (1, 4, 4), 2) if context.quick else ("conv", (3, 64, 64), 64)
    torch.manual_seed(0)
    config = ModelConfig(name, m, shape, init="kaiming")
    encoder, decoder = (
        module.to(context.device, memory_format=torch.channels_last) for module in build(config)
    )
    x = torch.rand(batch, *shape).to(context.device, memory_format=torch.channels_last)
    mean = torch.randn(batch, m).to(context.device).requires_grad_()
    log_var = (torch.randn(batch, m) / 4 - 1).to(context.device).requires_grad_()
    return encoder, decoder, (x, mean, log_var)


def _flops(decoder: nn.Module, z: Tensor) -> float:
    """Floating-point operations of the primal and m tangents, forward and twice that backward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder(z[:1])
    return 3.0 * counter.get_total_flops() * z.shape[0] * (z.shape[1] + 1)


def _gradients(loss: Loss, decoder, tensors: Tensors, dtype: str) -> tuple[Tensor, ...]:
    x, mean, log_var = tensors
    with autocast(dtype, mean.device.type):
        value = loss(decoder, x, mean, log_var)
    leaves = (mean, log_var, *decoder.parameters())
    return value.detach(), *torch.autograd.grad(value, leaves)


def decoder_loss(context: Context) -> None:
    """Objective and all gradients of the paper's decoder: celeba16, 32, 64."""
    for m in (2,) if context.quick else (16, 32, 64):
        _, decoder, tensors = _problem(context, m)
        flops = _flops(decoder, tensors[1].detach())
        few = tuple(t.detach()[:CHECKED].requires_grad_(t.requires_grad) for t in tensors)
        want = _exact_gradients(decoder, few)
        for dtype in PRECISIONS:
            for name, loss in DECODER_LOSSES.items():

                def run(loss=loss, dtype=dtype, decoder=decoder, tensors=tensors):
                    return _gradients(loss, decoder, tensors, dtype)

                def error(_, loss=loss, dtype=dtype, decoder=decoder, few=few, want=want):
                    return relative_error(_gradients(loss, decoder, few, dtype), want)

                case = Case(
                    *("decoder+loss", name, "both"),
                    *(_shape(tensors), dtype),
                    lambda run=run: [run],
                    error,
                    flops=flops,
                    launches=("eager", "graph") if name.startswith("fastsfvae") else ("eager",),
                )
                with products(dtype):
                    context.run(case)


def _exact_gradients(decoder: nn.Module, tensors: Tensors) -> tuple[Tensor, ...]:
    """By torch.func and torch.distributions in float64: none of this library's code."""
    double = copy.deepcopy(decoder).double()
    wide = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in tensors)
    return _gradients(vmap_jacfwd, double, wide, "float64")


def _shape(tensors: Tensors) -> str:
    x, mean, _ = tensors
    return f"B={len(x)} n={x[0].numel()} m={mean.shape[1]} channels-last"


def training_step(context: Context) -> None:
    """Encoder, objective, backward and Adam, against the sampling VAE's step."""
    for m in (2,) if context.quick else (16, 64):
        for dtype in PRECISIONS:
            baseline: dict[str, Timing] = {}
            for name, make in _objectives().items():
                with products(dtype):
                    timings = context.run(_step(context, m, dtype, name, make), baseline)
                if name == "sampling":
                    baseline = timings


def _objectives() -> dict[str, Callable[[nn.Module], Objective]]:
    return {
        "sampling": lambda decoder: Sampling(decoder, noise_var=NOISE_VAR),
        "fastsfvae[triton]": lambda decoder: SamplingFree(
            decoder, noise_var=NOISE_VAR, gamma=1.0, backend="triton"
        ),
        "fastsfvae[torch]": lambda decoder: SamplingFree(
            decoder, noise_var=NOISE_VAR, gamma=1.0, backend="torch"
        ),
    }


def _step(context: Context, m: int, dtype: str, name: str, make) -> Case:
    encoder, decoder, tensors = _problem(context, m)
    x = tensors[0]
    objective = make(decoder)
    # With a learning rate of 0 the parameters stay what they are when the check reads them.
    optimizer = torch.optim.Adam(
        [*encoder.parameters(), *decoder.parameters()],
        lr=0.0,
        fused=True,
        capturable=context.device == "cuda",
    )

    def run() -> tuple[Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with autocast(dtype, context.device):
            loss = objective(x, *encoder(x)).loss
        loss.backward()
        optimizer.step()
        return (loss.detach(),)

    def error(_) -> float:
        few, leaves = x[:CHECKED], [*encoder.parameters(), *decoder.parameters()]
        with autocast(dtype, context.device):
            loss = objective(few, *encoder(few)).loss
        got = (loss.detach(), *torch.autograd.grad(loss, leaves))
        wide = [copy.deepcopy(module).double() for module in (encoder, decoder)]
        loss = vmap_jacfwd(wide[1], few.double(), *wide[0](few.double())) / len(few)
        leaves = [p for module in wide for p in module.parameters()]
        return relative_error(got, (loss.detach(), *torch.autograd.grad(loss, leaves)))

    return Case(
        *("training step", name, "step", _shape(tensors), dtype),
        lambda: [run],
        # The sampling VAE draws noise, which no float64 run repeats.
        None if name == "sampling" else error,
        launches=("eager", "graph"),
    )


def short_training(context: Context) -> None:
    """Train on the digits with each backend: the loss curves must be the same."""
    steps = 3 if context.quick else 500
    curves: dict[str, list[float]] = {}
    for name, settings in {
        "fastsfvae[torch]": {"backend": "torch"},
        "fastsfvae[triton]": {"backend": "triton"},
        "sampling": {"method": "sampling"},
    }.items():
        config = TrainConfig(
            **{"steps": steps, "device": context.device, **settings},
            batch_size=4 if context.quick else 64,
            latent_dim=2 if context.quick else 16,
        )
        base = dict(op="training on digits", implementation=name, mode="step", dtype="float32")
        base["shape"] = f"B={config.batch_size} n=784 m={config.latent_dim} mlp steps={steps}"
        try:
            with products("float32"):
                curve, seconds = _train(config)
        except Exception as reason:
            context.recorder.write(**base, note=f"failed: {type(reason).__name__}: {reason}")
            continue
        curves[name] = curve
        note = f"loss {curve[0]:.3f} to {curve[-1]:.3f}"
        first = curves.get("fastsfvae[torch]")
        if first is not None and name == "fastsfvae[triton]":
            worst = max(abs(a - b) / abs(b) for a, b in zip(curve, first, strict=True))
            base["error"] = f"{worst:.2e}"
            note += "; error is the largest relative distance of its curve to fastsfvae[torch]'s"
        # One time for the whole run, compilation included: no quantiles, so not for the ledger.
        note += f"; {seconds / steps * 1e3:.3f} ms a step, the first ones included"
        context.recorder.write(**base, note=note)


def _train(config: TrainConfig) -> tuple[list[float], float]:
    """The windows' mean losses and the seconds of a run."""
    with tempfile.TemporaryDirectory() as folder:
        run = training.start(config, Path(folder) / "run")
        training.train(run)
        with (run.folder / training.METRICS).open(newline="") as file:
            return [float(row["loss"]) for row in csv.DictReader(file)], run.seconds
