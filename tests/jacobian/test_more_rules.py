"""Rules and adjoints of special functions, products, distances and what takes parameters apart."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsfvae.jacobian.run.cache import Linearizer
from tests.jacobian.exactness import TOLERANCE, assert_right, loss_and_gradients
from tests.jacobian.rule_cases import IMAGE, LINE, ROW, M, apply, decoder, through, with_linear
from tests.jacobian.test_rules import compare

special = torch.special
SMOOTH = {
    **{n: getattr(torch, n) for n in "lgamma digamma sinc i0 deg2rad rad2deg".split()},
    **{n: getattr(special, n) for n in "i0e i1 i1e erfcx ndtr log_ndtr ndtri entr".split()},
    "polygamma": lambda h: torch.polygamma(1, h + 1) + 0.1 * special.polygamma(2, h + 1),
    "mvlgamma": lambda h: torch.mvlgamma(h + 2, 3) + special.multigammaln(h + 1.5, 2),
    "sinc_far": lambda h: torch.sinc(9 * h - 4),
    "bessel_far": lambda h: special.i1(9 * h - 4) + special.i1e(9 * h - 4) + special.i0e(h - 3),
    "error_far": lambda h: special.log_ndtr(9 * h - 7) + special.erfcx(3 * h - 2),
    "ldexp": lambda h: torch.ldexp(h, torch.arange(12.0) - 6) + torch.ldexp(h, h.flip(1)),
    "float_power": lambda h: torch.float_power(h, 1.5) + torch.float_power(h, h),
}
PAIRS = "xlogy hypot logaddexp logaddexp2 fmax fmin copysign remainder fmod atan2".split()


def paired(name):
    """Each operand a Jet, a parameter, of fewer axes, of one sample's extents and wider."""
    f = getattr(torch, name)

    def body(h, weight, bias):
        trained = 0.4 + bias.sigmoid()
        return (
            f(h, h.flip(1) + 0.1)
            + f(h, trained)
            + f(trained, h)
            + f(bias, h[:, :1])
            + f(h[:, :1], 0.2 + weight.exp()[0])
            + f(h[:, None], 0.1 + weight.exp()[None]).sum(2)
        )

    return lambda: decoder(
        ROW, lambda h, layer: body(h, layer.weight, layer.bias), nn.Linear(12, 12), positive=True
    )


def distances(between):
    """Between points that depend on z and trained ones, on either side, few and many."""

    def body(h, weight, bias):
        points = h.view(-1, 3, 4)
        return (
            between(points, weight[:, :4]).sum(2).repeat(1, 4)
            + between(weight[:5, :4], points).flatten(1)[:, :12]
            + between(points, points.flip(1).sin()).sum(2).repeat(1, 4)
            + between(points, torch.cat([weight, 2 * weight]).view(-1, 4)).sum(2).repeat(1, 4)
        )

    return with_linear(body)()


def modulated(h, weight):
    """Convolution weights of each sample's own, the batch in the groups (StyleGAN2)."""
    batch, channels = h.shape[:2]
    kernel = weight[None] * h.mean((2, 3))[:, None, :, None, None]
    kernel = kernel * torch.rsqrt(kernel.square().sum((2, 3, 4), keepdim=True) + 1e-8)
    kernel = kernel.reshape(-1, channels, 3, 3)
    space = h.shape[2:]
    image = h.reshape(1, batch * channels, *space)
    return F.conv2d(image, kernel, padding=1, groups=batch).view(batch, -1, *space)


def modulated_upwards(h, weight):
    batch, channels, height, width = h.shape
    kernel = weight[None] * h.mean((2, 3))[:, :, None, None, None]
    options = {"stride": 2, "padding": 1, "output_padding": 1, "groups": batch}
    image = h.reshape(1, batch * channels, height, width)
    up = F.conv_transpose2d(image, kernel.flatten(0, 1), **options)
    return up.view(batch, -1, 2 * height, 2 * width)


def modulated_constant(style, constant, weight):
    """A trained image, the same for all samples, under weights that depend on z."""
    batch = style.shape[0]
    kernel = weight[None] * style[:, None, :, None, None]
    image = constant.view(1, 4, 3, 3).repeat(1, batch, 1, 1).view(1, -1, 3, 3)
    mixed = F.conv2d(image, kernel.flatten(0, 1), padding=1, groups=batch)
    return mixed.view(batch, -1, 3, 3)


def einsum_diagonals(h, weight):
    return (
        torch.einsum("bii->b", h)[:, None]
        + torch.einsum("bii->bi", h * h)
        + torch.einsum("bij,bii,kk->bi", h, h.sin(), weight)
        + torch.einsum("ii,bjj->bi", weight, h)
        + torch.einsum("...ii,iii->...i", h, weight[:, :, None].expand(4, 4, 4) * 1)
    )


def zeros(f):
    """Entries that are zero: one, then two."""

    def body(h):
        one, two = torch.ones(2, 6, dtype=h.dtype)
        one[2] = two[2] = two[3] = 0
        return f(h * one) + f(h * two)

    return apply((6,), body)


CASES = {
    **{f"special_{name}": apply(ROW, f, positive=True) for name, f in SMOOTH.items()},
    **{f"pair_{name}": paired(name) for name in PAIRS},
    "numbers": apply(
        ROW,
        lambda h: (
            torch.xlogy(h, 2.0)
            + torch.xlogy(2.0, h)
            + special.xlog1py(h, h)
            + special.xlog1py(h, 0.5)
            + special.xlog1py(0.5, h)
            + torch.remainder(h, 0.3)
            + torch.fmod(-h, torch.tensor(0.4))
            + torch.copysign(h, -1.0)
        ),
        positive=True,
    ),
    **{
        f"products_{shape}": apply(
            shape,
            lambda h: (
                h.prod(1, keepdim=True)
                + h.cumprod(1)
                + h.cummax(1)[0]
                + h.cummin(1)[0]
                + h.prod(-1, keepdim=True)
                + h.cumprod(-1, dtype=torch.float64)
            ),
        )
        for shape in ((1,), (7,), (8,), (5, 3))
    },
    "products_of_axes": apply(LINE, lambda h: h.prod(2).prod(1)[:, None] * h.flatten(1)),
    "product_with_zeros": zeros(lambda h: h.prod(1, keepdim=True)),
    "running_product_with_zeros": zeros(lambda h: h.cumprod(1)),
    "pairwise_distance": with_linear(
        lambda h, w, b: (
            F.pairwise_distance(h, b.expand_as(h), 3.0)[:, None]
            + F.pairwise_distance(h, h.flip(1))[:, None]
            + F.cosine_similarity(h, b[None])[:, None] * h
            + F.cosine_similarity(h[:, :, None], w[None], dim=1)
        )
    ),
    "renorm": apply(ROW, lambda h: h.renorm(2, 0, 1.5) + h.renorm(3, 0, 1.0) + h.renorm(1, 0, 99)),
    "norms": apply(
        LINE,
        lambda h: sum(
            torch.linalg.vector_norm(h, p, 2)
            for p in (0, 0.5, 1, 1.5, 2, 2.5, 3, math.inf, -math.inf, -1.0)
        ),
    ),
    "norms_by_other_names": apply(
        LINE,
        lambda h: (
            h.norm(1, 2)
            + h.norm("fro", 2)
            + h.norm(p=math.inf, dim=2)
            + torch.linalg.norm(h, 3, 2)
            + torch.linalg.norm(h, "fro", (1, 2))[:, None]
            + torch.ops.aten.norm(h, 2.5, [2])
        ),
    ),
    "numbers_among_nan": apply(
        LINE,
        lambda h: (
            torch.where(h > 0.5, math.nan, h).nansum(2)
            + torch.where(h > 0.3, math.nan, h).nanmean((1, 2))[:, None]
        ),
    ),
    "moments_of_all": apply(
        LINE,
        lambda h: (
            h.std((1, 2))[:, None]
            + sum(torch.std_mean(h, (1, 2), keepdim=True))[..., 0]
            + sum(torch.var_mean(h, 2, correction=0))
            + h.logsumexp((1, 2))[:, None]
        ),
    ),
    "integrals": apply(
        LINE,
        lambda h: (
            torch.trapezoid(h, dim=2)
            + torch.cumulative_trapezoid(h, dx=0.3, dim=2).sum(2)
            + torch.trapezoid(h, torch.arange(7.0, dtype=h.dtype).square(), dim=2)
            + torch.gradient(h, spacing=0.5, dim=(1, 2))[1].sum(2)
        ),
    ),
    "clamps": with_linear(
        lambda h, w, b: (
            h.clamp(min=b)
            + h.clamp(max=b)
            + torch.clamp(h, b - 0.3, b + 0.2)
            + torch.clamp(h, b + 0.2, b - 0.3)
            + torch.clamp(b, h, h + 0.1)
            + torch.clamp_min(b, h)
            + torch.clip(h, -0.1)
            + h.clamp(0.2, -0.2)
            + torch.clamp(h[:, :1], b - 0.1, h)
            + F.hardtanh(h, -0.2, 0.3)
        )
    ),
    "softmax_dtype": apply(
        LINE, lambda h: h.softmax(2, dtype=torch.float64) + h.log_softmax(1, dtype=torch.float64)
    ),
    # The batch in the channels' place.
    "pools_without_a_batch": apply(
        LINE,
        lambda h: (
            F.avg_pool2d(h, 2, 1, 0, True, False)[..., :3]
            + F.adaptive_avg_pool2d(h, 3)
            + F.max_pool2d(h, 2, 1)[..., :1]
            + F.adaptive_avg_pool1d(h.flatten(1), 3)[:, None]
            + F.avg_pool1d(h.flatten(1), 3, 2)[:, None, :3]
            + F.unfold(h.unsqueeze(1), 2)[:, :3, :3]
        ),
    ),
    "modulated": lambda: decoder(
        (4, 5, 4), lambda h, c: modulated(h, c.weight) + c.bias[:, None, None], nn.Conv2d(4, 6, 3)
    ),
    "modulated_upwards": lambda: decoder(
        (4, 5, 4), lambda h, c: modulated_upwards(h, c.weight), nn.ConvTranspose2d(4, 6, 3)
    ),
    "modulated_constant": lambda: decoder(
        (4,),
        lambda h, image, c: modulated_constant(h, image.weight, c.weight),
        nn.Linear(9, 4, bias=False),
        nn.Conv2d(4, 6, 3),
    ),
    "conv_same": through(
        IMAGE,
        nn.Conv2d(4, 6, 3, padding="same", dilation=2, groups=2),
        nn.Conv2d(6, 4, 5, padding="same"),
    ),
    "einsum_diagonals": lambda: decoder(
        (4, 4), lambda h, layer: einsum_diagonals(h, layer.weight), nn.Linear(4, 4)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rule(name):
    torch.manual_seed(0)
    z = torch.randn(5, M, dtype=torch.float64)
    with warnings.catch_warnings():
        # vmap warns of the oracle's speed.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        compare(CASES[name](), z)
        assert_right(CASES[name](), z)


class Attention(nn.Module):
    """Attention in which `which` of query, key, value and mask are parameters."""

    def __init__(self, which, **options):
        super().__init__()
        self.lift = nn.Linear(M, 2 * 5 * 4)
        self.which, self.options = which, options
        self.query, self.key = nn.Parameter(torch.randn(1, 2, 3, 4)), _trained(1, 2, 5, 4)
        self.value, self.mask = _trained(2, 5, 4), _trained(3, 5)

    def forward(self, z):
        h = self.lift(z).view(-1, 2, 5, 4)
        query = self.query if "q" in self.which else h[:, :, :3]
        key = self.key if "k" in self.which else h.cos()
        value = self.value if "v" in self.which else h.sin()
        if self.options.get("enable_gqa"):
            key, value = key[:, :1], value[..., :1, :, :]
            value = value.expand(z.shape[0], -1, -1, -1) if "v" in self.which else value
        mask = self.mask if "m" in self.which else None
        if "z" in self.which:
            mask = h[:, :, :3] @ h.mT
        return F.scaled_dot_product_attention(query, key, value, mask, **self.options).flatten(1)


def _trained(*shape):
    return nn.Parameter(torch.randn(shape))


@pytest.mark.parametrize("which", ["", *"q k v m z qk qv kv qm km qkm kvm kz".split()])
def test_attention_of_parameters(which):
    torch.manual_seed(0)
    assert_right(Attention(which).double(), torch.randn(5, M, dtype=torch.float64))


@pytest.mark.parametrize("which", ["", *"q k v qk".split()])
@pytest.mark.parametrize(
    "options", [{"is_causal": True, "scale": 0.3}, {"enable_gqa": True}], ids=str
)
def test_attention_options(which, options):
    torch.manual_seed(0)
    assert_right(Attention(which, **options).double(), torch.randn(5, M, dtype=torch.float64))


def assert_as(ours, oracle, z):
    """Loss and gradients as those of another decoder's reverse mode, where PyTorch's own fails."""
    oracle.load_state_dict(ours.state_dict())
    want, exact = loss_and_gradients(oracle, z, "reference")
    scale = max(float(g.abs().max()) for g in exact)
    for chunk_size in (None, 2):
        got, gradients = loss_and_gradients(ours, z, "torch", chunk_size=chunk_size)
        assert abs(got - want) <= TOLERANCE * max(1.0, abs(float(want)))
        for mine, theirs in zip(gradients, exact, strict=True):
            assert float((mine - theirs).abs().max()) <= TOLERANCE * max(1.0, scale)
    assert Linearizer(ours, z).plan(len(z)).obstacles == []


@pytest.mark.parametrize("p", [0.7, 1.0, 1.5, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("mode", ["", "use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist"])
def test_distances(p, mode):
    """PyTorch's own cannot be differentiated twice under vmap."""
    mode = mode or "use_mm_for_euclid_dist_if_necessary"
    ours = distances(lambda a, b: torch.cdist(a, b, p, mode))
    oracle = distances(
        lambda a, b: torch.linalg.vector_norm(a[..., :, None, :] - b[..., None, :, :], p, -1)
    )
    assert_as(ours, oracle, torch.randn(5, M, dtype=torch.float64))


@pytest.mark.parametrize("extent", [1, 5, 8])
def test_logcumsumexp(extent):
    """PyTorch's own second derivative is wrong."""
    later = torch.full((extent, extent), -300.0, dtype=torch.float64).triu(1)
    ours = apply((extent,), lambda h: h.logcumsumexp(1))()
    oracle = apply((extent,), lambda h: (h[:, None] + later).logsumexp(2))()
    assert_as(ours, oracle, torch.randn(5, M, dtype=torch.float64))


def test_remainder_of_a_number():
    """PyTorch's own has no derivative by the divisor."""
    ours = apply(ROW, lambda h: torch.remainder(2.0, h), positive=True)()
    oracle = apply(ROW, lambda h: torch.remainder(torch.tensor(2.0), h), positive=True)()
    assert_as(ours, oracle, torch.randn(5, M, dtype=torch.float64))


def test_aminmax():
    """PyTorch 2.11 has no derivative of it."""
    ours = apply(LINE, lambda h: sum(torch.aminmax(h, dim=2)))()
    oracle = apply(LINE, lambda h: h.amin(2) + h.amax(2))()
    assert_as(ours, oracle, torch.randn(5, M, dtype=torch.float64))


def test_ldexp_by_whole_numbers():
    """PyTorch 2.11's own derivative rounds the power down."""
    ours = apply(ROW, lambda h: torch.ldexp(h, torch.arange(12) - 6))()
    oracle = apply(ROW, lambda h: h * 2.0 ** (torch.arange(12.0) - 6))()
    assert_as(ours, oracle, torch.randn(5, M, dtype=torch.float64))
