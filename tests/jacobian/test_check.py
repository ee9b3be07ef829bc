"""check_decoder tells right decoders from wrong ones, and what they cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsfvae.jacobian.check import check_decoder
from fastsfvae.jacobian.rules.registry import RULES
from fastsfvae.jacobian.rules.rule import Rule


def conv_decoder():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 32),
        nn.ReLU(),
        nn.Unflatten(1, (8, 2, 2)),
        nn.ConvTranspose2d(8, 4, 4, 2, 1),
        nn.GroupNorm(2, 4),
        nn.Conv2d(4, 2, 3, padding=1, bias=False),
    )


def test_right_decoder():
    report = check_decoder(conv_decoder(), torch.randn(5, 3))
    assert report.ok
    assert max(report.output_error, report.jacobian_error, report.gradient_error) < 1e-12
    assert (report.latent_dim, report.output_shape) == (3, (2, 4, 4))
    assert report.jacobian_bytes == 3 * 2 * 4 * 4 * 4
    flops = {layer.op: layer.flops for layer in report.layers if layer.flops}
    # Two per multiply-add, three tangents; one per element of the others.
    assert flops == {
        "linear": 3 * 2 * 3 * 32,
        "relu": 3 * 32,
        "conv_transpose2d": 3 * 2 * (8 * 2 * 2) * 4 * 16,
        "group_norm": 3 * 64,
        "conv2d": 3 * 2 * (2 * 4 * 4) * 4 * 9,
    }
    assert report.flops == sum(flops.values())
    lines = str(report).splitlines()
    assert lines[-1] == "verdict: right"
    assert [line.split()[:4] for line in lines[1:6]] == [
        ["0", "linear", "32", "rule"],
        ["1", "relu", "32", "rule"],
        ["3", "conv_transpose2d", "4x4x4", "rule"],
        ["4", "group_norm", "4x4x4", "rule"],
        ["5", "conv2d", "2x4x4", "rule"],
    ]


class MixesSamples(nn.Linear):
    def forward(self, z):
        h = super().forward(z)
        return h * len(h)


def test_decoder_that_mixes_samples():
    report = check_decoder(MixesSamples(3, 4), torch.randn(5, 3))
    assert not report.ok and report.output_error > 1e-3
    assert "samples depend on each other" in str(report)


def test_wrong_rule(monkeypatch):
    right = RULES["relu"].forward

    def wrong(x):
        return right(x)._replace(tangent=2 * right(x).tangent)

    monkeypatch.setitem(RULES, "relu", Rule("relu", wrong))
    report = check_decoder(conv_decoder(), torch.randn(2, 3))
    assert report.output_error < 1e-12 and report.jacobian_error > 0.1
    assert not report.ok and str(report).endswith("verdict: WRONG: please report this decoder")


class WithFallback(nn.Linear):
    def forward(self, z, shift):
        h = super().forward(z)
        return F.huber_loss(h, shift, reduction="none") + shift


def test_fallback_and_extra_inputs():
    report = check_decoder(WithFallback(3, 4), torch.randn(2, 3), torch.randn(2, 4))
    assert report.ok and [layer.handled for layer in report.layers] == ["rule", "fallback", "rule"]
    assert "no rule for huber_loss" in str(report)


def test_plain_function_keeps_its_dtype():
    module = conv_decoder()
    report = check_decoder(lambda z: module(z).sin(), torch.randn(2, 3))
    assert report.ok and report.tolerance == pytest.approx(1e-2)
    assert 0 < report.jacobian_error < 1e-5
