"""Decoders of sequences: recurrences, convolutions in time, state spaces, vocoders."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.jacobian.zoo.pattern import M, Parts, lifted, pattern, weights


@pattern()
def gru():
    def run(own, z):
        h = z.unsqueeze(1).repeat(1, 4, 1)
        return own.out(own.gru(h)[0])

    return Parts(run, gru=nn.GRU(M, 5, num_layers=2, batch_first=True), out=nn.Linear(5, 2))


@pattern()
def bidirectional_gru():
    run = lambda own, z: own.gru(z[None].repeat(3, 1, 1))[0].transpose(0, 1)  # noqa: E731
    return Parts(run, gru=nn.GRU(M, 3, bidirectional=True))


@pattern()
def lstm_vae():
    """The latents start the state; the input is a learned token at every step."""

    def run(own, z):
        state = own.state(z).view(-1, 2, 2, 5).permute(1, 2, 0, 3).contiguous()
        tokens = own.token.expand(z.shape[0], 4, -1)
        return own.out(own.lstm(tokens, (state[0], state[1]))[0])

    parts = dict(state=nn.Linear(M, 20), token=weights(1, 1, 3), out=nn.Linear(5, 2))
    return Parts(run, **parts, lstm=nn.LSTM(3, 5, num_layers=2, batch_first=True, dropout=0.1))


@pattern()
def rnn():
    def run(own, z):
        start = torch.zeros(1, z.shape[0], 5, dtype=z.dtype)
        return own.rnn(z.unsqueeze(1).expand(-1, 3, -1), start)[0]

    return Parts(run, rnn=nn.RNN(M, 5, batch_first=True, nonlinearity="relu"))


@pattern()
def autoregressive_gru():
    """Each output is the next step's input."""

    def run(own, z):
        h, x, outputs = torch.tanh(own.state(z)), own.start.expand(z.shape[0], -1), []
        for _ in range(4):
            h = own.cell(x, h)
            x = own.out(h)
            outputs.append(x)
        return torch.stack(outputs, 1)

    parts = dict(state=nn.Linear(M, 5), start=weights(1, 2), cell=nn.GRUCell(2, 5))
    return Parts(run, **parts, out=nn.Linear(5, 2))


@pattern()
def autoregressive_lstm():
    """Soft tokens: the next input is the expected embedding."""

    def run(own, z):
        h, c = own.state(z).chunk(2, 1)
        x = own.embed.weight[0].unsqueeze(0).repeat(z.shape[0], 1)
        outputs = z.new_zeros(z.shape[0], 3, 6)
        for t in range(3):
            h, c = own.cell(x, (h, c))
            p = F.softmax(own.out(h), -1)
            outputs[:, t] = p
            x = p @ own.embed.weight
        return outputs

    parts = dict(state=nn.Linear(M, 10), embed=nn.Embedding(6, 3), cell=nn.LSTMCell(3, 5))
    return Parts(run, **parts, out=nn.Linear(5, 6))


@pattern()
def rnn_cell():
    def run(own, z):
        h = z.new_zeros(z.shape[0], 5)
        for _ in range(3):
            h = own.cell(z, h)
        return h

    return Parts(run, cell=nn.RNNCell(M, 5))


@pattern()
def greedy_tokens():
    """The next input is the embedding of the most likely token."""

    def run(own, z):
        h, outputs = own.state(z), []
        token = torch.zeros(z.shape[0], dtype=torch.long)
        for _ in range(3):
            h = own.cell(own.embed(token), h)
            outputs.append(own.out(h))
            token = outputs[-1].argmax(-1)
        return torch.stack(outputs, 1)

    parts = dict(state=nn.Linear(M, 5), embed=nn.Embedding(6, 3), cell=nn.GRUCell(3, 5))
    return Parts(run, **parts, out=nn.Linear(5, 6))


@pattern()
def conv_lstm():
    def run(own, z):
        x = own.lift(z).view(-1, 2, 3, 3)
        h, c = torch.zeros_like(x), torch.zeros_like(x)
        for _ in range(2):
            i, f, o, g = own.gates(torch.cat([x, h], 1)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return h

    return Parts(run, lift=nn.Linear(M, 18), gates=nn.Conv2d(4, 8, 3, padding=1))


@pattern()
def wavenet():
    """Dilated causal convolutions, gates, skip connections that are added up."""

    def run(own, h):
        skips = 0
        for i, (gate, residual) in enumerate(zip(own.gates, own.residuals, strict=True)):
            a, b = gate(F.pad(h, (2**i, 0))).chunk(2, 1)
            g = torch.tanh(a) * torch.sigmoid(b)
            h = h + residual(g)
            skips = skips + g
        return own.out(F.relu(skips))

    gates = nn.ModuleList([nn.Conv1d(3, 6, 2, dilation=2**i) for i in range(3)])
    residuals = nn.ModuleList([nn.Conv1d(3, 3, 1) for _ in range(3)])
    return lifted(run, 3, 8, gates=gates, residuals=residuals, out=nn.Conv1d(3, 2, 1))


@pattern()
def tcn():
    """Weight normalisation, padding on both sides that is cut off (chomp)."""
    norm = nn.utils.parametrizations.weight_norm

    def run(own, h):
        for i, layer in enumerate(own.layers):
            cut = layer(h)[:, :, : -(2 * 2**i)].contiguous()
            h = F.relu(h + own.dropout(F.relu(cut)))
        return h

    layers = [norm(nn.Conv1d(3, 3, 3, padding=2 * 2**i, dilation=2**i)) for i in range(2)]
    return lifted(run, 3, 8, layers=nn.ModuleList(layers), dropout=nn.Dropout1d(0.2))


@pattern()
def conformer():
    """GLU, depthwise convolution with batch statistics of training, half steps."""

    def run(own, h):
        h = h + 0.5 * own.feed(h)
        a = F.glu(own.wide(own.norm(h).transpose(1, 2)), dim=1)
        a = own.narrow(F.silu(own.batch(own.depthwise(a))))
        return h + a.transpose(1, 2)

    batch = nn.BatchNorm1d(4)
    batch.running_mean.normal_()
    feed = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))
    parts = dict(feed=feed, norm=nn.LayerNorm(4), wide=nn.Conv1d(4, 8, 1), batch=batch)
    depthwise = nn.Conv1d(4, 4, 3, padding="same", groups=4)
    return lifted(run, 5, 4, **parts, depthwise=depthwise, narrow=nn.Conv1d(4, 4, 1))


@pattern()
def fourier_mixing():
    """FNet: the real part of a transform of tokens and channels."""

    def run(own, h):
        h = own.norm(h + torch.fft.fft(torch.fft.fft(h, dim=-1), dim=-2).real)
        return h + own.ff(h)

    return lifted(run, 3, 4, norm=nn.LayerNorm(4), ff=nn.Linear(4, 4))


@pattern()
def long_convolution():
    """A convolution as long as the signal, by its transform (Hyena)."""

    def run(own, h):
        length = h.shape[-1]
        kernel = torch.fft.rfft(own.kernel * own.window, n=2 * length)
        u = torch.fft.rfft(h, n=2 * length)
        return torch.fft.irfft(u * kernel, n=2 * length)[..., :length] + h * own.skip

    window = torch.exp(-torch.arange(6.0))
    return lifted(run, 3, 6, kernel=weights(3, 6), window=window, skip=weights(3, 1))


@pattern()
def diagonal_state_space():
    """S4D: a kernel from complex parameters, made in forward."""

    def run(own, h):
        length = h.shape[-1]
        c = torch.view_as_complex(own.c)
        step = torch.exp(own.log_step)
        a = -torch.exp(own.log_a_real) + 1j * own.a_imag
        scaled = a * step.unsqueeze(-1)
        powers = scaled.unsqueeze(-1) * torch.arange(length)
        c = c * (torch.exp(scaled) - 1.0) / a
        kernel = 2 * torch.einsum("hn,hnl->hl", c, torch.exp(powers)).real
        k, u = torch.fft.rfft(kernel, n=2 * length), torch.fft.rfft(h, n=2 * length)
        return F.gelu(torch.fft.irfft(u * k, n=2 * length)[..., :length])

    parts = dict(c=weights(3, 2, 2), log_step=weights(3), log_a_real=weights(3, 2))
    return lifted(run, 3, 6, **parts, a_imag=nn.Parameter(math.pi * torch.rand(3, 2)))


@pattern()
def selective_scan():
    """Mamba: steps, inputs and outputs of the state all depend on the token."""

    def run(own, h):
        x, gate = own.inner(h).chunk(2, -1)
        x = F.silu(own.conv(x.transpose(1, 2))[..., : h.shape[1]].transpose(1, 2))
        delta, b, c = own.select(x).split([1, 3, 3], -1)
        delta, a = F.softplus(own.step(delta)), -torch.exp(own.log_a)
        decay = torch.exp(delta.unsqueeze(-1) * a)
        drive = delta.unsqueeze(-1) * b.unsqueeze(2) * x.unsqueeze(-1)
        state, outputs = torch.zeros_like(decay[:, 0]), []
        for t in range(h.shape[1]):
            state = decay[:, t] * state + drive[:, t]
            outputs.append((state * c[:, t].unsqueeze(1)).sum(-1))
        return own.out((torch.stack(outputs, 1) + x * own.d) * F.silu(gate))

    parts = dict(inner=nn.Linear(4, 8), conv=nn.Conv1d(4, 4, 2, padding=1, groups=4))
    parts |= dict(select=nn.Linear(4, 7), step=nn.Linear(1, 4), d=weights(4), log_a=weights(4, 3))
    return lifted(run, 3, 4, **parts, out=nn.Linear(4, 4))


@pattern()
def time_mixing():
    """RWKV: a shift of tokens and exponentially weighted sums."""

    def run(own, h):
        before = F.pad(h, (0, 0, 1, -1))
        mixed = h * own.mix + before * (1 - own.mix)
        k, v, r = own.kvr(mixed).chunk(3, -1)
        top, bottom, outputs = 0, 0, []
        for t in range(h.shape[1]):
            now = torch.exp(k[:, t])
            outputs.append((top + now * v[:, t]) / (bottom + now))
            top = torch.exp(-own.decay) * top + now * v[:, t]
            bottom = torch.exp(-own.decay) * bottom + now
        return torch.sigmoid(r) * torch.stack(outputs, 1)

    return lifted(run, 3, 4, mix=weights(4), decay=weights(4), kvr=nn.Linear(4, 12))


@pattern()
def vocoder():
    """HiFi-GAN with Snake units."""
    norm = nn.utils.parametrizations.weight_norm

    def run(own, h):
        h = own.up(h)
        h = h + (1 / (own.alpha + 1e-9)) * torch.sin(own.alpha * h).pow(2)
        h = sum(layer(F.leaky_relu(h, 0.1)) for layer in own.layers) / len(own.layers)
        return torch.tanh(own.out(h))

    layers = [norm(nn.Conv1d(4, 4, k, padding=k // 2)) for k in (3, 5)]
    parts = dict(
        up=norm(nn.ConvTranspose1d(3, 4, 4, 2, 1)), alpha=nn.Parameter(torch.ones(1, 4, 1))
    )
    out = nn.Conv1d(4, 1, 7, padding=3, padding_mode="reflect")
    return lifted(run, 3, 4, **parts, layers=nn.ModuleList(layers), out=out)


@pattern()
def inverse_stft():
    """Magnitude and phase, made a signal (Vocos)."""

    def run(own, h):
        magnitude, phase = own.head(h).chunk(2, dim=1)
        magnitude = torch.exp(magnitude).clip(max=1e2)
        spectrum = magnitude * (torch.cos(phase) + 1j * torch.sin(phase))
        return torch.istft(spectrum, 8, 4, 8, own.window, center=True)

    return lifted(run, 3, 5, head=nn.Conv1d(3, 10, 1), window=torch.hann_window(8))


@pattern()
def harmonic_synthesiser():
    """Sums of sines whose phase adds up in time (DDSP)."""

    def run(own, h):
        pitch, loud = torch.sigmoid(h[..., :1]), torch.softmax(h[..., 1:], -1)
        pitch = F.interpolate(pitch.transpose(1, 2), size=12, mode="linear").transpose(1, 2)
        loud = F.interpolate(loud.transpose(1, 2), size=12, mode="linear").transpose(1, 2)
        phase = torch.cumsum(2 * torch.pi * pitch * own.harmonics, dim=1)
        loud = torch.where(pitch * own.harmonics < 1.2, loud, torch.zeros_like(loud))
        return (torch.sin(phase) * loud).sum(-1)

    return lifted(run, 4, 4, harmonics=torch.arange(1.0, 4.0))


@pattern()
def echo_state():
    """A sparse fixed reservoir: buffers, only the read-out is trained."""

    def run(own, z):
        h, states = torch.zeros(z.shape[0], 6, dtype=z.dtype), []
        for _ in range(3):
            h = 0.7 * h + 0.3 * torch.tanh(F.linear(z, own.inputs) + h @ own.reservoir)
            states.append(h)
        return own.out(torch.cat(states, 1))

    reservoir = torch.randn(6, 6) * (torch.rand(6, 6) < 0.3)
    return Parts(run, inputs=torch.randn(6, M), reservoir=reservoir, out=nn.Linear(18, 5))
