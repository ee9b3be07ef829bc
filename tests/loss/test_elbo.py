"""The objective, the loss module and the distribution, as a user calls them."""

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import fastsfvae as sf

LIKELIHOODS = ("precision", "mixture", "normalized", "expected")


def decoder(m=3, out=(2, 4), dtype=torch.float64):
    torch.manual_seed(0)
    n = out[0] * out[1]
    layers = nn.Linear(m, 8), nn.Tanh(), nn.Linear(8, n), nn.Unflatten(1, out)
    return nn.Sequential(*layers).to(dtype)


def batch(B=5, m=3, out=(2, 4), dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    x = torch.rand(B, *out, generator=g, dtype=torch.float64).to(dtype)
    mean = torch.randn(B, m, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    log_var = (torch.randn(B, m, generator=g, dtype=torch.float64) - 1).to(dtype).requires_grad_()
    return x, mean, log_var


class Conditional(nn.Module):
    """A decoder with extra inputs: per-sample classes and a shared scale."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 3)
        self.body = decoder()

    def forward(self, z, label, scale=1.0):
        return self.body(z + self.embed(label)) * scale


def by_hand(f, x, mean, log_var, c, gamma, likelihood):
    """The objective per sample from dense covariances and jacrev."""
    values = []
    for xi, mu, lv in zip(x, mean, log_var, strict=True):
        J = torch.func.jacrev(lambda z: f(z[None])[0].flatten())(mu)
        r = (xi - f(mu[None])[0]).flatten()
        n, h, eye = len(r), lv.exp(), torch.eye(len(r), dtype=r.dtype)
        low_rank = J @ torch.diag(h) @ J.T
        cov = low_rank + c * eye
        mixed = gamma * cov.inverse() + (1 - gamma) / c * eye
        two_pi = torch.log(torch.tensor(2 * torch.pi, dtype=r.dtype))
        if likelihood == "precision":
            ll = -0.5 * (n * two_pi + cov.logdet() + r @ mixed @ r)
        elif likelihood == "normalized":
            ll = -0.5 * (n * two_pi - mixed.logdet() + r @ mixed @ r)
        else:
            noise = -0.5 * (n * (two_pi + c.log()) + r @ r / c)
            full = -0.5 * (n * two_pi + cov.logdet() + r @ cov.inverse() @ r)
            ll = gamma * full + (1 - gamma) * noise
            if likelihood == "expected":
                ll = noise - low_rank.trace() / (2 * c)
        kl = kl_divergence(Normal(mu, (0.5 * lv).exp()), Normal(0.0, 1.0)).sum()
        values.append(ll - 0.7 * kl)
    return torch.stack(values)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_objective_and_every_gradient_equal_the_dense_formulas(likelihood, backend):
    f = decoder()
    x, mean, log_var = batch()
    c = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    gamma = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    inputs = [mean, log_var, c, *f.parameters()] + ([gamma] if likelihood != "expected" else [])
    want = by_hand(f, x, mean, log_var, c, gamma, likelihood)
    want_grads = torch.autograd.grad(want @ cotangent, inputs, retain_graph=True)
    got = sf.sampling_free_elbo(
        *(f, x, mean, log_var), noise_var=c, gamma=gamma, kl_weight=0.7, likelihood=likelihood,
        backend=backend,
    )  # fmt: skip
    grads = torch.autograd.grad(got.elbo @ cotangent, inputs)
    for mine, oracle in zip((got.elbo, *grads), (want, *want_grads), strict=True):
        assert torch.allclose(mine, oracle, rtol=1e-9, atol=1e-10)


def test_loss_reductions_weights_and_terms():
    f = decoder()
    data = batch()
    each = sf.SamplingFreeLoss(f, reduction="none")(*data)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    assert torch.allclose(sf.SamplingFreeLoss(f)(*data), each.mean())
    assert torch.allclose(sf.SamplingFreeLoss(f, reduction="sum")(*data), each.sum())
    weighted = sf.SamplingFreeLoss(f)(*data, sample_weight=weight)
    assert torch.allclose(weighted, (each * weight).sum() / weight.sum())
    loss, terms = sf.SamplingFreeLoss(f)(*data, return_terms=True)
    assert torch.allclose(loss, -terms.elbo.mean())
    assert torch.allclose(terms.elbo, terms.log_likelihood - terms.kl)
    assert not any(t.requires_grad for t in terms)


def test_loss_holds_only_its_own_parameters_and_survives_copies():
    c = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))
    f = decoder()
    loss = sf.SamplingFreeLoss(f, noise_var=c)
    assert [name for name, _ in loss.named_parameters()] == ["noise_var"]
    assert list(loss.state_dict()) == ["noise_var"]
    value = loss(*batch())
    value.backward()
    assert c.grad is not None and float(c.grad) != 0
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert twin.decoder is not f
        assert torch.equal(twin(*batch()), value)


def test_settings_change_between_steps():
    f, data = decoder(), batch()
    loss = sf.SamplingFreeLoss(f)
    loss(*data)
    loss.gamma, loss.kl_weight, loss.noise_var = 0.9, 0.0, 1.5
    want = sf.sampling_free_elbo(f, *data, noise_var=1.5, gamma=0.9, kl_weight=0.0)
    assert torch.allclose(loss(*data), -want.elbo.mean())


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 7])
def test_extra_inputs_are_chunked_with_the_batch(chunk_size):
    torch.manual_seed(0)
    f = Conditional().double()
    x, mean, log_var = batch()
    labels = torch.tensor([0, 3, 3, 9, 1])
    got = sf.sampling_free_elbo(
        f, x, mean, log_var, labels, scale=torch.tensor(2.0), chunk_size=chunk_size
    )
    got_grads = torch.autograd.grad(got.elbo.sum(), [mean, *f.parameters()])
    want = torch.stack(
        [
            sf.sampling_free_elbo(
                *(f, x[i : i + 1], mean[i : i + 1], log_var[i : i + 1], labels[i : i + 1]),
                scale=torch.tensor(2.0),
                backend="reference",
            ).elbo[0]
            for i in range(5)
        ]
    )
    want_grads = torch.autograd.grad(want.sum(), [mean, *f.parameters()])
    for mine, oracle in zip((got.elbo, *got_grads), (want, *want_grads), strict=True):
        assert torch.allclose(mine, oracle, rtol=1e-9, atol=1e-11)


def test_no_bound_but_expected_is_exact_for_a_linear_decoder():
    # m = 1, linear decoder, exact posterior: log p(x) equals the ELBO and lies below the objective.
    torch.manual_seed(0)
    n, c = 6, 0.5
    linear = nn.Linear(1, n).double()
    W, b = linear.weight.detach(), linear.bias.detach()
    x = torch.randn(1, n, dtype=torch.float64)
    precision = 1 + (W.T @ W).squeeze() / c
    mean = ((x - b) @ W / c / precision).requires_grad_()
    log_var = (-precision.log()).reshape(1, 1)
    log_p = MultivariateNormal(b, W @ W.T + c * torch.eye(n, dtype=torch.float64)).log_prob(x)
    exact = sf.sampling_free_elbo(linear, x, mean, log_var, noise_var=c, likelihood="expected").elbo
    surrogate = sf.sampling_free_elbo(linear, x, mean, log_var, noise_var=c, gamma=1.0).elbo
    assert torch.allclose(exact, log_p, rtol=1e-12)
    assert bool((surrogate > log_p).all())


def test_a_nan_sample_leaves_the_other_terms_finite():
    x, mean, log_var = batch()
    x[2] = float("nan")
    terms = sf.sampling_free_elbo(decoder(), x, mean, log_var)
    assert bool(torch.isfinite(terms.elbo[[0, 1, 3, 4]]).all())
    assert bool(terms.elbo[2].isnan())


def test_linearized_gaussian_equals_the_dense_gaussian():
    f = decoder()
    _, mean, log_var = batch()
    output, jacobian = sf.decode_with_jacobian(f, mean)
    J = jacobian.flatten(2)
    q = sf.LinearizedGaussian(output.flatten(1), J, log_var.exp(), 0.3)
    eye = torch.eye(8, dtype=torch.float64)
    cov = J.mT @ (log_var.exp().unsqueeze(-1) * J) + 0.3 * eye
    dense = MultivariateNormal(output.flatten(1), cov)
    value = torch.randn(4, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(q.log_prob(value), dense.log_prob(value))
    assert torch.allclose(q.log_prob(value[0]), dense.log_prob(value[0]))
    assert torch.allclose(q.entropy(), dense.entropy())
    assert torch.allclose(q.variance, dense.variance)
    assert torch.allclose(q.covariance_matrix, cov)
    torch.manual_seed(0)
    draws = q.rsample((20_000,))
    assert draws.shape == (20_000, 5, 8)
    spread = torch.einsum("sbi,sbj->bij", draws - q.mean, draws - q.mean) / 20_000
    # Entries of a sample covariance err by at most sqrt(2 / N) times the largest variance.
    spread, cov = spread.detach(), cov.detach()
    assert float((spread - cov).abs().max()) < 5 * (2 / 20_000) ** 0.5 * float(cov.abs().max())
    single = sf.LinearizedGaussian(output[0].flatten(), J[0], log_var[0].exp(), 0.3)
    assert torch.allclose(single.log_prob(value[:, 0]), dense.log_prob(value)[:, 0])


def test_float16_and_bfloat16_inputs_are_evaluated_in_float32():
    J = (torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)) / 6).bfloat16()
    r = torch.randn(2, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    h = torch.full((2, 3), 0.5)
    got = sf.low_rank_log_prob(r, J, h, noise_var=0.5)
    want = sf.low_rank_log_prob(r.double(), J.double(), h.double(), noise_var=0.5)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), want, rtol=1e-5)


def call(**changes):
    """A good call of the functional objective with some arguments exchanged."""
    x, mean, log_var = batch()
    given = {"decoder": decoder(), "x": x, "mean": mean, "log_var": log_var} | changes
    return sf.sampling_free_elbo(
        given.pop("decoder"), given.pop("x"), given.pop("mean"), given.pop("log_var"), **given
    )


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"noise_var": -1.0}, ValueError, r"noise_var=-1.0"),
        ({"noise_var": float("nan")}, ValueError, r"noise_var=nan"),
        ({"noise_var": float("inf")}, ValueError, r"noise_var=inf"),
        ({"noise_var": torch.ones(3)}, ValueError, r"noise_var has shape \(3,\)"),
        ({"noise_var": "0.5"}, TypeError, r"noise_var='0.5'"),
        ({"gamma": 1.5}, ValueError, r"gamma=1.5"),
        ({"gamma": float("nan")}, ValueError, r"gamma=nan"),
        ({"kl_weight": -1}, ValueError, r"kl_weight=-1"),
        ({"likelihood": "elbo"}, ValueError, r"likelihood='elbo'.*'precision'"),
        ({"backend": "cuda"}, ValueError, r"backend='cuda'.*'triton'"),
        ({"chunk_size": 0}, ValueError, r"chunk_size.* 0"),
        ({"x": torch.zeros(5, 2, 4, dtype=torch.uint8)}, TypeError, r"uint8.*/ 255"),
        ({"x": torch.zeros(4, 2, 4).double()}, ValueError, r"x \(4, 2, 4\) and mean \(5, 3\)"),
        ({"x": torch.zeros(5, 3, 4).double()}, ValueError, r"\(5, 3, 4\).*\(5, 2, 4\)"),
        ({"mean": torch.zeros(5, 4).double()}, ValueError, r"mean \(5, 4\).*log_var \(5, 3\)"),
        ({"decoder": nn.DataParallel(decoder())}, (TypeError, ValueError), r"DataParallel"),
        ({"decoder": nn.Sequential(decoder(), nn.Dropout())}, RuntimeError, r"decoder.1.*dropout"),
        (
            {"decoder": nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8)).double()},
            RuntimeError,
            r"decoder\[1\] .*batch statistics",
        ),
        ({"decoder": decoder(dtype=torch.float32)}, ValueError, r"float64.*float32"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(changes, error, words):
    with pytest.raises(error, match=words) as caught:
        call(**changes)
    assert "\n" not in str(caught.value)


def test_an_empty_batch_and_a_bad_weight_are_clear_errors():
    x, mean, log_var = batch()
    with pytest.raises(ValueError, match="empty"):
        sf.sampling_free_elbo(decoder(), x[:0], mean[:0], log_var[:0])
    with pytest.raises(ValueError, match="empty"):
        sf.SamplingFreeLoss(decoder())(x[:0], mean[:0], log_var[:0])
    with pytest.raises(ValueError, match="chunk_size must be"):
        sf.SamplingFreeLoss(decoder(), chunk_size=0)
    with pytest.raises(ValueError, match=r"sample_weight has shape \(4,\)"):
        sf.SamplingFreeLoss(decoder())(x, mean, log_var, sample_weight=torch.ones(4))
    with pytest.raises(ValueError, match="reduction='avg'"):
        sf.SamplingFreeLoss(decoder(), reduction="avg")
    with pytest.raises(ValueError, match=r"jacobian \(2, 5, 3\)"):
        sf.low_rank_log_prob(torch.ones(2, 5), torch.ones(2, 5, 3), torch.ones(2, 3), noise_var=1.0)


def test_weak_settings_warn_where_they_are_given():
    x, mean, log_var = torch.rand(2, 5), torch.zeros(2, 3), torch.zeros(2, 3)
    weak = {"likelihood": "mixture", "gamma": 0.1}
    f = nn.Linear(3, 5)
    with pytest.warns(UserWarning, match="auto-encoder") as told:
        loss = sf.SamplingFreeLoss(f, **weak)
        sf.sampling_free_elbo(f, x, mean, log_var, noise_var=0.5, **weak)
        sf.low_rank_log_prob(x, torch.ones(2, 3, 5), mean.exp(), noise_var=0.5, **weak)
    assert [Path(warning.filename).name for warning in told] == [Path(__file__).name] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(x, mean, log_var)
