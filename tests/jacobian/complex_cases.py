"""Decoders with complex values, one for each operation that takes them, as `CASES`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.jacobian.rule_cases import decoder

aten = torch.ops.aten
C = torch.complex128


def parts(y):
    return torch.view_as_real(y.resolve_conj()) if y.is_complex() else y


def on(shape, function, *weights):
    """A case that applies a function of a complex value and of trained tensors of given shapes."""

    def body(h, *layers):
        given = [layer.weight for layer in layers]
        return parts(function(torch.complex(h[:, 0], h[:, 1]), *given))

    return lambda: decoder((2, *shape), body, *[Weight(*weight) for weight in weights])


def on_real(shape, function, *weights):
    """The same of a real value."""

    def body(h, *layers):
        return parts(function(h, *[layer.weight for layer in layers]))

    return lambda: decoder(shape, body, *[Weight(*weight) for weight in weights])


class Weight(nn.Module):
    def __init__(self, shape, dtype=C):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, dtype=dtype))


def _ramp(*shape):
    count = torch.Size(shape).numel()
    return torch.complex(
        torch.linspace(-1, 1, count, dtype=torch.float64),
        torch.linspace(0.5, -0.7, count, dtype=torch.float64),
    ).view(shape)


R = torch.float64
ROW, GRID, SQUARE, IMAGE = (6,), (3, 4), (3, 3), (2, 4, 5)
HOLOMORPHIC = (
    "exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sin cos tan asin acos atan "
    "sinh cosh asinh atanh tanh sigmoid neg positive sgn abs angle conj"
).split()
ALIASES = (
    "arcsin arccos arctan arcsinh arctanh negative absolute conj_physical resolve_conj resolve_neg"
).split()
SPECIAL = "exp2 expm1 expit log1p".split()
CASES = {
    **{f"fn_{name}": on(ROW, getattr(torch, name)) for name in HOLOMORPHIC},
    "aliases": on(
        ROW,
        lambda u: (
            sum(getattr(torch, name)(u) for name in ALIASES)
            + aten.alias(u) * aten._conj_physical(u)
        ),
    ),
    "special": on(ROW, lambda u: sum(getattr(torch.special, name)(u) for name in SPECIAL)),
    "angle_of_real": on_real(ROW, lambda h: h * torch.angle(h) + torch.sgn(h)),
    # Parts.
    "real_imag": on(ROW, lambda u: u.real * u.imag + u.conj().imag + u.mH.real.t()),
    "views": on_real(
        (6, 2),
        lambda h: (
            torch.view_as_complex(h) * torch.view_as_complex(h.flip(2))
            + torch.view_as_complex(h.transpose(1, 2).reshape(-1, 6, 2))
        ),
    ),
    "conjugates": on(
        ROW, lambda u: u.conj() * u.conj().imag + (u.conj() * 2j).conj_physical() - u.conj().real
    ),
    "complex": on_real((2, 6), lambda h: torch.complex(h[:, 0].sin(), h[:, 1] * h[:, 0])),
    "complex_trained": on_real(
        ROW,
        lambda h, a, b: torch.complex(h, a) * torch.complex(b, h) + torch.complex(a, b),
        (ROW, R),
        (ROW, R),
    ),
    "polar": on_real((2, 6), lambda h: torch.polar(h[:, 0].exp(), h[:, 1])),
    "polar_trained": on_real(
        ROW,
        lambda h, a, b: torch.polar(a.exp(), h) + torch.polar(h.exp(), b),
        (ROW, R),
        (ROW, R),
    ),
    "to": on(ROW, lambda u: u.real.to(C) * u.to(torch.complex128) + u.imag.type_as(u) + u.to(u)),
    "from_real": on_real(
        ROW, lambda h: (h + 1j) * (2 - 1j) * h + h.add(h * 1j, alpha=2) + h.to(C).exp()
    ),
    # Arithmetic.
    "arithmetic": on(
        ROW,
        lambda u: (
            (u * u.flip(1) + (2 + 1j) - u / (3 + u * u)) * (1 - u) / 2
            + torch.add(u, u * u, alpha=3j)
            - torch.sub(u, u * u, alpha=1 - 2j)
            + torch.rsub(u, u.sin(), alpha=2j)
            + 1j / (3 + u)
        ),
    ),
    "arithmetic_mixed": on(
        ROW, lambda u: (u * u.real + u.imag / (3 + u) - u.imag) / (2 + u.real) + u.abs() * u
    ),
    "arithmetic_names": on(
        ROW, lambda u: torch.multiply(u, u).subtract(u).divide(2 + u * u).true_divide(3j)
    ),
    "arithmetic_trained": on(
        ROW,
        lambda u, w, r: (
            u * w + w / u - w + r * u + r / (4 + u) + u.real * w + w.sub(u, alpha=2j) - r + (w - u)
        ),
        (ROW, C),
        (ROW, R),
    ),
    "broadcast": on(GRID, lambda u, w: u * u.mean(2, keepdim=True) * w + u[:, :1], ((3, 1), C)),
    "pow": on(
        ROW, lambda u: u**3 + u**1.7 + u ** (0.5 + 1j) + 2.0**u + (1 + 1j) ** u + u**0 + u**1
    ),
    "pow_tensors": on(ROW, lambda u: u ** u.flip(1) + u**u.real + u.real.exp() ** u),
    "pow_trained": on(ROW, lambda u, w: u**w + (4 + w) ** u, (ROW, C)),
    "where": on(
        ROW,
        lambda u, w: (
            torch.where(u.real > 0, u, w)
            + torch.where(u.imag > 0, w, u * u)
            + u.masked_fill(u.imag > 0.3, 0.4j)
        ),
        (ROW, C),
    ),
    "lerp": on(
        ROW,
        lambda u, w: u.lerp(u * u, 0.3) + torch.lerp(u, w, u.sin()) + torch.lerp(w, u, w),
        (ROW, C),
    ),
    "addcmul": on(
        ROW,
        lambda u, w: (
            torch.addcmul(u, u, w, value=0.5j)
            + torch.addcdiv(w, u, 4 + u, value=2)
            + torch.addcmul(u, _ramp(6), _ramp(6))
        ),
        (ROW, C),
    ),
    # Products.
    "linear": on(GRID, lambda u, w, b: F.linear(F.linear(u, w, b), w.t()), ((5, 4), C), ((5,), C)),
    "linear_real": on_real(ROW, lambda h, w: F.linear(h.to(C), w), ((5, 6), C)),
    "matmul": on(
        SQUARE,
        lambda u, w: (
            u @ u.mH
            + w @ u
            + torch.bmm(u, u.conj())
            + torch.linalg.matmul(u.mT, u)
            + u @ w[0, :, None]
        ),
        (SQUARE, C),
    ),
    "matmul_rows": on(
        ROW,
        lambda u, w: u.mm(w) * u.mv(w[0])[:, None] + torch.addmm(u, u, w, beta=0.5j, alpha=2 + 1j),
        ((6, 6), C),
    ),
    "baddbmm": on(SQUARE, lambda u: torch.baddbmm(u, u, u.mH, beta=0.3, alpha=0.2j)),
    "addmm_of_constants": on(
        SQUARE,
        lambda u: torch.baddbmm(
            u,
            _ramp(3, 2).expand(len(u), -1, -1),
            _ramp(2, 3).expand(len(u), -1, -1),
            beta=2,
            alpha=3,
        ),
    ),
    "einsum": on(
        GRID,
        lambda u, w: (
            torch.einsum("bij,jk,bkl->bil", u, w, u.mH)
            + torch.einsum("bij,bij->b", u, u.conj())[:, None, None]
            + torch.einsum("bij->bi", u)[..., None]
        ),
        ((4, 4), C),
    ),
    # Reductions.
    "reductions": on(
        GRID,
        lambda u: u.sum(2) + u.mean((1, 2))[:, None] + u.cumsum(1)[..., 0] + u.sum((1, 2))[:, None],
    ),
    "moments": on(
        GRID,
        lambda u: (
            u.var(2)
            + u.std(2, correction=0)
            + torch.var_mean(u, 2)[0]
            + torch.std_mean(u, 2)[1]
            + torch.std_mean(u, 2, keepdim=True)[0][..., 0] * torch.var_mean(u, 2)[1]
        ),
    ),
    "norms": on(
        GRID,
        lambda u: (
            torch.linalg.vector_norm(u, 2, 2)
            + u.norm(dim=2)
            + torch.linalg.vector_norm(u, 3, 2)
            + torch.linalg.vector_norm(u, 1, (1, 2))[:, None]
            + torch.linalg.vector_norm(u.mT, dim=1)
        ),
    ),
    "rms": on(GRID, lambda u: u * torch.rsqrt(u.abs().square().mean(2, keepdim=True) + 0.1)),
    # Shapes.
    "shapes": on(
        GRID,
        lambda u: (
            torch.cat(
                [
                    u.view(-1, 12),
                    u.reshape(-1, 12),
                    u.flatten(1),
                    u.unflatten(2, (2, 2)).flatten(1),
                    u.unsqueeze(1).squeeze(1).ravel().view(-1, 12),
                    u.view_as(u).flatten(1),
                    u.reshape_as(u).flatten(1),
                    u.permute(0, 2, 1).flatten(1),
                    u.mT.flatten(1),
                    u.transpose(1, 2).contiguous().view(-1, 12),
                    u.swapaxes(1, 2).flatten(1),
                    u.swapdims(1, 2).flatten(1),
                    u.movedim(1, 2).moveaxis(1, 2).flatten(1),
                    u.mH.flatten(1),
                    u.adjoint().flatten(1),
                    u.clone().flatten(1),
                    torch.atleast_3d(torch.atleast_2d(torch.atleast_1d(u))).flatten(1),
                    u[:, :1].expand(-1, 3, -1).flatten(1),
                    u[:, :1].expand_as(u).flatten(1),
                    torch.broadcast_to(u[:, :, :1], u.shape).flatten(1),
                    u[:, 0].t().exp().t(),
                    u[:, 0].T.exp().H,
                ],
                1,
            )
            * _ramp(23 * 12 - 24 + 0)[:250].sum()
        ),
    ),
    "arrangements": on(
        GRID,
        lambda u: torch.cat(
            [
                u.repeat(1, 2, 1),
                u.tile(1, 1, 1),
                u.repeat_interleave(2, 1),
                u.flip(1, 2),
                u.roll(1, 2),
                F.pad(u, (1, 1), value=0.3)[..., :4],
                F.pad(u, (-1, 1)),
                F.pad(u, (2, 0), "circular")[..., 1:5],
                torch.constant_pad_nd(u, (0, 0, 1, 0)),
            ],
            1,
        ).square(),
    ),
    "pieces": on(
        GRID,
        lambda u: torch.cat(
            [
                *u.chunk(2, 1),
                *u.split(2, 1),
                *u.split_with_sizes([1, 2], 1),
                u[:, ::2],
                *u.tensor_split(2, 1),
                *[v[:, None] for v in u.unbind(1)],
                u.select(1, 0)[:, None],
                u.narrow(1, 1, 2),
                torch.concat([u, u.real], 1),
                torch.concatenate([u, u], 1),
                torch.stack([u, u * u], 1).flatten(1, 2),
                u.unsafe_chunk(2, 1)[0],
                u.unsafe_split(2, 1)[0],
                u.unsafe_split_with_sizes([1, 2], 1)[1],
            ],
            1,
        ).exp(),
    ),
    "joined_with_trained": on(
        ROW,
        lambda u, w, r: torch.cat(
            [
                u.real,
                w.expand(u.shape),
                torch.stack([u, w.expand(u.shape)], 1).flatten(1),
                r.expand(u.shape),
            ],
            1,
        ).square(),
        (ROW, C),
        (ROW, R),
    ),
    "indices": on(
        SQUARE,
        lambda u: torch.cat(
            [
                u.gather(2, u.real.argsort(2)),
                torch.take_along_dim(u, u.imag.argsort(2), 2),
                u.index_select(1, torch.tensor([2, 0])),
                u[:, torch.tensor([0, 0, 1])],
                u.tril(),
                u.triu(1),
                u.diagonal(dim1=1, dim2=2)[:, None],
                u.unfold(2, 2, 1).flatten(2)[..., :3],
            ],
            1,
        ).sin(),
    ),
    "placed": on(
        SQUARE,
        lambda u, w: (
            u[:, 0].diag_embed()
            + torch.diagonal_scatter(u, u[:, 0].sin(), 0, 1, 2)
            + u.rot90(1, (1, 2))
            + u.index_fill(1, torch.tensor([1]), 0.5j)
            + u.index_copy(1, torch.tensor([2, 0]), u[:, :2] * 1j)
            + torch.zeros_like(u).scatter(2, u.real.argsort(2), u * w)
            + aten._unsafe_view(u, [len(u), 3, 3])
        ),
        (SQUARE, C),
    ),
    "products_along": on(GRID, lambda u: u.prod(2) + u.cumprod(1)[..., 0] + u.sinc()[:, :, 1]),
    "images": on(
        (4, 2, 4),
        lambda u: (
            F.pixel_unshuffle(F.pixel_shuffle(u, 2), 2)
            + F.channel_shuffle(u, 2)
            + F.fold(F.unfold(u, (1, 2)), (2, 4), (1, 2)) * u
        ),
    ),
    "writes": on(GRID, lambda u, w: _writes(u, w), ((4,), C)),
    "scatters": on(
        GRID,
        lambda u: (
            u.index_add(1, torch.tensor([2, 0]), u[:, :2].sin(), alpha=0.5)
            + torch.zeros_like(u).scatter_add(2, u.real.argsort(2), u.exp())
        ),
    ),
}


def _writes(u, w):
    u = u * 1
    u[:, 0] = w
    u[:, 1, 2:] = u[:, 2, 2:] * 2j
    canvas = torch.zeros(u.shape[0], 5, 4, dtype=C)
    canvas[:, 1:4] = u
    canvas[:, 4] = u[:, 0].real
    canvas[:, 0, torch.tensor([0, 2])] = u[:, 1, torch.tensor([1, 3])].square()
    canvas[:, 0, 1].fill_(0.3j)
    canvas[:, 0, 3].zero_()
    canvas[:, 2] *= w
    return canvas.exp()
