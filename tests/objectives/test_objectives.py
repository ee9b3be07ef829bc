"""Every objective's value and gradients; a small model makes 10,000 draws take seconds."""

import math

import pytest
import torch
from torch import nn

from fastsfvae.likelihoods import gaussian_kl
from fastsfvae.objectives import (
    AutoEncoder,
    DoublyReparameterized,
    ImportanceWeighted,
    Sampling,
    StickingTheLanding,
)
from fastsfvae.objectives.draws import draw_path
from tests.objectives.plain import close

NOISE_VAR = 0.3
M, N = 2, 5
BLOCKS, DRAWS_PER_BLOCK = 100, 100
DIRECTIONS = 16


def _model():
    generator = torch.Generator().manual_seed(0)
    encoder = nn.Linear(N, 2 * M).double()
    decoder = nn.Sequential(nn.Linear(M, 8), nn.Tanh(), nn.Linear(8, N)).double()
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return encoder, decoder


def _data(batch):
    return torch.randn(batch, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _noise(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _evaluate(objective, encoder, decoder, x, seed=7):
    """Terms, and the gradients of the encoder's and the decoder's parameters, flat."""
    mean, log_var = encoder(x).chunk(2, dim=1)
    generator = torch.Generator().manual_seed(seed)
    terms = objective(x, mean, log_var, generator=generator)
    encoder_parameters = tuple(encoder.parameters())
    gradients = torch.autograd.grad(terms.loss, (*encoder_parameters, *decoder.parameters()))
    flat = [gradient.flatten() for gradient in gradients]
    split = len(encoder_parameters)
    return terms, torch.cat(flat[:split]), torch.cat(flat[split:])


def _log_weight(decoder, x, z, mean, log_var):
    """Log p(x|z) + log p(z) - log q(z|x) from torch.distributions, ``[K, B]``."""
    normal = torch.distributions.Normal
    output = decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2])
    log_likelihood = normal(output, math.sqrt(NOISE_VAR)).log_prob(x).sum(-1)
    prior = normal(torch.zeros_like(mean), 1.0).log_prob(z).sum(-1)
    return log_likelihood, prior - normal(mean, (0.5 * log_var).exp()).log_prob(z).sum(-1)


# --- exact: values and gradients against the densities written out


@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize(
    "class_", [Sampling, ImportanceWeighted, StickingTheLanding, DoublyReparameterized]
)
def test_terms_and_gradients_from_the_densities(class_, samples):
    encoder, decoder = _model()
    x = _data(6)
    objective = class_(decoder, noise_var=NOISE_VAR, samples=samples)
    terms, encoder_gradient, decoder_gradient = _evaluate(objective, encoder, decoder, x)

    mean, log_var = encoder(x).chunk(2, dim=1)
    z = mean + (0.5 * log_var).exp() * _noise(7, samples, 6, M)
    log_likelihood, log_ratio = _log_weight(decoder, x, z, mean, log_var)
    kl = gaussian_kl(mean, log_var)
    if class_ is Sampling:
        value = log_likelihood.mean(0) - kl
    elif class_ is StickingTheLanding:
        value = (log_likelihood + log_ratio).mean(0)
    else:
        value = (log_likelihood + log_ratio).exp().mean(0).log()
    close(terms.objective, value.detach())
    close(terms.loss.detach(), -value.mean().detach())
    close(terms.log_likelihood, log_likelihood.mean(0).detach())
    close(terms.kl, kl.detach())
    constant = N * math.log(2 * math.pi * NOISE_VAR)
    close(terms.squared_error, -NOISE_VAR * (2 * terms.log_likelihood + constant))

    if class_ in (StickingTheLanding, DoublyReparameterized):
        # The weighted path derivatives, sample by sample.
        fixed = mean.detach(), log_var.detach()
        log_weight = sum(_log_weight(decoder, x, z, *fixed))
        (slope,) = torch.autograd.grad(log_weight.sum(), z, retain_graph=True)
        squared = log_weight.softmax(0).square()
        equal = torch.full_like(squared, 1 / samples)
        weight = squared if class_ is DoublyReparameterized else equal
        encoder_loss = -(weight.unsqueeze(-1).detach() * slope * z).sum() / len(x)
    else:
        encoder_loss = -value.mean()
    expected = torch.autograd.grad(encoder_loss, tuple(encoder.parameters()), retain_graph=True)
    close(encoder_gradient, torch.cat([g.flatten() for g in expected]))
    expected = torch.autograd.grad(-value.mean(), tuple(decoder.parameters()))
    close(decoder_gradient, torch.cat([g.flatten() for g in expected]))


@pytest.mark.parametrize("class_", [ImportanceWeighted, DoublyReparameterized])
def test_a_weight_that_is_lost_in_the_sum_has_no_gradient(class_):
    # Draws of 2 fit; of the others the weight is e^-60 of theirs, and less.
    output = torch.full((4, 1, 1), 10.0)
    output[:2] = 0.5
    output.requires_grad_()
    objective = class_(lambda z: output.view(4, 1), samples=4)
    mean, log_var = torch.zeros(1, M), torch.zeros(1, M)
    terms = objective(torch.zeros(1, 1), mean, log_var)
    terms.loss.backward()
    assert torch.isfinite(terms.loss) and output.grad[:2].abs().min() > 1e-3
    assert output.grad[2:].abs().max() == 0


def test_iwae_of_one_sample_is_the_sampling_elbo():
    encoder, decoder = _model()
    x = _data(6)
    iwae, *_ = _evaluate(ImportanceWeighted(decoder, noise_var=NOISE_VAR), encoder, decoder, x)
    elbo, *_ = _evaluate(Sampling(decoder, noise_var=NOISE_VAR), encoder, decoder, x)
    # The same noise: all that differs is the KL divergence, drawn instead of in closed form.
    mean, log_var = (t.detach() for t in encoder(x).chunk(2, dim=1))
    noise = _noise(7, 1, 6, M)
    z = mean + (0.5 * log_var).exp() * noise
    drawn_kl = -_log_weight(decoder, x, z, mean, log_var)[1][0]
    close(iwae.objective, elbo.log_likelihood - drawn_kl.detach())
    close(iwae.log_likelihood, elbo.log_likelihood)


def test_dreg_of_one_sample_is_sticking_the_landing():
    encoder, decoder = _model()
    x = _data(6)
    dreg = _evaluate(DoublyReparameterized(decoder, noise_var=NOISE_VAR), encoder, decoder, x)
    stl = _evaluate(StickingTheLanding(decoder, noise_var=NOISE_VAR), encoder, decoder, x)
    for actual, expected in zip((*dreg[0], *dreg[1:]), (*stl[0], *stl[1:]), strict=True):
        close(actual.detach(), expected.detach())
    iwae = _evaluate(ImportanceWeighted(decoder, noise_var=NOISE_VAR), encoder, decoder, x)
    close(stl[0].objective, iwae[0].objective)
    close(stl[2], iwae[2])
    # The score that it leaves out has no mean, but does not vanish.
    assert (stl[1] - iwae[1]).norm() > 0.1 * iwae[1].norm()


def test_sticking_the_landing_is_noiseless_at_the_true_posterior():
    # f(z) = Wz with orthogonal columns: the posterior is a diagonal Gaussian.
    weight = torch.zeros(N, M, dtype=torch.float64)
    weight[0, 0], weight[1, 1] = 2.0, 0.7
    x = _data(6)
    precision = 1 + weight.square().sum(0) / NOISE_VAR
    mean = ((x @ weight / NOISE_VAR) / precision).requires_grad_()
    log_var = (-precision.log()).expand(6, M).clone().requires_grad_()
    gradients = {}
    for class_ in (StickingTheLanding, ImportanceWeighted):
        objective = class_(lambda z: z @ weight.T, noise_var=NOISE_VAR)
        terms = objective(x, mean, log_var, generator=torch.Generator().manual_seed(3))
        gradients[class_] = torch.autograd.grad(terms.loss, (mean, log_var))
    for gradient in gradients[StickingTheLanding]:
        close(gradient, torch.zeros_like(gradient))
    assert all(gradient.abs().max() > 0.01 for gradient in gradients[ImportanceWeighted])


def test_a_narrow_posterior_keeps_its_digits():
    # z - mean in float32 would hold no digit of a deviation of 1e-9.
    decoder = nn.Linear(M, N)
    mean = torch.full((3, M), 5.0, requires_grad=True)
    log_var = torch.full((3, M), 2 * math.log(1e-9), requires_grad=True)
    x = _data(3).float()
    values = [
        class_(decoder)(x, mean, log_var, generator=torch.Generator().manual_seed(0)).objective
        for class_ in (ImportanceWeighted, StickingTheLanding)
    ]
    torch.testing.assert_close(*values, rtol=4e-7, atol=0)


def test_auto_encoder():
    encoder, decoder = _model()
    x = _data(6)
    objective = AutoEncoder(decoder, noise_var=NOISE_VAR)
    terms, encoder_gradient, decoder_gradient = _evaluate(objective, encoder, decoder, x)
    mean, _ = encoder(x).chunk(2, dim=1)
    normal = torch.distributions.Normal(decoder(mean), math.sqrt(NOISE_VAR))
    value = normal.log_prob(x).sum(-1)
    close(terms.objective, value.detach())
    close(terms.squared_error, (decoder(mean) - x).square().sum(-1).detach())
    parameters = (*encoder.parameters(), *decoder.parameters())
    expected = torch.autograd.grad(-value.mean(), parameters)
    flat = torch.cat([gradient.flatten() for gradient in expected])
    close(torch.cat([encoder_gradient, decoder_gradient]), flat)


def test_settings_that_are_refused():
    _, decoder = _model()
    for class_ in (Sampling, ImportanceWeighted, StickingTheLanding, DoublyReparameterized):
        with pytest.raises(ValueError, match="samples=0"):
            class_(decoder, samples=0)
        with pytest.raises(ValueError, match="noise_var=-1"):
            class_(decoder, noise_var=-1)
    with pytest.raises(ValueError, match=r"x has shape \(3, 4\) but the decoder returns \(3, 5\)"):
        AutoEncoder(decoder)(
            torch.zeros(3, 4), torch.zeros(3, M).double(), torch.zeros(3, M).double()
        )


# --- in the mean: 10,000 draws along fixed random directions


def _block_gradients(objective, encoder, decoder):
    """Blocks' mean gradients along the directions, ``[BLOCKS, DIRECTIONS]``: (encoder, decoder)."""
    x = _data(1).expand(DRAWS_PER_BLOCK, N)
    blocks = [_evaluate(objective, encoder, decoder, x, seed)[1:] for seed in range(BLOCKS)]
    projected = []
    for part, gradients in enumerate(map(torch.stack, zip(*blocks, strict=True))):
        directions = _noise(100 + part, gradients.shape[1], DIRECTIONS)
        projected.append(gradients @ (directions / directions.norm(dim=0)))
    return projected


def _standard_errors(first, second):
    """Distance of two estimators' means in standard errors of the paired difference."""
    difference = first - second
    error = difference.std(0) / math.sqrt(BLOCKS)
    # Identical estimators differ by rounding only.
    floor = 64 * torch.finfo(torch.float64).eps * first.abs().max()
    return (difference.mean(0).abs() / error.clamp_min(floor)).max()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((ImportanceWeighted, 1), (Sampling, 1)),
        ((StickingTheLanding, 1), (Sampling, 1)),
        ((DoublyReparameterized, 1), (Sampling, 1)),
        ((Sampling, 4), (Sampling, 1)),
        ((StickingTheLanding, 4), (Sampling, 1)),
        ((DoublyReparameterized, 4), (ImportanceWeighted, 4)),
    ],
    ids=["iwae-1", "stl", "dreg-1", "sampling-4", "stl-4", "dreg-4"],
)
def test_mean_gradients_agree(first, second):
    encoder, decoder = _model()
    estimates = [
        _block_gradients(class_(decoder, noise_var=NOISE_VAR, samples=samples), encoder, decoder)
        for class_, samples in (first, second)
    ]
    for one, other in zip(*estimates, strict=True):
        assert _standard_errors(one, other) < 4


def test_mean_gradients_that_differ_are_told_apart():
    """10,000 draws can see a bias: a tighter bound's gradient, and STL on it."""
    encoder, decoder = _model()
    bound, elbo, dreg = (
        _block_gradients(objective, encoder, decoder)
        for objective in (
            ImportanceWeighted(decoder, noise_var=NOISE_VAR, samples=4),
            Sampling(decoder, noise_var=NOISE_VAR),
            _BiasedBound(decoder, noise_var=NOISE_VAR, samples=4),
        )
    )
    assert _standard_errors(bound[0], elbo[0]) > 8
    assert _standard_errors(bound[0], dreg[0]) > 8


class _BiasedBound(ImportanceWeighted):
    """Sticking-the-Landing on the importance-weighted bound: the second weight is missing."""

    _draw = staticmethod(draw_path)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16"])
@pytest.mark.parametrize("make", [Sampling, ImportanceWeighted, StickingTheLanding, AutoEncoder])
def test_densities_of_latents_in_half_precision_are_float32s(make, autocast):
    torch.manual_seed(0)
    decoder = torch.nn.Linear(4, 6)
    mean, log_var = (0.1 * torch.randn(2, 50, 4)).bfloat16()
    x = torch.randn(50, 6)
    if not autocast:
        decoder, x = decoder.bfloat16(), x.bfloat16()
    options = {} if make is AutoEncoder else {"samples": 3}
    draw = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = make(decoder, **options)(x, mean, log_var, generator=draw())
    exact = make(decoder.float(), **options)(
        x.float(), mean.float(), log_var.float(), generator=draw()
    )
    assert {term.dtype for term in found} == {torch.float32}
    torch.testing.assert_close(found.kl, exact.kl)
    # Of draws and outputs of eight bits.
    torch.testing.assert_close(found.objective, exact.objective, rtol=0, atol=0.15)
