"""What Python does around a decoder's operations: attributes, side effects, wrappers, numbers."""

from __future__ import annotations

import collections
import copy
import functools
import random
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fastsfvae as sf
import fastsfvae.jacobian.run.cache as engine
from fastsfvae.jacobian.api import decode_with_jacobian
from fastsfvae.jacobian.plan.fingerprint import fingerprint
from fastsfvae.jacobian.rules.jet import Jet
from fastsfvae.jacobian.rules.registry import RULES, adjoint, rule
from fastsfvae.jacobian.rules.rule import Rule
from fastsfvae.jacobian.run.cache import Linearizer

M, B = 3, 5


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def traces(monkeypatch):
    """The batch size of every trace."""
    traced, trace = [], engine.Linearizer._trace

    def counted(self, batch):
        traced.append(batch)
        return trace(self, batch)

    monkeypatch.setattr(engine.Linearizer, "_trace", counted)
    return traced


class Decoder(nn.Module):
    """tanh of a linear layer, then what a test makes of it."""

    def __init__(self, then=None, **attributes):
        super().__init__()
        self.a = nn.Linear(M, 4)
        self.then = then
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, z, **kwargs):
        h = torch.tanh(self.a(z))
        return h if self.then is None else self.then(self, h, **kwargs)


def latents():
    return torch.randn(B, M, generator=torch.Generator().manual_seed(1))


def check(decoder, *args, swept=True, **kwargs):
    """The loss and its gradients against the reference, to 1e-10 of the largest."""
    z, log_var = latents(), 0.1 * torch.randn(B, M)
    with torch.no_grad():
        x = torch.rand_like(decoder(z, *args, **kwargs))
    parameters = list(decoder.parameters())
    results = []
    for backend in ("torch", "torch", "reference"):
        leaves = [z.clone().requires_grad_(), log_var.clone().requires_grad_()]
        options = {} if backend == "reference" else {"chunk_size": 2}
        loss = sf.SamplingFreeLoss(decoder, backend=backend, **options)(x, *leaves, *args, **kwargs)
        wanted = [*leaves, *parameters]
        grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        results.append((loss.detach(), *grads))
    *ours, reference = results
    scale = max(g.abs().max() for g in reference[1:])
    for got in ours:
        torch.testing.assert_close(got[0], reference[0], rtol=1e-12, atol=0)
        for a, b in zip(got[1:], reference[1:], strict=True):
            assert (a - b).abs().max() <= 1e-10 * scale
    if swept:
        assert Linearizer(decoder, z, args, kwargs).plan(B).obstacles == []


# Side effects


class Holder:
    pass


class Slotted:
    __slots__ = ("h", "n")

    def __init__(self):
        self.n = 0


def stores_in_list(d, h):
    d.kept.append(h)
    return h


def stores_in_dict(d, h):
    d.kept["h"] = h
    d.kept.setdefault("parts", []).append((h, h[:, :1]))
    return h


def stores_in_attribute(d, h):
    d.last, d.shape = h, h.shape
    return h


def stores_in_object(d, h):
    d.kept.h = h
    return h


def stores_under_numbers(d, h):
    d.kept[len(d.kept)] = h
    return h


def stores_in_a_new_list(d, h):
    d.kept = []
    d.kept.append(h)
    return h


def stores_in_set(d, h):
    d.kept.add(h)
    return h


def stores_deep(d, h):
    d.kept["log"].entries.append({"h": h})
    return h


STORES = {
    "list": (stores_in_list, list),
    "dict": (stores_in_dict, dict),
    "deque": (stores_in_list, lambda: collections.deque(maxlen=3)),
    "ordered": (stores_in_dict, collections.OrderedDict),
    "defaultdict": (stores_in_dict, lambda: collections.defaultdict(list)),
    "attribute": (stores_in_attribute, lambda: None),
    "namespace": (stores_in_object, types.SimpleNamespace),
    "object": (stores_in_object, Holder),
    "slots": (stores_in_object, Slotted),
    "numbers": (stores_under_numbers, dict),
    "set": (stores_in_set, set),
    "new list": (stores_in_a_new_list, list),
    "deep": (stores_deep, lambda: {"log": types.SimpleNamespace(entries=[], n=2)}),
}


def contents(value):
    """What is inside, without what it is."""
    if isinstance(value, dict):
        return {k: contents(v) for k, v in value.items()}
    if isinstance(value, (list, collections.deque)):
        return [contents(v) for v in value]
    if isinstance(value, (types.SimpleNamespace, Holder)):
        return contents(vars(value))
    if isinstance(value, Slotted):
        return {n: getattr(value, n) for n in value.__slots__ if hasattr(value, n)}
    return value


@pytest.mark.parametrize("name", STORES)
def test_what_forward_stores_is_neither_kept_nor_in_the_key(name, traces):
    then, make = STORES[name]
    decoder = Decoder(then, kept=make())
    before, kept = contents(decoder.kept), decoder.kept
    decode_with_jacobian(decoder, latents())
    assert contents(decoder.kept) == before and decoder.kept is kept
    assert "last" not in vars(decoder)
    for _ in range(6):
        # The user's own calls store.
        decoder(latents())
        decode_with_jacobian(decoder, latents())
    assert len(traces) <= 6
    before = len(traces)
    for _ in range(4):
        decoder(latents())
        decode_with_jacobian(decoder, latents())
    assert len(traces) == before
    check(decoder)


def test_hooks_that_store_leave_nothing_behind():
    acts, decoder = [], Decoder()
    decoder.a.register_forward_hook(lambda module, args, output: acts.append(output))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decode_with_jacobian(decoder, latents())
    assert acts == []


def test_closures_and_counters_are_as_before():
    count, notes = 0, [np.zeros(2)]

    def then(d, h):
        nonlocal count
        count += 1
        notes[0][0] += 1
        d.calls += 1
        return h

    decoder = Decoder(then, calls=3)
    decode_with_jacobian(decoder, latents())
    assert count == 0 and notes[0][0] == 0 and decoder.calls == 3


def test_a_plain_function_leaves_nothing_behind():
    acts, layer = [], nn.Linear(M, 4)

    def decode(z):
        acts.append(layer(z))
        return acts[-1].sin()

    decode_with_jacobian(decode, latents())
    assert acts == []


def test_a_failed_trace_leaves_nothing_behind():
    def then(d, h):
        d.kept.append(h)
        raise ValueError("no")

    decoder = Decoder(then, kept=[])
    with pytest.raises(ValueError, match="no"):
        decode_with_jacobian(decoder, latents())
    assert decoder.kept == []


def test_a_state_that_is_read_stays_in_the_key():
    """A recurrent decoder: what one call writes the next one reads."""

    def then(d, h):
        state = torch.zeros(4) if d.state is None else d.state
        d.state = h.detach().mean(0) if not d.frozen else d.state
        return h * (1 + state)

    decoder = Decoder(then, state=None, frozen=True)
    for state in (None, torch.rand(4), torch.rand(4)):
        decoder.state = state
        jacobian = decode_with_jacobian(decoder, latents())[1]
        torch.testing.assert_close(
            jacobian, decode_with_jacobian(decoder, latents(), backend="reference")[1]
        )


def test_a_written_state_that_is_read_stays_in_the_key():
    def then(d, h):
        old, d.state = d.state, h.detach()[0]
        return h if old is None else h * old

    decoder, weight = Decoder(then, state=None), None
    z = latents()
    for _ in range(3):
        state = decoder.state
        jacobian = decode_with_jacobian(decoder, z)[1]
        h = torch.tanh(decoder.a(z))
        weight = decoder.a.weight * (1 if state is None else state[:, None])
        expected = (1 - h.square())[:, None] * weight.t()
        torch.testing.assert_close(jacobian, expected)
        with torch.no_grad():
            decoder(z)
    assert decoder.state is not None


def test_the_reference_leaves_nothing_of_torch_func_behind():
    def then(d, h):
        d.average = 0.9 * d.average + 0.1 * h.detach().mean(0)
        return h

    decoder = Decoder(then, average=torch.zeros(4))
    for backend in ("reference", "torch", "reference"):
        decode_with_jacobian(decoder, latents(), backend=backend)
        assert type(decoder.average) is torch.Tensor
        assert not torch._C._functorch.is_functorch_wrapped_tensor(decoder.average)


def test_a_window_of_past_results_is_read_once_it_is_full():
    def then(d, h):
        d.past.append(h.detach())
        return h * d.past[-4].sum() if len(d.past) > 3 else h

    decoder = Decoder(then, past=[])
    for _ in range(6):
        past = list(decoder.past)
        jacobian = decode_with_jacobian(decoder, latents())[1]
        plain = Decoder()
        plain.load_state_dict(decoder.state_dict())
        expected = decode_with_jacobian(plain, latents())[1]
        scale = past[-3].sum() if len(past) > 2 else 1
        torch.testing.assert_close(jacobian, expected * scale)
        decoder(latents() + len(past))


def test_a_counter_that_is_read_stays_in_the_key():
    def then(d, h):
        d.kept["n"] += 1
        d.kept["h"] = h
        return h * d.kept["n"]

    decoder = Decoder(then, kept={"n": 0})
    z = latents()
    first = decode_with_jacobian(decoder, z)[1]
    torch.testing.assert_close(decode_with_jacobian(decoder, z)[1], first)
    decoder(z)
    torch.testing.assert_close(decode_with_jacobian(decoder, z)[1], 2 * first)


# Wrappers


def hooked(decoder):
    """What accelerate's add_hook_to_module does."""
    old = decoder.forward
    decoder._old_forward, decoder._hf_hook = old, types.SimpleNamespace(no_grad=False)

    def new_forward(module, *args, **kwargs):
        return module._old_forward(*args, **kwargs) * 2

    decoder.forward = functools.update_wrapper(functools.partial(new_forward, decoder), old)
    return decoder


def test_forward_replaced_by_a_partial(traces):
    check(hooked(Decoder()))
    assert len(traces) == 2


def test_forward_of_a_part_replaced():
    decoder = nn.Sequential(hooked(nn.Linear(M, 4)), nn.Tanh())
    check(decoder)


def test_forward_replaced_by_a_function():
    decoder = Decoder()
    decoder.forward = lambda z: torch.sin(decoder.a(z))
    check(decoder)


def test_the_method_behind_a_replaced_forward_is_itself():
    decoder = Decoder()
    plain = decoder.forward
    expected = decode_with_jacobian(decoder, latents())[1]
    hooked(decoder)
    torch.testing.assert_close(decode_with_jacobian(plain, latents())[1], expected)
    torch.testing.assert_close(decode_with_jacobian(decoder._old_forward, latents())[1], expected)
    torch.testing.assert_close(decode_with_jacobian(decoder, latents())[1], 2 * expected)


def compiled_by_method():
    decoder = nn.Sequential(nn.Linear(M, 4), nn.Tanh())
    decoder.compile(backend="eager")
    return decoder


def compiled_part_by_method():
    decoder = nn.Sequential(nn.Linear(M, 4), nn.Tanh())
    decoder[0].compile(backend="eager")
    return decoder


def compiled_child():
    return nn.Sequential(torch.compile(nn.Linear(M, 4), backend="eager"), nn.Tanh())


def compiled_function():
    double = torch.compile(lambda h: torch.sin(h) * 2, backend="eager")
    return Decoder(lambda d, h: double(h))


def compiled_in_a_list():
    decoder = Decoder(lambda d, h: d.parts[0](h))
    decoder.inner = nn.Linear(4, 4)
    decoder.parts = [torch.compile(decoder.inner, backend="eager")]
    return decoder


COMPILED = [
    compiled_by_method,
    compiled_part_by_method,
    compiled_child,
    compiled_function,
    compiled_in_a_list,
]


@pytest.mark.parametrize("build", COMPILED)
def test_compiled_parts_are_traced_as_they_were(build):
    decoder = build()
    implementation = vars(decoder).get("_compiled_call_impl")
    check(decoder)
    assert vars(decoder).get("_compiled_call_impl") is implementation


def test_a_compiled_part_keeps_its_hooks():
    part = torch.compile(nn.Linear(M, 4), backend="eager")
    part.register_forward_hook(lambda module, args, output: 3 * output)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(nn.Sequential(part, nn.Tanh()))


def test_a_batch_size_as_a_key():
    def then(d, h, convert):
        size = convert(h.shape[0])
        if size not in d.kept:
            d.kept[size] = torch.arange(4.0)
        return h * d.kept[size]

    check(Decoder(functools.partial(then, convert=int), kept={}))
    with pytest.raises(
        RuntimeError, match=r"needs the batch size as a plain number.*int\("
    ) as caught:
        decode_with_jacobian(
            Decoder(functools.partial(then, convert=lambda n: n), kept={}), latents()
        )
    assert "\n" not in str(caught.value)


def test_names_of_compiled_parts():
    decoder = nn.Sequential(torch.compile(nn.Linear(M, 4), backend="eager"), nn.Tanh())
    assert fingerprint(decoder).names == ["0.weight", "0.bias"]
    decode_with_jacobian(decoder, latents())
    assert type(decoder[0]).__name__ == "OptimizedModule"


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Linear(M, 4))


def traced():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(nn.Linear(M, 4), latents())


@pytest.mark.parametrize("build", [scripted, traced])
def test_scripted_modules_are_refused(build):
    for decoder, name in (
        (build(), "decoder is a torch.jit module"),
        (nn.Sequential(build(), nn.Tanh()), r"decoder\[0\] is a torch.jit module"),
    ):
        with pytest.raises(RuntimeError, match=name) as caught:
            decode_with_jacobian(decoder, latents())
        assert "\n" not in str(caught.value)


def test_a_data_parallel_part_is_refused():
    decoder = nn.Sequential(nn.DataParallel(nn.Linear(M, 4)), nn.Tanh())
    with pytest.raises(TypeError, match=r"decoder\[0\] is wrapped in DataParallel.*its \.module"):
        decode_with_jacobian(decoder, latents())


# Numbers that change


def test_an_attribute_that_changes_is_warned_of_once(traces):
    decoder = Decoder(lambda d, h: h * int(d.power))
    said = []
    for step in range(8):
        decoder.power = str(step)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            jacobian = decode_with_jacobian(decoder, latents())[1]
        said += [(step, str(w.message)) for w in caught]
        expected = decode_with_jacobian(decoder, latents(), backend="reference")[1]
        torch.testing.assert_close(jacobian, expected)
    ((step, message),) = said
    assert step == 3
    assert "decoder.power changes (from '2' to '3')" in message
    assert "0-d buffer" in message and "\n" not in message


def test_a_number_among_the_inputs_that_changes_is_warned_of():
    decoder = Decoder(lambda d, h, scale: h * int(scale))
    for step in "012":
        decode_with_jacobian(decoder, latents(), scale=step)
    with pytest.warns(UserWarning, match=r"further input scale changes \(from '2' to '3'\)"):
        decode_with_jacobian(decoder, latents(), scale="3")


def test_a_0d_buffer_that_changes_is_traced_once(traces):
    decoder = Decoder(lambda d, h: h * d.temperature)
    decoder.register_buffer("temperature", torch.tensor(1.0))
    first = decode_with_jacobian(decoder, latents())[1]
    for step in range(1, 5):
        decoder.temperature.mul_(0.5)
        torch.testing.assert_close(decode_with_jacobian(decoder, latents())[1], first * 0.5**step)
        decoder.temperature = decoder.temperature.clone()
    assert len(traces) == 1
    check(decoder)


def test_batch_sizes_and_modes_are_not_warned_of():
    decoder = Decoder()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in (1, 2, 3, 1, 2):
            decoder.train(size % 2 == 0)
            decode_with_jacobian(decoder, latents()[:size])


# The rest


def test_a_rule_registered_after_first_use_takes_effect(monkeypatch):
    decoder, z = Decoder(lambda d, h: torch.sin(h)), latents()
    first = decode_with_jacobian(decoder, z)[1]
    with monkeypatch.context() as patch:
        patch.setitem(
            RULES, "sin", Rule("sin", lambda x: Jet(x.primal.sin(), 3 * x.tangent / x.primal.cos()))
        )
        h = torch.tanh(decoder.a(z))
        expected = 3 * first / h.cos().square()[:, None]
        torch.testing.assert_close(decode_with_jacobian(decoder, z)[1], expected)
    torch.testing.assert_close(decode_with_jacobian(decoder, z)[1], first)
    version = RULES.version
    rule("of a test")(lambda x: x)
    adjoint("of a test")(lambda grad, out, needs, x: (grad,))
    del RULES["of a test"]
    assert RULES.version == version + 3


@pytest.mark.parametrize(
    "draw, name",
    [
        (lambda d: random.random(), "Python's random"),
        (lambda d: np.random.rand(), "numpy.random"),
        (lambda d: d.rng.random(), "Python's random"),
        (lambda d: d.generator.standard_normal(), "numpy.random.Generator"),
    ],
)
def test_random_numbers_drawn_in_python_are_refused(draw, name):
    decoder = Decoder(lambda d, h: h * draw(d))
    decoder.rng, decoder.generator = random.Random(0), np.random.default_rng(0)
    before = random.getstate(), np.random.get_state()[1].tobytes(), decoder.rng.getstate()
    with pytest.raises(RuntimeError, match=f"draws random numbers with {name}") as caught:
        decode_with_jacobian(decoder, latents())
    assert "\n" not in str(caught.value)
    after = random.getstate(), np.random.get_state()[1].tobytes(), decoder.rng.getstate()
    assert before == after


def test_a_decoder_with_side_effects_can_be_copied():
    decoder = Decoder(stores_in_list, kept=[])
    decode_with_jacobian(decoder, latents())
    copy.deepcopy(decoder)
