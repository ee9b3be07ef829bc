"""The loss inside what PyTorch users do to a module, besides what test_compose.py holds."""

import copy
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastsfvae as sf
from fastsfvae.jacobian.plan import refuse
from tests.decoders import M, batch, build


def step(loss, tensors, parameters):
    value = loss(*tensors)
    return value.detach(), *torch.autograd.grad(value, [*tensors, *parameters])


def equal(ours, theirs, tolerance=1e-12):
    for mine, want in zip(ours, theirs, strict=True):
        assert (mine - want).abs().max() <= tolerance * (1 + want.abs().max())


def test_vmap_over_models_by_the_reference_backend_or_one_clear_line():
    decoder, tensors = build("tanh"), batch(build("tanh"))
    models = [copy.deepcopy(decoder) for _ in range(3)]
    with torch.no_grad():
        for index, model in enumerate(models):
            for parameter in model.parameters():
                parameter.mul_(1 + index / 10)
    stacked, _ = torch.func.stack_module_state(models)

    class Step(nn.Module):
        def __init__(self, backend):
            super().__init__()
            self.decoder = decoder
            self.loss = sf.SamplingFreeLoss(decoder, backend=backend)

        def forward(self, *given):
            return self.loss(*given)

    def mapped(backend, parameters):
        module = Step(backend)

        def one(values):
            named = {f"decoder.{name}": value for name, value in values.items()}
            return torch.func.functional_call(module, named, tensors)

        return torch.vmap(one)(parameters)

    want = torch.stack([sf.SamplingFreeLoss(model)(*tensors) for model in models])
    equal([mapped("reference", stacked)], [want])
    frozen = {name: value.detach() for name, value in stacked.items()}
    for parameters in (stacked, frozen):
        with pytest.raises(RuntimeError, match='one model at a time, or give backend="reference"'):
            mapped("torch", parameters)


@pytest.mark.parametrize("name", ["higgins", "layer_norm", "attention"])
def test_autocast_to_float16_rounds_values_and_gradients_to_it_only(name):
    decoder, exact = build(name, torch.float32), build(name)
    want = step(sf.SamplingFreeLoss(exact), batch(exact), exact.parameters())
    with torch.autocast("cpu", torch.float16):
        tensors = batch(decoder, dtype=torch.float32)
        value = sf.SamplingFreeLoss(decoder, chunk_size=2)(*tensors)
    grads = torch.autograd.grad(value, [*tensors, *decoder.parameters()])
    # Sums run in float32 and each layer, of which there are at most eight, rounds its operands.
    bound = 16 * torch.finfo(torch.float16).eps
    for got, truth in zip((value.detach(), *grads), want, strict=True):
        assert got.dtype == torch.float32
        assert (got - truth).abs().max() <= bound * truth.abs().max()


def test_checkpointing_around_the_encoder():
    decoder, (x, *_) = build("residual"), batch(build("residual"))
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Flatten(), nn.Linear(x[0].numel(), 9), nn.Tanh(), nn.Linear(9, 2 * M)
    ).double()
    loss = sf.SamplingFreeLoss(decoder, chunk_size=2)

    def whole(encode):
        value = loss(x, *encode(x).chunk(2, 1))
        parameters = [*encoder.parameters(), *decoder.parameters()]
        return value.detach(), *torch.autograd.grad(value, parameters)

    equal(whole(lambda x: checkpoint(encoder, x, use_reentrant=False)), whole(encoder))


def test_copies_pickles_and_state_of_the_loss():
    decoder = build("tanh")
    tensors = batch(decoder)
    noise = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    loss = sf.SamplingFreeLoss(decoder, noise_var=noise, gamma=0.7, likelihood="normalized")
    want = step(loss, tensors, [noise])
    # The decoder is not the loss's own: its parameters are saved with it, where it is registered.
    assert list(loss.state_dict()) == ["noise_var"]
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert twin.decoder is not decoder and twin.noise_var is not noise
        equal(step(twin, tensors, [twin.noise_var]), want, 0)
        with torch.no_grad():
            next(twin.decoder.parameters()).add_(1)
        assert not torch.equal(twin(*tensors), want[0])
        equal(step(loss, tensors, [noise]), want, 0)
    fresh = sf.SamplingFreeLoss(
        decoder, noise_var=nn.Parameter(noise.detach() * 0 + 9), gamma=0.7, likelihood="normalized"
    )
    fresh.load_state_dict(loss.state_dict())
    equal(step(fresh, tensors, [fresh.noise_var]), want, 0)
    # A model that holds both keeps them together.
    model = nn.ModuleDict({"decoder": decoder, "loss": loss})
    both = copy.deepcopy(model)
    assert both["loss"].decoder is both["decoder"]


def test_data_parallel_is_refused():
    decoder = build("tanh")
    with pytest.raises(TypeError, match="wrapped in DataParallel"):
        sf.SamplingFreeLoss(nn.DataParallel(decoder))
    # What nn.DataParallel makes of a loss on each device.
    replica = sf.SamplingFreeLoss(decoder)._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="copies the loss but not its decoder: use Distributed"):
        replica(*batch(decoder))


class Buffered(nn.Module):
    """A scale and a shift that are set from outside."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(M, 9), nn.Linear(9, 6)
        self.register_buffer("scale", torch.ones(9))
        self.register_buffer("hidden", torch.linspace(0, 1, 6), persistent=False)

    def forward(self, z):
        return self.out(torch.tanh(self.layer(z)) * self.scale) + self.hidden


def test_buffers_are_read_at_every_call():
    torch.manual_seed(0)
    decoder = Buffered().double()
    tensors = batch(decoder)

    def both():
        losses = [sf.SamplingFreeLoss(decoder, backend=b) for b in ("torch", "reference")]
        return [step(loss, tensors, decoder.parameters()) for loss in losses]

    first, _ = both()
    for change in (
        lambda: decoder.scale.mul_(2),
        lambda: setattr(decoder, "scale", torch.linspace(1, 2, 9, dtype=torch.float64)),
        lambda: decoder.hidden.add_(1),
    ):
        change()
        ours, want = both()
        equal(ours, want, 1e-11)
        assert not torch.equal(ours[0], first[0])
        first = ours


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_both_forms_of_weight_norms(norm):
    old, new = getattr(nn.utils, norm), getattr(nn.utils.parametrizations, norm)
    for wrap in (old, new):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            layers = wrap(nn.Linear(M, 9).double()), nn.SiLU(), wrap(nn.Linear(9, 6).double())
        decoder = nn.Sequential(*layers).eval()
        tensors = batch(decoder)
        # The old form leaves its last weight behind, a value and no parameter.
        parameters = list(decoder.parameters())
        ours, want = (
            step(sf.SamplingFreeLoss(decoder, backend=backend), tensors, parameters)
            for backend in ("torch", "reference")
        )
        equal(ours, want, 1e-10)


def test_hooks_run_or_raise(monkeypatch):
    # Told once a process, perhaps by another test.
    monkeypatch.setattr(refuse, "_warned_hooks", set())
    decoder, plain = build("tanh"), build("tanh")
    tensors = batch(decoder)
    loss = sf.SamplingFreeLoss(decoder)
    want = step(loss, tensors, decoder.parameters())

    # On a parameter: they run, also one that changes the gradient.
    parameter, seen = next(decoder.parameters()), []
    handles = [
        parameter.register_hook(lambda grad: 2 * grad),
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone())),
    ]
    loss(*tensors).backward()
    equal(seen, [2 * want[4]])
    for handle in handles:
        handle.remove()

    # On a module: what a forward hook computes is part of the function.
    with pytest.warns(UserWarning, match="forward hooks of decoder.0. run only when"):
        handle = decoder[0].register_forward_hook(lambda layer, given, output: 2 * output)
        hooked = step(loss, tensors, decoder.parameters())
    with torch.no_grad():
        for p in plain[0].parameters():
            p.mul_(2)
    doubled = step(sf.SamplingFreeLoss(plain), tensors, plain.parameters())
    equal(hooked[:4], doubled[:4])
    handle.remove()
    equal(step(loss, tensors, decoder.parameters()), want, 0)

    # A backward hook would never run, and a plan of before it does not hide it.
    for name in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        handle = getattr(decoder[2], name)(lambda *_: None)
        with pytest.raises(RuntimeError, match="backward hooks of decoder.2. would not run"):
            loss(*tensors)
        handle.remove()
    equal(step(loss, tensors, decoder.parameters()), want, 0)


class PulledBack(nn.Module):
    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, z, x):
        return tuple(sf.pullback(self.decoder, z, x))


# Dynamo of torch 2.11 cannot follow the call to the plan.
_STRICT = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14), reason="needs torch 2.14"
)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=_STRICT)])
def test_export_of_the_pullback(strict):
    module = PulledBack(build("tanh"))
    x, z, _ = (t.detach() for t in batch(module.decoder))
    if not strict:
        with pytest.raises(RuntimeError, match="not made inside torch.export: call it once before"):
            torch.export.export(module, (z, x), strict=False)
    module(z, x)
    exported = torch.export.export(module, (z, x), strict=strict).module()
    other = torch.linspace(-2, 2, z.numel(), dtype=z.dtype).view_as(z)
    equal(exported(other, x + 1), module(other, x + 1))


def test_export_says_that_its_batch_is_fixed():
    module = PulledBack(build("tanh"))
    x, z, _ = (t.detach() for t in batch(module.decoder))
    size = torch.export.Dim("size", min=2, max=64)
    with pytest.raises(RuntimeError, match="export it with a fixed batch size"):
        torch.export.export(module, (z, x), dynamic_shapes=({0: size}, {0: size}), strict=False)


def test_this_torch_is_one_that_is_supported():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    oldest = re.search(r'"torch>=(\d+)\.(\d+)"', text)
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    assert tuple(map(int, found.groups())) >= tuple(map(int, oldest.groups()))


@pytest.mark.gpu
def test_a_side_stream_and_every_device_give_the_same(monkeypatch):
    # cuDNN may sum a weight's gradient in any order.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    decoder = build("higgins", torch.float32).cuda()
    tensors = [t.detach().cuda().requires_grad_() for t in batch(build("higgins"))]
    tensors = [t.detach().float().requires_grad_() for t in tensors]
    want = step(sf.SamplingFreeLoss(decoder), tensors, decoder.parameters())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours = step(sf.SamplingFreeLoss(decoder), tensors, decoder.parameters())
    torch.cuda.current_stream().wait_stream(stream)
    equal(ours, want, 0)
    # The current device stays cuda:0.
    for index in range(1, torch.cuda.device_count()):
        there = copy.deepcopy(decoder).to(index)
        moved = [t.detach().to(index).requires_grad_() for t in tensors]
        ours = step(sf.SamplingFreeLoss(there), moved, there.parameters())
        equal([t.cpu() for t in ours], [t.cpu() for t in want], 1e-5)
