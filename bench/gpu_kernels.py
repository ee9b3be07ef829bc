"""The kernels and the log-density with J given, at the workloads' sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import fastsfvae as sf
from bench.gpu_measure import Case, Context, relative_error, rotations
from bench.loss_only import CANDIDATES, NOISE_VAR, SHAPES, inputs, plain_closed_form
from fastsfvae import reference
from fastsfvae.ops import _library
from fastsfvae.ops.gram_project import gram_project_backward, gram_project_forward
from fastsfvae.ops.woodbury import woodbury_native, woodbury_triton

QUICK_SHAPES = {"m4": (2, 48, 4)}
# Samples that are computed again in float64.
CHECKED = 2


def kernels(context: Context) -> None:
    """gram_project, woodbury and tangent_activation on each backend."""
    for B, n, m in (QUICK_SHAPES if context.quick else SHAPES).values():
        for dtype in (torch.float32, torch.bfloat16):
            for backend in ("torch", "triton"):
                for case in _gram_project(context, (B, m, n), dtype, backend):
                    context.run(case)
        for backend in ("torch", "triton"):
            context.run(_woodbury(context, B, m, backend))
    # The largest layer of the paper's decoder.
    m, shape = (2, (2, 4, 3, 3)) if context.quick else (16, (64, 32, 32, 32))
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("relu", "gelu"):
            for case in _tangent_activation(context, m, shape, dtype, kind):
                context.run(case)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _gram_project(context: Context, size, dtype, backend) -> Iterator[Case]:
    B, m, n = size
    element = dtype.itemsize

    def draw() -> tuple[Tensor, ...]:
        make = lambda *shape: torch.randn(shape, device=context.device)  # noqa: E731
        # Tangent-major storage, as the decoder's layers leave it.
        J = (make(m, B, n) / 50).to(dtype).transpose(0, 1)
        g_G = make(B, m, m)
        return J, make(B, n), g_G + g_G.mT, make(B, m), make(B)

    def exact(J, r, M, u, g_rr, backward: bool) -> tuple[Tensor, ...]:
        J, r, M, u, g_rr = (t[:CHECKED].double() for t in (J, r, M, u, g_rr))
        if not backward:
            return reference.gram_project(J, r)
        dr = (u.unsqueeze(-2) @ J).squeeze(-2) + 2 * g_rr.unsqueeze(-1) * r
        return M @ J + u.unsqueeze(-1) * r.unsqueeze(-2), dr

    def case(backward: bool, traffic: float) -> Case:
        sets = [draw() for _ in range(rotations(traffic, context.device))]

        def run(tensors):
            if backward:
                return gram_project_backward(*tensors, backend)
            return gram_project_forward(*tensors[:2], backend)

        def error(outputs):
            return relative_error([t[:CHECKED] for t in outputs], exact(*sets[0], backward))

        return Case(
            *("gram_project", f"fastsfvae[{backend}]", "backward" if backward else "forward"),
            *(f"B={B} n={n} m={m}", _name(dtype)),
            lambda: [lambda s=s: run(s) for s in sets],
            error,
            bytes=traffic,
            flops=2 * B * m * n * (m + 1),
            launches=("graph",),
        )

    yield case(False, B * n * (m * element + 4))
    yield case(True, 2 * B * n * (m * element + 4))


def _woodbury(context: Context, B: int, m: int, backend: str) -> Case:
    J = torch.randn(B, m, 4 * m, device=context.device) / 8
    r = torch.randn(B, 4 * m, device=context.device)
    h = torch.rand(B, m, device=context.device) + 0.1
    c = torch.full((B,), NOISE_VAR, device=context.device)
    args = (*reference.gram_project(J, r), h, c)
    solve: Callable = woodbury_native if backend == "torch" else woodbury_triton

    def error(outputs):
        # Without the last, which flags lost pivots.
        return relative_error(outputs[:-1], woodbury_native(*(t.double() for t in args))[:-1])

    return Case(
        *("woodbury", f"fastsfvae[{backend}]", "forward", f"B={B} m={m}", "float32"),
        lambda: [lambda: tuple(solve(*args))],
        error,
        # G in and K out; the rest is small.
        bytes=2 * 4 * B * m * m,
        launches=("graph",),
    )


def _tangent_activation(context: Context, m, shape, dtype, kind) -> Iterator[Case]:
    plain = {"relu": torch.relu, "gelu": F.gelu}[kind]
    curved = kind == "gelu"
    numel = torch.Size(shape).numel()

    def draw() -> tuple[Tensor, ...]:
        def make(*lead):
            t = torch.randn(*lead, *shape, device=context.device, dtype=dtype)
            t = t.flatten(0, -4).contiguous(memory_format=torch.channels_last)
            return t.unflatten(0, (*lead, shape[0]))

        return make(), make(m), make(), make(m)

    def exact(a, T, g_out, g_T, backward: bool) -> tuple[Tensor, ...]:
        a, T, g_out, g_T = (t.double() for t in (a[:1], T[:, :1], g_out[:1], g_T[:, :1]))
        a.requires_grad_()
        T.requires_grad_()
        out = plain(a)
        (slope,) = torch.autograd.grad(out.sum(), a, create_graph=True)
        if not backward:
            return out, slope * T
        return torch.autograd.grad((out, slope * T), (a, T), (g_out, g_T))

    def case(backward: bool, passes: int) -> Case:
        traffic = passes * numel * dtype.itemsize
        sets = [draw() for _ in range(rotations(traffic, context.device))]

        def run(a, T, g_out, g_T):
            _library.require_triton(a)
            if backward:
                kept = T if curved else None
                return _library.tangent_activation_bwd(a, kept, g_out, g_T, kind, ())
            return _library.tangent_activation(a, T, kind, ())

        def error(outputs):
            want = exact(*sets[0], backward)
            return relative_error((outputs[0][:1], outputs[1][:, :1]), want)

        return Case(
            *(f"tangent_activation {kind}", "fastsfvae[triton]"),
            "backward" if backward else "forward",
            *(f"m={m} a={'x'.join(map(str, shape))}", _name(dtype)),
            lambda: [lambda s=s: run(*s) for s in sets],
            error,
            bytes=traffic,
            launches=("graph",),
        )

    # Values and cotangents once in, once out; a curved kind's backward also reads the tangents.
    yield case(False, 2 * m + 2)
    yield case(True, (3 if curved else 2) * m + 3)


def _ours_triton(jacobian: Tensor, residual: Tensor, latent_var: Tensor) -> Tensor:
    return sf.low_rank_log_prob(
        residual, jacobian, latent_var, noise_var=NOISE_VAR, backend="triton"
    )


def loss_only(context: Context) -> None:
    """low_rank_log_prob against its peers, values alone and with all gradients."""
    candidates = {"fastsfvae[triton]": _ours_triton, **CANDIDATES}
    for shape in (QUICK_SHAPES if context.quick else SHAPES).values():
        sets = _input_sets(context, shape)
        leaves = tuple(t.detach()[:CHECKED].double().requires_grad_() for t in sets[0])
        value = plain_closed_form(*leaves)
        exact = (value, *torch.autograd.grad(value.sum(), leaves))
        for name, candidate in candidates.items():
            for mode in ("forward", "both"):
                context.run(_log_prob(shape, sets, exact, name, candidate, mode))


def _input_sets(context: Context, shape: tuple[int, int, int]) -> list[tuple[Tensor, ...]]:
    first = inputs(shape, context.device)
    copies = range(rotations(4 * first[0].numel(), context.device) - 1)
    return [first] + [tuple(t.detach().clone().requires_grad_() for t in first) for _ in copies]


def _log_prob(shape, sets, exact, name, candidate, mode) -> Case:
    B, n, m = shape
    once = 4 * B * n * (m + 1)
    backward = mode == "both"
    # J is read forward and backward, and dJ written.
    traffic = 3 * once if backward else once

    def run(tensors):
        if not backward:
            with torch.no_grad():
                return (candidate(*tensors),)
        value = candidate(*tensors)
        return value, *torch.autograd.grad(value.sum(), tensors)

    def error(outputs):
        return relative_error([t[:CHECKED] for t in outputs], exact[: len(outputs)])

    # The peers are not captured: torch.distributions and linear_operator wait for the device.
    launches = ("eager", "graph") if name.startswith("fastsfvae") else ("eager",)
    return Case(
        *("low_rank_log_prob", name, mode, f"B={B} n={n} m={m}", "float32"),
        lambda: [lambda s=s: run(s) for s in sets],
        error,
        bytes=traffic,
        flops=(2 if backward else 1) * 2 * B * m * n * (m + 1),
        launches=launches,
    )
