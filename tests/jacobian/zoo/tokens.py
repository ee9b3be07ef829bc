"""Transformers and what is built like them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.jacobian.zoo.pattern import B, M, Parts, lifted, pattern, weights

SMALL = dict(dim_feedforward=8, dropout=0.1, batch_first=True)


@pattern()
def transformer_decoder():
    """Learned queries that read the latents."""

    def run(own, z):
        queries = own.queries.unsqueeze(0).expand(z.shape[0], -1, -1)
        return own.out(own.decoder(queries, own.memory(z).view(-1, 2, 4)))

    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, **SMALL), 2)
    parts = dict(queries=weights(3, 4), memory=nn.Linear(M, 8), decoder=decoder)
    return Parts(run, **parts, out=nn.Linear(4, 2))


@pattern()
def transformer_encoder():
    """A causal mask that is a buffer."""

    def run(own, z):
        return own.encoder(own.lift(z).view(-1, 3, 4) + own.positions, mask=own.mask)

    layer = nn.TransformerEncoderLayer(4, 2, norm_first=True, activation="gelu", **SMALL)
    mask = nn.Transformer.generate_square_subsequent_mask(3)
    parts = dict(lift=nn.Linear(M, 12), positions=weights(1, 3, 4), mask=mask)
    encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(4), enable_nested_tensor=False)
    return Parts(run, **parts, encoder=encoder)


@pattern()
def padded_transformer():
    """A padding mask that goes with the samples."""

    def run(own, z, padded):
        h = own.encoder(own.lift(z).view(-1, 3, 4), src_key_padding_mask=padded)
        return h.masked_fill(padded.unsqueeze(-1), 0.0)

    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, **SMALL), 1)
    padded = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 1]] * 2, dtype=torch.bool)
    return Parts(run, lift=nn.Linear(M, 12), encoder=encoder), padded


@pattern()
def whole_transformer():
    def run(own, z):
        target = own.start.repeat(z.shape[0], 1, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(2, dtype=z.dtype)
        return own.model(own.lift(z).view(-1, 3, 4), target, tgt_mask=mask, tgt_is_causal=True)

    model = nn.Transformer(4, 2, 1, 1, **SMALL)
    return Parts(run, start=weights(1, 2, 4), lift=nn.Linear(M, 12), model=model)


@pattern()
def detr():
    """Queries [T, B, C], added to a target of zeros in every layer."""

    def run(own, z):
        memory = own.memory(z).view(-1, 3, 4).transpose(0, 1)
        queries = own.queries.weight.unsqueeze(1).repeat(1, z.shape[0], 1)
        target = torch.zeros_like(queries)
        for attend, read, norm in zip(own.attend, own.read, own.norms, strict=True):
            q = target + queries
            target = norm(target + attend(q, q, value=target, need_weights=False)[0])
            target = target + read(target + queries, memory, memory)[0]
        return own.boxes(target).sigmoid().transpose(0, 1)

    parts = dict(memory=nn.Linear(M, 12), queries=nn.Embedding(2, 4), boxes=nn.Linear(4, 4))
    parts |= {k: nn.ModuleList([nn.MultiheadAttention(4, 2)] * 1) for k in ("attend", "read")}
    return Parts(run, **parts, norms=nn.ModuleList([nn.LayerNorm(4)]))


@pattern()
def perceiver():
    """A latent array and output queries, both learned, by cross attention."""

    def attend(q, k, v):
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def run(own, z):
        data = own.data(z).view(-1, 5, 4)
        h = own.array.expand(z.shape[0], -1, -1)
        h = h + attend(own.q(h), *own.kv(data).chunk(2, -1))
        out = own.queries.expand(z.shape[0], -1, -1)
        return attend(own.q(out), *own.kv(h).chunk(2, -1))

    parts = dict(data=nn.Linear(M, 20), array=weights(1, 3, 4), queries=weights(1, 6, 4))
    return Parts(run, **parts, q=nn.Linear(4, 4), kv=nn.Linear(4, 8))


@pattern()
def set_transformer():
    """Pooling by attention: the query is a parameter that no sample expands."""

    def run(own, z):
        x = own.lift(z).view(-1, 5, 4)
        weight = torch.softmax(own.seeds @ own.k(x).transpose(1, 2) / 2, -1)
        h = own.norm(own.seeds + weight @ own.v(x))
        return h + F.relu(own.ff(h))

    parts = dict(lift=nn.Linear(M, 20), seeds=weights(1, 2, 4), norm=nn.LayerNorm(4))
    return Parts(run, **parts, k=nn.Linear(4, 4), v=nn.Linear(4, 4), ff=nn.Linear(4, 4))


@pattern()
def mae():
    """Mask tokens behind the visible ones, put in order by a buffer of places."""

    def run(own, z):
        x = own.embed(z).view(-1, 2, 4)
        tokens = own.mask_token.repeat(x.shape[0], own.restore.shape[0] - x.shape[1], 1)
        x = torch.cat([x, tokens], dim=1)
        index = own.restore[None, :, None].repeat(x.shape[0], 1, x.shape[2])
        x = torch.gather(x, dim=1, index=index)
        cls = own.cls.expand(x.shape[0], -1, -1)
        x = torch.cat([cls, x], dim=1) + own.positions
        return own.head(own.block(x))[:, 1:, :]

    parts = dict(embed=nn.Linear(M, 8), mask_token=weights(1, 1, 4), cls=weights(1, 1, 4))
    parts |= dict(restore=torch.tensor([3, 0, 2, 1]), positions=weights(1, 5, 4))
    block = nn.TransformerEncoderLayer(4, 2, **SMALL)
    return Parts(run, **parts, block=block, head=nn.Linear(4, 3))


def timestep_embedding(t, dim):
    frequencies = torch.exp(-math.log(1e4) * torch.arange(dim // 2, dtype=t.dtype) / (dim // 2))
    angles = t[:, None] * frequencies[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(4, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(4, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(approximate="tanh"), nn.Linear(8, 4))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(4, 24))

    def attention(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.proj(h.transpose(1, 2).reshape(batch, length, 4))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


@pattern()
def dit():
    """Modulation by the embedding of a constant time, the same for all samples."""

    def run(own, z):
        t = torch.full((z.shape[0],), 0.3, dtype=z.dtype)
        c = own.time(timestep_embedding(t, 4))
        x = own.lift(z).view(-1, 3, 4) + own.positions
        for block in own.blocks:
            x = block(x, c)
        shift, scale = own.last(c).chunk(2, dim=1)
        return own.out(modulate(F.layer_norm(x, (4,)), shift, scale))

    time = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4))
    parts = dict(time=time, lift=nn.Linear(M, 12), blocks=nn.ModuleList([DiTBlock(), DiTBlock()]))
    return Parts(
        run, **parts, positions=weights(1, 3, 4), last=nn.Linear(4, 8), out=nn.Linear(4, 2)
    )


@pattern()
def dit_with_labels():
    """The same with a time and a label for each sample."""

    def run(own, z, t, y):
        c = own.time(timestep_embedding(t, 4)) + own.labels(y)
        return own.block(own.lift(z).view(-1, 3, 4), c)

    parts = dict(time=nn.Linear(4, 4), labels=nn.Embedding(5, 4), lift=nn.Linear(M, 12))
    decoder = Parts(run, **parts, block=DiTBlock())
    return decoder, torch.rand(B, dtype=torch.float64), torch.tensor([1, 4, 0, 2, 3, 1])


@pattern()
def diffusion_unet():
    """A time embedding from whole numbers, added to the channels in each block."""

    def run(own, z):
        t = torch.full((z.shape[0],), 7, dtype=torch.long)
        e = own.time(timestep_embedding(t.to(z.dtype), 4))
        h = own.lift(z).view(-1, 4, 3, 3)
        for norm, conv, project in zip(own.norms, own.convs, own.projects, strict=True):
            h = h + conv(F.silu(norm(h))) + project(F.silu(e))[:, :, None, None]
        return h

    convs = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(2)])
    norms = nn.ModuleList([nn.GroupNorm(2, 4) for _ in range(2)])
    projects = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
    time = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4))
    parts = dict(lift=nn.Linear(M, 36), time=time)
    return Parts(run, **parts, convs=convs, norms=norms, projects=projects)


def heads(h):
    """[B, T, 3 * 8] -> three [B, 2, T, 4]."""
    return (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in h.chunk(3, -1))


def angles():
    return torch.outer(torch.arange(3.0), torch.tensor([1.0, 0.1]))


@pattern()
def rotary_complex():
    """Queries and keys turned as complex numbers (LLaMA)."""

    def turn(x, turns):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(3)

    def run(own, z):
        q, k, v = heads(own.qkv(own.lift(z).view(-1, 3, 8)))
        turns = torch.polar(torch.ones_like(own.angles), own.angles)
        return F.scaled_dot_product_attention(turn(q, turns), turn(k, turns), v, is_causal=True)

    return Parts(run, lift=nn.Linear(M, 24), qkv=nn.Linear(8, 24), angles=angles())


@pattern()
def rotary_real():
    def half(x):
        a, b = x.chunk(2, -1)
        return torch.cat((-b, a), -1)

    def run(own, z):
        q, k, v = heads(own.qkv(own.lift(z).view(-1, 3, 8)))
        q, k = (t * own.cos + half(t) * own.sin for t in (q, k))
        return F.scaled_dot_product_attention(q, k, v)

    both = torch.cat([angles(), angles()], -1)
    parts = dict(lift=nn.Linear(M, 24), qkv=nn.Linear(8, 24))
    return Parts(run, **parts, cos=both.cos(), sin=both.sin())


@pattern()
def alibi():
    """A bias that grows with the distance, made in forward."""

    def run(own, z):
        q, k, v = heads(own.qkv(own.lift(z).view(-1, 3, 8)))
        place = torch.arange(q.shape[2], dtype=z.dtype)
        bias = -(place[None] - place[:, None]).abs() * own.slopes[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])

    parts = dict(lift=nn.Linear(M, 24), qkv=nn.Linear(8, 24))
    return Parts(run, **parts, slopes=torch.tensor([0.5, 0.25]))


@pattern()
def relative_bias():
    """Attention as in T5: a learned bias of the bucketed distance."""

    def run(own, z):
        q, k, v = heads(own.qkv(own.norm(own.lift(z).view(-1, 3, 8))))
        distance = torch.arange(3)[None] - torch.arange(3)[:, None]
        bias = own.bias(distance.clamp(-1, 1) + 1).permute(2, 0, 1).unsqueeze(0)
        scores = torch.matmul(q, k.transpose(3, 2)) + bias
        weight = F.softmax(scores, dim=-1).type_as(scores)
        return torch.matmul(weight, v).transpose(1, 2).flatten(2)

    parts = dict(lift=nn.Linear(M, 24), qkv=nn.Linear(8, 24), bias=nn.Embedding(3, 2))
    return Parts(run, **parts, norm=nn.RMSNorm(8))


@pattern()
def einsum_attention():
    """A causal mask made in forward, filled with the smallest number."""

    def run(own, z):
        h = own.lift(z).view(-1, 3, 8)
        q, k, v = (t.unflatten(-1, (2, 4)) for t in own.qkv(h).chunk(3, -1))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / 2
        mask = torch.ones(3, 3, dtype=torch.bool).tril()
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)

    return Parts(run, lift=nn.Linear(M, 24), qkv=nn.Linear(8, 24))


@pattern()
def linear_attention():
    def run(own, h):
        q, k, v = heads(own.qkv(h))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = torch.einsum("bhtd,bhte->bhtde", k, v).cumsum(2)
        norm = torch.einsum("bhtd,bhtd->bht", q, k.cumsum(2))
        return torch.einsum("bhtd,bhtde->bhte", q, state) / (norm + 1e-6).unsqueeze(-1)

    return lifted(run, 3, 8, qkv=nn.Linear(8, 24))


@pattern()
def retention():
    """Decay by a mask of powers."""

    def run(own, h):
        q, k, v = heads(own.qkv(h))
        return own.norm(((q @ k.transpose(-1, -2)) * own.decay @ v).transpose(1, 2).flatten(2))

    place = torch.arange(3.0)
    decay = (0.9 ** (place[:, None] - place)).tril()
    return lifted(run, 3, 8, qkv=nn.Linear(8, 24), decay=decay, norm=nn.LayerNorm(8))


@pattern()
def sparse_attention():
    """Only the two largest scores of each row."""

    def run(own, h):
        q, k, v = heads(own.qkv(h))
        scores = q @ k.transpose(-1, -2)
        largest = scores.topk(2, dim=-1).values[..., -1:]
        return scores.masked_fill(scores < largest, float("-inf")).softmax(-1) @ v

    return lifted(run, 3, 8, qkv=nn.Linear(8, 24))


@pattern()
def mlp_mixer():
    def run(own, h):
        h = h + own.tokens(own.norm1(h).transpose(1, 2)).transpose(1, 2)
        return h + own.channels(own.norm2(h))

    tokens = nn.Sequential(nn.Linear(3, 6), nn.GELU(), nn.Linear(6, 3))
    channels = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 8))
    norms = dict(norm1=nn.LayerNorm(8), norm2=nn.LayerNorm(8))
    return lifted(run, 3, 8, tokens=tokens, channels=channels, **norms)


@pattern()
def gated_mlp():
    """gMLP's gate along the tokens, then SwiGLU."""

    def run(own, h):
        u, v = own.first(h).chunk(2, dim=-1)
        h = h + own.second(u * own.spatial(own.norm(v)))
        return h + own.down(F.silu(own.gate(h)) * own.up(h))

    parts = dict(first=nn.Linear(4, 8), second=nn.Linear(4, 4), spatial=nn.Conv1d(3, 3, 1))
    parts |= dict(gate=nn.Linear(4, 6), up=nn.Linear(4, 6), down=nn.Linear(6, 4))
    return lifted(run, 3, 4, **parts, norm=nn.LayerNorm(4))


@pattern()
def slot_attention():
    """Learned slots that compete for the tokens, a few steps with a GRU cell."""

    def run(own, z):
        x = own.lift(z).view(-1, 5, 4)
        slots = own.slots.expand(z.shape[0], -1, -1)
        for _ in range(2):
            weight = torch.einsum("bid,bjd->bij", own.q(slots), own.k(x)).softmax(dim=1) + 1e-8
            weight = weight / weight.sum(dim=-1, keepdim=True)
            updates = torch.einsum("bjd,bij->bid", own.v(x), weight)
            slots = own.gru(updates.reshape(-1, 4), slots.reshape(-1, 4)).reshape(-1, 2, 4)
        return slots

    parts = {name: nn.Linear(4, 4) for name in "qkv"}
    return Parts(run, lift=nn.Linear(M, 20), slots=weights(1, 2, 4), gru=nn.GRUCell(4, 4), **parts)
