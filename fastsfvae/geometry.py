"""The pullback metric of a decoder: G = J^T J as a Riemannian metric of the latent space.

A latent velocity v moves the output by J v, so that a curve z(t) has the length of its image,

    integral of sqrt(z'^T G(z) z') dt,

and geodesics, distances and volumes follow from G and its derivative (Arvanitidis, Hansen and
Hauberg, "Latent space oddity", ICLR 2018). G is symmetric: its m (m + 1) / 2 entries need as many
gradients, each of one scalar. With q(d) = |J d|^2 = d^T G d

    d^T G d' = (q(d + d') - q(d) - q(d')) / 2

a scalar takes one tangent, along d, and not m. The directions are the axes divided by |J_i|, so
that nothing of a latent to which the output hardly reacts is lost in the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastsfvae._checks import Backend
from fastsfvae.gram.autograd import transforms
from fastsfvae.gram.isometry import TRACES
from fastsfvae.gram.pullback import pullback
from fastsfvae.gram.query import Query, gradient_of_sum
from fastsfvae.jacobian.backend import resolve_backend
from fastsfvae.jacobian.shared import bind
from fastsfvae.jacobian.validate import check_chunk_size, check_latents, unwrap


class Metric:
    """The pullback metric of a decoder; `metric` makes it.

    Attributes:
        decoder: with its further inputs, called as decoder(z).
    """

    def __init__(
        self,
        decoder: Callable[..., Tensor],
        args: tuple,
        kwargs: dict[str, Any],
        backend: Backend,
        chunk_size: int | None,
    ):
        check_chunk_size(chunk_size)
        inner, kwargs = unwrap(decoder, kwargs)
        if args or kwargs:
            inner, *_ = bind(inner, args, kwargs, (*range(len(args)), *kwargs))
        self.decoder = inner
        self._backend: Backend = backend
        self._chunk_size = chunk_size

    @overload
    def __call__(self, z: Tensor, derivative: Literal[False] = False) -> Tensor: ...

    @overload
    def __call__(self, z: Tensor, derivative: Literal[True]) -> tuple[Tensor, Tensor]: ...

    @overload
    def __call__(self, z: Tensor, derivative: bool) -> Tensor | tuple[Tensor, Tensor]: ...

    def __call__(self, z: Tensor, derivative: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """G at z, and with `derivative` dG/dz.

        G alone is differentiable like `pullback`. With its derivative neither has a graph: what
        needs one differentiates G itself.

        Each of the m (m + 1) / 2 entries decodes all points once with one tangent and pulls a
        gradient back, a chunk at a time.

        Args:
            z: latents [B, m].
            derivative: whether dG is wanted.

        Returns:
            G [B, m, m], in float32 at least; with `derivative` the pair (G, dG), where
            dG[b, i, j, l] = d G_ij / d z_l, [B, m, m, m].

        Raises:
            TypeError, ValueError, RuntimeError: see `pullback`; dG inside of torch.func.
        """
        check_latents(z)
        if not derivative:
            return self._gram(z)
        if not torch.compiler.is_compiling() and transforms():
            raise RuntimeError(
                "dG is not made inside a transform of torch.func, which would take it for "
                "constant: transform metric(z), which has derivatives"
            )
        with torch.no_grad():
            G = self._gram(z)
        B, m = z.shape
        i, j = torch.triu_indices(m, m, device=z.device)
        squares = G.diagonal(dim1=1, dim2=2)
        a = torch.where(squares > 0, squares.rsqrt(), 1).to(z.dtype)
        axes = torch.diag_embed(a)
        # Twice an axis where i = j.
        d = (axes[:, i] + axes[:, j]).flatten(0, 1)
        points = z.detach().repeat_interleave(len(i), 0)
        backend = resolve_backend(self._backend, z)
        # Of one tangent the trace is |J d|^2.
        query = Query(
            *(TRACES, self.decoder, points, None, (), (), {}, backend, self._chunk_size, d[None])
        )
        q = gradient_of_sum(query, points).view(B, -1, m).to(G.dtype)
        dG = G.new_empty(B, m, m, m)
        dG[:, i, j] = dG[:, j, i] = q
        own = dG.diagonal(dim1=1, dim2=2).mT / 4
        scale = a.to(G.dtype).unsqueeze(2) * a.to(G.dtype).unsqueeze(1)
        return G, (dG - own.unsqueeze(2) - own.unsqueeze(1)) / (2 * scale.unsqueeze(-1))

    def to_geomstats(self, m: int) -> Any:
        """The latent space R^m as a manifold of geomstats, equipped with this metric.

        Its metric has geodesics, exponential and logarithm, which solve their equations with
        SciPy, Christoffel symbols and what else geomstats makes of G and dG. geomstats takes the
        backend "pytorch" from the environment variable GEOMSTATS_BACKEND, and its import makes
        float64 torch's default dtype.

        Args:
            m: latents, of the decoder in geomstats' dtype.

        Returns:
            geomstats.geometry.euclidean.Euclidean(m), whose attribute `metric` is this one.

        Raises:
            ImportError: geomstats is not installed.
            RuntimeError: geomstats runs on another backend; later, geomstats asks for a derivative
                of dG.
        """
        try:
            import geomstats.backend as gs
            from geomstats.geometry.euclidean import Euclidean
            from geomstats.geometry.riemannian_metric import RiemannianMetric
            from geomstats.numerics.geodesic import ExpODESolver, LogODESolver
            from geomstats.numerics.ivp import ScipySolveIVP
        except ImportError as error:
            raise ImportError(
                "to_geomstats needs geomstats: pip install 'fastsfvae[geometry]'"
            ) from error
        if not gs.__name__.endswith("pytorch"):
            raise RuntimeError(
                f"geomstats runs on {gs.__name__}: set GEOMSTATS_BACKEND=pytorch before its import"
            )
        metric = self

        class PulledBack(RiemannianMetric):  # type: ignore[misc, valid-type]
            def __init__(self, space: Any):
                super().__init__(space)
                self.exp_solver = ExpODESolver(space, integrator=ScipySolveIVP())
                # Its Jacobian would need the derivative of dG.
                self.log_solver = LogODESolver(space, use_jac=False)

            def metric_matrix(self, base_point: Tensor) -> Tensor:
                # SciPy takes nothing with a graph, and geomstats differentiates by points alone.
                with torch.set_grad_enabled(base_point.requires_grad):
                    G = metric(base_point.reshape(-1, m))
                return G.reshape(*base_point.shape[:-1], m, m)

            def inner_product_derivative_matrix(self, base_point: Tensor) -> Tensor:
                if base_point.requires_grad:
                    raise RuntimeError(
                        "dG has no derivative: choose a solver of geomstats that does without "
                        "(LogODESolver with use_jac=False, PathStraightening)"
                    )
                _, dG = metric(base_point.reshape(-1, m), derivative=True)
                return dG.reshape(*base_point.shape[:-1], m, m, m)

        return Euclidean(m, equip=False).equip_with_metric(PulledBack)

    def _gram(self, z: Tensor) -> Tensor:
        return pullback(self.decoder, z, backend=self._backend, chunk_size=self._chunk_size).gram


def metric(
    decoder: Callable[..., Tensor],
    *args: Any,
    backend: Backend = "auto",
    chunk_size: int | None = None,
    **kwargs: Any,
) -> Metric:
    """The pullback metric G(z) = J^T J of a decoder, as a function of z.

        metric = sf.metric(decoder)
        G = metric(z)                           # [B, m, m]
        G, dG = metric(z, derivative=True)      # dG [B, m, m, m]

    Args:
        decoder: see `decode_with_jacobian`.
        *args: further decoder inputs, without a batch axis: they are the same at every point.
        backend: see `decode_with_jacobian`.
        chunk_size: samples whose tangents exist at one time, of dG's repeated points likewise; None
            chooses. Changes rounding only.
        **kwargs: further decoder inputs by name, likewise.

    Raises:
        TypeError: no decoder, or one that is wrapped for data-parallel training.
        ValueError: chunk_size is no int >= 1.
    """
    return Metric(decoder, args, kwargs, backend, chunk_size)
