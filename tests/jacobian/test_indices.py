"""Entries taken, sorted, replaced and sampled at places, swept, against reverse mode."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsfvae.jacobian.api import decode_with_jacobian
from tests.jacobian.exactness import assert_right, loss_and_gradients
from tests.jacobian.rule_cases import (
    CUBE,
    IMAGE,
    LINE,
    ROW,
    B,
    M,
    apply,
    decoder,
    with_linear,
)

pytestmark = pytest.mark.filterwarnings("ignore:index_reduce", "ignore:The reduce argument")

Z = torch.randn(B, M, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
THIRD = torch.arange(12) % 3 == 0
SOME = torch.arange(28).view(4, 7) % 3 == 0
PLACES = torch.tensor([[[0, 2, 1, 3], [1, 0, 3, 2]]])


TWICE = torch.tensor([[1, 1, 2]])
_LAST = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)


def uniform(*shape):
    generator = torch.Generator().manual_seed(1)
    return 2.6 * torch.rand(1, *shape, dtype=torch.float64, generator=generator) - 1.3


POINTS, POINTS_IN_SPACE = uniform(3, 4, 2), uniform(2, 3, 4, 3)


def wide(t, h):
    """The same for all samples."""
    return t.expand(h.shape[0], *t.shape[1:])


def rows_of(h):
    return torch.arange(h.shape[0])[:, None]


def written(h, indices, values):
    h = h * 1
    h[indices] = values
    return h


TAKEN = {
    "topk": apply(
        LINE, lambda h: h.gather(2, h.topk(3, 2).indices) + h.topk(3, 2, largest=False).values
    ),
    "topk_unsorted": apply(LINE, lambda h: h.topk(2, 1, False, False)[0].sort(1)[0]),
    "sort": apply(LINE, lambda h: h.sort(1)[0] + h.sort(1, descending=True)[0] + h.argsort(1)),
    "extremes_with_places": apply(
        LINE,
        lambda h: (
            h.max(2).values
            + h.max(-1)[1]
            + h.min(2)[0] * h.gather(2, h.min(2, keepdim=True)[1])[..., 0]
        ),
    ),
    "median": apply(
        LINE,
        lambda h: h.median(2)[0] + h.median(2)[1] + h.nanmedian(2, keepdim=True)[0][..., 0],
    ),
    "kthvalue": apply(
        LINE, lambda h: h.kthvalue(2, 2)[0] + h.kthvalue(3, -1, True)[0][..., 0] * h.kthvalue(2)[1]
    ),
    "mode": apply(LINE, lambda h: h.mode(2)[0] * h.mode(1, True)[0].sum(2)),
    "quantile": apply(LINE, lambda h: h.quantile(0.3, 2) + torch.nanquantile(h, 0.6, 2)),
    "take": apply(ROW, lambda h: h.take(rows_of(h) * 12 + torch.tensor([0, 3, 3, 11]))),
    "take_from_the_end": apply(LINE, lambda h: h.take_along_dim(torch.tensor([[[-1, 0]]]), -1)),
    "masked_select": apply(ROW, lambda h: h.masked_select(THIRD).view(-1, 4)),
    "masked_select_plane": apply(LINE, lambda h: h.masked_select(SOME).view(h.shape[0], -1)),
    "mask": apply(ROW, lambda h: h[:, THIRD]),
    "new_axes": apply(LINE, lambda h: h[:, None, torch.tensor([1, 2]), ..., torch.tensor([0, 0])]),
    "triangle": apply((4, 4), lambda h: h[(slice(None), *torch.tril_indices(4, 4))]),
    "pairs": apply(ROW, lambda h: h[:, torch.combinations(torch.arange(4))].sum(-1)),
    "bucketize": apply(ROW, lambda h: h * torch.bucketize(h, torch.tensor([-0.5, 0.0, 0.5]))),
    "embedding": lambda: decoder(
        ROW, lambda h, table: h * table(h.argsort(1)[:, :2]).sum(1), nn.Embedding(12, 12, 3)
    ),
    "diagonals": apply(
        LINE,
        lambda h: (
            torch.diag_embed(h)
            + torch.diag_embed(h[..., 1:], 1)
            + torch.diag_embed(h, 0, 1, 2).sum((1, 2), keepdim=True)[..., :1]
        ),
    ),
    "diagonal_copy": apply((4, 4), lambda h: torch.diagonal_copy(h, 1, -1, -2)),
    "turns": apply(
        IMAGE, lambda h: h.rot90(1, (2, 3)) + h.rot90(-1, (-1, -2)) + h.rot90(2, (2, 3)).mT
    ),
    "copies": apply(
        LINE,
        lambda h: (
            torch.expand_copy(h[:, :1], (-1, 4, 7))
            + torch.permute_copy(torch.permute_copy(h, (0, 2, 1)), (0, 2, 1))
            + torch.transpose_copy(torch.transpose_copy(h, 1, 2), -1, -2)
            + torch.view_copy(h, (-1, 4, 7))
            + torch.squeeze_copy(torch.unsqueeze_copy(h, 1), 1)
            + torch.alias_copy(h)
            + torch.narrow_copy(h, 1, 1, 1)
            + torch.slice_copy(h, 1, 0, 2)[:, :1]
            + torch.select_copy(h, 1, 2)[:, None]
            + torch.split_copy(h, 2, 1)[0][:, :1]
            + torch.unbind_copy(h, 1)[0][:, None]
            + torch.unfold_copy(h, 2, 2, 1).sum((2, 3))[:, :, None]
        ),
    ),
}
REPLACED = {
    "scatter": with_linear(
        lambda h, w, b: (
            h.view(-1, 3, 4).scatter(2, wide(PLACES, h), h.view(-1, 3, 4)[:, 1:].sin()).flatten(1)
            + h.scatter(-1, h.argsort(1), b.expand_as(h))
            + b.expand_as(h).scatter(1, wide(PLACES[0, :1], h), h[:, :4])
            + h.scatter(1, h.argsort(1)[:, :5], 0.5)
        )
    ),
    "scatter_add": with_linear(
        lambda h, w, b: (
            h.scatter_add(1, h.argsort(1)[:, :4] // 2, wide(w[:1], h)[:, :4])
            + b.expand_as(h).scatter_add(1, h.argsort(1)[:, :4] // 2, h[:, :4])
        )
    ),
    "index_copy": with_linear(
        lambda h, w, b: (
            h.index_copy(-1, torch.tensor([3, 1]), h[:, :2].sin())
            + h.index_copy(1, torch.tensor([0]), b[:1].expand(h.shape[0], 1))
        )
    ),
    "index_fill": with_linear(
        lambda h, w, b: (
            h.index_fill(1, torch.tensor([3, 1]), 0.4) + h.index_fill(1, torch.tensor([3]), b[0])
        )
    ),
    "index_add": with_linear(
        lambda h, w, b: (
            h.index_add(-1, torch.tensor([3, 1, 1]), h[:, :3].sin(), alpha=2)
            + h.index_add(1, torch.tensor([3, 1, 1]), b[:3].expand(h.shape[0], -1))
        )
    ),
    "index_put": apply(
        LINE,
        lambda h: (
            written(h, (slice(None), torch.tensor([0, 2]), slice(1, 3)), h[:, :2, :2] * 2)
            + written(h, h > 0, 0.3)
            + h.index_put((rows_of(h), torch.tensor([1, 3])), h[:, :1])
        ),
    ),
    "index_put_accumulated": apply(
        LINE,
        lambda h: h.index_put((rows_of(h), torch.tensor([1, 1, -1])), h[:, :1].sin(), True),
    ),
    "index_put_trained": with_linear(
        lambda h, w, b: (
            written(h, (slice(None), torch.tensor([0, 2])), w[0, :2])
            + written(b.expand_as(h), (slice(None), torch.tensor([0, 2])), h[:, :2])
        )
    ),
    "masked": with_linear(
        lambda h, w, b: (
            h.masked_scatter(THIRD, h[:, :4].sin())
            + h.masked_scatter(THIRD.expand_as(h), b[:4].expand(h.shape[0], 4).contiguous())
            + THIRD.to(h.dtype).expand_as(h).masked_scatter(THIRD, h[:, 2:6])
            + h.masked_fill(h > 0.2, b[0])
        )
    ),
    "put": with_linear(
        lambda h, w, b: (
            h.put(rows_of(h) * 12 + torch.tensor([0, 3, 11]), h[:, :3].sin())
            + h.put(rows_of(h) * 12 - h.numel(), h[:, 1:2])
            + h.put(rows_of(h) * 12 + torch.tensor([0, 3, 3]), b[:3].expand(h.shape[0], 3), True)
        )
    ),
    "slices": with_linear(
        lambda h, w, b: (
            h.slice_scatter(h[:, :3].exp(), 1, 2, 5)
            + h.slice_scatter(b[:3].expand(h.shape[0], 3), 1, 2, 8, 2)
        )
    ),
    "diagonal_scatter": apply(
        (4, 4),
        lambda h: (
            h.diagonal_scatter(h[:, 0].sin(), 0, 1, 2)
            + h.diagonal_scatter(h[:, 0, :3].sin(), 1, -2, -1)
        ),
    ),
    "triangle": apply(
        (4, 4),
        lambda h: written(
            torch.zeros_like(h), (slice(None), *torch.tril_indices(4, 4)), h.flatten(1)[:, :10]
        ),
    ),
    "unpool_1d": apply(LINE, lambda h: F.max_unpool1d(*F.max_pool1d(h, 2, return_indices=True), 2)),
    "unpool_2d": apply(
        IMAGE,
        lambda h: F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), 2, output_size=(6, 5)),
    ),
    "unpool_3d": apply(
        CUBE, lambda h: F.max_unpool3d(*F.max_pool3d(h, (1, 2, 1), return_indices=True), (1, 2, 1))
    ),
    "fractional_pool": apply(
        IMAGE,
        lambda h: F.fractional_max_pool2d(
            h, 2, output_size=3, _random_samples=torch.full((h.shape[0], 4, 2), 0.4).to(h)
        ),
    ),
    "nothing": apply(
        LINE,
        lambda h: torch.cat(
            [
                h,
                h[:, :0].sort(2)[0],
                h[:, :0].index_fill(2, torch.tensor([1]), 0.0),
                h.scatter(2, torch.zeros(h.shape[0], 0, 1, dtype=torch.long), 1.0),
                h.index_copy(1, torch.tensor([], dtype=torch.long), h[:, :0]),
            ],
            1,
        ),
    ),
}


def _reduced(mode, included):
    def body(h, w, b):
        places = h.argsort(1)[:, :5] // 2
        return torch.cat(
            [
                h.scatter_reduce(1, places, h.flip(1).sin()[:, :5], mode, include_self=included),
                h.scatter_reduce(1, places, wide(w[:1], h)[:, :5], mode, include_self=included),
                b.expand_as(h).scatter_reduce(1, places, h[:, :5], mode, include_self=included),
            ],
            1,
        )

    return with_linear(body)


def _reduced_rows(mode, included):
    rows = torch.tensor([0, 2, 2, 3, 0])

    def body(h):
        return h.index_reduce(-1, rows, h.flip(1).sin()[..., :5], mode, include_self=included)

    return apply(LINE, body)


REDUCED = {
    f"{mode}_{included}": _reduced(mode, included)
    for mode in ("sum", "prod", "mean", "amax", "amin")
    for included in (True, False)
} | {
    f"rows_{mode}_{included}": _reduced_rows(mode, included)
    for mode in ("prod", "mean", "amax", "amin")
    for included in (True, False)
}
STRIDED = {
    "plain": apply(LINE, lambda h: h.as_strided((h.shape[0], 3, 4), (28, 4, 1), 3).sin()),
    "windows": apply(ROW, lambda h: h.as_strided((h.shape[0], 5, 4), (h.stride(0), 2, 1)).sin()),
    "transposed": apply(LINE, lambda h: h.mT.as_strided((h.shape[0], 3, 4), (28, 4, 1)).sin()),
    "contiguous": apply(
        LINE, lambda h: h.mT.contiguous().as_strided((h.shape[0], 3, 4), (28, 4, 1)).sin()
    ),
    "computed_transposed": apply(
        LINE, lambda h: F.gelu(h.mT + h.mT).as_strided((h.shape[0], 3, 4), (28, 4, 1))
    ),
    "channels_last": apply(
        IMAGE,
        lambda h: h.to(memory_format=torch.channels_last).as_strided((h.shape[0], 9), (120, 3)),
    ),
    "convolution": lambda: decoder(
        IMAGE,
        lambda h, layer: layer(h).as_strided((h.shape[0], 3, 4), (90, 4, 1)).sin(),
        nn.Conv2d(4, 3, 3, padding=1),
    ),
    "copy": apply(LINE, lambda h: torch.as_strided_copy(h, (h.shape[0], 2, 5), (28, 1, 3))),
    "detached": apply(LINE, lambda h: h * h.detach().as_strided((h.shape[0], 4, 7), (28, 7, 1))),
    "changed_in_place": apply(
        LINE, lambda h: (h * 1).as_strided((h.shape[0], 3, 4), (28, 4, 1)).mul_(2).sin()
    ),
}


def _sampled(mode, padding, corners):
    options = {"mode": mode, "padding_mode": padding, "align_corners": corners}

    def points(h, w, b):
        image, trained = h.view(-1, 1, 3, 4), wide(w.view(1, 3, 6, 8), h)
        moved = 1.3 * h.view(-1, 2, 3, 2).sin()
        return torch.cat(
            [
                F.grid_sample(image, wide(POINTS, h), **options).flatten(1),
                F.grid_sample(
                    image, w.view(1, 6, 12, 2).expand(h.shape[0], -1, -1, -1), **options
                ).flatten(1),
                F.grid_sample(trained, moved, **options).flatten(1),
                F.grid_sample(image, moved, **options).flatten(1),
            ],
            1,
        )

    return with_linear(points)


def _sampled_volume(mode, padding, corners):
    options = {"mode": mode, "padding_mode": padding, "align_corners": corners}

    def points(h):
        moved = 1.3 * h.view(h.shape[0], 2, 3, 4, 3)[:, :1].sin()
        fixed = F.grid_sample(h, wide(POINTS_IN_SPACE, h), **options)
        return torch.cat([fixed, F.grid_sample(h, moved, **options)], 2)

    return apply(CUBE, points)


SAMPLED = {
    f"{mode}_{padding}_{corners}": _sampled(mode, padding, corners)
    for mode in ("bilinear", "nearest", "bicubic")
    for padding in ("zeros", "border", "reflection")
    for corners in (True, False)
} | {
    f"volume_{mode}_{padding}_{corners}": _sampled_volume(mode, padding, corners)
    for mode in ("bilinear", "nearest")
    for padding in ("zeros", "border", "reflection")
    for corners in (True, False)
}
SAMPLED |= {
    "affine": apply((2, 3), lambda h: F.affine_grid(h, (h.shape[0], 1, 3, 4), align_corners=False)),
    "affine_volume": apply(
        (3, 4), lambda h: F.affine_grid(h, (h.shape[0], 1, 2, 3, 4), align_corners=True)
    ),
    "transformer": with_linear(
        lambda h, w, b: F.grid_sample(
            w.view(1, 1, 12, 12).expand(h.shape[0], -1, -1, -1),
            F.affine_grid(h[:, :6].view(-1, 2, 3), (h.shape[0], 1, 5, 5), align_corners=False),
            align_corners=False,
        )
    ),
    # Points of the border itself, where PyTorch's derivative is that of the outside.
    "identity": apply(
        ROW,
        lambda h: F.grid_sample(
            h.view(-1, 1, 3, 4),
            F.affine_grid(
                (torch.eye(2, 3) + 0 * h[:, :6].view(-1, 2, 3)), (h.shape[0], 1, 3, 4), True
            ),
            padding_mode="border",
            align_corners=True,
        ),
    ),
}
ALL = {
    f"{group}_{name}": case
    for group, cases in {
        "taken": TAKEN,
        "replaced": REPLACED,
        "reduced": REDUCED,
        "strided": STRIDED,
        "sampled": SAMPLED,
    }.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", ALL)
def test_right_and_swept(name):
    assert_right(ALL[name](), Z)


# PyTorch's own derivative of the first is wrong or missing; the second computes the same.
EQUAL = {
    "index_put_to_one_place_twice": (
        LINE,
        lambda h: h.index_put((rows_of(h), torch.tensor([1, 1, 2])), h[:, :3].sin()),
        lambda h: torch.cat([h[:, :1], h[:, 1:3].sin(), h[:, 3:]], 1),
    ),
    "scatter_to_one_place_twice": (
        ROW,
        lambda h: h.scatter(1, wide(TWICE, h), h[:, :3].sin()),
        lambda h: torch.cat([h[:, :1], h[:, 1:3].sin(), h[:, 3:]], 1),
    ),
    "unpooled_windows_that_overlap": (
        IMAGE,
        lambda h: F.max_unpool2d(*F.max_pool2d(h, 3, 1, return_indices=True), 3, 1),
        lambda h: h * _is_maximum(h),
    ),
    "select_scatter_from_the_end": (
        ROW,
        lambda h: h.select_scatter(h[:, 1].sin(), -1, 2),
        lambda h: torch.cat([h[:, :2], h[:, 1:2].sin(), h[:, 3:]], 1),
    ),
    "as_strided_scatter": (
        ROW,
        lambda h: h.as_strided_scatter(h[:, :6].exp(), (h.shape[0], 6), (12, 2)),
        lambda h: torch.stack([h[:, :6].exp(), h[:, 1::2]], 2).flatten(1),
    ),
    "as_strided_beside_a_slice": (
        LINE,
        lambda h: h[:, 1:].as_strided((h.shape[0], 3, 4), (28, 4, 1), 0).sin(),
        lambda h: h.flatten(1)[:, :12].sin(),
    ),
    "as_strided_of_an_expanded_axis": (
        ROW,
        lambda h: h[:, :1].expand(-1, 4).as_strided((h.shape[0], 5), (12, 2)),
        lambda h: h[:, :9:2],
    ),
    "product_of_zeros": (
        ROW,
        lambda h: h[:, :1].scatter_reduce(
            1, torch.zeros_like(h).long()[:, :3], h[:, :3].relu() * _LAST, "prod"
        ),
        lambda h: h[:, :1] * h[:, :1] * (0 * h[:, 1:2]) * h[:, 2:3],
    ),
    "scatter_added": (
        ROW,
        lambda h: h.scatter(1, wide(TWICE, h), h[:, :3].sin(), reduce="add"),
        lambda h: torch.cat(
            [
                h[:, :1],
                h[:, 1:2] + h[:, :1].sin() + h[:, 1:2].sin(),
                h[:, 2:3] + h[:, 2:3].sin(),
                h[:, 3:],
            ],
            1,
        ),
    ),
    "scatter_multiplied": (
        ROW,
        lambda h: h.scatter(1, wide(TWICE, h), 3.0, reduce="multiply"),
        lambda h: h * torch.tensor([1.0, 9, 3, *[1] * 9]),
    ),
}


def _is_maximum(h):
    places = F.max_pool2d(h.detach(), 3, 1, return_indices=True)[1].flatten(2)
    return torch.zeros_like(h).flatten(2).scatter(2, places, 1.0).view(h.shape)


@pytest.mark.parametrize("name", EQUAL)
def test_right_where_pytorch_is_not(name):
    shape, ours, theirs = EQUAL[name]
    module, oracle = decoder(shape, ours), decoder(shape, theirs)
    oracle.load_state_dict(module.state_dict())
    want, exact = loss_and_gradients(oracle, Z, "reference")
    scale = max(float(g.abs().max()) for g in exact)
    for chunk_size in (None, 1, 2):
        got, gradients = loss_and_gradients(module, Z, "torch", chunk_size=chunk_size)
        assert abs(got - want) <= 1e-10 * abs(want)
        for mine, other in zip(gradients, exact, strict=True):
            assert float((mine - other).abs().max()) <= 1e-10 * scale


REFUSED = {
    "entries_by_value": (lambda h: h.masked_select(h > 0).sum() * h, "cannot be traced"),
    "unique": (lambda h: h * h.unique().numel(), "cannot be traced"),
    "random_windows": (
        lambda h: F.fractional_max_pool2d(h[:, None], 2, output_size=2),
        "draws at random",
    ),
    "other_samples_row": (lambda h: h[torch.arange(h.shape[0] - 1, -1, -1)], "mixes the samples"),
    "other_samples_entry": (
        lambda h: h.gather(0, torch.zeros(1, 4, 7, dtype=torch.long).expand_as(h)),
        "mixes the samples",
    ),
    "other_samples_source": (
        lambda h: h.masked_scatter(SOME, h.sin()),
        "mixes the samples|belongs to other ones",
    ),
    "strides_over_samples": (lambda h: h.as_strided((h.shape[0], 4), (4, 1)), "mixes the samples"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    function, message = REFUSED[name]
    with pytest.raises(RuntimeError, match=message) as caught:
        decode_with_jacobian(apply(LINE, function)(), Z)
    assert "\n" not in str(caught.value)
