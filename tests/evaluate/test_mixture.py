"""The ex-post density of latents, against Gaussians that are known."""

import math
import sys

import pytest
import torch

from fastsfvae.evaluate import fit_mixture


def _two_clusters(count=4_000):
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    factor = torch.tensor([[0.5, 0.0], [0.4, 0.1]], dtype=torch.float64)
    near = first[: count // 4] @ factor.T + torch.tensor([6.0, 0.0])
    return torch.cat([near, first[count // 4 :] - torch.tensor([2.0, 1.0])]), factor


def test_the_components_of_two_clusters_are_found():
    latents, factor = _two_clusters()
    found = fit_mixture(latents.float(), components=2, seed=3)
    order = found.weight.argsort()
    # Standard errors of 1,000 and 3,000 draws.
    torch.testing.assert_close(
        found.weight[order], torch.tensor([0.25, 0.75]).double(), atol=2e-3, rtol=0
    )
    expected = torch.tensor([[6.0, 0.0], [-2.0, -1.0]], dtype=torch.float64)
    assert (found.loc[order] - expected).abs().max() < 4 / math.sqrt(1_000)
    covariance = found.factor @ found.factor.mT
    assert (covariance[order[0]] - factor @ factor.T).abs().max() < 4 * 0.36 / math.sqrt(1_000)
    assert torch.equal(found.factor, found.factor.tril())


def test_samples_are_those_of_the_mixture_and_the_generators():
    latents, _ = _two_clusters()
    found = fit_mixture(latents, components=2)
    drawn = found.sample(20_000, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, found.sample(20_000, torch.Generator().manual_seed(1)))
    # EM keeps the sample's mean and covariance, but for what is added to each covariance.
    error = (drawn.mean(0) - latents.mean(0)).abs() / (latents.std(0) / math.sqrt(20_000))
    assert error.max() < 4
    assert (torch.cov(drawn.T) - torch.cov(latents.T)).abs().max() < 0.3


def test_what_has_no_density_is_refused(monkeypatch):
    latents = torch.randn(5, 2)
    for broken, components, message in (
        (latents, 6, r"latents \(5, 2\) for 6 components"),
        (latents[:1], 1, "N >= 2"),
        (latents[0], 1, r"give \[N, m\]"),
        (latents / 0.0, 2, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_mixture(broken, components)
    with pytest.raises(TypeError, match="latents has dtype"):
        fit_mixture(torch.ones(4, 2, dtype=torch.long))
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(RuntimeError, match=r"scikit-learn is missing.*fastsfvae\[train\]"):
        fit_mixture(latents, 2)
