"""The likelihood of a decoder whose gradients are finished chunk by chunk, as one operator.

The operator `fastsfvae::decoder_likelihood` holds the whole chunk loop: value, tangents, likelihood
and, for given cotangents of the likelihood's terms, the gradients of everything. Two autograd
Functions stand over it.

    total_log_likelihood    knows the cotangents in its forward (they are the samples' weights),
                            finishes the gradients there and scales them in its backward
    log_likelihood_terms    learns them in its backward and sweeps the batch again there
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsfvae import likelihood_adjoint
from fastsfvae.gram.sources import gram_of
from fastsfvae.jacobian.rules.jet import full_tangent, latent_jet
from fastsfvae.jacobian.run.cache import Linearizer, chunk_bounds
from fastsfvae.jacobian.run.chunks import flatten_in_memory_order
from fastsfvae.jacobian.run.known import remember
from fastsfvae.jacobian.run.sweep import Sweep, default_chunk, find_program, program_of
from fastsfvae.jacobian.validate import check_chunk_size
from fastsfvae.likelihoods import likelihood_terms
from fastsfvae.ops._library import refuse_vmap
from fastsfvae.settings import Settings


class Problem(NamedTuple):
    """What is evaluated, besides the tensors; the decoder by its program's number."""

    program: int
    along: int
    chunk_size: int
    likelihood: str
    backend: str
    autocast: torch.dtype | None


class Prepared(NamedTuple):
    """A problem and its tensors (z, x, latent_var, noise_var, gamma, *along, *whole)."""

    problem: Problem
    tensors: tuple[Tensor, ...]


def prepare(
    decoder: Callable[..., Tensor],
    x: Tensor,
    z: Tensor,
    latent_var: Tensor,
    args: tuple,
    kwargs: dict[str, Any],
    settings: Settings,
) -> Prepared | None:
    """Trace the decoder and gather what the operator reads; None where it cannot be swept.

    Raises:
        ValueError: x does not match the decoder's output, or chunk_size is no int >= 1.
    """
    check_chunk_size(settings.chunk_size)
    if settings.backend == "reference":
        return None
    if torch.compiler.is_compiling():
        from fastsfvae.gram import compiled

        found = compiled.gather(decoder, z, args, kwargs, settings.backend)
        number, shape, along, whole = found.number, found.output_shape, found.along, found.whole
        size = settings.chunk_size or found.chunk_size
    else:
        remember(decoder)
        linearizer = Linearizer(decoder, z, args, kwargs, settings.backend)
        size = settings.chunk_size or default_chunk(linearizer)
        bounds = chunk_bounds(z.shape[0], size)
        program = program_of(linearizer, sorted({stop - start for start, stop in bounds}))
        if program is None:
            return None
        number, shape = program.number, program.plans[0].output_shape
        along, whole = program.gather(linearizer.tensors, linearizer.extras)
    if list(x.shape[1:]) != list(shape):
        raise ValueError(
            f"x has shape {tuple(x.shape)} but the decoder returns {(x.shape[0], *shape)}: "
            "they must match"
        )
    dtype = torch.promote_types(torch.promote_types(z.dtype, x.dtype), torch.float32)
    scalars = [
        t.to(z.device) if isinstance(t, Tensor) else torch.full((), t, dtype=dtype, device=z.device)
        for t in (settings.noise_var, settings.gamma)
    ]
    kind = z.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    problem = Problem(number, len(along), size, settings.likelihood, settings.backend, autocast)
    return Prepared(problem, (z, x, latent_var, *scalars, *along, *whole))


@torch.library.custom_op("fastsfvae::decoder_likelihood", mutates_args=())
def decoder_likelihood(
    z: Tensor,
    x: Tensor,
    latent_var: Tensor,
    noise_var: Tensor,
    gamma: Tensor,
    along: Sequence[Tensor],
    whole: Sequence[Tensor],
    cotangents: Tensor | None,
    needs: Sequence[bool],
    program: int,
    chunk_size: int,
    likelihood: str,
    backend: str,
    autocast: torch.dtype | None,
) -> list[Tensor]:
    """Terms ``[4, B]`` (see `likelihood_adjoint`), then the gradients that `needs` asks for.

    Args:
        z: latents ``[B, m]``.
        x: data ``[B, *out]``.
        latent_var: h ``[B, m]``.
        noise_var: c, 0-d.
        gamma: 0-d.
        along: the decoder's further inputs with a batch axis.
        whole: its parameters and inputs without one.
        cotangents: of the terms, ``[4, B]``; None gives the terms alone.
        needs: a bool for each of z, x, latent_var, noise_var, gamma, along, whole.
        program: the number of the decoder's program.
        chunk_size: samples whose tangents exist at one time.
        likelihood: see `fastsfvae.likelihoods`.
        backend: "torch" or "triton".
        autocast: the dtype of an autocast region around the call, or None.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    dtype = torch.promote_types(z.dtype, dtype)
    h, c, weight = (t.to(dtype) for t in (latent_var, noise_var, gamma))
    if cotangents is None:
        needs = [False] * len(needs)
    split = 5 + len(along)
    sweep = Sweep(
        find_program(program),
        z,
        along,
        whole,
        (needs[0], needs[5:split], needs[split:]),
        chunk_size,
    )
    terms, grads_x, grads_h = [], [], []
    grad_c, grad_gamma = torch.zeros_like(c), torch.zeros_like(c)
    enabled = autocast is not None
    with torch.no_grad():
        chunks = iter(sweep)
        while True:
            # Autocast shapes the decoder's values and tangents; adjoints follow their dtypes. Its
            # cache would keep casts made without a graph, and the caller's own use of the decoder
            # in the same region would take them and leave its weights without gradients.
            with torch.autocast(z.device.type, autocast, enabled=enabled, cache_enabled=False):
                chunk = next(chunks, None)
            if chunk is None:
                break
            rows = slice(chunk.start, chunk.stop)
            with torch.autocast(z.device.type, enabled=False):
                gram = gram_of(chunk.output, x[rows], backend)
                found = likelihood_adjoint.evaluate(gram, h[rows], c, weight, likelihood)
                terms.append(found.terms)
                if not any(needs) or cotangents is None:
                    continue
                pulled = likelihood_adjoint.pull(
                    found, gram, (h[rows], c, weight), cotangents[:, rows], likelihood
                )
                if needs[1]:
                    grads_x.append(pulled.chunk.x)
                grads_h.append(pulled.latent_var)
                grad_c += pulled.noise_var
                grad_gamma += pulled.gamma
                chunk.pull(pulled.chunk.jet, pulled.chunk.others)
    values = torch.cat(terms, dim=1)
    if not any(needs):
        return [values]
    grad_z, *others = sweep.gradients() if needs[0] else (None, *sweep.gradients())
    first = [
        grad_z,
        torch.cat(grads_x).to(x.dtype) if needs[1] else None,
        torch.cat(grads_h).to(latent_var.dtype),
        grad_c.to(noise_var.dtype),
        grad_gamma.to(gamma.dtype),
    ]
    return [values, *(g for g, need in zip(first, needs, strict=False) if need), *others]


@decoder_likelihood.register_fake
def _(z, x, latent_var, noise_var, gamma, along, whole, cotangents, needs, *_):
    dtype = torch.promote_types(torch.promote_types(x.dtype, torch.float32), z.dtype)
    values = x.new_empty((4, z.shape[0]), dtype=dtype)
    tensors = (z, x, latent_var, noise_var, gamma, *along, *whole)
    if cotangents is None:
        return [values]
    return [values, *(torch.empty_like(t) for t, need in zip(tensors, needs, strict=True) if need)]


decoder_likelihood.register_vmap(refuse_vmap)


def _evaluate(problem: Problem, needs: Sequence[bool], cotangents: Tensor | None, tensors: tuple):
    along, whole = tensors[5 : 5 + problem.along], tensors[5 + problem.along :]
    values, *grads = decoder_likelihood(
        *tensors[:5], list(along), list(whole), cotangents, list(needs), problem.program,
        problem.chunk_size, problem.likelihood, problem.backend, problem.autocast,
    )  # fmt: skip
    return values, grads


def _needs(tensors: tuple) -> tuple[bool, ...]:
    enabled = torch.is_grad_enabled()
    return tuple(enabled and t.requires_grad for t in tensors)


def _spread(grads: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    given = iter(grads)
    return [next(given) if need else None for need in needs]


def total_log_likelihood(prepared: Prepared, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of weights * log-likelihood (0-d) and the terms ``[4, B]``, which carry no gradient.

    Args:
        prepared: what is evaluated.
        weights: ``[B]``, without a gradient of their own.
    """
    problem, tensors = prepared
    needs = _needs(tensors)
    if not any(needs):
        values, _ = _evaluate(problem, needs, None, tensors)
        return _total(values, weights), values
    total, values, *_ = _Total.apply(problem, needs, weights, *tensors)
    return total, values


def _total(values: Tensor, weights: Tensor) -> Tensor:
    # Not a dot product, which autocast would round to half precision.
    return (values[likelihood_adjoint.LOG_LIKELIHOOD] * weights).sum()


class _Total(torch.autograd.Function):
    vmap = staticmethod(refuse_vmap)

    @staticmethod
    def forward(problem, needs, weights, *tensors):
        cotangents = torch.zeros((4, len(weights)), dtype=weights.dtype, device=weights.device)
        cotangents[likelihood_adjoint.LOG_LIKELIHOOD] = weights
        values, grads = _evaluate(problem, needs, cotangents, tensors)
        return _total(values, weights), values, *grads

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.needs, _, *tensors = inputs
        _, values, *grads = output
        ctx.mark_non_differentiable(values, *grads)
        ctx.set_materialize_grads(False)
        wanted = [t for t, need in zip(tensors, ctx.needs, strict=True) if need]
        ctx.save_for_backward(*grads, *wanted)

    @staticmethod
    def backward(ctx, upstream, *_):
        if upstream is None:
            return (None,) * (3 + len(ctx.needs))
        count = sum(ctx.needs)
        grads, wanted = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        grads = [g * upstream for g in grads]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _Last.apply(count, *grads, *wanted)
        return None, None, None, *_spread(grads, ctx.needs)


class _Last(torch.autograd.Function):
    """Gradients that know what they depend on, and refuse to be differentiated by it.

    torch.func.grad always runs a backward as with create_graph, so that it cannot refuse at once.
    """

    @staticmethod
    def forward(count, *tensors):
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Nothing is kept."""

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "the loss's gradients are finished in its forward and have no derivative: for second "
            'order give reduction="none" and backend="torch"'
        )


def log_likelihood_terms(prepared: Prepared) -> Tensor:
    """The terms ``[4, B]``, each differentiable."""
    problem, tensors = prepared
    needs = _needs(tensors)
    if not any(needs):
        return _evaluate(problem, needs, None, tensors)[0]
    return _Terms.apply(problem, needs, *tensors)


class _Terms(torch.autograd.Function):
    vmap = staticmethod(refuse_vmap)

    @staticmethod
    def forward(problem, needs, *tensors):
        return _evaluate(problem, needs, None, tensors)[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.problem, ctx.needs, *tensors = inputs
        if not torch.compiler.is_compiling():
            # The backward runs it again, perhaps after the decoder's plans were renewed.
            ctx.program = find_program(ctx.problem.program)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, cotangents):
        tensors = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _differentiable_gradients(ctx.problem, ctx.needs, cotangents, tensors)
        else:
            _, grads = _evaluate(ctx.problem, ctx.needs, cotangents.contiguous(), tensors)
        return None, None, *_spread(grads, ctx.needs)


def _differentiable_gradients(problem, needs, cotangents, tensors) -> list[Tensor]:
    """The same gradients by autograd, for create_graph: all chunks' tangents at once."""
    if problem.backend != "torch":
        raise RuntimeError(
            f'backend="{problem.backend}" has first derivatives only; second order needs '
            'backend="torch" (or "reference")'
        )
    z, x, latent_var, noise_var, gamma = tensors[:5]
    along, whole = tensors[5 : 5 + problem.along], tensors[5 + problem.along :]
    with torch.enable_grad():
        enabled = problem.autocast is not None
        with torch.autocast(z.device.type, problem.autocast, enabled=enabled):
            y = find_program(problem.program).body(latent_jet(z), along, whole)
            terms = likelihood_terms(
                *flatten_in_memory_order(full_tangent(y), x - y.primal),
                latent_var,
                noise_var=noise_var,
                gamma=gamma,
                likelihood=problem.likelihood,
                backend=problem.backend,
            )
        wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
        return list(
            torch.autograd.grad(
                torch.stack(terms[:4]),
                wanted,
                cotangents,
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        )
