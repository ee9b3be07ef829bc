"""The captured training step: what it refuses, and that it trains like a loop by hand."""

import contextlib
import copy
import gc

import pytest
import torch
from torch import nn

import fastsfvae as sf
from fastsfvae import _ranges as ranges

M, B = 3, 6


class Encoder(nn.Module):
    """With running statistics and dropout: what a warm-up must not leave behind."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.out = nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2 * M)

    def forward(self, x):
        return self.out(self.drop(self.norm(x))).chunk(2, dim=1)


def modules(device="cpu", seed=0, dropout=True):
    torch.manual_seed(seed)
    encoder = Encoder().to(device)
    if not dropout:
        encoder.drop = nn.Identity()
    layers = nn.Linear(M, 10), nn.Tanh(), nn.Linear(10, 8)
    return encoder, nn.Sequential(*layers).to(device)


def adam(encoder, decoder, *more, **settings):
    parameters = [*encoder.parameters(), *decoder.parameters(), *more]
    return torch.optim.Adam(parameters, **{"lr": 1e-2, "capturable": True, **settings})


def batches(count, device="cpu"):
    g = torch.Generator().manual_seed(7)
    # Every fourth batch is an epoch's last.
    return [torch.rand(B - 2 * (i % 4 == 3), 8, generator=g).to(device) for i in range(count)]


def changed(loss, index):
    """Settings that change between steps, as numbers and as tensors."""
    loss.gamma = [0.5, 0.9, torch.tensor(0.7), torch.tensor(0.6)][index % 4]
    loss.kl_weight = 1.0 if index < 3 else 0.5


class Rehearsal(sf.GraphedStep):
    """A graph that is no graph: replaying runs the step on what a graph would read."""

    def _record(self):
        self._graph, self._outputs = self, None

    def replay(self):
        with self._captured_settings():
            self._outputs = self._train(*self._inputs)


def by_hand(steps, device="cpu", dropout=True, noise_var=0.3):
    encoder, decoder = modules(device, dropout=dropout)
    loss = sf.SamplingFreeLoss(decoder, noise_var=noise_var)
    optimizer, values = adam(encoder, decoder, capturable=device != "cpu"), []
    torch.manual_seed(3)
    for index, x in enumerate(batches(steps, device)):
        changed(loss, index)
        value = loss(x, *encoder(x))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    return values, [*encoder.state_dict().values(), *decoder.parameters()]


def by_step(make, steps, device="cpu", dropout=True):
    encoder, decoder = modules(device, dropout=dropout)
    loss = sf.SamplingFreeLoss(decoder, noise_var=0.3)
    optimizer, values = adam(encoder, decoder, capturable=device != "cpu"), []
    torch.manual_seed(3)
    step = make(encoder, loss, optimizer, batches(1, device)[0])
    for index, x in enumerate(batches(steps, device)):
        changed(loss, index)
        value, terms = step(x)
        assert torch.allclose(value, -terms.elbo.mean(), rtol=1e-5)
        values.append(value.item())
    return values, [*encoder.state_dict().values(), *decoder.parameters()]


def rehearse(encoder, loss, optimizer, x):
    step = Rehearsal(encoder, loss, optimizer)
    step.capture(x)
    return step


def eager(*args):
    return sf.make_graphed_step(*args, capture=False)


@pytest.mark.parametrize("make", [eager, rehearse])
def test_twenty_steps_are_those_of_a_loop_by_hand(make):
    values, weights = by_step(make, 20)
    want, trained = by_hand(20)
    # Settings on the device are rounded as the loss rounds a number: the bits are the same.
    assert values == want
    assert all(torch.equal(a, b) for a, b in zip(weights, trained, strict=True))


def test_a_replay_is_one_range(monkeypatch):
    named = []
    monkeypatch.setattr(ranges, "_range", lambda name: named.append(name) or ranges._nothing)
    encoder, decoder = modules()
    x, *_ = batches(1)
    step = Rehearsal(
        encoder, sf.SamplingFreeLoss(decoder), adam(encoder, decoder, capturable=False)
    )
    with ranges.recording():
        step.capture(x)
        assert "replay" not in named and "solve" in named
        named.clear()
        step(x)
    assert named[0] == "replay"


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_warm_up_leaves_nothing_behind(steps_before):
    encoder, decoder = modules()
    noise_var = nn.Parameter(torch.tensor(0.4))
    loss = sf.SamplingFreeLoss(decoder, noise_var=noise_var)
    optimizer = adam(encoder, decoder, noise_var, amsgrad=True, capturable=False)
    step = eager(encoder, loss, optimizer, batches(1)[0])
    for x in batches(steps_before):
        step(x)
    modules_before = copy.deepcopy((encoder.state_dict(), decoder.state_dict(), noise_var))
    state_before = copy.deepcopy(optimizer.state_dict()["state"])
    random_before = torch.get_rng_state()
    step.warm_up(batches(1)[0])
    assert torch.equal(torch.get_rng_state(), random_before)
    assert all(p.grad is None for p in (*encoder.parameters(), *decoder.parameters(), noise_var))
    after = encoder.state_dict(), decoder.state_dict(), noise_var
    leaves = torch.utils._pytree.tree_leaves
    for a, b in zip(leaves(after), leaves(modules_before), strict=True):
        assert torch.equal(a, b)
    found = leaves(optimizer.state_dict()["state"])
    wanted = leaves(state_before) if steps_before else [torch.zeros_like(t) for t in found]
    assert found and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_learned_noise_variance_is_trained():
    results = []
    for make in (eager, rehearse):
        encoder, decoder = modules(dropout=False)
        noise_var = nn.Parameter(torch.tensor(0.4))
        loss = sf.SamplingFreeLoss(decoder, noise_var=noise_var)
        optimizer = adam(encoder, decoder, noise_var, capturable=False)
        step = make(encoder, loss, optimizer, batches(1)[0])
        for x in batches(5):
            step(x)
        assert loss.noise_var is noise_var and noise_var.item() != pytest.approx(0.4, abs=1e-3)
        results.append(noise_var.item())
    assert results[0] == results[1]


def test_a_variance_learned_by_its_logarithm_is_trained():
    results = []
    for make in (eager, rehearse):
        encoder, decoder = modules(dropout=False)
        loss = sf.SamplingFreeLoss(decoder, noise_var=0.4, learned_noise_var=True)
        optimizer = adam(encoder, decoder, *loss.parameters(), capturable=False)
        step = make(encoder, loss, optimizer, batches(1)[0])
        for x in batches(5):
            step(x)
        results.append(loss.noise_var.item())
    assert results[0] == results[1] != pytest.approx(0.4, abs=1e-3)


def test_what_samples_share_is_no_obstacle():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(M, 8)

        def forward(self, z, table):
            return self.linear(z) + table.mean(0)

    encoder, _ = modules()
    decoder, x, table = Rows(), batches(1)[0], torch.rand(B, 8)
    optimizer = adam(encoder, decoder)
    for shared, reason in (((), "give shared="), ((0,), "needs its tensors on a GPU")):
        loss = sf.SamplingFreeLoss(decoder, shared=shared)
        with pytest.raises(RuntimeError, match=reason):
            sf.make_graphed_step(encoder, loss, optimizer, x, table)


def test_changes_that_a_graph_would_not_see_are_refused():
    encoder, decoder = modules()
    noise_var = nn.Parameter(torch.tensor(0.4))
    loss = sf.SamplingFreeLoss(decoder, noise_var=noise_var)
    optimizer = adam(encoder, decoder, noise_var, capturable=False)
    x = batches(1)[0]
    step = rehearse(encoder, loss, optimizer, x)
    for name, value in (("noise_var", 0.4), ("gamma", nn.Parameter(torch.tensor(0.5)))):
        kept = getattr(loss, name)
        delattr(loss, name)
        setattr(loss, name, value)
        with pytest.raises(
            ValueError, match=rf"loss.{name} was (not )?learned when .*capture again"
        ):
            step(x)
        delattr(loss, name)
        setattr(loss, name, kept)
    loss.gamma = 1.5
    with pytest.raises(ValueError, match=r"gamma=1.5 must lie in \[0, 1\]"):
        step(x)
    loss.gamma = 0.5
    optimizer.param_groups[0]["lr"] = 5e-3
    with pytest.raises(ValueError, match=r"lr was captured as 0.01 and is now 0.005: .*lr=torch"):
        step(x)
    optimizer.param_groups[0].update(lr=1e-2, betas=(0.5, 0.999))
    with pytest.raises(ValueError, match=r"betas was captured as \(0.9, 0.999\) and is now \(0.5"):
        step(x)
    optimizer.param_groups[0]["betas"] = 0.9, 0.999
    for wrong in (torch.rand(B + 1, 8), torch.rand(B, 9)):
        with pytest.raises(ValueError, match=r"captured for \(6, 8\) and takes that or fewer"):
            step(wrong)


def test_a_state_that_is_loaded_later_is_refused():
    encoder, decoder = modules()
    optimizer = adam(encoder, decoder, capturable=False)
    x = batches(1)[0]
    step = rehearse(encoder, sf.SamplingFreeLoss(decoder), optimizer, x)
    step(x)
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="load it before the step is captured"):
        step(x)


def test_a_learning_rate_on_the_host_is_part_of_the_graph():
    encoder, decoder = modules()
    rate = torch.tensor(1e-2)
    optimizer = adam(encoder, decoder, lr=rate, capturable=False)
    x = batches(1)[0]
    step = rehearse(encoder, sf.SamplingFreeLoss(decoder), optimizer, x)
    step(x)
    rate.fill_(5e-3)
    with pytest.raises(ValueError, match=r"is now 0.00499.*lr=torch.tensor.*on the GPU"):
        step(x)


@pytest.fixture
def captures(monkeypatch):
    """Stands in for torch.cuda's captures: (current device, stream, gc.isenabled()) of each."""
    current, seen = [], []

    @contextlib.contextmanager
    def made_current(device):
        current.append(device)
        yield

    @contextlib.contextmanager
    def graph(_, *, stream=None, **options):
        seen.append((current[-1], stream, gc.isenabled()))
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "device", made_current)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return seen


def uncaptured():
    encoder, decoder = modules()
    optimizer = adam(encoder, decoder, capturable=False)
    return sf.GraphedStep(encoder, sf.SamplingFreeLoss(decoder), optimizer), batches(1)[0]


def test_a_step_is_captured_on_its_own_device(captures):
    step, x = uncaptured()
    step.capture(x)
    assert [seen[:2] for seen in captures] == [(x.device, x.device)]


@pytest.mark.parametrize("collects", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_no_garbage_is_collected_in_a_capture(captures, monkeypatch, collects, fails):
    step, x = uncaptured()
    step.warm_up(x)
    rounds, train = [], step._train

    def trained(*given):
        rounds.append(gc.isenabled())
        if fails and captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        return train(*given)

    monkeypatch.setattr(step, "_train", trained)
    if not collects:
        gc.disable()
    try:
        with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
            step.capture(x)
        assert gc.isenabled() == collects
    finally:
        gc.enable()
    # Three steps to warm up, and the captured one.
    assert rounds == [collects] * 3 + [False] and captures[0][2] is False


def unhandled():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(M, 8)

        def forward(self, z):
            h = self.layer(z)
            return nn.functional.huber_loss(h, h.flip(1), reduction="none")

    return Odd()


@pytest.mark.parametrize(
    "case, kind, words",
    [
        ({}, RuntimeError, 'x is on "cpu": move encoder, decoder and x there, or give capture=F'),
        ({"capturable": False}, ValueError, "capturable=False: give Adam.*capturable=True"),
        ({"optimizer": "SGD"}, TypeError, "SGD cannot be captured: give torch.optim.Adam or AdamW"),
        ({"backend": "reference"}, ValueError, 'backend="reference" is not made for a graph'),
        ({"reduction": "none"}, ValueError, 'reduction="none" gives no single loss'),
        ({"decoder": unhandled}, RuntimeError, "decoder cannot be captured: .*has no"),
        ({"loss": nn.MSELoss()}, TypeError, "loss is a MSELoss: give a SamplingFreeLoss"),
    ],
    ids=lambda value: next(iter(value), "cpu") if isinstance(value, dict) else "",
)
def test_what_cannot_be_captured_says_why(case, kind, words):
    encoder, decoder = modules()
    decoder = case["decoder"]() if "decoder" in case else decoder
    settings = {name: case[name] for name in ("backend", "reduction") if name in case}
    loss = case.get("loss") or sf.SamplingFreeLoss(decoder, **settings)
    optimizer = adam(encoder, decoder, capturable=case.get("capturable", True))
    if "optimizer" in case:
        optimizer = torch.optim.SGD(encoder.parameters(), 1e-2)
    before = copy.deepcopy(encoder.state_dict())
    with pytest.raises(kind, match=words) as raised:
        sf.make_graphed_step(encoder, loss, optimizer, batches(1)[0])
    assert "\n" not in str(raised.value)
    assert all(torch.equal(t, before[name]) for name, t in encoder.state_dict().items())


@pytest.mark.gpu
def test_a_graph_trains_like_the_loop():
    # Dropout draws other numbers in a graph than outside of one.
    values, weights = by_step(sf.make_graphed_step, 20, "cuda", dropout=False)
    want, trained = by_hand(20, "cuda", dropout=False)
    torch.testing.assert_close(values, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(weights, trained, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_graph_on_a_device_that_is_not_the_current_one():
    # The first capture is on the current device.
    first, _ = by_step(sf.make_graphed_step, 8, "cuda:0", dropout=False)
    second, _ = by_step(sf.make_graphed_step, 8, "cuda:1", dropout=False)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_graph_in_bfloat16_and_with_further_inputs():
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.out = nn.Linear(M, 10), nn.Linear(10, 8)

        def forward(self, z, label):
            return self.out(torch.tanh(self.layer(z)) * label)

    results = []
    for capture in (True, False):
        encoder, _ = modules("cuda", dropout=False)
        torch.manual_seed(1)
        decoder = Conditional().cuda()
        loss, label = sf.SamplingFreeLoss(decoder), torch.rand(B, 10, device="cuda")
        step = sf.make_graphed_step(
            *(encoder, loss, adam(encoder, decoder), batches(1, "cuda")[0], label),
            autocast=torch.bfloat16, capture=capture,
        )  # fmt: skip
        results.append([step(x, label[: len(x)])[0].item() for x in batches(20, "cuda")])
    torch.testing.assert_close(*results, rtol=2**-7, atol=2**-7)
