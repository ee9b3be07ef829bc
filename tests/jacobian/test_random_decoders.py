"""No wrong Jacobian: decoders drawn from a grammar against jacrev and autograd, in float64."""

import copy
import warnings

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastsfvae as sf
from fastsfvae.jacobian.run.cache import Linearizer
from fastsfvae.jacobian.run.sweep import program_of
from tests.grammar import M, Part, draw_decoder

PER_TEST = 10
EPS = torch.finfo(torch.float64).eps
SETTINGS = {"noise_var": 0.3, "gamma": 0.7}
SUBJECT = "random decoders, float64"


def pytest_generate_tests(metafunc):
    if "first" in metafunc.fixturenames:
        count = metafunc.config.getoption("--decoders")
        metafunc.parametrize("first", range(0, count, PER_TEST))


def _exact(decoder, z, args):
    """(output, J [B, m, *out]), one backward pass for each output: nothing of torch.func."""
    output = decoder(z, *args)
    rows = [
        torch.autograd.grad(column.sum(), z, create_graph=True)[0]
        for column in output.flatten(1).unbind(1)
    ]
    return output, torch.stack(rows, -1).unflatten(-1, output.shape[1:])


class _PlainInstanceNorm(nn.Module):
    """InstanceNorm in primitive operations.

    PyTorch 2.14's own second derivative is wrong for some strides of the incoming gradient; finite
    differences show it.
    """

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        var, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
        scale, shift = (p.view(-1, 1, 1) for p in (self.norm.weight, self.norm.bias))
        return (x - mean) / torch.sqrt(var + self.norm.eps) * scale + shift


def _in_primitives(decoder):
    """The same function of the same parameters for the oracle."""
    twin = copy.deepcopy(decoder, {id(p): p for p in decoder.parameters()})
    for module in list(twin.modules()):
        if isinstance(module, Part) and module.plain is not None:
            module.run = module.plain
        for name, child in list(module.named_children()):
            if isinstance(child, nn.InstanceNorm2d):
                setattr(module, name, _PlainInstanceNorm(child))
    return twin


def _exact_results(decoder, x, z, log_var, args, wanted):
    """Output, J and the loss's gradients."""
    # PyTorch's fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        output, jacobian = _exact(_in_primitives(decoder), z, args)
        loss = _reference_loss(x, z, log_var, output, jacobian)
        gradients = _gradients(loss, wanted)
    return [t.detach() for t in (output, jacobian, *gradients)]


def _gradients(loss, wanted):
    return torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)


def check(seed, largest_error):
    """Output, J and every gradient of a decoder against the oracle's.

    Each of its operations must have an adjoint. Returns whether its chunks were swept: one of a
    single sample may be laid out in another way, and then autograd takes all of them.
    """
    # Chunks of two; one of a single sample is another trace, which takes its time.
    batch = 3 if seed % 4 == 0 else 4
    decoder, args = draw_decoder(seed, batch)
    generator = torch.Generator().manual_seed(seed)
    z, log_var = (
        torch.randn(batch, M, dtype=torch.float64, generator=generator).requires_grad_()
        for _ in range(2)
    )
    given = [a.requires_grad_() for a in args if a.is_floating_point()]
    wanted = [z, log_var, *given, *(p for p in decoder.parameters() if p.requires_grad)]
    output, jacobian = sf.decode_with_jacobian(decoder, z, *args, chunk_size=2)
    x = torch.randn(output.shape, dtype=torch.float64, generator=generator)
    # The loss ends its gradients by the rules' adjoints, not by autograd.
    loss = sf.SamplingFreeLoss(decoder, chunk_size=2, backend="torch", **SETTINGS)
    gradients = _gradients(loss(x, z, log_var, *args), wanted)
    linearizer = Linearizer(decoder, z, args)
    obstacles = linearizer.plan(batch).obstacles
    assert not obstacles, f"decoder {seed} is not swept ({obstacles}): {decoder}"

    exact = _exact_results(decoder, x, z, log_var, args, wanted)
    moved: list[torch.Tensor] = []
    names = ("the output", "J", *["a gradient"] * len(gradients))
    largest = max(1.0, *(float(g.abs().max()) for g in exact[2:]))
    for index, (name, got) in enumerate(zip(names, (output, jacobian, *gradients), strict=True)):
        want = exact[index]
        scale = max(1.0, float(want.abs().max()))
        error, allowed = float((got.detach() - want).abs().max()), 500 * EPS * scale
        if error > allowed and not moved:
            # How much the answer depends on the last bits of z: norms of nearly equal values do.
            nudged = (z.detach() * (1 + 8 * EPS)).requires_grad_()
            moved = _exact_results(decoder, x, nudged, log_var, args, [nudged, *wanted[1:]])
        if moved:
            allowed += 50 * float((want - moved[index]).abs().max())
        if name == "a gradient":
            allowed, scale = min(allowed, 1e-10 * largest), largest
        assert error <= allowed, f"{name} of decoder {seed} is off by {error:.1e}: {decoder}"
        largest_error(SUBJECT, f"{name}, of the largest entry", error / scale)
    return program_of(linearizer, [2] if batch == 4 else [1, 2]) is not None


def test_jacobians_and_gradients_of_random_decoders(first, largest_error, tally):
    for seed in range(first, first + PER_TEST):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*has no tangent rule.*")
            swept = check(seed, largest_error)
        tally(SUBJECT, "cases")
        tally(SUBJECT, "swept", swept)


def _reference_loss(x, mean, log_var, output, jacobian):
    """The loss as its formula reads, through a dense covariance."""
    noise_var, gamma = SETTINGS["noise_var"], SETTINGS["gamma"]
    r, J = (x - output).flatten(1), jacobian.flatten(2)
    n = r.shape[1]
    factor = J * (0.5 * log_var).exp().unsqueeze(-1)
    sigma = factor.mT @ factor + noise_var * torch.eye(n, dtype=r.dtype)
    log_det = torch.linalg.slogdet(sigma / noise_var).logabsdet
    squared = r.square().sum(-1)
    solved = (r * torch.linalg.solve(sigma, r)).sum(-1)
    mixed = gamma * solved + (1 - gamma) * squared / noise_var
    constant = n * torch.log(torch.tensor(2 * torch.pi * noise_var, dtype=r.dtype))
    log_likelihood = -0.5 * (constant + log_det + mixed)
    kl = 0.5 * (log_var.exp() + mean.square() - 1 - log_var).sum(-1)
    return (kl - log_likelihood).mean()
