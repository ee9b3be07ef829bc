"""Recurrent layers and cells, swept by hand-written gradients, against reverse mode."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastsfvae.jacobian.api import decode_with_jacobian
from tests.jacobian.exactness import assert_right
from tests.jacobian.rule_cases import ROW, WORDS, B, M, decoder

Z = torch.randn(B, M, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def sequence(layer, function=lambda h, layer: layer(h)[0]):
    return lambda: decoder(WORDS, function, layer)


def rows(function, *layers):
    return lambda: decoder(ROW, function, *layers)


def time_first(h, layer):
    return layer(h.transpose(0, 1))[0].transpose(0, 1)


def last_states(h, layer):
    states = layer(h)[1]
    return torch.cat(states if isinstance(states, tuple) else (states,)).transpose(0, 1)


def from_states(h, layer):
    """Latents as initial states, nothing as input."""
    start = h[:, :2, :5].transpose(0, 1).contiguous()
    given = (start[:1], start[1:].sin()) if isinstance(layer, nn.LSTM) else start[:1]
    return layer(torch.zeros(h.shape[0], 3, 8, dtype=h.dtype), given)[0]


def from_trained_state(h, layer, state):
    start = state.weight.view(1, 1, 5).expand(-1, h.shape[0], -1).contiguous()
    return layer(h, start)[0]


def trained_inputs(h, layer, word):
    start = h[:, :1, :5].transpose(0, 1).contiguous()
    return layer(word.weight.view(1, 1, 8).expand(h.shape[0], 3, -1), start)[0]


def fed_back(h, cell, out):
    """Each step's output is the next one's input, as a decoder of sequences has it."""
    state, x, steps = (h[:, :5], h[:, 5:10]), h[:, :3], []
    for _ in range(4):
        state = cell(x, state)
        x = out(state[0])
        steps.append(x)
    return torch.stack(steps, 1)


CASES = {
    "gru": sequence(nn.GRU(8, 5, batch_first=True)),
    "gru_deep": sequence(nn.GRU(8, 5, 2, batch_first=True, bidirectional=True)),
    "gru_time_first": sequence(nn.GRU(8, 5, bias=False), time_first),
    "gru_last": sequence(nn.GRU(8, 5, 2, batch_first=True), last_states),
    "gru_state": sequence(nn.GRU(8, 5, batch_first=True), from_states),
    "gru_trained_state": lambda: decoder(
        WORDS, from_trained_state, nn.GRU(8, 5, batch_first=True), nn.Linear(5, 1, bias=False)
    ),
    "gru_trained_inputs": lambda: decoder(
        WORDS, trained_inputs, nn.GRU(8, 5, batch_first=True), nn.Linear(8, 1, bias=False)
    ),
    "gru_dropout_off": sequence(nn.GRU(8, 5, 2, dropout=0.5, batch_first=True)),
    "lstm": sequence(nn.LSTM(8, 5, batch_first=True)),
    "lstm_deep": sequence(nn.LSTM(8, 5, 2, bidirectional=True, batch_first=True)),
    "lstm_projected": sequence(nn.LSTM(8, 5, 2, proj_size=3, batch_first=True)),
    "lstm_time_first": sequence(nn.LSTM(8, 5, bias=False, bidirectional=True), time_first),
    "lstm_last": sequence(nn.LSTM(8, 5, 2, batch_first=True), last_states),
    "lstm_state": sequence(nn.LSTM(8, 5, batch_first=True), from_states),
    "rnn": sequence(nn.RNN(8, 5, 2, batch_first=True)),
    "rnn_relu": sequence(nn.RNN(8, 5, nonlinearity="relu", bidirectional=True, batch_first=True)),
    "gru_cell": rows(lambda h, cell: cell(h, cell(h)), nn.GRUCell(12, 5)),
    "lstm_cell": rows(lambda h, cell: torch.cat(cell(h, cell(h)), 1), nn.LSTMCell(12, 5)),
    "rnn_cell": rows(lambda h, cell: cell(h, cell(h)), nn.RNNCell(12, 5)),
    "rnn_relu_cell": rows(
        lambda h, cell: cell(h, cell(h, h[:, :5])),
        nn.RNNCell(12, 5, bias=False, nonlinearity="relu"),
    ),
    "fed_back": rows(fed_back, nn.LSTMCell(3, 5), nn.Linear(5, 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_right_and_swept(name):
    assert_right(CASES[name](), Z)


def test_in_training_without_dropout():
    assert_right(CASES["gru_deep"]().train(), Z)


def test_dropout_between_layers_is_refused():
    module = CASES["gru_dropout_off"]().train()
    message = r"^decoder\.layers\[0\] drops out values .*: call decoder\.layers\[0\]\.eval\(\)$"
    with pytest.raises(RuntimeError, match=message):
        decode_with_jacobian(module, Z)


def test_packed_sequences_are_refused():
    def packed(h, layer):
        lengths = torch.full((h.shape[0],), 5)
        given = nn.utils.rnn.pack_padded_sequence(h, lengths, batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(layer(given)[0], batch_first=True)[0]

    with pytest.raises(RuntimeError, match="cannot be traced|packed") as caught:
        decode_with_jacobian(decoder(WORDS, packed, nn.GRU(8, 5, batch_first=True)), Z)
    assert "\n" not in str(caught.value)
