"""What of a decoder's attributes is part of its plans' key, whatever they are."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import decimal
import enum
import fractions
import functools
import gc
import itertools
import logging
import pathlib
import random
import threading
import types
import uuid
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsfvae.jacobian.api import decode_with_jacobian
from fastsfvae.jacobian.plan.fingerprint import fingerprint, freeze
from tests.jacobian.around import Decoder, latents


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@dataclasses.dataclass
class Options:
    scale: float = 1.0
    parts: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True)
class SlottedOptions:
    scale: float = 1.0


class Odd(type):
    def __eq__(cls, other):
        raise RuntimeError("no")

    __hash__ = None


class OddlyTyped(metaclass=Odd):
    pass


class Hostile:
    """Raises wherever it is looked at."""

    def __getattribute__(self, name):
        raise RuntimeError(name)

    def __eq__(self, other):
        raise RuntimeError("no")

    __hash__ = None


def recursive_list():
    found: list = [1]
    found.append(found)
    return found


def recursive_dict():
    found: dict = {"a": 1}
    found["self"] = ([found],)
    return found


class Linked:
    def __init__(self):
        self.parent = self
        self.scale = 2.0


def generator():
    yield 1


TENSOR = torch.ones(2)
VALUES = {
    "class": torch.Tensor,
    "parameter class": nn.Parameter,
    "odd class": OddlyTyped,
    "odd object": OddlyTyped(),
    "enum": Colour.RED,
    "int enum": Level.HIGH,
    "dataclass": Options(),
    "slots": SlottedOptions(),
    "weakref": weakref.ref(Colour),
    "weak dictionary": weakref.WeakKeyDictionary({Colour: 1}),
    "weak proxy": weakref.proxy(Linked.__init__),
    "lock": threading.Lock(),
    "thread": threading.current_thread(),
    "logger": logging.getLogger("decoder"),
    "generator": generator(),
    "count": itertools.count(),
    "iterator": iter([1]),
    "file": pathlib.Path(__file__).open(),  # noqa: SIM115
    "partial": functools.partial(torch.add, TENSOR, alpha=2),
    "lambda": lambda h: h,
    "bound method": TENSOR.add,
    "bound method of a list": [1].append,
    "own method": Linked().__init__,
    "array": np.ones((2, 3)),
    "array of objects": np.array([1, "a", None], dtype=object),
    "structured array": np.zeros(2, dtype=[("a", "i4"), ("b", "f8")]),
    "masked array": np.ma.masked_array([1.0, 2.0], [True, False]),
    "numpy scalar": np.float32(2.5),
    "numpy integer": np.int64(2),
    "numpy boolean": np.bool_(True),
    "numpy dtype": np.dtype("f4"),
    "numpy generator": np.random.default_rng(0),
    "namespace": argparse.Namespace(scale=1, parts=[1]),
    "recursive list": recursive_list(),
    "recursive dict": recursive_dict(),
    "recursive object": Linked(),
    "dict with tensor keys": {TENSOR: 1, torch.ones(2): 2},
    "set of tensors": {TENSOR, torch.ones(2)},
    "set": frozenset({1, "a", (2, 3)}),
    "tuple of tensors": (TENSOR, [TENSOR]),
    "fraction": fractions.Fraction(1, 3),
    "decimal": decimal.Decimal("0.10"),
    "path": pathlib.Path("a/b"),
    "uuid": uuid.UUID(int=1),
    "string": "a",
    "nan": float("nan"),
    "complex": 1j,
    "range": range(3),
    "slice": slice(1, None, 2),
    "bytearray": bytearray(b"ab"),
    "module": np,
    "device": torch.device("cpu"),
    "size": torch.Size([1, 2]),
    "layout": torch.strided,
    "random": random.Random(0),
    "torch generator": torch.Generator(),
    "counter": collections.Counter("aab"),
    "named tuple": collections.namedtuple("Pair", "a b")(1, TENSOR),  # noqa: PYI024
    "mapping": types.MappingProxyType({"a": 1}),
    "module in a list": [nn.Linear(2, 2)],
    "optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1),
    "integer parameter list": [torch.arange(3)],
    "sparse": torch.eye(3).to_sparse(),
    "quantizer": torch.finfo(torch.float32),
    "ellipsis": ...,
}


@pytest.mark.parametrize("name", VALUES)
def test_any_attribute_has_a_key(name, traces):
    decoder = Decoder(kind=VALUES[name])
    for _ in range(2):
        decode_with_jacobian(decoder, latents())
    assert len(traces) == 1
    keys = [fingerprint(decoder).key for _ in range(2)]
    assert keys[0] == keys[1] and hash(keys[0]) == hash(keys[1])


def test_what_raises_wherever_it_is_looked_at_has_a_key():
    odd = Hostile()
    assert freeze([odd]) == freeze([odd]) != freeze([Hostile()])


def changes():
    """Pairs of states that a forward can tell apart."""
    array = np.arange(6.0)
    yield "array's shape", array, array.reshape(2, 3)
    yield "array's dtype", np.zeros(2, "f4"), np.zeros(1, "f8")
    yield "array's values", np.zeros(2), np.array([0.0, -0.0])
    yield "objects in an array", np.array([1], object), np.array([2], object)
    yield "sign of zero", 0.0, -0.0
    yield "signs in a list", [0.0], [-0.0]
    yield "int and float", 2, 2.0
    yield "int and bool", [1], [True]
    yield "items of a set", {1}, {True}
    yield "decimals", decimal.Decimal("0.1"), decimal.Decimal("0.10")
    yield "fractions", fractions.Fraction(1, 2), fractions.Fraction(1, 3)
    yield "enums", Colour.RED, Colour.BLUE
    yield "levels", Level.LOW, 1
    yield "classes", torch.Tensor, nn.Parameter
    yield "dataclasses", Options(1.0), Options(2.0)
    yield "slots", SlottedOptions(1.0), SlottedOptions(2.0)
    yield "partials", functools.partial(F.leaky_relu, negative_slope=0.1), functools.partial(F.relu)
    yield "their numbers", functools.partial(F.elu, alpha=0.1), functools.partial(F.elu, alpha=0.2)
    yield "order", {"a": 1, "b": 2}, {"b": 2, "a": 1}
    yield "keys", {1: 0}, {True: 0}
    yield "numpy scalars", np.float32(0.5), np.float64(0.5)
    yield "texts", "a", b"a"
    yield "lengths", collections.deque([1], 2), collections.deque([1], 3)
    yield "lists and tuples", [1], (1,)
    yield "ranges", range(0, 3), range(0, 3, 2)
    yield "tensors", torch.zeros(2), torch.zeros(2)
    yield "namespaces", argparse.Namespace(a=1), argparse.Namespace(a=2)


@pytest.mark.parametrize("name, first, second", [*changes()])
def test_states_that_differ_share_no_key(name, first, second):
    decoder = Decoder(kind=first)
    before = fingerprint(decoder).key
    decoder.kind = second
    assert fingerprint(decoder).key != before
    decoder.kind = first
    assert fingerprint(decoder).key == before


def test_changes_inside_a_value_are_seen():
    inside = Options(parts=[{"n": Linked()}])
    decoder = Decoder(kind=inside)
    before = fingerprint(decoder).key
    inside.parts[0]["n"].scale = 3.0
    assert fingerprint(decoder).key != before


@pytest.mark.usefixtures("young_heap")
def test_an_object_of_unknown_kind_is_not_taken_for_a_later_one():
    decoder = Decoder()
    seen = []
    for _ in range(20):
        decoder.kind = iter([1])
        key = fingerprint(decoder).key
        assert key not in seen
        seen.append(key)
        gc.collect()


def test_a_lazy_module_is_refused():
    decoder = nn.Sequential(nn.LazyLinear(4), nn.Tanh())
    with pytest.raises(RuntimeError, match=r"of decoder\[0\] have no shape yet.*call the decoder"):
        decode_with_jacobian(decoder, latents())
