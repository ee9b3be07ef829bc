"""Recurrent layers and their cells, step by step, on the rules of their parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from fastsfvae.jacobian.rules import activation as activation
from fastsfvae.jacobian.rules.arithmetic import add, mul, sub
from fastsfvae.jacobian.rules.constant import as_jets
from fastsfvae.jacobian.rules.jet import Jet, is_list
from fastsfvae.jacobian.rules.linear import linear
from fastsfvae.jacobian.rules.pieces import cat, chunk, select, stack
from fastsfvae.jacobian.rules.registry import RULES, always, bind, rule

_sigmoid, _tanh, _relu = (bind(RULES[name]) for name in ("sigmoid", "tanh", "relu"))
# One step: from what the input gives, the states and the recurrent parameters to the new states.
_Step = Callable[..., tuple[Jet, ...]]


def _gru_step(given: Jet, h: Jet, weight: Any, bias: Any) -> tuple[Jet]:
    reset_x, update_x, new_x = chunk(given, 3, -1)
    reset_h, update_h, new_h = chunk(linear(h, weight, bias), 3, -1)
    reset, update = _sigmoid(add(reset_x, reset_h)), _sigmoid(add(update_x, update_h))
    new = _tanh(add(new_x, mul(reset, new_h)))
    return (add(new, mul(update, sub(h, new))),)


def _lstm_step(
    given: Jet, h: Jet, c: Jet, weight: Any, bias: Any, projection: Any = None
) -> tuple[Jet, Jet]:
    gates = add(given, linear(h, weight, bias))
    entered, kept, cell, shown = chunk(gates, 4, -1)
    c = add(mul(_sigmoid(kept), c), mul(_sigmoid(entered), _tanh(cell)))
    h = mul(_sigmoid(shown), _tanh(c))
    return (h if projection is None else linear(h, projection)), c


def _elman_step(activation: Callable[[Jet], Jet]) -> _Step:
    def step(given: Jet, h: Jet, weight: Any, bias: Any) -> tuple[Jet]:
        return (activation(add(given, linear(h, weight, bias))),)

    return step


def _layer(name: str, step: _Step, states: int) -> None:
    """Several layers, both directions, without dropout; returns (output, final states...)."""

    @rule(name, several=True, composed=True, covers=always)
    def layer(
        x: Any,
        initial: Any,
        parameters: list[Any],
        has_biases: Any,
        num_layers: Any,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool = False,
    ) -> tuple[Jet, ...]:
        if is_list(has_biases):
            raise RuntimeError(
                f"{name} of a packed sequence has no tangent rule: give it the padded one"
            )
        given = list(initial) if is_list(initial) else [initial]
        x, *given = as_jets(x, *given)
        sets = _sets(parameters, num_layers * (2 if bidirectional else 1))
        axis = 1 if batch_first else 0
        finals: list[tuple[Jet, ...]] = []
        for _ in range(num_layers):
            directions = []
            for reverse in (False, True) if bidirectional else (False,):
                state = tuple(select(s, 0, len(finals)) for s in given)
                outputs, state = _run(step, x, state, next(sets), has_biases, axis, reverse)
                directions.append(outputs)
                finals.append(state)
            x = cat(directions, -1) if bidirectional else directions[0]
        return x, *(stack([final[k] for final in finals], 0) for k in range(states))


def _sets(parameters: list[Any], count: int) -> Iterator[list[Any]]:
    size = len(parameters) // count
    return iter([parameters[k * size : (k + 1) * size] for k in range(count)])


def _run(
    step: _Step,
    x: Jet,
    state: tuple[Jet, ...],
    parameters: list[Any],
    has_biases: bool,
    axis: int,
    reverse: bool,
) -> tuple[Jet, tuple[Jet, ...]]:
    """One direction of a layer over all steps."""
    of_input, of_state, *rest = parameters
    bias, other = (rest.pop(0), rest.pop(0)) if has_biases else (None, None)
    # All steps' inputs at once.
    x = linear(x, of_input, bias)
    count = x.primal.shape[axis]
    order = range(count)[::-1] if reverse else range(count)
    outputs: list[Any] = [None] * count
    for k in order:
        state = step(select(x, axis, k), *state, of_state, other, *rest)
        outputs[k] = state[0]
    return stack(outputs, axis), state


def _cell(name: str, step: _Step) -> None:
    """One step of its own; returns the state, or a tuple where there are two."""

    @rule(name, several=True, composed=True, covers=always)
    def cell(
        x: Any, initial: Any, of_input: Any, of_state: Any, bias: Any = None, other: Any = None
    ) -> Any:
        x, *given = as_jets(x, *(initial if is_list(initial) else [initial]))
        state = step(linear(x, of_input, bias), *given, of_state, other)
        return state if is_list(initial) else state[0]


for _name, _step, _states in (
    ("gru", _gru_step, 1),
    ("lstm", _lstm_step, 2),
    ("rnn_tanh", _elman_step(_tanh), 1),
    ("rnn_relu", _elman_step(_relu), 1),
):
    _layer(_name, _step, _states)
    _cell(f"{_name}_cell", _step)
