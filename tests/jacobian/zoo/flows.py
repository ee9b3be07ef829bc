"""Normalising flows, mixtures, routing, discrete codes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.jacobian.zoo.pattern import M, Parts, lifted, pattern, weights


def net(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, outputs))


@pattern()
def affine_coupling():
    """Halves that change in turn, the order of features turned round between."""

    def run(own, z):
        for layer in own.layers:
            a, b = z.chunk(2, 1)
            shift, scale = layer(a).chunk(2, 1)
            z = torch.cat([a, b * torch.exp(torch.tanh(scale)) + shift], 1).flip(1)
        return own.out(z)

    layers = nn.ModuleList([net(2, 4) for _ in range(3)])
    return Parts(run, layers=layers, out=nn.Linear(M, 5))


@pattern()
def real_nvp():
    """Masks that are buffers."""

    def run(own, z):
        for mask, scale, shift in zip(own.masks, own.scales, own.shifts, strict=True):
            kept = z * mask
            z = kept + (1 - mask) * (z * torch.exp(scale(kept)) + shift(kept))
        return z

    masks = torch.tensor([[0.0, 1, 0, 1], [1, 0, 1, 0]])
    scales = nn.ModuleList([net(M, M), net(M, M)])
    return Parts(run, masks=masks, scales=scales, shifts=nn.ModuleList([net(M, M), net(M, M)]))


@pattern()
def masked_halves():
    """Boolean masks that choose the features."""

    def run(own, z):
        a, b = z[:, own.mask], z[:, ~own.mask]
        out = torch.empty_like(z)
        out[:, own.mask] = a
        out[:, ~own.mask] = b + own.shift(a)
        return out

    mask = torch.tensor([True, False, True, False])
    return Parts(run, mask=mask, shift=net(2, 2))


class ActNorm(nn.Module):
    """Starts from its first batch, which a flag remembers."""

    def __init__(self, channels: int):
        super().__init__()
        self.loc, self.scale = (
            weights(1, channels, 1, 1),
            nn.Parameter(torch.ones(1, channels, 1, 1)),
        )
        self.register_buffer("initialized", torch.tensor(1, dtype=torch.uint8))

    def forward(self, x):
        if self.initialized.item() == 0:
            with torch.no_grad():
                self.loc.copy_(-x.mean((0, 2, 3), keepdim=True))
            self.initialized.fill_(1)
        return self.scale * (x + self.loc)


@pattern()
def glow():
    """ActNorm with a flag, an invertible 1x1 convolution, a coupling, squeezed pixels."""

    def run(own, z):
        h = own.norm(own.lift(z).view(-1, 4, 2, 2))
        h = F.conv2d(h, torch.inverse(own.weight).view(4, 4, 1, 1))
        a, b = h.chunk(2, 1)
        shift, scale = own.conv(a).chunk(2, 1)
        h = torch.cat([a, (b + shift) * torch.sigmoid(scale + 2)], 1)
        h = h.view(-1, 1, 2, 2, 2, 2).permute(0, 1, 4, 2, 5, 3).reshape(-1, 1, 4, 4)
        return h + torch.linalg.slogdet(own.weight)[1]

    weight = nn.Parameter(torch.linalg.qr(torch.randn(4, 4))[0])
    parts = dict(norm=ActNorm(4), lift=nn.Linear(M, 16), weight=weight)
    return Parts(run, **parts, conv=nn.Conv2d(2, 4, 3, padding=1))


@pattern()
def lu_convolution():
    """The same weight as a product of triangles with constant permutation and signs."""

    def run(own, h):
        lower = own.lower.tril(-1) + torch.eye(3, dtype=h.dtype)
        upper = own.upper.triu(1) + torch.diag(own.signs * own.log_s.exp())
        return F.conv1d(h, (own.permutation @ lower @ upper).unsqueeze(-1))

    parts = dict(lower=weights(3, 3), upper=weights(3, 3), log_s=weights(3))
    signs, permutation = torch.tensor([1.0, -1.0, 1.0]), torch.eye(3)[[2, 0, 1]]
    return lifted(run, 3, 4, **parts, signs=signs, permutation=permutation)


@pattern()
def planar():
    """With the logarithm of the determinant beside the result."""

    def run(own, z):
        total = torch.zeros(z.shape[0], dtype=z.dtype)
        for w, u, b in zip(own.w, own.u, own.b, strict=True):
            wu = w @ u
            u = u + (F.softplus(wu) - 1 - wu) * w / w.square().sum()
            h = torch.tanh(z @ w + b)
            total = total + torch.log(torch.abs(1 + (1 - h**2) * (w @ u)))
            z = z + u * h.unsqueeze(-1)
        return torch.cat([z, total.unsqueeze(1)], 1)

    return Parts(run, w=weights(2, M), u=weights(2, M), b=weights(2))


@pattern()
def autoregressive_flow():
    """Sampling feature by feature through masked layers (MAF)."""

    def run(own, z):
        x = torch.zeros_like(z)
        for i in range(M):
            h = torch.tanh(F.linear(x, own.first * own.mask_in, own.bias))
            shift, scale = F.linear(h, own.second * own.mask_out).chunk(2, 1)
            x = torch.where(own.places == i, z * torch.exp(0.5 * scale) + shift, x)
        return x

    hidden = torch.arange(6) % 3
    mask_in = (hidden[:, None] >= torch.arange(M)).float()
    mask_out = (torch.arange(M)[:, None] > hidden).float().repeat(2, 1)
    parts = dict(first=weights(6, M), bias=weights(6), second=weights(2 * M, 6))
    return Parts(run, **parts, mask_in=mask_in, mask_out=mask_out, places=torch.arange(M))


@pattern()
def rational_splines():
    """Bins by searchsorted, their parameters by gather, the tails by where."""

    def run(own, z):
        h = own.net(z[:, :2]).view(-1, 2, 8)
        x = z[:, 2:]
        widths = F.pad(torch.cumsum(F.softmax(h[..., :4], -1), -1), (1, 0)) * 4 - 2
        heights = F.pad(torch.cumsum(F.softmax(h[..., 4:], -1), -1), (1, 0)) * 4 - 2
        inside = (x > -2) & (x < 2)
        index = torch.searchsorted(widths[..., 1:-1].contiguous(), x.unsqueeze(-1).contiguous())
        left, low = widths.gather(-1, index).squeeze(-1), heights.gather(-1, index).squeeze(-1)
        right = widths.gather(-1, index + 1).squeeze(-1)
        high = heights.gather(-1, index + 1).squeeze(-1)
        t = (x - left) / (right - left)
        spline = low + (high - low) * t.square() / (t.square() + 2 * t * (1 - t) + (1 - t).square())
        return torch.cat([z[:, :2], torch.where(inside, spline, x)], 1)

    return Parts(run, net=net(2, 16))


@pattern(refused="depend")
def splines_of_chosen_samples():
    """Only the entries inside are computed: their number depends on the latents."""

    def run(own, z):
        h = own.lift(z)
        out, inside = torch.zeros_like(h), (h > -1) & (h < 1)
        out[inside] = torch.tanh(h[inside])
        out[~inside] = h[~inside]
        return out

    return Parts(run, lift=nn.Linear(M, 5))


@pattern()
def residual_flow():
    """An inverse by a fixed number of iterations."""

    def run(own, z):
        x = z
        for _ in range(6):
            x = z - 0.3 * own.net(x)
        return x

    return Parts(run, net=net(M, M))


@pattern(refused="depend")
def equilibrium_until_converged():
    """A loop that ends when the numbers say so."""

    def run(own, z):
        h = torch.zeros_like(z)
        for _ in range(50):
            after = torch.tanh(0.3 * own.net(h) + z)
            if (after - h).abs().max() < 1e-3:
                break
            h = after
        return h

    return Parts(run, net=net(M, M))


@pattern()
def mixture_of_experts():
    """All experts, mixed by a softmax."""

    def run(own, z):
        gate = own.gate(z).softmax(-1)
        return torch.einsum("be,ebo->bo", gate, torch.stack([e(z) for e in own.experts]))

    return Parts(run, gate=nn.Linear(M, 3), experts=nn.ModuleList([net(M, 5) for _ in range(3)]))


@pattern()
def top_two_experts():
    """The two largest gates, renormalised; the others' results are masked."""

    def run(own, z):
        logits = own.gate(z)
        largest, index = torch.topk(logits, 2, dim=-1)
        chosen = torch.full_like(logits, float("-inf")).scatter(-1, index, largest)
        gates = F.softmax(chosen, dim=-1)
        outputs = torch.stack([e(z) for e in own.experts], 1)
        return (outputs * gates.unsqueeze(-1)).sum(1)

    return Parts(run, gate=nn.Linear(M, 3), experts=nn.ModuleList([net(M, 5) for _ in range(3)]))


@pattern()
def gathered_experts():
    """The weights of the chosen expert, gathered for each sample."""

    def run(own, z):
        probability, index = own.gate(z).softmax(-1).max(-1)
        h = torch.bmm(own.weight[index], z.unsqueeze(-1)).squeeze(-1) + own.bias[index]
        return h * probability.unsqueeze(-1)

    return Parts(run, gate=nn.Linear(M, 3), weight=weights(3, 5, M), bias=weights(3, 5))


@pattern(refused="depend")
def dispatched_experts():
    """Each expert runs on the samples that chose it: shapes depend on the latents."""

    def run(own, z):
        choice, out = own.gate(z).argmax(-1), torch.zeros(z.shape[0], 5, dtype=z.dtype)
        for number, expert in enumerate(own.experts):
            rows = torch.where(choice == number)[0]
            out = out.index_add(0, rows, expert(z[rows]))
        return out

    return Parts(run, gate=nn.Linear(M, 3), experts=nn.ModuleList([net(M, 5) for _ in range(3)]))


@pattern()
def hard_routing():
    """One of the experts' results by an argmax."""

    def run(own, z):
        outputs = torch.stack([e(z) for e in own.experts], 1)
        index = own.gate(z).argmax(-1).view(-1, 1, 1).expand(-1, 1, 5)
        return outputs.gather(1, index).squeeze(1)

    return Parts(run, gate=nn.Linear(M, 3), experts=nn.ModuleList([net(M, 5) for _ in range(3)]))


@pattern()
def straight_through_codes():
    """The nearest code's value, the gradient of the latents (VQ-VAE)."""

    def run(own, h):
        flat = h.reshape(-1, 2)
        distance = flat.square().sum(1, keepdim=True) - 2 * flat @ own.codes.weight.T
        distance = distance + own.codes.weight.square().sum(1)
        code = own.codes(distance.argmin(1)).view_as(h)
        return own.out(h + (code - h).detach())

    return lifted(run, 3, 2, codes=nn.Embedding(5, 2), out=nn.Linear(2, 3))


@pattern()
def finite_scalars():
    """Rounded levels with a straight-through gradient (FSQ)."""

    def run(own, z):
        bounded = torch.tanh(z + own.shift) * own.levels
        rounded = bounded + (bounded.round() - bounded).detach()
        return own.net(rounded / own.levels)

    return Parts(run, shift=torch.rand(M) / 9, levels=torch.tensor([2.0, 2, 3, 3]), net=net(M, 5))


@pattern(refused="random|noise|draw")
def gumbel_softmax():
    return lifted(lambda h: F.gumbel_softmax(h, tau=0.5, hard=True, dim=-1), 3, 4)


@pattern()
def capsules():
    """Routing by agreement between squashed vectors."""

    def squash(s):
        norm = (s**2).sum(-1, keepdim=True)
        return norm / (1 + norm) * s / torch.sqrt(norm + 1e-8)

    def run(own, z):
        votes = torch.einsum("bic,ijcd->bijd", squash(z.view(-1, 2, 2)), own.weight)
        logits = torch.zeros(z.shape[0], 2, 3, dtype=z.dtype)
        for _ in range(2):
            v = squash((logits.softmax(2).unsqueeze(-1) * votes).sum(1))
            logits = logits + (votes * v.unsqueeze(1)).sum(-1)
        return v

    return Parts(run, weight=weights(2, 3, 2, 4))


@pattern()
def sorted_quantiles():
    """Quantiles that do not cross, sorted; their median and a quantile beside them."""

    def run(h):
        rising = h[:, :1] + torch.cumsum(F.softplus(h), 1)
        ordered = torch.sort(h, dim=1, descending=True)[0]
        middle = h.median(dim=1, keepdim=True).values
        return torch.cat([rising, ordered, middle, torch.quantile(h, 0.3, dim=1, keepdim=True)], 1)

    return lifted(run, 5)


@pattern()
def mixture_density():
    """The mean of a mixture of Gaussians, and its log-density at constant points."""

    def run(own, h):
        logits, mean, log_scale = h.unbind(1)
        weight = F.log_softmax(logits, -1).unsqueeze(1)
        t = (own.points[:, None] - mean.unsqueeze(1)) / log_scale.exp().unsqueeze(1)
        terms = weight - 0.5 * t.square() - log_scale.unsqueeze(1) - 0.5 * math.log(2 * math.pi)
        return torch.cat([(weight.exp().squeeze(1) * mean).sum(1, True), terms.logsumexp(-1)], 1)

    return lifted(run, 3, 4, points=torch.linspace(-1, 1, 3))


@pattern()
def stick_breaking():
    """Weights as products of what the earlier ones left."""

    def run(h):
        v = torch.sigmoid(h)
        left = torch.cumprod(1 - v, dim=-1)
        return torch.cat([v[:, :1], v[:, 1:] * left[:, :-1], left[:, -1:]], 1)

    return lifted(run, 5)
