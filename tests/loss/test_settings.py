"""Settings as tensors: out of range they are NaN and can be asked for; a learned variance."""

import copy
import math

import pytest
import torch
from torch import nn

import fastsfvae as sf
from fastsfvae._checks import LIKELIHOODS

B, M, N = 5, 4, 20


def problem(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    decoder = nn.Sequential(nn.Linear(M, 8), nn.Tanh(), nn.Linear(8, N)).to(dtype)
    return decoder, *(torch.randn(B, size, dtype=dtype) for size in (N, M, M))


OUT_OF_RANGE = [
    ("noise_var", 0.0),
    ("noise_var", -0.5),
    ("noise_var", math.nan),
    ("noise_var", math.inf),
    ("gamma", -1e-3),
    ("gamma", 1.001),
    ("gamma", math.nan),
    ("kl_weight", -1e-3),
    ("kl_weight", math.nan),
    ("kl_weight", math.inf),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_a_number_out_of_range_is_refused_and_so_is_a_tensor_that_is_asked_for(name, value):
    decoder, *inputs = problem()
    with pytest.raises(ValueError, match=f"{name}="):
        sf.SamplingFreeLoss(decoder, **{name: value})
    loss_fn = sf.SamplingFreeLoss(decoder, **{name: torch.tensor(value)})
    for check in (
        loss_fn.check_settings,
        lambda: sf.check_settings(**{name: torch.tensor(value)}),
        lambda: sf.check_settings(**{name: value}),
    ):
        with pytest.raises(ValueError, match=f"{name}="):
            check()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(("name", "value"), [c for c in OUT_OF_RANGE if c[1] != math.inf])
@pytest.mark.filterwarnings("ignore:likelihood=")
def test_a_tensor_out_of_range_is_nan_and_never_a_plausible_number(
    name, value, likelihood, backend
):
    decoder, *inputs = problem()
    options = {"likelihood": likelihood, "backend": backend, name: torch.tensor(value)}
    assert sf.sampling_free_elbo(decoder, *inputs, **options).elbo.isnan().all()
    assert sf.SamplingFreeLoss(decoder, **options)(*inputs).isnan()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.filterwarnings("ignore:likelihood=")
def test_a_tensor_in_range_is_the_number_to_the_bit(likelihood):
    decoder, *inputs = problem()
    for gamma, weight in ((0.0, 0.0), (1.0, 1.0), (0.3, 2.5)):
        numbers = {"gamma": gamma, "kl_weight": weight, "likelihood": likelihood}
        tensors = {
            name: torch.tensor(v, dtype=torch.float64) if isinstance(v, float) else v
            for name, v in numbers.items()
        }
        mine, theirs = (
            sf.sampling_free_elbo(decoder, *inputs, **given).elbo for given in (tensors, numbers)
        )
        assert torch.equal(mine, theirs)


def test_a_weight_at_the_end_of_its_range_still_has_its_gradient():
    decoder, *inputs = problem()
    gamma, weight = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.0, 0.0))
    terms = sf.sampling_free_elbo(decoder, *inputs, gamma=gamma, kl_weight=weight)
    mine = torch.autograd.grad(terms.elbo.sum(), (gamma, weight))
    torch.testing.assert_close(mine[0], terms.explained.sum().detach())
    torch.testing.assert_close(mine[1], -terms.kl.sum().detach())


def test_a_learned_variance_is_learned_and_stays_positive():
    decoder, *inputs = problem()
    loss_fn = sf.SamplingFreeLoss(decoder, noise_var=0.3, learned_noise_var=True)
    (logarithm,) = loss_fn.parameters()
    assert loss_fn.noise_var.item() == pytest.approx(0.3)
    c = torch.tensor(0.3, requires_grad=True)
    by_c = torch.autograd.grad(sf.SamplingFreeLoss(decoder, noise_var=c)(*inputs), c)[0]
    by_logarithm = torch.autograd.grad(loss_fn(*inputs), logarithm)[0]
    torch.testing.assert_close(by_logarithm, by_c * 0.3)
    # Steps that would take c itself far below 0.
    optimizer = torch.optim.SGD(loss_fn.parameters(), lr=0.2)
    for _ in range(50):
        loss = loss_fn(*inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite() and loss_fn.noise_var > 0
    # The variance of what is left over, whose gradient is 0.
    assert abs(logarithm.grad) < 0.5 * abs(by_logarithm)


def test_a_learned_variance_can_be_saved_copied_assigned_and_refused():
    decoder, *inputs = problem()
    loss_fn = sf.SamplingFreeLoss(decoder, noise_var=0.3, learned_noise_var=True)
    loss_fn.noise_var = 0.2
    assert loss_fn.noise_var.item() == pytest.approx(0.2)
    copied = copy.deepcopy(loss_fn)
    again = sf.SamplingFreeLoss(decoder, learned_noise_var=True)
    again.load_state_dict(loss_fn.state_dict())
    fixed = sf.SamplingFreeLoss(decoder, noise_var=float(loss_fn.noise_var))
    for other in (copied, again, fixed):
        torch.testing.assert_close(other(*inputs), loss_fn(*inputs))
    for value in (-0.1, 0.0, math.nan, torch.tensor(-0.1)):
        with pytest.raises(ValueError, match="noise_var="):
            loss_fn.noise_var = value
        with pytest.raises(ValueError, match="noise_var="):
            sf.SamplingFreeLoss(decoder, noise_var=value, learned_noise_var=True)
    assert loss_fn.noise_var.item() == pytest.approx(0.2)


def test_a_step_that_could_be_captured_learns_the_variance():
    decoder, x, *_ = problem(dtype=torch.float32)

    class Encoder(nn.Sequential):
        def forward(self, x):
            return super().forward(x).chunk(2, 1)

    def trained(graphed):
        torch.manual_seed(1)
        encoder, own = Encoder(nn.Linear(N, 2 * M)), copy.deepcopy(decoder)
        loss_fn = sf.SamplingFreeLoss(own, learned_noise_var=True)
        weights = [*encoder.parameters(), *own.parameters(), *loss_fn.parameters()]
        optimizer = torch.optim.Adam(weights, lr=0.05)
        step = sf.make_graphed_step(encoder, loss_fn, optimizer, x, capture=False)
        for _ in range(4):
            if graphed:
                step(x)
            else:
                loss = loss_fn(x, *encoder(x))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return loss_fn.noise_var.item()

    assert trained(True) == trained(False) != 0.5


@pytest.mark.slow
def test_a_learned_variance_compiles():
    decoder, *inputs = problem()
    loss_fn = sf.SamplingFreeLoss(decoder, learned_noise_var=True)
    (logarithm,) = loss_fn.parameters()
    compiled = torch.compile(loss_fn, fullgraph=True, dynamic=True)
    mine, theirs = (torch.autograd.grad(f(*inputs), logarithm)[0] for f in (compiled, loss_fn))
    torch.testing.assert_close(mine, theirs)
