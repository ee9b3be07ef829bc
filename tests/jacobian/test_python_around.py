"""What Python does around a decoder's operations: wrappers, numbers, rules, random state."""

from __future__ import annotations

import functools
import random
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from fastsfvae.jacobian.api import decode_with_jacobian
from fastsfvae.jacobian.plan.fingerprint import fingerprint
from fastsfvae.jacobian.rules.jet import Jet
from fastsfvae.jacobian.rules.registry import RULES, adjoint, rule
from fastsfvae.jacobian.rules.rule import Rule
from tests.jacobian.around import Decoder, M, check, latents

pytestmark = pytest.mark.usefixtures("double_precision")


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
    # The plan for two samples is right for one as well.
    assert traces == [2]


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
