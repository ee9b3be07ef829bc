"""The metric as one of geomstats, in processes of its own: geomstats makes float64 the default."""

import importlib.util
import os
import subprocess
import sys

import pytest
from torch import nn

import fastsfvae as sf

needs_geomstats = pytest.mark.skipif(
    importlib.util.find_spec("geomstats") is None, reason="geomstats is not installed"
)

HEAD = """
import geomstats.backend as gs
import torch
from torch import nn

import fastsfvae as sf

torch.manual_seed(0)
"""

CHRISTOFFELS = """
decoder = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 10)).requires_grad_(False)
metric = sf.metric(decoder).to_geomstats(3).metric
z = torch.randn(4, 3)

def gram(z):
    J = torch.stack([torch.autograd.functional.jacobian(decoder, s) for s in z])
    return J.mT @ J

def derivative(step):
    moved = [(gram(z + step * e) - gram(z - step * e)) / (2 * step) for e in torch.eye(3)]
    return torch.stack(moved, -1)

# The error of a difference goes with the step's square, which two of them cancel.
dG = (4 * derivative(5e-4) - derivative(1e-3)) / 3
# Of the first kind: first[b, i, j, l] = (d_i G_jl + d_j G_il - d_l G_ij) / 2
first = 0.5 * (dG.permute(0, 3, 1, 2) + dG.permute(0, 1, 3, 2) - dG)
want = torch.einsum("bkl,bijl->bkij", torch.linalg.inv(gram(z)), first)
found = metric.christoffels(z)
assert (found - want).abs().max() <= 1e-8 * want.abs().max(), (found - want).abs().max()
assert torch.allclose(metric.christoffels(z[1]), found[1], rtol=1e-12, atol=1e-12)
assert torch.allclose(metric.metric_matrix(z[1]), gram(z)[1], rtol=1e-12, atol=1e-12)
"""

SPHERE = """
class Sphere(nn.Module):
    def forward(self, z):
        theta, phi = z.unbind(1)
        sine = theta.sin()
        return torch.stack([sine * phi.cos(), sine * phi.sin(), theta.cos()], 1)

sphere = Sphere()
metric = sf.metric(sphere).to_geomstats(2).metric
a, b = torch.tensor([[0.9, 0.2], [1.7, 1.1]])
angle = (sphere(a[None]) * sphere(b[None])).sum().arccos()
# geomstats' solvers keep three digits.
assert abs(metric.dist(a, b) - angle) <= 2e-3 * angle
velocity = metric.log(b, a)
assert (metric.exp(velocity, a) - b).abs().max() <= 2e-3
middle = sphere(metric.geodesic(a, b)(torch.tensor([0.5])))[0]
right = nn.functional.normalize(sphere(a[None]) + sphere(b[None]))[0]
assert (middle - right).abs().max() <= 2e-3
"""

DIFFERENTIATED = """
metric = sf.metric(nn.Sequential(nn.Linear(2, 5), nn.Tanh())).to_geomstats(2).metric
z = torch.randn(3, 2, requires_grad=True)
assert torch.autograd.grad(metric.squared_norm(torch.ones(3, 2), z).sum(), z)[0].abs().max() > 0
try:
    metric.christoffels(z)
except RuntimeError as error:
    assert "dG has no derivative" in str(error) and "\\n" not in str(error)
else:
    raise AssertionError("a derivative of dG that nobody computes")
"""

OTHER_BACKEND = """
try:
    sf.metric(nn.Linear(2, 5)).to_geomstats(2)
except RuntimeError as error:
    assert "set GEOMSTATS_BACKEND=pytorch" in str(error) and "\\n" not in str(error)
else:
    raise AssertionError("another backend was taken")
"""


def run(code, backend="pytorch"):
    environment = os.environ | {"GEOMSTATS_BACKEND": backend}
    done = subprocess.run(
        [sys.executable, "-c", HEAD + code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@needs_geomstats
def test_christoffel_symbols_against_finite_differences():
    run(CHRISTOFFELS)


@needs_geomstats
def test_geodesics_of_the_sphere_are_great_circles():
    run(SPHERE)


@needs_geomstats
def test_what_is_differentiated_further_and_what_is_not():
    run(DIFFERENTIATED)


@needs_geomstats
def test_another_backend_is_refused():
    run(OTHER_BACKEND, "numpy")


def test_without_geomstats(monkeypatch):
    monkeypatch.setitem(sys.modules, "geomstats", None)
    monkeypatch.setitem(sys.modules, "geomstats.backend", None)
    with pytest.raises(ImportError, match=r"pip install 'fastsfvae\[geometry\]'"):
        sf.metric(nn.Linear(2, 3)).to_geomstats(2)
