"""Ten decoders that between them use most operations, each [B, 4] -> [B, *out]."""

import torch
from torch import nn

M = 4


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.lift, self.norm = nn.Linear(M, 8 * 9), nn.GroupNorm(2, 8)
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.act = nn.SiLU()

    def forward(self, z):
        h = self.lift(z).view(-1, 8, 3, 3)
        return h + self.second(self.act(self.first(self.act(self.norm(h)))))


class Shuffled(nn.Module):
    def __init__(self):
        super().__init__()
        self.lift, self.widen = nn.Linear(M, 2 * 9), nn.Conv2d(2, 8, 3, padding=1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, z):
        h = self.lift(z).view(-1, 2, 3, 3).relu()
        fine = nn.functional.pixel_shuffle(self.widen(h), 2)
        coarse = nn.functional.interpolate(h, scale_factor=2)
        return self.last(torch.cat([fine, coarse], 1))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(M, M), nn.Linear(M, 7, bias=False)

    def forward(self, z):
        h = torch.tanh(self.layer(torch.tanh(self.layer(z))))
        return self.out(h) * (1 + self.layer.bias.sum())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.lift = nn.Linear(M, 3 * 5 * 6)
        self.out = nn.Linear(6, 2)

    def forward(self, z):
        q, k, v = self.lift(z).view(-1, 5, 18).chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v)).flatten(1)


def higgins():
    layers = [nn.Linear(M, 16), nn.ReLU(), nn.Unflatten(1, (16, 1, 1))]
    layers += [nn.ConvTranspose2d(16, 8, 4), nn.ReLU()]
    layers += [nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1))


def upsampled():
    body = nn.Linear(M, 3 * 4), nn.ELU(), nn.Unflatten(1, (3, 2, 2))
    scale = nn.Upsample(scale_factor=2, mode="bilinear")
    return nn.Sequential(*body, scale, nn.Conv2d(3, 2, 3, padding=1), nn.Sigmoid())


def normalized():
    body = nn.Linear(M, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, 9), nn.LayerNorm(9)
    return nn.Sequential(*body, nn.Softplus(), nn.Linear(9, 7))


def tanh():
    return nn.Sequential(nn.Linear(M, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 7))


def frozen():
    decoder = tanh()
    decoder[2].requires_grad_(False)
    return decoder


def weight_normalized():
    norm = nn.utils.parametrizations.weight_norm
    return nn.Sequential(norm(nn.Linear(M, 9)), nn.LeakyReLU(0.2), norm(nn.Linear(9, 7)))


# Every fifth is quick: the ones with the most layers are not among them.
DECODERS = {
    "pixel_shuffle": Shuffled,
    "higgins": higgins,
    "residual": Residual,
    "upsampled": upsampled,
    "tanh": tanh,
    "layer_norm": normalized,
    "shared": Shared,
    "frozen": frozen,
    "weight_norm": weight_normalized,
    "attention": Attention,
}


def build(name, dtype=torch.float64):
    torch.manual_seed(sum(map(ord, name)))
    return DECODERS[name]().to(dtype)


def batch(decoder, size=5, dtype=torch.float64):
    """(x, mean, log_var) with gradients wanted of all."""
    g = torch.Generator().manual_seed(size)
    with torch.no_grad():
        shape = decoder(torch.zeros(2, M, dtype=dtype)).shape[1:]
    tensors = (
        torch.randn(size, *shape, generator=g, dtype=torch.float64),
        *torch.randn(2, size, M, generator=g, dtype=torch.float64),
    )
    return tuple(t.to(dtype).requires_grad_() for t in tensors)
