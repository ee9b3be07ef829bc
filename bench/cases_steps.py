"""Cases of a decoder with its Jacobian: J itself, the loss with its gradients, training steps."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

import fastsfvae as sf
from bench.measure import Case, Prepared
from bench.peers import (
    DECODER_LOSSES,
    OURS,
    SAMPLING,
    STEPS,
    TRITON,
    exact_gradients,
    loss_and_gradients,
    tiled_jvp,
    vmap_jacfwd,
    vmap_jvp,
)
from bench.problems import (
    CHECKED,
    WORKLOADS,
    Problem,
    autocast,
    build_problem,
    products,
    relative_error,
)
from fastsfvae.jacobian.check import LayerReport, list_layers
from fastsfvae.jacobian.cost import step_parts

PRECISIONS = ("tf32", "float32", "bfloat16")
JACOBIANS = {
    TRITON: lambda decoder: lambda z: _ours(decoder, z, "triton"),
    OURS: lambda decoder: lambda z: _ours(decoder, z, "torch"),
    "vmap(jacfwd)": vmap_jacfwd,
    "vmap(jvp)": vmap_jvp,
    "tiled jvp": tiled_jvp,
}


def _ours(decoder, z: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return sf.decode_with_jacobian(decoder, z, backend=backend)


def shape_text(name: str, batch: int | None = None) -> str:
    """A workload as a row's shape names it."""
    workload = WORKLOADS[name]
    n = torch.Size(workload.image_shape).numel()
    return f"{name} B={batch or workload.batch} n={n} m={workload.m} channels-last"


def _launches(implementation: str) -> tuple[str, ...]:
    # The peers are not captured: torch.distributions waits for the device.
    captured = implementation == SAMPLING or implementation.startswith("fastsfvae")
    return ("eager", "graph") if captured else ("eager",)


@functools.cache
def _decoder(name: str) -> list[LayerReport]:
    problem = build_problem(name, 2)
    return list_layers(problem.decoder, problem.mean.detach())


def _loss_cost(name: str, batch: int | None, dtype: str) -> dict[str, float]:
    """FLOPs and least bytes of decoder and loss, forward and backward."""
    workload = WORKLOADS[name]
    n = torch.Size(workload.image_shape).numel()
    size = workload.m, n, batch or workload.batch
    flops, moved = (
        sum(column) for column in zip(*step_parts(_decoder(name), *size, dtype), strict=True)
    )
    return {"flops": flops, "bytes": moved}


def jacobian(device: str, names: Sequence[str], batch: int | None = None) -> Iterator[Case]:
    """f(z) and J, without gradients."""
    for name in names:
        # Of the m tangents, and the value beside them.
        share = (WORKLOADS[name].m + 1) / WORKLOADS[name].m
        flops = share * (batch or WORKLOADS[name].batch) * sum(e.flops for e in _decoder(name))
        for implementation, make in JACOBIANS.items():

            def prepare(name=name, make=make) -> Prepared:
                problem = build_problem(name, batch, device=device)
                decode, z = make(problem.decoder), problem.mean.detach()
                exact = vmap_jacfwd(copy.deepcopy(problem.decoder).double())(z[:CHECKED].double())

                def run() -> tuple[Tensor, Tensor]:
                    with torch.no_grad():
                        return decode(z)

                def error(outputs) -> float:
                    output, columns = (t[:CHECKED] for t in outputs)
                    return relative_error((output, columns.flatten(2)), exact)

                return Prepared([run], error)

            yield Case(
                *("decode_with_jacobian", implementation, "forward"),
                *(shape_text(name, batch), "float32"),
                prepare,
                flops=flops,
                launches=_launches(implementation),
            )


def decoder_loss(
    device: str,
    names: Sequence[str],
    batch: int | None = None,
    dtypes: Sequence[str] = ("float32",),
    implementations: Sequence[str] = tuple(DECODER_LOSSES),
) -> Iterator[Case]:
    """The objective and all its gradients."""
    for case in product(names, dtypes, implementations):
        yield _decoder_loss(device, batch, *case)


def _decoder_loss(device, batch, name, dtype, implementation) -> Case:
    def prepare() -> Prepared:
        problem = build_problem(name, batch, device=device)
        loss = DECODER_LOSSES[implementation](problem.decoder)
        few = problem.head()

        def run(problem: Problem = problem) -> tuple[Tensor, ...]:
            with products(dtype):
                return loss_and_gradients(loss, problem, dtype)

        return Prepared([run], lambda _: relative_error(run(few), exact_gradients(few)))

    return Case(
        *("decoder+loss", implementation, "both", shape_text(name, batch), dtype),
        prepare,
        **_loss_cost(name, batch, dtype),
        launches=_launches(implementation),
        child=(name, implementation, *([str(batch)] if batch else [])),
    )


def training_step(
    device: str,
    names: Sequence[str],
    batch: int | None = None,
    dtypes: Sequence[str] = ("float32",),
    implementations: Sequence[str] = tuple(STEPS),
) -> Iterator[Case]:
    """Encoder, objective, backward and Adam; the sampling VAE's comes first."""
    for case in product(names, dtypes, implementations):
        yield _training_step(device, batch, *case)


def _training_step(device, batch, name, dtype, implementation) -> Case:
    def prepare() -> Prepared:
        problem = build_problem(name, batch, device=device)
        modules = problem.encoder, problem.decoder
        objective = STEPS[implementation](*modules)
        leaves = [p for module in modules for p in module.parameters()]
        # With a learning rate of 0 the parameters stay what they are when the check reads them.
        optimizer = torch.optim.Adam(leaves, lr=0.0, fused=True, capturable=device == "cuda")

        def evaluate(x: Tensor) -> Tensor:
            with products(dtype), autocast(dtype, device):
                return objective(x)

        def run() -> tuple[Tensor]:
            optimizer.zero_grad(set_to_none=True)
            loss = evaluate(problem.x)
            with products(dtype):
                loss.backward()
            optimizer.step()
            return (loss.detach(),)

        def error(_) -> float:
            few = problem.x[:CHECKED]
            loss = evaluate(few)
            got = (loss.detach(), *torch.autograd.grad(loss, leaves))
            wide = [copy.deepcopy(module).double() for module in modules]
            loss = STEPS["vmap(jacfwd)"](*wide)(few.double())
            exact = [p for module in wide for p in module.parameters()]
            return relative_error(got, (loss.detach(), *torch.autograd.grad(loss, exact)))

        # The sampling VAE draws noise, which no float64 run repeats.
        return Prepared([run], None if implementation == SAMPLING else error)

    return Case(
        *("training step", implementation, "step", shape_text(name, batch), dtype),
        prepare,
        launches=_launches(implementation),
    )
