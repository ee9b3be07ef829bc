"""Exact log p(x) and ELBO against quadrature, and the importance sampler against them."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fastsfvae import evaluate, sampling_free_elbo
from fastsfvae.objectives import ExactMarginal
from fastsfvae.piecewise.trace import layers

F64 = torch.float64
C, N = 0.05, 5


def decoder(m, activation=None, scale=2.0, seed=0):
    torch.manual_seed(seed)
    act = activation or nn.ReLU()
    net = nn.Sequential(
        nn.Linear(m, 10), act, nn.Sequential(nn.Linear(10, 7), act), nn.Linear(7, N)
    )
    for parameter in net.double().parameters():
        parameter.data.mul_(scale)
    return net


def data(m, images=3):
    torch.manual_seed(1)
    x = 1.5 * torch.randn(images, N, dtype=F64)
    return x, torch.randn(images, m, dtype=F64), 0.5 * torch.randn(images, m, dtype=F64) - 1


def nodes(knots=()):
    """Gauss's nodes and weights on fine panels of [-12, 12], cut at the knots as well."""
    edges = np.unique([*np.linspace(-12, 12, 1201), *knots])
    unit, weight = np.polynomial.legendre.leggauss(20)
    half = np.diff(edges)[:, None] / 2
    z = (edges[:-1, None] + half + half * unit).ravel()
    return torch.from_numpy(z), torch.from_numpy((half * weight).ravel())


def knots(net):
    """Where a unit of a fine chain of chords crosses what is a threshold of any activation here."""
    found, z = [], torch.linspace(-12, 12, 24_001, dtype=F64)
    h = z[:, None]
    for layer in [net[0], net[1], net[2][0], net[2][1]]:
        if not isinstance(layer, nn.Linear):
            for threshold in (0.0, 6.0, -0.3, 0.5):
                a, b = h[:-1] - threshold, h[1:] - threshold
                row, unit = ((a * b) <= 0).nonzero(as_tuple=True)
                a, b = a[row, unit], b[row, unit]
                found += (z[row] + (z[1] - z[0]) * a / (a - b)).nan_to_num(0).tolist()
        h = layer(h).detach()
    return found


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.LeakyReLU(0.1), nn.PReLU(), nn.ReLU6(), nn.Hardtanh(-0.3, 0.5), nn.Identity()],
    ids=lambda a: type(a).__name__,
)
def test_one_latent_against_quadrature_with_gradients(activation):
    net = decoder(1, activation)
    x, mean, log_var = data(1)
    leaves = [mean.requires_grad_(), log_var.requires_grad_(), *net.parameters()]
    z, weight = nodes(knots(net))
    error = (x.unsqueeze(1) - net(z[:, None])).square().sum(-1)
    constant = -0.5 * N * math.log(2 * math.pi * C)
    log_prior = -0.5 * (z.square() + math.log(2 * math.pi))
    want = constant + (log_prior - error / (2 * C) + weight.log()).logsumexp(1)
    q = torch.distributions.Normal(mean, torch.exp(0.5 * log_var)).log_prob(z).exp() * weight
    want_error = (q * error).sum(1)
    got = evaluate.exact_log_marginal_likelihood(net, x, noise_var=C)
    elbo = evaluate.exact_elbo(net, x, mean, log_var, noise_var=C)
    # The quadrature's own knots are known to the square of its chords' length only.
    close = {"rtol": 1e-7, "atol": 1e-7}
    torch.testing.assert_close(got, want, **close)
    torch.testing.assert_close(elbo.squared_error, want_error, **close)
    torch.testing.assert_close(elbo.elbo, constant - want_error / (2 * C) - elbo.kl, **close)
    assert (elbo.elbo <= got).all()
    for ours, theirs, used in ((got, want, leaves[2:]), (elbo.squared_error, want_error, leaves)):
        pairs = [torch.autograd.grad(v.sum(), used, retain_graph=True) for v in (ours, theirs)]
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))


def test_gradients_against_finite_differences():
    net, (x, mean, log_var) = decoder(1), data(1)
    x, noise_var = x.requires_grad_(), torch.tensor(C, dtype=F64, requires_grad=True)
    weights = [p.detach().requires_grad_() for p in net.parameters()]

    def values(x, noise_var, mean, log_var, *weights):
        for layer, i in ((net[0], 0), (net[2][0], 2), (net[3], 4)):
            for name, weight in zip(("weight", "bias"), weights[i : i + 2], strict=True):
                layer._parameters[name] = weight
        given = evaluate.exact_elbo(net, x, mean, log_var, noise_var=noise_var)
        return evaluate.exact_log_marginal_likelihood(net, x, noise_var=noise_var), given.elbo

    given = (x, noise_var, mean.requires_grad_(), log_var.requires_grad_(), *weights)
    # Central differences of some hundred nats, whose curvature has 1 / c.
    assert torch.autograd.gradcheck(values, given, eps=1e-6, atol=2e-4, rtol=1e-4, fast_mode=True)


@pytest.mark.slow
def test_two_latents_against_a_fine_grid():
    net = decoder(2, scale=1.0, seed=2)
    x, mean, log_var = data(2, images=2)
    got = evaluate.exact_log_marginal_likelihood(net, x, noise_var=0.2)
    elbo = evaluate.exact_elbo(net, x, mean, log_var, noise_var=0.2)
    e = torch.linspace(-8, 8, 1601, dtype=F64)
    plane = torch.cartesian_prod(e, e)
    log_area = 2 * torch.log(e[1] - e[0])
    log_prior = -0.5 * plane.square().sum(1) - math.log(2 * math.pi) + log_area
    with torch.no_grad():
        error = torch.stack([(y - net(plane)).square().sum(1) for y in x])
        constant = -0.5 * N * math.log(2 * math.pi * 0.2)
        want = constant + (log_prior - error / 0.4).logsumexp(1)
        for i in range(2):
            z = mean[i] + torch.exp(0.5 * log_var[i]) * plane
            expected = (log_prior.exp() * (x[i] - net(z)).square().sum(1)).sum()
            # Of a grid with kinks, h^2 times a jump of the slope.
            assert float(elbo.squared_error[i]) == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert (elbo.elbo <= got).all()


def test_two_latents_apart_are_two_of_one():
    """Each latent has outputs of its own: p(x) is a product. One ReLU stands there twice."""
    one, other = decoder(1, scale=1.5, seed=5), decoder(1, scale=1.5, seed=6)
    both = nn.Sequential()
    for (_, a), (_, b) in zip(layers(one), layers(other), strict=True):
        if isinstance(a, nn.Linear):
            layer = nn.Linear(a.in_features + b.in_features, a.out_features + b.out_features)
            layer.weight.data = torch.block_diag(a.weight.data, b.weight.data)
            layer.bias.data = torch.cat([a.bias.data, b.bias.data])
            both.append(layer)
        else:
            both.append(a)
    (x, mean, log_var), (y, *_) = data(2, images=2), data(1, images=2)
    joint, parts = torch.cat([x, y], 1), ((one, x, 0), (other, y, 1))
    got = evaluate.exact_log_marginal_likelihood(both, joint, noise_var=0.2)
    want = [evaluate.exact_log_marginal_likelihood(n, x, noise_var=0.2) for n, x, _ in parts]
    torch.testing.assert_close(got, sum(want), rtol=0, atol=1e-8)
    elbo = evaluate.exact_elbo(both, joint, mean, log_var, noise_var=0.2).elbo
    want = [
        evaluate.exact_elbo(n, x, mean[:, i : i + 1], log_var[:, i : i + 1], noise_var=0.2).elbo
        for n, x, i in parts
    ]
    torch.testing.assert_close(elbo, sum(want), rtol=0, atol=1e-6)


def test_a_linear_decoder_of_two_latents_is_a_gaussian():
    net, (x, mean, log_var) = nn.Sequential(nn.Linear(2, N)).double(), data(2)
    W, b = net[0].weight.detach(), net[0].bias.detach()
    gaussian = torch.distributions.MultivariateNormal(b, W @ W.T + C * torch.eye(N).double())
    got = evaluate.exact_log_marginal_likelihood(net, x, noise_var=C)
    torch.testing.assert_close(got, gaussian.log_prob(x), rtol=0, atol=1e-8)
    # No knot within reach: what is linear there is exact without samples.
    want = sampling_free_elbo(net, x, mean, log_var, noise_var=C, likelihood="expected")
    elbo = evaluate.exact_elbo(net, x, mean, log_var, noise_var=C).elbo
    torch.testing.assert_close(elbo, want.elbo.double(), rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("seed", [3, 4])
def test_the_samplers_agree_within_their_errors(m, seed):
    # Scaled so that several latents explain an image: posteriors of more than one mode.
    net, (x, mean, log_var) = decoder(m, scale=1.5, seed=seed).requires_grad_(False), data(m, 2)
    c = 0.5
    exact = evaluate.exact_log_marginal_likelihood(net, x, noise_var=c)
    wide = torch.full_like(log_var, 1.0)
    for proposal in evaluate.PROPOSALS:
        found = evaluate.log_marginal_likelihood(
            *(net, x, 0 * mean, wide),
            noise_var=c,
            samples=20_000,
            proposal=proposal,
            generator=torch.Generator().manual_seed(0),
        )
        trusted = found.effective_samples > 200
        # A Gaussian at one mode may not see another: it has no error to be trusted by.
        assert trusted.all() or proposal == "linearized"
        if proposal != "linearized":
            assert ((found.estimate - exact).abs() < 4 * found.standard_error).all()
    drawn = evaluate.sampled_elbo(
        *(net, x, mean, log_var),
        noise_var=c,
        samples=20_000,
        generator=torch.Generator().manual_seed(0),
    )
    elbo = evaluate.exact_elbo(net, x, mean, log_var, noise_var=c).elbo
    assert ((drawn.elbo - elbo).abs() < 4 * drawn.standard_error).all()


def test_extremes_are_finite():
    net, (x, _, _) = decoder(1), data(1)
    # Far in the tail, and nearly without noise: the nearest piece's end has all of the mass.
    for noise_var in (1e-6, 1e6):
        for far in (1.0, 1e4):
            got = evaluate.exact_log_marginal_likelihood(net, far * x, noise_var=noise_var)
            (slope,) = torch.autograd.grad(got.sum(), net[0].weight)
            assert got.isfinite().all() and slope.isfinite().all()


class Own(nn.Module):
    def forward(self, z):
        return z.expand(-1, N)


HOOKED = nn.Linear(1, N)
HOOKED.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(nn.Linear(1, N), nn.Tanh()), "layer '1', Tanh, is not known"),
        (Own(), "decoder Own is not known to be piecewise affine"),
        (nn.Sequential(nn.Sequential(nn.Linear(1, N), Own())), "layer '0.1', Own,"),
        (nn.Sequential(HOOKED), "layer '0', Linear, has hooks"),
        (lambda z: z, "decoder is a function"),
        (nn.Sequential(nn.Linear(3, N)), "m=3 latent dimensions"),
        (nn.Sequential(nn.Linear(1, 4)), "the decoder returns"),
        (nn.Sequential(nn.Linear(1, N), nn.Dropout(0.1)), "call decoder.eval"),
        (nn.Sequential(nn.Linear(1, N), nn.BatchNorm1d(N)), "call decoder.eval"),
        (nn.Sequential(nn.Linear(1, N), nn.Flatten(0)), "samples one by one"),
        (nn.Sequential(nn.Linear(1, N), nn.Conv1d(1, 1, 1)), "samples one by one"),
    ],
)
def test_what_is_not_known_is_refused_in_one_line(net, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        evaluate.exact_log_marginal_likelihood(net, torch.zeros(2, N), noise_var=C)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "exact", [evaluate.exact_elbo, lambda net, *data, **c: ExactMarginal(net, **c)(*data)]
)
def test_latents_that_do_not_fit_are_refused(exact):
    x, mean, log_var = data(2)
    with pytest.raises(ValueError, match=r"mean has shape \(3, 2\) but the decoder takes m=1"):
        exact(decoder(1), x, mean, log_var, noise_var=C)


def test_second_derivatives_are_refused():
    net, (x, mean, log_var) = decoder(1), data(1)
    elbo = evaluate.exact_elbo(net, x, mean, log_var, noise_var=C).elbo
    for value in (evaluate.exact_log_marginal_likelihood(net, x, noise_var=C), elbo):
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(value.sum(), [*net.parameters()], create_graph=True)


def test_the_objective_trains_each_part_by_its_own():
    net, (x, mean, log_var) = decoder(1), data(1)
    leaves = [mean.requires_grad_(), log_var.requires_grad_()]
    terms = ExactMarginal(net, noise_var=C)(x, mean, log_var)
    log_p = evaluate.exact_log_marginal_likelihood(net, x, noise_var=C)
    elbo = evaluate.exact_elbo(net, x, mean, log_var, noise_var=C).elbo
    torch.testing.assert_close(terms.objective, log_p.detach())
    got = torch.autograd.grad(terms.loss, [*leaves, *net.parameters()])
    want = [*torch.autograd.grad(-elbo.mean(), leaves)]
    want += torch.autograd.grad(-log_p.mean(), [*net.parameters()])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
