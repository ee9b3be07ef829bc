"""Decoders of images: convolutional generators."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.jacobian.zoo.pattern import B, M, Parts, pattern, weights


def conv(inputs: int, outputs: int, size: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def lift(*shape: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(M, math.prod(shape)), nn.Unflatten(1, shape))


def settled(module: nn.Module) -> nn.Module:
    """Running statistics as after training."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    return module


@pattern()
def mlp():
    return nn.Sequential(nn.Linear(M, 8), nn.GELU(), nn.Linear(8, 7), nn.Sigmoid())


@pattern()
def dcgan():
    layers = [nn.Unflatten(1, (M, 1, 1)), nn.ConvTranspose2d(M, 6, 3, bias=False)]
    layers += [nn.BatchNorm2d(6), nn.ReLU(True), nn.ConvTranspose2d(6, 4, 4, 2, 1, bias=False)]
    layers += [nn.BatchNorm2d(4), nn.ReLU(True), nn.ConvTranspose2d(4, 3, 4, 2, 1), nn.Tanh()]
    return settled(nn.Sequential(*layers))


@pattern(refused="BatchNorm|batch")
def dcgan_in_training_mode():
    return dcgan().train()


class EqualLinear(nn.Module):
    """A layer whose weight is scaled when it is used."""

    def __init__(self, inputs: int, outputs: int, rate: float = 0.01, bias: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.full((outputs,), bias))
        self.scale, self.rate = rate / math.sqrt(inputs), rate

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias * self.rate)


def pixel_norm(x):
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-8)


class ModulatedConv(nn.Module):
    """A convolution whose weight each sample scales: one grouped convolution for the batch."""

    def __init__(self, inputs: int, outputs: int, size: int, demodulate: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, outputs, inputs, size, size))
        self.style, self.demodulate = EqualLinear(5, inputs, 1.0, 1.0), demodulate

    def forward(self, x, w):
        batch, channels, height, width = x.shape
        weight = self.weight * self.style(w).view(batch, 1, channels, 1, 1)
        if self.demodulate:
            weight = weight * torch.rsqrt(weight.pow(2).sum([2, 3, 4], keepdim=True) + 1e-8)
        weight = weight.reshape(-1, *self.weight.shape[2:])
        x = x.reshape(1, batch * channels, height, width)
        padding = self.weight.shape[-1] // 2
        return F.conv2d(x, weight, padding=padding, groups=batch).view(batch, -1, height, width)


class StyleGAN2(nn.Module):
    def __init__(self):
        super().__init__()
        layers = [EqualLinear(M, 5), nn.LeakyReLU(0.2), EqualLinear(5, 5), nn.LeakyReLU(0.2)]
        self.mapping = nn.Sequential(*layers)
        self.constant = nn.Parameter(torch.randn(1, 4, 3, 3))
        self.first, self.second = ModulatedConv(4, 6, 3), ModulatedConv(6, 4, 3)
        self.to_rgb = nn.ModuleList([ModulatedConv(6, 3, 1, False), ModulatedConv(4, 3, 1, False)])
        self.noise = nn.Parameter(torch.zeros(1))
        self.register_buffer("constant_noise", torch.randn(1, 1, 3, 3))
        kernel = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("blur", (kernel[:, None] * kernel)[None, None] / 16)

    def forward(self, z):
        w = self.mapping(pixel_norm(z))
        x = self.first(self.constant.repeat(z.shape[0], 1, 1, 1), w)
        x = F.leaky_relu(x + self.noise * self.constant_noise, 0.2) * math.sqrt(2)
        skip = self.to_rgb[0](x, w)
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = F.conv2d(x, self.blur.expand(x.shape[1], 1, 3, 3), padding=1, groups=x.shape[1])
        x = F.leaky_relu(self.second(x, w), 0.2)
        skip = F.interpolate(skip, scale_factor=2, mode="bilinear", align_corners=False)
        return skip + self.to_rgb[1](x, w)


@pattern()
def stylegan2():
    return StyleGAN2()


@pattern()
def stylegan1():
    """AdaIN from a mapping network, a learned constant, noise as a buffer."""

    def run(own, z):
        w = own.mapping(z)
        h = own.constant.expand(z.shape[0], -1, -1, -1)
        h = F.leaky_relu(h + own.strength * own.noise, 0.2)
        scale, shift = own.style(w)[:, :, None, None].chunk(2, 1)
        return own.out(own.norm(h) * (1 + scale) + shift)

    parts = dict(mapping=nn.Sequential(nn.Linear(M, 6), nn.LeakyReLU(0.2)), style=nn.Linear(6, 8))
    parts |= dict(constant=weights(1, 4, 3, 3), strength=weights(1, 4, 1, 1), out=conv(4, 3))
    return Parts(run, **parts, noise=torch.randn(1, 1, 3, 3), norm=nn.InstanceNorm2d(4))


class ConditionalNorm(nn.Module):
    """Batch statistics of training, scale and shift from a condition."""

    def __init__(self, channels: int, condition: int):
        super().__init__()
        self.gain = nn.utils.spectral_norm(nn.Linear(condition, channels, bias=False))
        self.bias = nn.Linear(condition, channels, bias=False)
        self.register_buffer("stored_mean", torch.randn(channels))
        self.register_buffer("stored_var", torch.rand(channels) + 0.5)

    def forward(self, x, y):
        gain, bias = 1 + self.gain(y)[..., None, None], self.bias(y)[..., None, None]
        out = F.batch_norm(x, self.stored_mean, self.stored_var, None, None, self.training, 0.1)
        return out * gain + bias


@pattern()
def biggan():
    """The latents in parts, one for each block, with the class embedding beside each."""

    def run(own, z, y):
        first, rest = torch.split(z, 2, 1)
        y = own.embed(y)
        h = own.linear(torch.cat([first, y], 1)).view(-1, 4, 3, 3)
        condition = torch.cat([rest, y], 1)
        a = own.conv1(F.interpolate(F.relu(own.bn1(h, condition)), scale_factor=2))
        a = own.conv2(F.relu(own.bn2(a, condition)))
        return torch.tanh(a + own.skip(F.interpolate(h, scale_factor=2)))

    sn = nn.utils.spectral_norm
    parts = dict(embed=nn.Embedding(5, 2), linear=sn(nn.Linear(4, 36)), conv1=sn(conv(4, 4)))
    parts |= dict(conv2=conv(4, 3), skip=conv(4, 3, 1))
    parts |= dict(bn1=ConditionalNorm(4, 4), bn2=ConditionalNorm(4, 4))
    return Parts(run, **parts), torch.tensor([0, 3, 4, 1, 0, 2])


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, inputs), nn.GroupNorm(2, outputs)
        self.conv1, self.conv2 = conv(inputs, outputs), conv(outputs, outputs)
        self.dropout = nn.Dropout(0.1)
        self.shortcut = nn.Identity() if inputs == outputs else conv(inputs, outputs, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(x) + h


@pattern()
def resnet():
    layers = [Residual(4, 6), nn.Upsample(scale_factor=2), Residual(6, 6), conv(6, 3)]
    return nn.Sequential(lift(4, 3, 3), *layers)


@pattern()
def vq_decoder():
    """Attention between pixels by bmm, as in VQ-GAN and latent diffusion."""

    def run(own, z):
        h = own.block(own.post_quant(own.lift(z)))
        batch, channels, height, width = h.shape
        n = own.norm(h)
        q = own.q(n).reshape(batch, channels, height * width).permute(0, 2, 1)
        k = own.k(n).reshape(batch, channels, height * width)
        w = F.softmax(torch.bmm(q, k) * channels**-0.5, dim=2)
        v = own.v(n).reshape(batch, channels, height * width)
        h = h + own.proj(torch.bmm(v, w.permute(0, 2, 1)).reshape(batch, channels, height, width))
        h = F.interpolate(h, scale_factor=2.0, mode="nearest")
        return own.out(F.silu(h))

    parts = {name: conv(4, 4, 1) for name in ("q", "k", "v", "proj", "post_quant")}
    parts |= dict(lift=lift(4, 2, 3), block=Residual(4, 4), norm=nn.GroupNorm(2, 4, eps=1e-6))
    return Parts(run, **parts, out=conv(4, 3))


@pattern()
def unet():
    """A stack of skip connections."""

    def run(own, z):
        h, skips = own.lift(z), []
        for down in own.down:
            h = F.relu(down(h))
            skips.append(h)
            h = F.max_pool2d(h, 2)
        for up in own.up:
            h = F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=True)
            h = F.relu(up(torch.cat([h, skips.pop()], 1)))
        return own.out(h)

    down, up = nn.ModuleList([conv(3, 4), conv(4, 4)]), nn.ModuleList([conv(8, 4), conv(8, 4)])
    return Parts(run, lift=lift(3, 4, 4), down=down, up=up, out=conv(4, 2, 1))


class Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(channels, 2), nn.ReLU(inplace=True))
        self.gate = nn.Sequential(nn.Linear(2, channels), nn.Sigmoid())

    def forward(self, x):
        pooled = torch.mean(x, dim=[2, 3])
        return x * self.gate(self.fc(pooled))[:, :, None, None]


@pattern()
def nvae_cell():
    """Depthwise convolutions, SiLU, batch statistics of training, squeeze and excitation."""
    layers = [nn.BatchNorm2d(4, eps=1e-5, momentum=0.05), conv(4, 8, 1), nn.BatchNorm2d(8)]
    layers += [nn.SiLU(), conv(8, 8, 5, groups=8), nn.BatchNorm2d(8), nn.SiLU(), conv(8, 4, 1)]
    cell = settled(nn.Sequential(*layers, nn.BatchNorm2d(4), Squeeze(4)))
    run = lambda own, z: own.out(own.lift(z) + 0.1 * own.cell(own.lift(z)))  # noqa: E731
    return Parts(run, lift=lift(4, 4, 4), cell=cell, out=conv(4, 3))


@pattern()
def spade():
    """Scale and shift from a segmentation map that is an argument."""

    def run(own, z, segmentation):
        h = own.lift(z)
        m = F.interpolate(segmentation, size=h.shape[2:], mode="nearest")
        m = F.relu(own.shared(m))
        return own.out(F.leaky_relu(own.norm(h) * (1 + own.gamma(m)) + own.beta(m), 0.2))

    parts = dict(lift=lift(4, 3, 3), shared=conv(2, 5), gamma=conv(5, 4), beta=conv(5, 4))
    decoder = Parts(run, **parts, norm=nn.InstanceNorm2d(4, affine=False), out=conv(4, 3))
    return decoder, torch.rand(B, 2, 6, 6)


@pattern()
def film():
    """A constant picture of coordinates, modulated by the latents."""

    def run(own, z):
        h = own.grid.unsqueeze(0).expand(z.shape[0], -1, -1, -1)
        for layer, modulation in zip(own.layers, own.modulations, strict=True):
            gamma, beta = modulation(z)[:, :, None, None].chunk(2, dim=1)
            h = F.relu(gamma * layer(h) + beta)
        return own.out(h)

    axis = torch.linspace(-1, 1, 4)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"))
    layers = nn.ModuleList([conv(2, 4), conv(4, 4)])
    modulations = nn.ModuleList([nn.Linear(M, 8), nn.Linear(M, 8)])
    return Parts(run, grid=grid, layers=layers, modulations=modulations, out=conv(4, 3))


@pattern()
def spatial_broadcast():
    """The latents at every pixel, with coordinates beside them."""

    def run(own, z):
        h = z[:, :, None, None].expand(-1, -1, 4, 5)
        x = torch.linspace(-1, 1, 5, dtype=z.dtype).view(1, 1, 1, 5).expand(z.shape[0], 1, 4, 5)
        y = torch.linspace(-1, 1, 4, dtype=z.dtype).view(1, 1, 4, 1).expand(z.shape[0], 1, 4, 5)
        return own.net(torch.cat([h, x, y], 1))

    return Parts(run, net=nn.Sequential(conv(M + 2, 6), nn.ELU(), conv(6, 3)))


@pattern()
def object_mixture():
    """Pictures of slots, mixed by a softmax of their masks (MONet, IODINE)."""

    def run(own, z):
        h = z.view(-1, 2)[:, :, None, None].repeat(1, 1, 3, 3)
        rgb, mask = own.net(h + own.position).view(-1, 2, 4, 3, 3).split([3, 1], 2)
        return (rgb * mask.softmax(1)).sum(1)

    net = nn.Sequential(conv(2, 5), nn.CELU(), conv(5, 4))
    return Parts(run, net=net, position=weights(1, 2, 3, 3))


@pattern()
def espcn():
    layers = [conv(3, 8, 5), nn.Tanh(), conv(8, 12), nn.PixelShuffle(2), nn.Sigmoid()]
    return nn.Sequential(lift(3, 3, 3), *layers)


@pattern()
def progressive_gan():
    """Normalised pixels, leaky units, a fade between two resolutions that is a buffer."""

    def run(own, z):
        h = own.lift(pixel_norm(z))
        h = pixel_norm(F.leaky_relu(own.first(h), 0.2))
        up = F.interpolate(h, scale_factor=2, mode="nearest")
        fine = own.fine(pixel_norm(F.leaky_relu(own.second(up), 0.2)))
        return torch.lerp(own.coarse(up), fine, own.alpha)

    parts = dict(lift=lift(4, 2, 2), first=conv(4, 4), second=conv(4, 4), fine=conv(4, 3, 1))
    return Parts(run, **parts, coarse=conv(4, 3, 1), alpha=torch.tensor(0.3))


@pattern()
def voxels():
    layers = [nn.Unflatten(1, (M, 1, 1, 1)), nn.ConvTranspose3d(M, 4, 2), nn.GroupNorm(2, 4)]
    layers += [nn.ReLU(), nn.ConvTranspose3d(4, 1, 4, 2, 1), nn.Sigmoid()]
    return nn.Sequential(*layers)


@pattern()
def masked_convolutions():
    """PixelCNN layers whose weight is masked in forward, once over a lifted picture."""

    class Masked(nn.Conv2d):
        def __init__(self, *args):
            super().__init__(*args, padding=1)
            mask = torch.ones_like(self.weight)
            mask[:, :, 1, 2:], mask[:, :, 2:] = 0, 0
            self.register_buffer("mask", mask)

        def forward(self, x):
            return self._conv_forward(x, self.weight * self.mask, self.bias)

    return nn.Sequential(lift(3, 4, 4), Masked(3, 4, 3), nn.ReLU(), Masked(4, 2, 3))
