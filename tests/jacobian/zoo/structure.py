"""How decoders are put together: shared and tied parts, checkpoints, distributions, arguments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import (
    Beta,
    Categorical,
    Gamma,
    Independent,
    LogNormal,
    MixtureSameFamily,
    Normal,
)
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.jacobian.zoo.pattern import B, M, Parts, lifted, pattern, weights


@pattern()
def tied_weights():
    """The transposed weight of a layer in front."""

    def run(own, z):
        return F.linear(torch.tanh(own.first(z)), own.first.weight.t(), own.bias)

    return Parts(run, first=nn.Linear(M, 6), bias=weights(M))


@pattern()
def shared_module():
    """One module twice under two names, and again in a list."""
    layer = nn.Linear(M, M)
    run = lambda own, z: own.items[0](torch.tanh(own.b(torch.tanh(own.a(z)))))  # noqa: E731
    return Parts(run, a=layer, b=layer, items=nn.ModuleList([layer]))


@pattern()
def tied_parameters():
    first, second = nn.Linear(M, M), nn.Linear(M, M)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


@pattern()
def frozen_layers():
    frozen = nn.Linear(6, 6).requires_grad_(False)
    return nn.Sequential(nn.Linear(M, 6), nn.Tanh(), frozen, nn.Tanh(), nn.Linear(6, 3))


class KeepsActivations(nn.Module):
    """Stores what it computed in a list, a dictionary and an attribute."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(M, M) for _ in range(3)])
        self.activations, self.named, self.last = [], {}, None

    def forward(self, z):
        self.activations.clear()
        for number, layer in enumerate(self.layers):
            z = torch.tanh(layer(z))
            self.activations.append(z)
            self.named[f"layer{number}"] = z
        self.last = z
        return sum(self.activations)


@pattern()
def kept_activations():
    return KeepsActivations()


@pattern()
def checkpointed():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(M, 6), nn.GELU(), nn.Linear(6, M))

        def forward(self, z):
            return z + checkpoint(self.net, z, use_reentrant=False)

    return nn.Sequential(Block(), Block(), nn.Linear(M, 3))


@pattern()
def checkpointed_sequence():
    def run(own, z):
        return checkpoint_sequential(own.layers, 2, z, use_reentrant=False)

    layers = [nn.Linear(M, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)]
    return Parts(run, layers=nn.Sequential(*layers))


@pattern()
def averaged_weights():
    """An exponential average of the weights in buffers, used where it is not training."""

    def run(own, z):
        weight = own.layer.weight if own.training else own.average
        return torch.tanh(F.linear(z, weight, own.layer.bias))

    return Parts(run, layer=nn.Linear(M, 5), average=torch.randn(5, M))


@pattern()
def stochastic_depth():
    """Branches that are dropped in training only, scaled by a learned vector."""

    def run(own, z):
        for layer, gamma in zip(own.layers, own.gammas, strict=True):
            if own.training and torch.rand(()) < 0.5:
                continue
            z = z + gamma * F.dropout(layer(z), 0.3, own.training)
        return z

    layers = nn.ModuleList([nn.Sequential(nn.LayerNorm(M), nn.Linear(M, M)) for _ in range(2)])
    return Parts(run, layers=layers, gammas=nn.ParameterList([weights(M), weights(M)]))


@pattern()
def labels():
    """A condition from an embedding, one for each sample, masked by a guidance weight."""

    def run(own, z, y, weight=1.5):
        with_label = own.net(torch.cat([z, own.embed(y)], 1))
        without = own.net(torch.cat([z, torch.zeros_like(own.embed(y))], 1))
        return without + weight * (with_label - without)

    net = nn.Sequential(nn.Linear(M + 2, 6), nn.ReLU(), nn.Linear(6, 3))
    return Parts(run, net=net, embed=nn.Embedding(4, 2)), torch.tensor([0, 3, 1, 2, 2, 0])


@pattern()
def one_hot_labels():
    def run(own, z, y):
        return own.net(torch.cat([z, F.one_hot(y, 4).type_as(z)], 1))

    return Parts(run, net=nn.Linear(M + 4, 6)), torch.tensor([0, 3, 1, 2, 2, 0])


@pattern()
def options_as_arguments():
    """Flags, strings and numbers beside a tensor that all samples share."""

    def run(own, z, mode, scale, context):
        h = own.net(z)
        h = torch.sigmoid(h) if mode == "sigmoid" else torch.tanh(h)
        return scale * h + context.mean(0)

    decoder = Parts(run, net=nn.Linear(M, 6))
    return decoder, "sigmoid", 0.5, torch.randn(B + 2, 6)


@pattern()
def several_heads():
    """A dictionary of heads, joined."""

    def run(own, z):
        h = F.relu(own.trunk(z))
        outputs = {name: head(h) for name, head in own.heads.items()}
        outputs["scale"] = F.softplus(outputs["scale"])
        return torch.cat([outputs[name] for name in sorted(outputs)], 1)

    heads = nn.ModuleDict({"mean": nn.Linear(6, 3), "scale": nn.Linear(6, 3)})
    return Parts(run, trunk=nn.Linear(M, 6), heads=heads)


@pattern(refused="one tensor, got tuple")
def two_outputs():
    return Parts(lambda own, z: (own.net(z), z), net=nn.Linear(M, 3))


@pattern()
def normal_mean():
    """A distribution that is not validated; only its mean is used."""

    def run(own, z):
        h, log_scale = own.net(z).chunk(2, 1)
        return Independent(
            Normal(h, log_scale.exp(), validate_args=False), 1, validate_args=False
        ).mean

    return Parts(run, net=nn.Linear(M, 6))


@pattern(refused="validate_args=False")
def validated_distribution():
    return lifted(lambda h: Normal(h, F.softplus(h), validate_args=True).mean, 5)


@pattern()
def other_means():
    def run(h):
        a, b = F.softplus(h).chunk(2, 1)
        kinds = (Beta, Gamma, LogNormal)
        return torch.cat([kind(a, b, validate_args=False).mean for kind in kinds], 1)

    return lifted(run, 6)


@pattern()
def mixture_mean():
    def run(h):
        logits, mean, scale = h.unbind(1)
        parts = Normal(mean, F.softplus(scale), validate_args=False)
        weight = Categorical(logits=logits, validate_args=False)
        return MixtureSameFamily(weight, parts, validate_args=False).mean.unsqueeze(1)

    return lifted(run, 3, 4)


@pattern(refused="random|noise|draw")
def sampled():
    return lifted(lambda h: Normal(h, 1.0, validate_args=False).rsample(), 5)


@pattern(refused=r"decoder\.1\.eval\(\)|decoder\[1\]\.eval\(\)")
def dropout_in_training():
    return nn.Sequential(nn.Linear(M, 6), nn.Dropout(0.2), nn.Linear(6, 3)).train()


@pattern(refused="sample|batch")
def centred_batch():
    """Samples that are not decoded one by one."""
    return lifted(lambda h: h - h.mean(0), 5)


@pattern(refused="sample|batch")
def attention_between_samples():
    return lifted(lambda h: torch.softmax(h @ h.T, -1) @ h, 5)


@pattern()
def input_gradient_free():
    """A branch without a gradient: detached, under no_grad, of integers."""

    def run(own, z):
        with torch.no_grad():
            gate = torch.sigmoid(own.gate(z))
        count = (z > 0).sum(1, keepdim=True).to(z.dtype)
        return own.net(z) * gate.detach() + count

    return Parts(run, gate=nn.Linear(M, 5), net=nn.Linear(M, 5))


@pattern(refused=r"torch\.func \(vmap\)")
def vmapped():
    """torch.vmap over a group of small networks whose weights are stacked."""

    def run(own, z):
        one = lambda weight, bias: torch.tanh(F.linear(z, weight, bias))  # noqa: E731
        return torch.vmap(one, out_dims=1)(own.weight, own.bias).flatten(1)

    return Parts(run, weight=weights(3, 2, M), bias=weights(3, 2))


@pattern()
def functional_parameters():
    """Parameters made from others by a parametrisation: positive, symmetric, cumulative."""

    def run(own, z):
        weight = F.softplus(own.raw)
        symmetric = own.square + own.square.T
        steps = torch.cumsum(weight, 0)
        return F.linear(F.linear(z, symmetric), steps / steps.sum(0))

    return Parts(run, raw=weights(5, M), square=weights(M, M))


@pattern()
def orthogonal_parametrisation():
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(M, M), orthogonal_map="matrix_exp")
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(M, 3))


@pattern()
def in_place_layers():
    layers = [nn.Linear(M, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.LeakyReLU(0.1, True)]
    layers += [nn.Linear(6, 6), nn.ELU(inplace=True), nn.Linear(6, 6), nn.Hardtanh(inplace=True)]
    return nn.Sequential(*layers, nn.Threshold(-0.2, 0.1, inplace=True))


@pattern()
def in_place_dropout():
    """Dropout that is off and would write in place."""
    layers = [nn.Linear(M, 6), nn.Dropout(0.1, inplace=True), nn.Tanh(), nn.AlphaDropout(0.1, True)]
    return nn.Sequential(*layers, nn.Unflatten(1, (2, 3)), nn.Dropout1d(0.1, True))


@pattern()
def learned_activations():
    layers = [nn.Linear(M, 6), nn.PReLU(6), nn.Linear(6, 6), nn.Softsign(), nn.Linear(6, 6)]
    return nn.Sequential(*layers, nn.LogSigmoid(), nn.Linear(6, 6), nn.Softmin(1), nn.PReLU())


@pattern()
def gated_linear_units():
    layers = [nn.Linear(M, 8), nn.GLU(), nn.Linear(4, 8), nn.GLU(dim=1), nn.Linear(4, 6)]
    return nn.Sequential(*layers, nn.Unflatten(1, (2, 3)), nn.GLU(1))


@pattern()
def bilinear():
    """A product of two views of the latents, and a tensor product layer."""

    def run(own, z):
        a, b = z.chunk(2, 1)
        outer = torch.bmm(a.unsqueeze(2), b.unsqueeze(1)).flatten(1)
        return own.bilinear(a, b) + own.net(outer)

    return Parts(run, bilinear=nn.Bilinear(2, 2, 5), net=nn.Linear(4, 5))
