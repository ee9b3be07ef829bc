"""Decoders of images that are not plain generators: warps, wavelets, codecs, attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.jacobian.zoo.images import conv, lift, settled
from tests.jacobian.zoo.pattern import M, Parts, lifted, pattern, weights


@pattern()
def spatial_transformer():
    """A picture that is warped by a transformation of the latents."""

    def run(own, z):
        theta = own.theta(z[:, :2]).view(-1, 2, 3) + own.identity
        h = own.lift(z)
        grid = F.affine_grid(theta, h.shape, align_corners=False)
        return F.grid_sample(h, grid, align_corners=False)

    parts = dict(theta=nn.Linear(2, 6), identity=torch.eye(2, 3), lift=lift(2, 4, 4))
    return Parts(run, **parts)


@pattern()
def flow_warp():
    """A learned template, moved along a flow of the latents."""

    def run(own, z):
        flow = 0.2 * torch.tanh(own.flow(z)).permute(0, 2, 3, 1)
        template = own.template.expand(z.shape[0], -1, -1, -1)
        grid = own.grid + flow
        return F.grid_sample(template, grid, padding_mode="border", align_corners=True)

    axis = torch.linspace(-1, 1, 4)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)[None]
    return Parts(run, flow=lift(2, 4, 4), template=weights(1, 3, 4, 4), grid=grid)


@pattern()
def deformable():
    """Samples at learned offsets, weighted by a mask."""

    def run(own, z):
        h = own.lift(z)
        offsets, mask = own.offsets(h).split([4, 2], 1)
        parts = []
        for k in range(2):
            grid = own.grid + 0.1 * offsets[:, 2 * k : 2 * k + 2].permute(0, 2, 3, 1)
            sampled = F.grid_sample(h, grid, align_corners=True)
            parts.append(own.kernels[k](sampled * mask[:, k : k + 1].sigmoid()))
        return sum(parts)

    axis = torch.linspace(-1, 1, 4)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)[None]
    kernels = nn.ModuleList([conv(3, 2, 1), conv(3, 2, 1)])
    return Parts(run, lift=lift(3, 4, 4), offsets=conv(3, 6), kernels=kernels, grid=grid)


@pattern()
def convnext():
    """Depthwise convolution, LayerNorm on the last axis, layer scale, stochastic depth off."""

    class Block(nn.Module):
        def __init__(self, channels, drop):
            super().__init__()
            self.depthwise = conv(channels, channels, 7, groups=channels)
            self.norm = nn.LayerNorm(channels, eps=1e-6)
            self.wide, self.narrow = nn.Linear(channels, 8), nn.Linear(8, channels)
            self.gamma, self.drop = weights(channels), drop

        def drop_path(self, x):
            if self.drop == 0.0 or not self.training:
                return x
            keep = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(1 - self.drop)
            return x * keep / (1 - self.drop)

        def forward(self, x):
            h = self.depthwise(x).permute(0, 2, 3, 1)
            h = self.gamma * self.narrow(F.gelu(self.wide(self.norm(h))))
            return x + self.drop_path(h.permute(0, 3, 1, 2))

    return nn.Sequential(lift(4, 3, 3), Block(4, 0.1), Block(4, 0.2), conv(4, 3, 1))


@pattern()
def convnext_v2():
    """Global response normalisation."""

    def run(own, h):
        n = torch.norm(h, p=2, dim=(1, 2), keepdim=True)
        n = n / (n.mean(dim=-1, keepdim=True) + 1e-6)
        return own.gamma * (h * n) + own.beta + h

    return lifted(run, 3, 3, 4, gamma=weights(1, 1, 1, 4), beta=weights(1, 1, 1, 4))


@pattern()
def swin():
    """Attention in shifted windows with a relative bias and a mask."""
    side, window, heads, dim = 4, 2, 2, 4

    def windows(x):
        x = x.view(-1, side // window, window, side // window, window, x.shape[-1])
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window * window, x.shape[-1])

    def run(own, z):
        x = own.lift(z).permute(0, 2, 3, 1)
        shifted = torch.roll(own.norm(x), shifts=(-1, -1), dims=(1, 2))
        w = windows(shifted)
        qkv = own.qkv(w).reshape(-1, 4, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attention = (q * (dim // heads) ** -0.5) @ k.transpose(-2, -1)
        bias = own.table[own.index.view(-1)].view(4, 4, -1).permute(2, 0, 1)
        attention = attention + bias.contiguous().unsqueeze(0)
        attention = attention.view(-1, 4, heads, 4, 4) + own.mask[None, :, None]
        attention = attention.view(-1, heads, 4, 4).softmax(-1)
        h = own.proj((attention @ v).transpose(1, 2).reshape(-1, 4, dim))
        h = h.view(-1, side // window, side // window, window, window, dim)
        h = h.permute(0, 1, 3, 2, 4, 5).reshape(-1, side, side, dim)
        return x + torch.roll(h, shifts=(1, 1), dims=(1, 2))

    regions = torch.zeros(1, side, side, 1)
    cuts = (slice(0, -window), slice(-window, -1), slice(-1, None))
    for number, (rows, columns) in enumerate((a, b) for a in cuts for b in cuts):
        regions[:, rows, columns] = number
    ids = windows(regions).squeeze(-1)
    mask = (ids.unsqueeze(1) - ids.unsqueeze(2)).ne(0) * -100.0
    place = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij"))
    away = (place.flatten(1)[:, :, None] - place.flatten(1)[:, None]).permute(1, 2, 0) + 1
    parts = dict(lift=lift(dim, side, side), norm=nn.LayerNorm(dim), qkv=nn.Linear(dim, 3 * dim))
    parts |= dict(proj=nn.Linear(dim, dim), table=weights(9, heads), mask=mask)
    return Parts(run, **parts, index=away[..., 0] * 3 + away[..., 1])


@pattern()
def wavelets():
    """An inverse wavelet transform: a transposed convolution with a buffer for weight."""

    def run(own, h):
        kernel = own.filters.repeat(h.shape[1] // 4, 1, 1, 1)
        return F.conv_transpose2d(h, kernel, stride=2, groups=h.shape[1] // 4)

    low, high = torch.tensor([1.0, 1.0]) / 2**0.5, torch.tensor([1.0, -1.0]) / 2**0.5
    filters = torch.stack([a[:, None] * b for a in (low, high) for b in (low, high)])
    return lifted(run, 8, 3, 3, filters=filters[:, None])


@pattern()
def block_transform():
    """A codec: coefficients of blocks, made pixels by a cosine transform and fold."""

    def run(own, h):
        blocks = own.basis.T @ (h * own.table) @ own.basis
        return F.fold(blocks.flatten(2).transpose(1, 2), (6, 6), kernel_size=3, stride=3)

    k, n = torch.arange(3.0)[:, None], torch.arange(3.0)
    basis = torch.cos(torch.pi * (n + 0.5) * k / 3)
    return lifted(run, 4, 3, 3, basis=basis, table=torch.rand(3, 3) + 0.5)


@pattern()
def laplacian_pyramid():
    def run(own, z):
        picture = own.levels[0](z)
        for level in own.levels[1:]:
            size = tuple(2 * n for n in picture.shape[-2:])
            picture = F.interpolate(picture, size=size, mode="bicubic", align_corners=False)
            picture = picture + level(z)
        return picture.clamp(-3, 3)

    return Parts(run, levels=nn.ModuleList([lift(2, 2, 2), lift(2, 4, 4), lift(2, 8, 8)]))


@pattern()
def kernels_from_latents():
    """A hypernetwork: each sample convolves with weights of its own."""

    def run(own, z):
        weight = own.kernel(z).view(-1, 3, 3, 3, 3)
        h = own.canvas.expand(z.shape[0], -1, -1, -1).reshape(1, -1, 4, 4)
        batch = z.shape[0]
        h = F.conv2d(h, weight.reshape(batch * 3, 3, 3, 3), padding=1, groups=batch)
        return h.view(batch, 3, 4, 4)

    return Parts(run, kernel=nn.Linear(M, 81), canvas=weights(1, 3, 4, 4))


@pattern()
def dynamic_convolution():
    """Weights that are a mixture of experts' (CondConv)."""

    def run(own, z):
        gate = own.gate(z).softmax(1)
        weight = torch.einsum("be,eoihw->boihw", gate, own.experts)
        h = own.lift(z)
        batch, channels, height, width = h.shape
        h = F.conv2d(
            h.reshape(1, batch * channels, height, width),
            weight.reshape(-1, *weight.shape[2:]),
            padding=1,
            groups=batch,
        )
        return h.reshape(batch, -1, height, width)

    return Parts(run, gate=nn.Linear(M, 3), experts=weights(3, 2, 3, 3, 3), lift=lift(3, 3, 3))


@pattern()
def involution():
    """Kernels of each pixel from the pixel itself, applied to unfolded neighbours."""

    def run(own, h):
        weight = own.span(F.relu(own.reduce(h))).flatten(2).unsqueeze(1)
        patches = F.unfold(h, 3, padding=1).view(-1, 4, 9, 9)
        return (weight * patches).sum(2).view(-1, 4, 3, 3)

    return lifted(run, 4, 3, 3, reduce=conv(4, 2, 1), span=conv(2, 9, 1))


@pattern()
def fourier_upsampling():
    """Zeros between the frequencies of a small picture."""

    def run(h):
        spectrum = torch.fft.fftshift(torch.fft.fft2(h, norm="ortho"), dim=(-2, -1))
        spectrum = F.pad(spectrum, (2, 2, 2, 2))
        return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1)), norm="ortho").real

    return lifted(run, 2, 4, 4)


@pattern()
def weight_normed():
    norm = nn.utils.parametrizations.weight_norm
    layers = [norm(nn.ConvTranspose2d(4, 4, 4, 2, 1)), nn.ELU(), norm(conv(4, 3))]
    return nn.Sequential(lift(4, 2, 2), *layers)


@pattern()
def spectral_normed():
    norm = nn.utils.parametrizations.spectral_norm
    layers = [norm(nn.Linear(M, 36)), nn.Unflatten(1, (4, 3, 3)), nn.ReLU(), norm(conv(4, 3))]
    return nn.Sequential(*layers)


@pattern()
def norms_in_turn():
    layers = [nn.GroupNorm(2, 4), conv(4, 4), nn.InstanceNorm2d(4, affine=True), nn.Mish()]
    layers += [nn.LocalResponseNorm(2), conv(4, 4), nn.BatchNorm2d(4), nn.Hardswish()]
    tracked = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    return settled(nn.Sequential(lift(4, 3, 3), *layers, nn.LayerNorm([4, 3, 3]), tracked))


@pattern()
def unpooling():
    """Max pooling whose places are given back by max unpooling (SegNet)."""

    def run(own, h):
        pooled, places = F.max_pool2d(own.conv(h), 2, return_indices=True)
        return F.max_unpool2d(F.relu(pooled), places, 2)

    return lifted(run, 2, 4, 4, conv=conv(2, 3))


@pattern()
def channels_attention():
    """Spatial and channel gates from maxima and means (CBAM), a shuffle of channel groups."""

    def run(own, h):
        pooled = [F.adaptive_avg_pool2d(h, 1).flatten(1), F.adaptive_max_pool2d(h, 1).flatten(1)]
        h = h * torch.sigmoid(sum(own.mlp(p) for p in pooled))[:, :, None, None]
        maps = torch.cat([h.max(1, keepdim=True)[0], h.mean(1, keepdim=True)], 1)
        h = h * torch.sigmoid(own.spatial(maps))
        return F.channel_shuffle(h, 2)

    mlp = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 4))
    return lifted(run, 4, 3, 3, mlp=mlp, spatial=conv(2, 1))


@pattern()
def splatting():
    """Gaussians of the latents, drawn front to back over a grid of pixels."""

    def run(own, h):
        centre, spread, colour = h[..., :2].tanh(), F.softplus(h[..., 2]), h[..., 3:6].sigmoid()
        distance = (own.grid - centre[:, :, None]).square().sum(-1) / (spread[..., None] + 0.1)
        alpha = 0.9 * torch.exp(-distance) * torch.sigmoid(h[..., 6:])
        behind = torch.cumprod(1 - alpha, 1)
        through = torch.cat([torch.ones_like(behind[:, :1]), behind[:, :-1]], 1)
        return torch.einsum("bkp,bkc->bcp", alpha * through, colour)

    axis = torch.linspace(-1, 1, 3)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(-1, 2)
    return lifted(run, 3, 7, grid=grid)
