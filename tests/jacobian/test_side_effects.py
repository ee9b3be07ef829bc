"""What a decoder's forward does beside its result is undone, and is no part of the key."""

from __future__ import annotations

import collections
import copy
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from fastsfvae.jacobian.api import decode_with_jacobian
from tests.jacobian.around import Decoder, M, check, latents

pytestmark = pytest.mark.usefixtures("double_precision")


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


def test_a_decoder_with_side_effects_can_be_copied():
    decoder = Decoder(stores_in_list, kept=[])
    decode_with_jacobian(decoder, latents())
    copy.deepcopy(decoder)
