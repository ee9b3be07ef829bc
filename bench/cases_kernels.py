"""Cases of the operations with given tensors: the kernels, and the log-density with J given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.measure import Case, Prepared
from bench.peers import LOG_PROBS, TRITON
from bench.problems import CHECKED, GIVEN, NOISE_VAR, given_jacobian, relative_error, rotations
from fastsfvae import reference
from fastsfvae.ops import _library
from fastsfvae.ops.gram_project import gram_project_backward, gram_project_forward
from fastsfvae.ops.tangent_activation import activation_bwd_op, activation_op
from fastsfvae.ops.woodbury import woodbury_native, woodbury_triton

BACKENDS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16)
# m and the value's shape: the largest layer of the paper's decoder.
LAYERS = {"celeba16": (16, (64, 32, 32, 32)), "tiny": (2, (2, 4, 3, 3))}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(name: str) -> str:
    B, n, m = GIVEN[name]
    return f"B={B} n={n} m={m}"


def gram_project(device: str, names: Sequence[str], dtypes=DTYPES) -> Iterator[Case]:
    """J, r -> G, p, rr and its adjoint, on each backend."""
    for case in product(names, dtypes, BACKENDS, (False, True)):
        yield _gram_project(device, *case)


def _gram_project(device: str, name: str, dtype, backend: str, backward: bool) -> Case:
    B, n, m = GIVEN[name]
    once = B * n * (m * dtype.itemsize + 4)
    traffic = 2 * once if backward else once

    def draw() -> tuple[Tensor, ...]:
        make = lambda *shape: torch.randn(shape, device=device)  # noqa: E731
        # Tangent-major storage, as the decoder's layers leave it.
        J = (make(m, B, n) / 50).to(dtype).transpose(0, 1)
        g_G = make(B, m, m)
        return J, make(B, n), g_G + g_G.mT, make(B, m), make(B)

    def exact(J, r, M, u, g_rr) -> tuple[Tensor, ...]:
        J, r, M, u, g_rr = (t[:CHECKED].double() for t in (J, r, M, u, g_rr))
        if not backward:
            return reference.gram_project(J, r)
        dr = (u.unsqueeze(-2) @ J).squeeze(-2) + 2 * g_rr.unsqueeze(-1) * r
        return M @ J + u.unsqueeze(-1) * r.unsqueeze(-2), dr

    def run(tensors) -> tuple[Tensor, ...]:
        if backward:
            return gram_project_backward(*tensors, backend)
        return gram_project_forward(*tensors[:2], backend)

    def prepare() -> Prepared:
        sets = [draw() for _ in range(rotations(traffic, device))]
        want = exact(*sets[0])
        return Prepared(
            [lambda s=s: run(s) for s in sets],
            lambda outputs: relative_error([t[:CHECKED] for t in outputs], want),
        )

    return Case(
        *("gram_project", f"fastsfvae[{backend}]", "backward" if backward else "forward"),
        *(_size(name), _name(dtype)),
        prepare,
        bytes=traffic,
        flops=2 * B * m * n * (m + 1),
        launches=("graph",),
    )


def woodbury(device: str, names: Sequence[str]) -> Iterator[Case]:
    """G, p, h, c -> log_det, explained and what the adjoint needs, on each backend."""
    for case in product(names, BACKENDS):
        yield _woodbury(device, *case)


def _woodbury(device: str, name: str, backend: str) -> Case:
    B, _, m = GIVEN[name]
    solve: Callable = woodbury_native if backend == "torch" else woodbury_triton

    def prepare() -> Prepared:
        J = torch.randn(B, m, 4 * m, device=device) / 8
        r = torch.randn(B, 4 * m, device=device)
        h = torch.rand(B, m, device=device) + 0.1
        c = torch.full((B,), NOISE_VAR, device=device)
        args = (*reference.gram_project(J, r), h, c)

        def error(outputs):
            # Without the last, which flags lost pivots.
            return relative_error(outputs[:-1], woodbury_native(*(t.double() for t in args))[:-1])

        return Prepared([lambda: tuple(solve(*args))], error)

    return Case(
        *("woodbury", f"fastsfvae[{backend}]", "forward", f"B={B} m={m}", "float32"),
        prepare,
        # G in and K out; the rest is small.
        bytes=2 * 4 * B * m * m,
        launches=("graph",),
    )


def tangent_activation(device: str, names: Sequence[str], dtypes=DTYPES) -> Iterator[Case]:
    """phi(a) and phi'(a) T in one pass, and its adjoint: the Triton kernel and torch.func."""
    choices = (False, True), (TRITON, "vmap(jvp)")
    for case in product(names, dtypes, ("relu", "gelu"), *choices):
        yield _tangent_activation(device, *case)


def _tangent_activation(device, name, dtype, kind, backward, implementation) -> Case:
    m, shape = LAYERS[name]
    plain = {"relu": torch.relu, "gelu": F.gelu}[kind]
    curved = kind == "gelu"
    # Values and cotangents once in, once out; a curved kind's backward also reads the tangents.
    passes = (3 if curved else 2) * m + 3 if backward else 2 * m + 2
    traffic = passes * torch.Size(shape).numel() * dtype.itemsize

    def draw() -> tuple[Tensor, ...]:
        def make(*lead):
            t = torch.randn(*lead, *shape, device=device, dtype=dtype)
            t = t.flatten(0, -4).contiguous(memory_format=torch.channels_last)
            return t.unflatten(0, (*lead, shape[0]))

        return make(), make(m), make(), make(m)

    def exact(a, T, g_out, g_T) -> tuple[Tensor, ...]:
        a, T, g_out, g_T = (t.double() for t in (a[:1], T[:, :1], g_out[:1], g_T[:, :1]))
        a.requires_grad_()
        T.requires_grad_()
        out = plain(a)
        (slope,) = torch.autograd.grad(out.sum(), a, create_graph=True)
        if not backward:
            return out, slope * T
        return torch.autograd.grad((out, slope * T), (a, T), (g_out, g_T))

    def by_torch_func(a, T, g_out, g_T) -> tuple[Tensor, ...]:
        a, T = (t.detach().requires_grad_(backward) for t in (a, T))
        push = lambda t: torch.func.jvp(plain, (a,), (t,))  # noqa: E731
        results = torch.func.vmap(push, out_dims=(None, 0))(T)
        return torch.autograd.grad(results, (a, T), (g_out, g_T)) if backward else results

    def run(a, T, g_out, g_T) -> tuple[Tensor, ...]:
        if implementation != TRITON:
            return by_torch_func(a, T, g_out, g_T)
        _library.require_triton(a)
        if backward:
            kept = T if curved else None
            return activation_bwd_op(a, kept, g_out, g_T, kind, ())
        return activation_op(a, T, kind, ())

    def prepare() -> Prepared:
        sets = [draw() for _ in range(rotations(traffic, device))]
        want = exact(*sets[0])
        return Prepared(
            [lambda s=s: run(*s) for s in sets],
            lambda outputs: relative_error((outputs[0][:1], outputs[1][:, :1]), want),
        )

    return Case(
        *(f"tangent_activation {kind}", implementation),
        "backward" if backward else "forward",
        *(f"m={m} a={'x'.join(map(str, shape))}", _name(dtype)),
        prepare,
        bytes=traffic,
        launches=("graph",),
    )


def low_rank(device: str, names: Sequence[str]) -> Iterator[Case]:
    """low_rank_log_prob against its peers: values alone, and with all gradients."""
    for case in product(names, ("forward", "both"), LOG_PROBS):
        yield _low_rank(device, *case)


def _low_rank(device: str, name: str, mode: str, implementation: str) -> Case:
    B, n, m = GIVEN[name]
    once = 4 * B * n * (m + 1)
    backward = mode == "both"
    # J is read forward and backward, and dJ written.
    traffic = 3 * once if backward else once
    log_prob = LOG_PROBS[implementation]

    def run(tensors) -> tuple[Tensor, ...]:
        if not backward:
            with torch.no_grad():
                return (log_prob(*tensors),)
        value = log_prob(*tensors)
        return value, *torch.autograd.grad(value.sum(), tensors)

    def prepare() -> Prepared:
        sets = [given_jacobian(name, device) for _ in range(rotations(traffic, device))]
        leaves = tuple(t.detach()[:CHECKED].double().requires_grad_() for t in sets[0])
        # The plainest of them is the oracle.
        value = LOG_PROBS["LowRankMultivariateNormal"](*leaves)
        exact = (value, *torch.autograd.grad(value.sum(), leaves))

        def error(outputs):
            return relative_error([t[:CHECKED] for t in outputs], exact[: len(outputs)])

        return Prepared([lambda s=s: run(s) for s in sets], error)

    # The peers are not captured: torch.distributions and linear_operator wait for the device.
    ours = implementation.startswith("fastsfvae")
    return Case(
        *("low_rank_log_prob", implementation, mode, _size(name), "float32"),
        prepare,
        bytes=traffic,
        flops=(2 if backward else 1) * 2 * B * m * n * (m + 1),
        launches=("eager", "graph") if ours else ("eager",),
    )
