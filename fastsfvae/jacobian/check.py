"""A user's question before training: is my decoder's Jacobian right, and what does it cost?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from fastsfvae.jacobian.api import decode_with_jacobian
from fastsfvae.jacobian.backend import resolve_backend
from fastsfvae.jacobian.cost import CARDS, Floor, step_floor
from fastsfvae.jacobian.rules.registry import RULES
from fastsfvae.jacobian.run.cache import Linearizer
from fastsfvae.jacobian.shared import bind
from fastsfvae.jacobian.validate import Shared, check_latents, copied
from fastsfvae.ops.dispatch import Choice

if TYPE_CHECKING:
    from fastsfvae.jacobian.plan.plan import Step

_SAMPLES = 4
# Output directions along which J is compared with reverse mode.
_PROBES = 32
# Roundings of float64, and of float32 where a plain function keeps its own dtype.
_TOLERANCE = {torch.float64: 1e-8}
_LOOSE = 1e-2


class LayerReport(NamedTuple):
    """One operation that carries tangents.

    Attributes:
        module: dotted path in the decoder, "" for its own forward.
        op: the ATen operation, such as "conv2d".
        shape: the result's shape without the batch axis.
        handled: "rule" or "fallback" (differentiated generically, slower).
        backend: what runs it for this z: "torch" or "triton".
        flops: floating point operations for the m tangents of one sample, forward.
        elements: of those tangents, that forward and backward must move; see
            `fastsfvae.jacobian.cost`.
        choice: of a layer that a fused kernel might take: "fused" or "library", and why; see
            `fastsfvae.fused_layers`. None of the others.
    """

    module: str
    op: str
    shape: tuple[int, ...]
    handled: str
    backend: str
    flops: int
    elements: int
    choice: Choice | None = None


@dataclasses.dataclass(frozen=True)
class DecoderReport:
    """The result of `check_decoder`; `print` it.

    Attributes:
        layers: the operations that carry tangents, in order.
        latent_dim: m.
        output_shape: of one sample.
        flops: for all tangents of one sample, forward only.
        jacobian_bytes: of one sample's J in z's dtype.
        output_error: the largest difference of f(z) from the decoder run sample by sample,
            relative to its largest entry. Large where the decoder mixes samples.
        jacobian_error: likewise for J^T u against reverse mode, along every output u, or along 32
            random directions u where there are more outputs.
        gradient_error: likewise for the worst gradient of a random function of (f, J) in z and
            in the parameters; None where PyTorch has no second derivative to compare with.
        tolerance: what the errors may be.
        obstacles: why the loss differentiates this decoder by autograd, chunk by chunk and twice
            over, and not by the rules' adjoints in its forward; empty where it does not.
    """

    layers: list[LayerReport]
    latent_dim: int
    output_shape: tuple[int, ...]
    flops: int
    jacobian_bytes: int
    output_error: float
    jacobian_error: float
    gradient_error: float | None
    tolerance: float
    obstacles: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every error is within the tolerance."""
        errors = (self.output_error, self.jacobian_error, self.gradient_error or 0.0)
        return all(error <= self.tolerance for error in errors)

    def floor(self, card: str = "RTX 4090", batch: int = 64, dtype: str = "bfloat16") -> Floor:
        """The least time that decoder and loss, forward and backward, take on a card.

        By data sheet and static counts (`fastsfvae.jacobian.cost`), not measured.

        Args:
            card: "RTX 3090", "RTX 4090", "RTX 5090", "Quadro RTX 6000" or "H100".
            batch: B.
            dtype: of the products, "float32", "tf32" or "bfloat16".

        Raises:
            ValueError: for another card, or a dtype that the card has no products of.
        """
        if card not in CARDS:
            raise ValueError(f"card={card!r} is unknown: give one of {', '.join(CARDS)}")
        n = math.prod(self.output_shape)
        return step_floor(self.layers, self.latent_dim, n, batch, CARDS[card], dtype)

    def __str__(self) -> str:
        """A table of the layers that cost something, the totals and the verdict."""
        header = ("module", "operation", "shape", "tangents", "backend", "MFLOP", "")
        rows = [
            (
                layer.module or "(decoder)",
                layer.op,
                "x".join(map(str, layer.shape)),
                layer.handled,
                layer.backend,
                f"{layer.flops / 1e6:.3g}",
                f"{layer.choice.how}: {layer.choice.why}" if layer.choice else "",
            )
            for layer in self.layers
            if layer.flops or layer.handled == "fallback"
        ]
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [header, *rows]
        ]
        gradient = "not comparable" if self.gradient_error is None else f"{self.gradient_error:.1e}"
        lines += [
            f"one sample: {self.latent_dim} tangents, {self.flops / 1e6:.3g} MFLOP forward, "
            f"J {self.jacobian_bytes / 2**20:.3g} MiB",
            f"relative errors: output {self.output_error:.1e}, Jacobian {self.jacobian_error:.1e}, "
            f"gradients {gradient} (allowed {self.tolerance:.0e})",
            "loss: " + ("; ".join(self.obstacles) or "gradients are finished in the forward"),
            f"verdict: {self._verdict()}",
        ]
        return "\n".join(lines)

    def _verdict(self) -> str:
        generic = sorted({layer.op for layer in self.layers if layer.handled == "fallback"})
        if self.output_error > self.tolerance:
            return "WRONG: the decoder's samples depend on each other, or it draws at random"
        if not self.ok:
            return "WRONG: please report this decoder"
        if generic:
            return f"right; no rule for {', '.join(generic)}, which run slower"
        return "right"


def check_decoder(
    decoder: Callable[..., Tensor], z: Tensor, *args: Any, shared: Shared = (), **kwargs: Any
) -> DecoderReport:
    """Compare J and its gradients with reverse mode in float64, and list every layer's rule.

    A copy of the decoder is checked in float64 on at most four samples, on z's device. A plain
    function cannot be copied: it is checked as it is, in z's dtype and with a loose tolerance.

    Args:
        decoder: see `decode_with_jacobian`.
        z: latents [B, m].
        *args: further decoder inputs.
        shared: see `decode_with_jacobian`.
        **kwargs: further decoder inputs by name.

    Returns:
        A `DecoderReport`; its `ok` is the verdict, its string a table.

    Raises:
        TypeError, ValueError, RuntimeError: see `decode_with_jacobian`.
    """
    check_latents(z)
    target, args, kwargs = bind(decoder, args, kwargs, shared)
    backend = resolve_backend("auto", z)
    linearizer = Linearizer(target, z, args, kwargs, backend)
    plan = linearizer.plan(z.shape[0])
    layers, m = _layers(plan.steps, z.shape[1], backend), z.shape[1]
    dtype = torch.float64 if isinstance(target, nn.Module) else z.dtype
    exact = copied("check_decoder", target).to(dtype) if isinstance(target, nn.Module) else target

    def few(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        along = leaf.ndim > 0 and leaf.shape[0] == z.shape[0]
        leaf = (leaf[:_SAMPLES] if along else leaf).detach()
        return leaf.to(dtype) if leaf.is_floating_point() else leaf

    small = few(z)
    few_args, few_kwargs = pytree.tree_map(few, (args, kwargs))
    output, errors = _errors(exact, small, few_args, few_kwargs)
    return DecoderReport(
        layers=layers,
        latent_dim=m,
        output_shape=tuple(output.shape[1:]),
        flops=sum(layer.flops for layer in layers),
        jacobian_bytes=m * output[0].numel() * z.element_size(),
        output_error=errors[0],
        jacobian_error=errors[1],
        gradient_error=errors[2],
        tolerance=_TOLERANCE.get(dtype, _LOOSE),
        obstacles=tuple(dict.fromkeys(plan.obstacles)),
    )


def list_layers(decoder: nn.Module, z: Tensor) -> list[LayerReport]:
    """The `layers` of a decoder's report alone, without a check.

    Raises:
        TypeError, ValueError, RuntimeError: see `decode_with_jacobian`.
    """
    backend = resolve_backend("auto", z)
    plan = Linearizer(decoder, z, backend=backend).plan(z.shape[0])
    return _layers(plan.steps, z.shape[1], backend)


def _layers(steps: Sequence[Step], m: int, backend: str) -> list[LayerReport]:
    return [
        LayerReport(
            step.path,
            step.op,
            step.shape[1:],
            step.handled,
            "triton" if backend == "triton" and _has_kernel(step) else "torch",
            step.cost.flops * m,
            step.cost.elements * m,
            step.choice,
        )
        for step in steps
        if step.handled != "plain"
    ]


def _has_kernel(step: Step) -> bool:
    if step.choice is not None:
        return step.choice.how == "fused"
    return step.op in RULES and RULES[step.op].triton is not None


def _errors(decoder, z: Tensor, args, kwargs) -> tuple[Tensor, tuple[float, float, float | None]]:
    parameters = list(decoder.parameters()) if isinstance(decoder, nn.Module) else []
    leaves = [z.clone().requires_grad_(), *(p for p in parameters if p.requires_grad)]
    # Attention's kernels of one pass have no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        output, jacobian = decode_with_jacobian(
            decoder, leaves[0], *args, backend="torch", **kwargs
        )
        probes = _probes(output)
        ours = output, jacobian.flatten(2) @ probes.mT
        truth = _sample_by_sample(decoder, leaves[0], args, kwargs, probes)
        gradient = _gradient_error(ours, truth, leaves)
    return truth[0], (_difference(ours[0], truth[0]), _difference(ours[1], truth[1]), gradient)


def _probes(output: Tensor) -> Tensor:
    """Directions u [k, n] in output space along which J^T u is compared.

    All n of them where that is cheap. Random ones otherwise: reverse mode over n = 12288 outputs
    and its gradient would not fit in memory, and a wrong J agrees along random directions with
    probability 0.
    """
    n = output[0].numel()
    if n <= _PROBES:
        return torch.eye(n, dtype=output.dtype, device=output.device)
    generator = torch.Generator().manual_seed(1)
    probes = torch.randn(_PROBES, n, generator=generator, dtype=torch.float64)
    return (probes / n**0.5).to(output)


def _sample_by_sample(decoder, z: Tensor, args, kwargs, probes: Tensor) -> tuple[Tensor, Tensor]:
    """f(z) [B, *out] and J^T u [B, m, k] by reverse mode on each sample alone.

    Alone, so that a decoder that mixes samples is found out.
    """
    outputs, pulled = [], []
    for i in range(z.shape[0]):

        def one(leaf: Any, i: int = i) -> Any:
            along = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == z.shape[0]
            return leaf[i : i + 1] if along else leaf

        one_args, one_kwargs = pytree.tree_map(one, (args, kwargs))
        sample = z[i : i + 1]
        y = decoder(sample, *one_args, **one_kwargs)
        rows = [
            torch.autograd.grad(y, sample, u.view_as(y), create_graph=True, materialize_grads=True)
            for u in probes
        ]
        outputs.append(y)
        pulled.append(torch.stack([row for (row,) in rows], dim=-1))
    return torch.cat(outputs), torch.cat(pulled)


def _gradient_error(ours, truth, leaves: list[Tensor]) -> float | None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in truth]

    def gradients(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        parts = [(w * (t + t.square())).sum() for w, t in zip(weights, pair, strict=True)]
        value = torch.stack(parts).sum()
        return torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)

    try:
        expected = gradients(truth)
    except RuntimeError:
        return None
    pairs = zip(gradients(ours), expected, strict=True)
    scale = max(float(g.abs().max()) for g in expected)
    return max(float((a - b).abs().max()) for a, b in pairs) / max(scale, 1e-300)


def _difference(ours: Tensor, truth: Tensor) -> float:
    scale = truth.detach().abs().max().item()
    return (ours - truth).detach().abs().max().item() / max(scale, 1e-300)
