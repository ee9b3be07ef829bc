"""One decoder for each operation that has a rule, as `CASES`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

B, M = 3, 4


class Decoder(nn.Module):
    """A trained linear map to the shape that a case wants, the case, another linear map."""

    def __init__(self, shape, body, *layers, positive=False, tail=True):
        super().__init__()
        self.shape, self.body, self.positive = shape, body, positive
        self.lift = nn.Linear(M, math.prod(shape))
        self.layers = nn.ModuleList(layers)
        self.gain = nn.Parameter(torch.tensor(1.3)) if tail else None

    def forward(self, z, *args):
        h = self.lift(z).view(-1, *self.shape)
        if self.positive:
            h = 0.2 + 0.7 * h.sigmoid()
        h = self.body(h, *self.layers, *args)
        return h if self.gain is None else torch.tanh(self.gain * h.reshape(h.shape[0], -1))


def decoder(shape, body, *layers, **options):
    torch.manual_seed(sum(map(ord, str(shape))))
    module = Decoder(shape, body, *layers, **options).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in module.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
            elif name.endswith("running_mean"):
                buffer.normal_()
    return module


def through(shape, *layers, **options):
    """A case that applies modules one after another."""
    return lambda: decoder(shape, lambda h, *ls: nn.Sequential(*ls)(h), *layers, **options)


def apply(shape, function, **options):
    """A case that applies a function."""
    return lambda: decoder(shape, lambda h, *ls: function(h), **options)


def with_linear(function):
    """A case that applies a function of a row and a trained matrix [12, 12] and vector [12]."""
    return lambda: decoder(
        ROW, lambda h, layer: function(h, layer.weight, layer.bias), nn.Linear(12, 12)
    )


IMAGE, LINE, CUBE, ROW, WORDS = (4, 6, 5), (4, 7), (2, 3, 4, 3), (12,), (5, 8)
ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu_inplace": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(0.2),
    "prelu": nn.PReLU(),
    "elu": nn.ELU(1.3),
    "elu_inplace": nn.ELU(0.7, inplace=True),
    "celu": nn.CELU(2.0),
    "selu": nn.SELU(),
    "silu": nn.SiLU(),
    "silu_inplace": nn.SiLU(inplace=True),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "mish": nn.Mish(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "log_sigmoid": nn.LogSigmoid(),
    "softplus": nn.Softplus(),
    "softplus_beta": nn.Softplus(2.0, 1.0),
    "softsign": nn.Softsign(),
    "hardtanh": nn.Hardtanh(-0.7, 0.4),
    "hardswish": nn.Hardswish(),
    "hardshrink": nn.Hardshrink(0.3),
    "softshrink": nn.Softshrink(0.3),
    "tanhshrink": nn.Tanhshrink(),
    "threshold": nn.Threshold(0.1, 0.5),
    "rrelu": nn.RReLU(),
    "glu": nn.GLU(1),
    "softmin": nn.Softmin(1),
    "dropout": nn.Dropout(0.5),
}
ELEMENTWISE = {
    name: getattr(torch, name)
    for name in (
        "exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal abs sin cos tan asin "
        "acos atan sinh cosh asinh atanh erf erfc erfinv neg logit frac sigmoid tanh digamma"
    ).split()
}
CASES = {
    **{f"act_{k}": through((2, 6), v) for k, v in ACTIVATIONS.items()},
    **{f"fn_{k}": apply(ROW, v, positive=True) for k, v in ELEMENTWISE.items()},
    "acosh": apply(ROW, lambda h: torch.acosh(h + 2), positive=True),
    "prelu_channels": through(IMAGE, nn.PReLU(4)),
    "pow": apply(ROW, lambda h: h**3 + h.abs() ** 1.7 + 2.0**h),
    "pow_tensors": apply(ROW, lambda h: h ** h.flip(1), positive=True),
    "linear": through(ROW, nn.Linear(12, 7), nn.Linear(7, 5, bias=False)),
    "linear_words": through(WORDS, nn.Linear(8, 3)),
    "conv1d": through(LINE, nn.Conv1d(4, 6, 3, 2, 1, 1, 2)),
    "conv2d": through(IMAGE, nn.Conv2d(4, 6, 3, 2, 1, 2, 2)),
    "huber": apply(ROW, lambda h: F.huber_loss(h, 0.3 * h.flip(1), reduction="none")),
    "conv2d_same_even": through(IMAGE, nn.Conv2d(4, 3, 4, padding="same")),
    "conv2d_same": through(IMAGE, nn.Conv2d(4, 3, 3, padding="same")),
    "conv2d_valid": through(IMAGE, nn.Conv2d(4, 3, 3, padding="valid")),
    "conv2d_reflect": through(IMAGE, nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect")),
    "conv2d_circular": through(IMAGE, nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular")),
    "conv2d_replicate": through(IMAGE, nn.Conv2d(4, 3, 3, padding=1, padding_mode="replicate")),
    "conv3d": through(CUBE, nn.Conv3d(2, 4, 2, groups=2, bias=False)),
    "deconv1d": through(LINE, nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, 2)),
    "deconv2d": through(IMAGE, nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2, dilation=2)),
    "deconv3d": through(CUBE, nn.ConvTranspose3d(2, 3, 2, 2)),
    "channels_last": lambda: through(
        IMAGE, nn.Conv2d(4, 6, 3), nn.SiLU(), nn.ConvTranspose2d(6, 3, 4, 2, 1)
    )().to(memory_format=torch.channels_last),
    "to_channels_last": apply(IMAGE, lambda h: h.to(memory_format=torch.channels_last) * 2),
    "group_norm": through(IMAGE, nn.GroupNorm(2, 4)),
    "layer_norm": through(WORDS, nn.LayerNorm(8), nn.LayerNorm((5, 8), elementwise_affine=False)),
    "instance_norm": through(IMAGE, nn.InstanceNorm2d(4, affine=True)),
    "instance_norm_running": through(LINE, nn.InstanceNorm1d(4, track_running_stats=True)),
    "rms_norm": through(WORDS, nn.RMSNorm(8), nn.RMSNorm((5, 8), eps=1e-3)),
    "batch_norm": through(IMAGE, nn.BatchNorm2d(4)),
    "batch_norm_rows": through(ROW, nn.BatchNorm1d(12, affine=False)),
    "local_response": through(IMAGE, nn.LocalResponseNorm(3)),
    "softmax": through(IMAGE, nn.Softmax(1), nn.LogSoftmax(-1)),
    "upsample_nearest": through(IMAGE, nn.Upsample(scale_factor=2)),
    "upsample_nearest_exact": through(IMAGE, nn.Upsample(size=(9, 7), mode="nearest-exact")),
    "upsample_linear": through(LINE, nn.Upsample(scale_factor=1.5, mode="linear")),
    "upsample_bilinear": through(IMAGE, nn.Upsample((9, 8), mode="bilinear", align_corners=True)),
    "upsample_bicubic": through(IMAGE, nn.Upsample(scale_factor=2, mode="bicubic")),
    "upsample_trilinear": through(CUBE, nn.Upsample(scale_factor=2, mode="trilinear")),
    "upsample_antialias": apply(
        IMAGE, lambda h: F.interpolate(h, (3, 3), mode="bilinear", antialias=True)
    ),
    "pixel_shuffle": through(IMAGE, nn.PixelShuffle(2)),
    "pixel_unshuffle": through((2, 4, 6), nn.PixelUnshuffle(2)),
    "channel_shuffle": through(IMAGE, nn.ChannelShuffle(2)),
    "avg_pool": through(IMAGE, nn.AvgPool2d(2, 2, 1), nn.AdaptiveAvgPool2d((2, 1))),
    "avg_pool_1d": through(LINE, nn.AvgPool1d(2)),
    "avg_pool_3d": through(CUBE, nn.AvgPool3d(2, 1), nn.AdaptiveAvgPool3d(1)),
    "max_pool": through(IMAGE, nn.MaxPool2d(3, 2, 1)),
    "max_pool_1d": through(LINE, nn.MaxPool1d(2)),
    "max_pool_3d": through(CUBE, nn.MaxPool3d(2)),
    "adaptive_max_pool": through(IMAGE, nn.AdaptiveMaxPool2d((2, 3))),
    "lp_pool": through(IMAGE, nn.LPPool2d(2, 2), positive=True),
    "zero_pad": through(IMAGE, nn.ZeroPad2d((1, 2, 0, 1)), nn.ConstantPad2d(1, 0.3)),
    "flatten": through(IMAGE, nn.Flatten(2), nn.Unflatten(1, (2, 2)), nn.Flatten()),
    "permute": apply(IMAGE, lambda h: h.permute(0, 2, 3, 1).transpose(1, -1).movedim(1, 2)),
    "batch_moves": apply(LINE, lambda h: h.transpose(0, 1).sin().permute(1, 0, 2).contiguous()),
    "reshape_batch": apply(LINE, lambda h: h.reshape(-1, 7).sin().view(-1, 4, 7)),
    "squeeze": apply(LINE, lambda h: h[:, :1].squeeze(1).unsqueeze(-1).squeeze(-1)),
    "expand": apply(
        LINE, lambda h: h.unsqueeze(1).expand(-1, 3, -1, -1) + h[:, :1].expand_as(h)[:, None]
    ),
    "repeat": apply(LINE, lambda h: h.repeat(1, 2, 1).repeat_interleave(2, 2)),
    "pieces": apply(
        LINE,
        lambda h: torch.cat(
            [
                h.chunk(3, 2)[2],
                *h.split([3, 4], 2),
                *h.split(3, 2),
                *h.tensor_split(2, 2),
                h.narrow(2, 1, 3),
            ],
            -1,
        ),
    ),
    "unbind": apply(LINE, lambda h: torch.stack(h.unbind(1)[:2] + h.unbind(1)[3:], -1)),
    "cat_constant": apply(
        LINE,
        lambda h: torch.cat(
            [h, torch.ones_like(h), h.new_ones(1, 4, 1).expand(h.shape[0], 4, 1)], 2
        ),
    ),
    "slices": apply(
        LINE, lambda h: h[:, 1:3, ::2] * h[..., 0, 1][:, None, None] + h[:, [2, 0], 1:5]
    ),
    "advanced_index": apply(LINE, lambda h: h[:, torch.tensor([0, 2, 2]), torch.tensor([1, 6, 3])]),
    "gather": apply(LINE, lambda h: h.gather(2, h.argsort(2)[..., :3]) + h.topk(3, 2).values),
    "sort": apply(LINE, lambda h: h.sort(1).values + h.index_select(1, torch.tensor([3, 2, 1, 0]))),
    "roll_flip": apply(IMAGE, lambda h: h.roll(2, 1).flip(-1, 2).roll((1, 1), (2, 3))),
    "roll_flat": apply(ROW, lambda h: h[..., None].roll(1, 1)),
    "triangle": apply(
        (4, 4), lambda h: h.tril() + h.triu(1).mT + h.diagonal(dim1=1, dim2=2)[:, None]
    ),
    "dtype": apply(ROW, lambda h: h.to(torch.float64).clone().type_as(h).contiguous()),
    "arithmetic": apply(
        ROW,
        lambda h: (h * h.flip(1) + 2 - h / (3 + h * h)) * (1 - h) / 2 + torch.add(h, h, alpha=3),
    ),
    "broadcast": apply(LINE, lambda h: h * h.mean(2, keepdim=True) + h.sum((1, 2))[:, None, None]),
    "scalar_left": apply(ROW, lambda h: 1 / (2 + h * h) - (3 - h) * torch.ones(12, dtype=h.dtype)),
    "rounding": apply(ROW, lambda h: h + torch.floor(h) + torch.div(h, 0.3, rounding_mode="floor")),
    "modulo": apply(ROW, lambda h: h % 0.7 + torch.fmod(h, 0.3)),
    "where": apply(ROW, lambda h: torch.where(h > 0, h.exp(), h * 2) + torch.where(h < 0, 1.0, h)),
    "masked_fill": apply(ROW, lambda h: h.masked_fill(h > 0.3, 0.1)),
    "clamp": apply(ROW, lambda h: h.clamp(-0.3, 0.4) + h.clamp(min=0) + h.clamp_max(0.2)),
    "clamp_tensor": apply(ROW, lambda h: torch.clamp(h, h.flip(1) - 0.1, h * 0.5 + 0.3)),
    "extremes": apply(
        ROW, lambda h: torch.maximum(h, h.flip(1)) - torch.minimum(h, 0.5 * h.roll(1, 1))
    ),
    "lerp": apply(ROW, lambda h: h.lerp(h.flip(1), 0.3) + torch.lerp(h, h * 2, h.sigmoid())),
    "addcmul": apply(
        ROW, lambda h: torch.addcmul(h, h, h.flip(1), value=0.5) + torch.addcdiv(h, h, 2 + h * h)
    ),
    "atan2": apply(ROW, lambda h: torch.atan2(h, 1 + h * h)),
    "reductions": apply(
        LINE, lambda h: h.amax(2) + h.amin((1, 2))[:, None] + h.max(2).values + h.min(2)[0]
    ),
    "moments": apply(
        LINE, lambda h: h.var(2) + h.std(2, correction=0) + h.mean((1, 2))[:, None] + h.logsumexp(2)
    ),
    "var_mean": apply(LINE, lambda h: torch.var_mean(h, 2)[0] + torch.var_mean(h, 2)[1]),
    "norms": apply(
        LINE, lambda h: F.normalize(h, dim=1) + h.norm(dim=2, keepdim=True) + h.abs().cumsum(2)
    ),
    "norms_orders": apply(
        LINE,
        lambda h: (
            torch.linalg.vector_norm(h, 3, 2) + h.norm(1, 2) + torch.linalg.norm(h, torch.inf, 2)
        ),
    ),
    "matmul": apply(
        (4, 4), lambda h: h @ h.mT + h @ h[:, 0, :, None] + torch.ones(4, 4, dtype=h.dtype) @ h
    ),
    "matmul_ranks": apply(
        (2, 3, 3),
        lambda h: torch.matmul(h, h[:, :1]) + torch.matmul(torch.ones(2, 1, 3, dtype=h.dtype), h),
    ),
    "matmul_vector": apply((4, 4), lambda h: h @ torch.arange(4.0, dtype=h.dtype)),
    "bmm": apply((4, 4), lambda h: torch.baddbmm(h, h, h.mT, beta=0.3, alpha=0.2).bmm(h)),
    "einsum": apply(
        (4, 5), lambda h: torch.einsum("bij,bkj->bik", h, h) + torch.einsum("bij->bi", h)[..., None]
    ),
    "einsum_implicit": apply(
        (4, 5), lambda h: torch.einsum("...ij,jk", h, torch.ones(5, 2, dtype=h.dtype))
    ),
    "attention": apply((2, 5, 4), lambda h: F.scaled_dot_product_attention(h, h.flip(2), h.sin())),
    "attention_causal": apply(
        (2, 5, 4), lambda h: F.scaled_dot_product_attention(h, h, h, is_causal=True, scale=0.3)
    ),
    "attention_mask": apply(
        (2, 5, 4),
        lambda h: F.scaled_dot_product_attention(
            h, h, h, torch.eye(5, dtype=torch.bool) | (h[..., 0] > -9)[:, :, None]
        ),
    ),
    "modulation": apply(
        (4, 3, 3),
        lambda h: (
            _own_weights(h[:, :2], h[:, 2:].mean((2, 3))) + h.sum((1, 2, 3))[:, None, None, None]
        ),
    ),
    # Other names of the same operations.
    "spellings_pointwise": apply(
        ROW,
        lambda h: (
            sum(
                getattr(torch, name)(h)
                for name in "absolute arccos arcsin arcsinh arctan arctanh negative".split()
            )
            + sum(
                getattr(torch.special, name)(h)
                for name in "erf erfc erfinv exp2 expit expm1 log1p logit".split()
            )
            + torch.arccosh(torch.positive(h) + 1)
            + torch.nan_to_num(h)
            + torch.arctan2(h, h + 1)
            + F.hardtanh(h, 0.3, 0.6)
            + F.relu6(8 * h)
            + h.clip(0.3, 0.6)
        ),
        positive=True,
    ),
    "spellings_arithmetic": apply(
        ROW, lambda h: torch.multiply(h, h).subtract(h).divide(2 + h * h).true_divide(3)
    ),
    "spellings_shape": apply(
        LINE,
        lambda h: torch.concat(
            [
                h.swapaxes(1, 2).swapdims(1, 2).moveaxis(1, 2).mT.adjoint().mH,
                torch.concatenate([h.reshape_as(h), h.view_as(h)], 2).unsafe_chunk(2, 2)[0],
                h.unsafe_split(3, 2)[1],
                h.unsafe_split_with_sizes([2, 5], 2)[1],
                torch.broadcast_to(h[:, :1], h.shape).tile(1, 1, 2),
                torch.atleast_3d(torch.atleast_2d(torch.atleast_1d(h))),
                h.sum(1).t().sin().T[:, None].expand(-1, 4, -1),
                h.permute(2, 1, 0).T,
                h.ravel().view(h.shape),
                torch.take_along_dim(h, h.argsort(2), 2),
                torch.special.logsumexp(h, 2, True),
            ],
            -1,
        ),
    ),
    "spellings_products": apply(
        (4, 4),
        lambda h: torch.stack(
            [
                torch.linalg.matmul(h, h).flatten(1).mm(_ramp(16, 4)),
                torch.addmm(h[:, 0], h[:, 1], _ramp(4, 4), beta=0.5),
                h[:, 1].mv(_ramp(4))[:, None] * h[:, 3],
                h.norm(dim=1),
            ]
        ).sum(0),
    ),
    "pads": apply(
        LINE,
        lambda h: (
            torch.constant_pad_nd(h, (1, 2), 0.4)[..., :7]
            + F.pad(h, (2, 1), "reflect")[..., 1:8]
            + F.pad(h, (0, 3), "replicate")[..., 3:]
        ),
    ),
    "pads_cube": through(CUBE, nn.ReplicationPad3d(1), nn.ReflectionPad3d((1, 1, 1, 0, 0, 1))),
    "resample_1d": through(
        LINE, nn.Upsample(scale_factor=2), nn.AdaptiveAvgPool1d(5), nn.AdaptiveMaxPool1d(3)
    ),
    "resample_1d_exact": through(LINE, nn.Upsample(11, mode="nearest-exact")),
    "resample_3d": through(CUBE, nn.Upsample(scale_factor=2), nn.AdaptiveMaxPool3d((2, 3, 2))),
    "resample_3d_exact": through(CUBE, nn.Upsample((4, 5, 4), mode="nearest-exact")),
    "bicubic_antialias": apply(
        IMAGE, lambda h: F.interpolate(h, (3, 4), mode="bicubic", antialias=True)
    ),
    "max_pool_pairs": apply(
        IMAGE,
        lambda h: (
            F.max_pool2d(h, 2, return_indices=True)[0]
            + F.max_pool1d(h.flatten(2), 2, return_indices=True)[0][..., :6].reshape(-1, 4, 3, 2)
        ),
    ),
    "max_pool_pairs_3d": apply(CUBE, lambda h: F.max_pool3d(h, 2, return_indices=True)[0]),
    "dropouts": through(
        IMAGE, nn.Dropout2d(0.5), nn.AlphaDropout(0.5), nn.FeatureAlphaDropout(0.5)
    ),
    "avg_pool_1d_options": through(LINE, nn.AvgPool1d(3, 2, 1, True, False), nn.AvgPool1d(2)),
    "repeat_new_axis": apply(LINE, lambda h: h.sum(1).repeat(3, 1, 2).permute(1, 0, 2)),
    "take_broadcast": apply(
        LINE, lambda h: torch.take_along_dim(h[:, :1], torch.tensor([[[3, 0], [1, 1]]]), 2)
    ),
    "pow_constants": apply(ROW, lambda h: h**0 + h**1 + h**2 + torch.rsqrt(h**4 + 1)),
    "norms_spellings": apply(
        LINE, lambda h: torch.linalg.norm(h, dim=2) + torch.std_mean(h, 2)[0] + h.norm(2.5, 2)
    ),
    # Parameters beside values that depend on z.
    "trained_arithmetic": with_linear(
        lambda h, w, b: (
            torch.lerp(h, b, h.sigmoid())
            + torch.lerp(b, h, w[0])
            + torch.atan2(h, b)
            + torch.atan2(b, h)
            + h.exp() ** b
            + b.exp() ** h
            + torch.clamp(h, b - 0.2, b + 0.1)
            + torch.clamp_min(h, b)
            + torch.maximum(h, b) * torch.minimum(b, h)
            + torch.where(h > 0, b, h)
            + h.masked_fill(h > 0.2, b.sum())
        )
    ),
    "trained_products": with_linear(
        lambda h, w, b: (
            (h @ b + torch.mv(h, b))[:, None]
            + torch.addmm(b, h, w, beta=0.5, alpha=2)
            + torch.matmul(b, h.view(-1, 12, 1))
            + F.bilinear(h, h.sin(), w[None].expand(12, 12, 12), b)
        )
    ),
    "trained_writes": with_linear(lambda h, w, b: _write_trained(h, w, b)),
    "plain_copy": with_linear(lambda h, w, b: h * torch.zeros_like(h).copy_(b)),
    "einsum_factors": with_linear(
        lambda h, w, b: (
            torch.einsum("bi,oi,bj->bo", h, w, h.sin())
            + torch.einsum("bi,jk->bj", h, w)
            + torch.einsum("...i,i->...", h, b)[:, None]
        )
    ),
    "scatters": apply(
        LINE,
        lambda h: (
            h.index_add(1, torch.tensor([2, 0]), h[:, :2].sin(), alpha=0.5)
            + torch.zeros_like(h).scatter_add(2, h.argsort(2), h.exp())
        ),
    ),
    "inplace_zero": apply(LINE, lambda h: _write_nothing(h)),
    "unfold": apply(LINE, lambda h: h.unfold(2, 3, 2)),
    "fold": apply(IMAGE, lambda h: F.fold(F.unfold(h, 2), (6, 5), 2)),
    "weight_norm": through(ROW, nn.utils.parametrizations.weight_norm(nn.Linear(12, 5))),
    "spectral_norm": through(ROW, nn.utils.parametrizations.spectral_norm(nn.Linear(12, 5))),
    "spectral_norm_old": through(ROW, nn.utils.spectral_norm(nn.Linear(12, 5))),
    "bilinear": lambda: decoder(ROW, lambda h, layer: layer(h, h.sin()), nn.Bilinear(12, 12, 3)),
    "gru_cell": lambda: decoder(ROW, lambda h, layer: layer(h), nn.GRUCell(12, 5)),
    "no_grad": apply(ROW, lambda h: h * _constant(h)),
    "detach": apply(ROW, lambda h: h * h.detach()),
    "residual": lambda: decoder(
        ROW, lambda h, a, b: h + b(F.relu(a(h))), nn.Linear(12, 9), nn.Linear(9, 12)
    ),
    "inplace_chain": apply(
        ROW, lambda h: (h * 1).mul_(2).add_(h.mean(1, keepdim=True)).relu_().sin()
    ),
    "inplace_alias": apply(LINE, lambda h: _write_alias(h)),
    "inplace_into_zeros": apply(LINE, lambda h: _write_zeros(h)),
    "index_put": apply(ROW, lambda h: _index_put(h)),
}


def _constant(h):
    with torch.no_grad():
        return h.mean(1, keepdim=True).exp()


def _write_alias(h):
    view = h[:, 1]
    copy = h * 1
    copy[:, 2:, :3] += view[:, None, :3] * 2
    first = copy[:, 0]
    first.mul_(3)
    return copy * first[:, None] + copy[:, 1, None]


def _write_zeros(h):
    canvas = torch.zeros(h.shape[0], 6, 7, dtype=h.dtype)
    canvas[:, 1:5] = h
    canvas[:, 5] = h[:, 0].sin()
    canvas[:, 0, 0] = 2.0
    return canvas.exp()


def _own_weights(h, style):
    """A convolution whose weights each sample makes for itself, as one grouped convolution."""
    batch = h.shape[0]
    base = torch.linspace(-1, 1, 2 * 2 * 9, dtype=h.dtype).view(1, 2, 2, 3, 3)
    weight = (base * style[:, None, :, None, None]).reshape(batch * 2, 2, 3, 3)
    mixed = F.conv2d(h.reshape(1, batch * 2, 3, 3), weight, padding=1, groups=batch)
    return mixed.view(batch, 2, 3, 3)


def _ramp(*shape):
    return torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).view(shape)


def _write_nothing(h):
    h = h * 1
    h[:, 1].zero_()
    h[:, 2].fill_(0.3)
    return h.exp()


def _write_trained(h, weight, bias):
    h = h.sin()
    h[:, 5] = weight[0, 0]
    h[:, torch.tensor([6, 8])] = weight[0, :2] * 2
    canvas = torch.zeros_like(h)
    canvas.copy_(h * bias)
    canvas[:, 2:5] = h[:, :3]
    return torch.cat([h, canvas], 1).exp()


def _index_put(h):
    h = h * 2
    h[:, torch.tensor([0, 3])] = h[:, torch.tensor([1, 2])].square()
    return h
