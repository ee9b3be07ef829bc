"""Neural operators, implicit functions, differential equations, Gaussian processes."""

from __future__ import annotations

import torch
from torch import nn

from bench.zoo.entry import Direct, Lifted, M, entry


def fno(side: tuple[int, ...], modes: tuple[int, ...], **options) -> nn.Module:
    from neuralop.models import FNO

    net = FNO(modes, in_channels=1, out_channels=1, hidden_channels=4, n_layers=1, **options)
    return Lifted(net, 1, *side)


@entry("neuraloperator")
def fourier_operator() -> nn.Module:
    return fno((8, 8), (4, 4))


@entry("neuraloperator")
def fourier_operator_1d() -> nn.Module:
    return fno((12,), (4,))


@entry("neuraloperator")
def tucker_operator() -> nn.Module:
    from neuralop.models import TFNO

    net = TFNO((4, 4), in_channels=1, out_channels=1, hidden_channels=4, n_layers=1, rank=0.5)
    return Lifted(net, 1, 6, 6)


@entry("neuraloperator")
def u_shaped_operator() -> nn.Module:
    from neuralop.models import UNO

    net = UNO(
        in_channels=1,
        out_channels=1,
        hidden_channels=4,
        n_layers=3,
        uno_out_channels=[4, 4, 4],
        uno_n_modes=[[4, 4], [4, 4], [4, 4]],
        channel_mlp_skip="linear",
        uno_scalings=[[1.0, 1.0], [0.5, 0.5], [2.0, 2.0]],
    )
    return Lifted(net, 1, 8, 8)


@entry("siren-pytorch")
def modulated_sirens() -> nn.Module:
    """Sines over a grid of coordinates, modulated by the latents of one sample at a time."""
    from siren_pytorch import SirenNet, SirenWrapper

    net = SirenWrapper(SirenNet(2, 6, 3, num_layers=2), 3, 3, latent_dim=M)
    return Direct(net, lambda net, z: torch.cat([net(latent=one) for one in z.unbind(0)]))


@entry("siren-pytorch")
def siren_of_latents() -> nn.Module:
    from siren_pytorch import SirenNet

    return Direct(SirenNet(M, 6, 5, num_layers=2), lambda net, z: net(z))


class Field(nn.Module):
    """The right-hand side of an equation."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(M, 6), nn.Tanh(), nn.Linear(6, M))

    def forward(self, t, z):
        """The rate of change of z at time t."""
        return self.net(z) * (1 + t)


def solved(**options) -> nn.Module:
    from torchdiffeq import odeint

    times = torch.linspace(0, 1, 3, dtype=torch.float64)
    return Direct(Field(), lambda net, z: odeint(net, z, times, **options).transpose(0, 1))


@entry("torchdiffeq")
def euler() -> nn.Module:
    return solved(method="euler", options={"step_size": 0.25})


@entry("torchdiffeq")
def runge_kutta() -> nn.Module:
    return solved(method="rk4")


@entry("torchdiffeq")
def adaptive_steps() -> nn.Module:
    """Steps are chosen by the numbers."""
    return solved(method="dopri5")


@entry("gpytorch")
def kernel_mean() -> nn.Module:
    """The mean of a Gaussian process with learned inducing points, by a constant kernel matrix."""
    import gpytorch

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())
            self.points = nn.Parameter(torch.randn(5, M))
            self.targets = nn.Parameter(torch.randn(5, 3))

        def forward(self, z):
            K = self.kernel(self.points).to_dense() + 0.1 * torch.eye(5, dtype=z.dtype)
            cross = self.kernel(z.unsqueeze(1), self.points).to_dense().squeeze(1)
            return cross @ torch.linalg.solve(K, self.targets)

    return Direct(Mean(), lambda net, z: net(z))


@entry("gpytorch")
def matern_features() -> nn.Module:
    import gpytorch

    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = gpytorch.kernels.MaternKernel(nu=2.5, ard_num_dims=M)
            self.points, self.out = nn.Parameter(torch.randn(5, M)), nn.Linear(5, 4)

        def forward(self, z):
            cross = self.kernel(z.unsqueeze(1), self.points).to_dense().squeeze(1)
            return self.out(cross)

    return Direct(Features(), lambda net, z: net(z))
