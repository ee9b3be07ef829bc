"""Derivatives along given directions against torch.func: `python -m bench.uses.tangents`.

    jvp       k = 1, 4 and 16 directions through an MLP, a convolutional net and a transformer
              block, values alone and with all gradients; for k > 1 torch.func.jvp runs under vmap.
              "double backward" is the trick of two reverse passes, one more for each direction.
    sindy     J z' of one direction by the loop of public SINDy code: a Jacobian of each sample.
    pullback  G, p and rr with all gradients, beside the loss with the same.

Every candidate is compared with float64 (J by reverse mode) before it is timed, and all take turns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastsfvae as sf
from bench.command import make_parser
from bench.uses.table import Row, compare, publish

M, BATCH, DIRECTIONS = 16, 64, (1, 4, 16)
OURS, FUNC, DOUBLE = "sf.jvp", "torch.func.jvp", "double backward"
# Of float32 values and gradients against float64.
TOLERANCE = 1e-3
Products = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]


class Block(nn.Module):
    """Sixteen tokens of 64 through one block of a transformer."""

    def __init__(self, tokens: int = 16, width: int = 64, heads: int = 4):
        super().__init__()
        self.lift, self.tokens, self.heads = nn.Linear(M, tokens * width), tokens, heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mix, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.out = nn.Linear(width, 48)

    def forward(self, z: Tensor) -> Tensor:
        """Decode."""
        h = self.lift(z).unflatten(1, (self.tokens, -1))
        parts = self.mix(self.norms[0](h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Written out, as fused attention has no forward mode in torch.func.
        q, k, v = parts.unbind(0)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        h = h + self.project((weights @ v).transpose(1, 2).flatten(2))
        return self.out(h + self.feed(self.norms[1](h)))


def networks() -> dict[str, nn.Module]:
    """Three decoders, drawn at random."""
    torch.manual_seed(0)
    up = {"kernel_size": 4, "stride": 2, "padding": 1}
    return {
        "MLP 16-256-512-784": nn.Sequential(
            *(nn.Linear(M, 256), nn.ReLU(), nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 784))
        ),
        "conv to 3x32x32": nn.Sequential(
            *(nn.Linear(M, 1024), nn.ReLU(), nn.Unflatten(1, (64, 4, 4))),
            *(nn.ConvTranspose2d(64, 32, **up), nn.ReLU(), nn.ConvTranspose2d(32, 32, **up)),
            *(nn.ReLU(), nn.ConvTranspose2d(32, 3, **up)),
        ),
        "transformer block": Block(),
    }


def by_us(decoder: nn.Module, z: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    return sf.jvp(decoder, z, tangents)


def by_func(decoder: nn.Module, z: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    if len(tangents) == 1:
        output, derivative = torch.func.jvp(decoder, (z,), (tangents[0],))
        return output, derivative[None]

    def push(tangent: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(decoder, (z,), (tangent,))

    return torch.func.vmap(push, out_dims=(None, 0))(tangents)


def by_double_backward(decoder: nn.Module, z: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    z = z if z.requires_grad else z.detach().requires_grad_()
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        output = decoder(z)
        dummy = torch.zeros_like(output, requires_grad=True)
        (pulled,) = torch.autograd.grad(output, z, dummy, create_graph=True)
        options = {"create_graph": again, "retain_graph": True}
        found = [torch.autograd.grad(pulled, dummy, v, **options)[0] for v in tangents]
    return output, torch.stack(found)


def by_loop(decoder: nn.Module, z: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """A Jacobian of each sample."""
    found = []
    for row, tangent in zip(z, tangents[0], strict=True):
        J = torch.autograd.functional.jacobian(decoder, row[None], create_graph=True)
        found.append(J.flatten(1, -3).squeeze(0).squeeze(-2) @ tangent)
    return decoder(z), torch.stack(found)[None]


def exact(decoder: nn.Module, z: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    output, J = sf.decode_with_jacobian(decoder, z, backend="reference")
    return output, torch.einsum("kbm,bm...->kb...", tangents, J)


def gradients(product: Products, decoder: nn.Module, z: Tensor, tangents: Tensor) -> list[Tensor]:
    """Of |f|^2 + |J V|^2 by z, V and every parameter."""
    leaves = [z, tangents, *decoder.parameters()]
    total = sum(t.square().sum() for t in product(decoder, z, tangents))
    found = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return list(found)


def error_of(values: Callable, exact_values: Callable, decoder: nn.Module, *given: Tensor) -> float:
    """Of two samples' values or gradients, against float64."""
    small = [t.detach()[..., :2, :].requires_grad_() for t in given]
    wide = [t.detach().double().requires_grad_() for t in small]
    got, want = values(decoder, *small), exact_values(copy.deepcopy(decoder).double(), *wide)
    scale = max(float(t.abs().max()) for t in want)
    return max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True)) / scale


def compared(
    case: str, quantity: str, candidates: dict[str, Products], given: tuple, rounds: int
) -> list[Row]:
    """Values, and values with gradients, of the candidates that are right."""
    rows: list[Row] = []

    def values(product: Products, *given: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return product(*given)

    for what, function in (("values", values), ("with gradients", gradients)):
        runs = {}
        for label, product in candidates.items():
            own, oracle = partial(function, product), partial(function, exact)
            error = error_of(own, oracle, *given)
            if error <= TOLERANCE:
                runs[label] = partial(own, *given)
            else:
                note = f"not timed: wrong by {error:.1e}"
                rows.append(Row(case, label, f"{quantity}, {what}", note=note))
        rows += compare(case, f"{quantity}, {what}", runs, rounds)
    return rows


def products(rounds: int) -> list[Row]:
    rows: list[Row] = []
    for name, decoder in networks().items():
        z = torch.randn(BATCH, M, requires_grad=True)
        for k in DIRECTIONS:
            tangents = torch.randn(k, BATCH, M, requires_grad=True)
            candidates: dict[str, Products] = {OURS: by_us, FUNC: by_func}
            candidates |= {DOUBLE: by_double_backward} if k <= 4 else {}
            rows += compared(name, f"k = {k}", candidates, (decoder, z, tangents), rounds)
    return rows


def sindy(rounds: int) -> list[Row]:
    """An MLP as SINDy autoencoders have, m = 3 and 128 numbers, 128 samples."""
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(3, 32), nn.Sigmoid(), nn.Linear(32, 64), nn.Sigmoid())
    decoder.append(nn.Linear(64, 128))
    z, tangents = (torch.randn(*shape, requires_grad=True) for shape in ((128, 3), (1, 128, 3)))
    candidates = {OURS: by_us, FUNC: by_func, "loop of jacobian": by_loop}
    return compared("SINDy, B = 128", "k = 1", candidates, (decoder, z, tangents), min(rounds, 3))


def pullbacks(rounds: int) -> list[Row]:
    rows: list[Row] = []
    for name, decoder in networks().items():
        z = torch.randn(BATCH, M, requires_grad=True)
        log_var = torch.zeros(BATCH, M, requires_grad=True)
        with torch.no_grad():
            x = torch.randn_like(decoder(z))
        loss_fn = sf.SamplingFreeLoss(decoder)

        def pullback(decoder=decoder, z=z, x=x):
            found = sf.pullback(decoder, z, x)
            total = found.gram.sum() + found.projection.sum() + found.squared_error.sum()
            return torch.autograd.grad(total, [z, *decoder.parameters()], allow_unused=True)

        def loss(decoder=decoder, z=z, x=x, loss_fn=loss_fn, log_var=log_var):
            leaves = [z, log_var, *decoder.parameters()]
            return torch.autograd.grad(loss_fn(x, z, log_var), leaves, allow_unused=True)

        runs = {"sf.pullback": pullback, "sf.SamplingFreeLoss": loss}
        rows += compare(name, "all m = 16, with gradients", runs, rounds)
    return rows


def main() -> None:
    parser = make_parser("uses.tangents", __doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    publish("tangents", [*products(rounds), *sindy(rounds), *pullbacks(rounds)])


if __name__ == "__main__":
    main()
