"""A whole training step in one CUDA graph: encode, loss, backward and optimiser.

A step of a small model is some hundred kernels of a few microseconds each, which Python launches
more slowly than a GPU runs them. A graph is recorded once and launched as one.

Not measured on a GPU yet.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from fastsfvae import _checks
from fastsfvae._ranges import span
from fastsfvae.elbo import Elbo
from fastsfvae.ground.garbage import uncollected
from fastsfvae.jacobian.backend import resolve_backend
from fastsfvae.jacobian.run.cache import Linearizer
from fastsfvae.jacobian.shared import bind
from fastsfvae.loss import SamplingFreeLoss

# Before a capture every kernel has been compiled and every library has chosen its algorithms.
_WARM_UP_STEPS = 3
_SCALARS = ("noise_var", "gamma", "kl_weight")


def make_graphed_step(
    encoder: nn.Module,
    loss: SamplingFreeLoss,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    *args: Tensor,
    autocast: torch.dtype | None = None,
    capture: bool = True,
) -> GraphedStep:
    """Capture a training step, to be called with one batch after another.

        optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True, capturable=True)
        step = sf.make_graphed_step(encoder, loss, optimizer, x)
        for x in batches:
            value, terms = step(x)

    Nothing is trained by the capture: parameters, buffers, random numbers and the optimiser's state
    are afterwards what they were. The modules must keep their mode, their parameters and their
    layers; `loss.gamma`, `loss.noise_var` and `loss.kl_weight` may be changed between steps.

    Args:
        encoder: ``x [B, ...] -> (mean [B, m], log_var [B, m])``.
        loss: with reduction "mean" or "sum".
        optimizer: Adam or AdamW with capturable=True; a learning rate that changes must be a
            tensor on the GPU.
        x: an example batch of the size that is captured, on the GPU.
        *args: example tensors that go to the decoder after z.
        autocast: the dtype of an autocast region around encoder and loss, or None.
        capture: False runs every step eagerly, on any device: the same results without a graph.

    Returns:
        `GraphedStep`: called as ``step(x, *args)``, it gives ``(loss 0-d, Elbo)``, which the next
        call overwrites. A smaller batch, an epoch's last, runs eagerly.

    Raises:
        TypeError, ValueError, RuntimeError: in one line that says why a step cannot be captured.
    """
    _checks.tensors(x=x)
    if not isinstance(loss, SamplingFreeLoss):
        raise TypeError(f"loss is a {type(loss).__name__}: give a SamplingFreeLoss")
    if loss.reduction == "none":
        raise ValueError('reduction="none" gives no single loss: give "mean" or "sum"')
    step = GraphedStep(encoder, loss, optimizer, autocast)
    if capture:
        # The decoder before the device, so that a CPU tells as much as a GPU.
        _check_step(encoder, optimizer, args)
        _check_linearized(encoder, loss, x, args)
        if not x.is_cuda:
            raise RuntimeError(
                f'a CUDA graph needs its tensors on a GPU, x is on "{x.device}": move encoder, '
                "decoder and x there, or give capture=False to run every step eagerly"
            )
        step.capture(x, *args)
    return step


class GraphedStep:
    """A training step; `make_graphed_step` makes it.

    Called as ``step(x, *args)``, it trains on one batch and returns ``(loss 0-d, Elbo)``. A batch
    of the captured size replays the graph, a smaller one runs eagerly, a larger one is refused.

    Args:
        encoder: as in `make_graphed_step`, like all that are not listed.
        loss: called as ``loss(x, mean, log_var, *args, return_terms=True)``; has its `decoder`.
        optimizer: Adam or AdamW.
        autocast: a dtype or None.
        settings: numbers of the loss that may be changed between steps.
    """

    def __init__(
        self,
        encoder: nn.Module,
        loss: Any,
        optimizer: torch.optim.Optimizer,
        autocast: torch.dtype | None = None,
        settings: tuple[str, ...] = _SCALARS,
    ):
        self._encoder, self._loss, self._optimizer = encoder, loss, optimizer
        self._autocast, self._settings = autocast, settings
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._outputs: Any = None
        self._scalars: dict[str, Tensor] = {}
        self._given: dict[str, Any] = {}
        self._groups = self._captured_groups()
        self._state = optimizer.state

    def __call__(self, x: Tensor, *args: Tensor) -> tuple[Tensor, Elbo]:
        """Train on a batch; returns ``(loss, Elbo)``, detached.

        Raises:
            ValueError: a batch that does not fit the captured one, or a setting that was changed
                although it is part of the graph.
        """
        _checks.tensors(x=x)
        if self._graph is None or not self._fits((x, *args)):
            return self._train(x, *args)
        with span("replay"):
            self._take_settings()
            for static, given in zip(self._inputs, (x, *args), strict=True):
                static.copy_(given, non_blocking=True)
            self._graph.replay()
        return self._outputs

    def capture(self, x: Tensor, *args: Tensor) -> None:
        """Record the graph for batches like this one."""
        self._inputs = tuple(t.detach().clone() for t in (x, *args))
        self._hold_settings(x)
        with self._captured_settings():
            self.warm_up(*self._inputs)
            self._record()

    def _record(self) -> None:
        self._graph, device = torch.cuda.CUDAGraph(), self._inputs[0].device
        # torch's own stream for captures is on the device that was current at its first one, and
        # would record nothing of a step on another. A second thread may copy the next batch
        # meanwhile.
        with torch.cuda.device(device):
            capturing = torch.cuda.graph(
                self._graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"
            )
            with uncollected(), capturing:
                self._outputs = self._train(*self._inputs)

    def warm_up(self, x: Tensor, *args: Tensor) -> None:
        """Train for a few steps and take them back."""
        before = [(t, t.detach().clone()) for t in (*self._weights(), *self._optimizer_state())]
        with _random_state_kept(x.device), _side_stream(x.device):
            for _ in range(_WARM_UP_STEPS):
                self._train(x, *args)
        with torch.no_grad():
            # Adam makes its state in its first step, where it is zero.
            for tensor in self._optimizer_state():
                tensor.zero_()
            for tensor, value in before:
                tensor.copy_(value)
        # Gradients are made in the graph's own memory, where every replay finds them.
        self._optimizer.zero_grad(set_to_none=True)

    def _train(self, x: Tensor, *args: Tensor) -> Any:
        # Without the cache: its casts would be made in one graph and read in another.
        enabled = self._autocast is not None
        with torch.autocast(x.device.type, self._autocast, enabled=enabled, cache_enabled=False):
            # A posterior is no place for eight bits.
            posterior = (t.to(torch.promote_types(t.dtype, x.dtype)) for t in self._encoder(x))
            value, terms = self._loss(x, *posterior, *args, return_terms=True)
        self._optimizer.zero_grad(set_to_none=True)
        value.backward()
        self._optimizer.step()
        return value.detach(), terms

    def _optimizer_state(self) -> list[Tensor]:
        leaves = pytree.tree_leaves([*self._optimizer.state.values()])
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def _weights(self) -> Iterator[Tensor]:
        for module in (self._encoder, self._loss.decoder, self._loss):
            if isinstance(module, nn.Module):
                yield from module.parameters()
                yield from module.buffers()
        for group in self._optimizer.param_groups:
            yield from group["params"]

    def _fits(self, given: tuple[Tensor, ...]) -> bool:
        """Whether a batch is like the captured one; False for a smaller one."""
        same = [(t.shape, t.dtype) for t in given] == [(t.shape, t.dtype) for t in self._inputs]
        if same:
            return True
        size, captured = given[0].shape[:1], self._inputs[0].shape[:1]
        if given[0].shape[1:] != self._inputs[0].shape[1:] or size > captured:
            raise ValueError(
                f"x has shape {tuple(given[0].shape)}: the step was captured for "
                f"{tuple(self._inputs[0].shape)} and takes that or fewer samples"
            )
        return False

    def _hold_settings(self, x: Tensor) -> None:
        """Put the loss's settings on the device, except one that is learned."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        for name in self._settings:
            if not _is_learned(getattr(self._loss, name)):
                self._scalars[name] = torch.zeros((), dtype=dtype, device=x.device)
            self._given[name] = None
        self._take_settings()

    def _take_settings(self) -> None:
        """Bring what was changed since the last step to where the graph reads it."""
        if self._optimizer.state is not self._state:
            raise ValueError(
                "the optimizer's state was replaced (load_state_dict does that) and the graph "
                "still writes to the old one: load it before the step is captured"
            )
        for before, group in zip(self._groups, self._captured_groups(), strict=True):
            for name, value in group.items():
                if value == before[name]:
                    continue
                advice = "put back what it was, or capture again"
                if name == "lr":
                    advice = "give the optimizer lr=torch.tensor(..., device=...), on the GPU"
                raise ValueError(
                    f"{name} was captured as {before[name]} and is now {value}: {advice}"
                )
        loss = self._loss
        for name in self._settings:
            value, before = _held(loss, name), self._given[name]
            learned = name not in self._scalars
            replaced = learned and before is not None and value is not before
            if _is_learned(value) != learned or replaced:
                raise ValueError(
                    f"loss.{name} was {'learned' if learned else 'not learned'} when the step was "
                    "captured: put back what it was, or capture again"
                )
            if isinstance(value, Tensor) and not learned:
                # The same tensor may hold something else.
                allowed = _checks.in_range(name, value)
                assert isinstance(allowed, Tensor)
                self._scalars[name].copy_(allowed, non_blocking=True)
            elif not isinstance(value, Tensor) and value is not before:
                _checks.settings(loss.noise_var, loss.gamma, loss.kl_weight, loss.likelihood)
                self._scalars[name].fill_(value)
            self._given[name] = value

    @contextlib.contextmanager
    def _captured_settings(self) -> Iterator[None]:
        kept = {name: getattr(self._loss, name) for name in self._scalars}
        for name, scalar in self._scalars.items():
            setattr(self._loss, name, scalar)
        try:
            yield
        finally:
            for name, value in kept.items():
                setattr(self._loss, name, value)

    def _captured_groups(self) -> list[dict[str, Any]]:
        names = self._optimizer.defaults
        groups = self._optimizer.param_groups
        return [{name: _as_captured(group[name]) for name in names} for group in groups]


def _as_captured(value: Any) -> Any:
    """What a graph keeps of an optimiser's setting: a tensor on the host counts as its number.

    A tensor on the device is read anew by every replay.
    """
    if isinstance(value, tuple):
        return tuple(map(_as_captured, value))
    if isinstance(value, Tensor):
        return value.item() if value.device.type == "cpu" else None
    return value


def _held(loss: SamplingFreeLoss, name: str) -> float | Tensor:
    """A setting, or the parameter that it is made from at each use."""
    if parametrize.is_parametrized(loss, name):
        return getattr(loss.parametrizations, name).original
    return getattr(loss, name)


def _is_learned(value: float | Tensor) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _check_step(
    encoder: nn.Module, optimizer: torch.optim.Optimizer, args: tuple[Tensor, ...]
) -> None:
    """Raise where a capture would fail or, worse, record something else than the step."""
    kind = type(optimizer).__name__
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        raise TypeError(f"{kind} cannot be captured: give torch.optim.Adam or AdamW")
    if not all(group["capturable"] for group in optimizer.param_groups):
        raise ValueError(f"{kind} has capturable=False: give {kind}(..., capturable=True)")
    if isinstance(encoder, DistributedDataParallel):
        raise TypeError("the encoder is wrapped in DistributedDataParallel: capture one process")
    if not all(isinstance(t, Tensor) for t in args):
        raise TypeError(f"further inputs must be tensors, got {[type(t).__name__ for t in args]}")


def _check_linearized(
    encoder: nn.Module, loss: SamplingFreeLoss, x: Tensor, args: tuple[Tensor, ...]
) -> None:
    """Raise where the decoder's tangents, or their gradients, would not be in the graph."""
    with torch.no_grad(), _random_state_kept(x.device):
        # A copy, whose running statistics do not count.
        mean, _ = copy.deepcopy(encoder)(x)
    backend = resolve_backend(loss.backend, mean)
    if backend == "reference":
        raise ValueError('backend="reference" is not made for a graph: give "torch" or "triton"')
    decoder: Any = loss.decoder
    asked = bind(decoder, args, {}, loss.shared)
    linearizer = Linearizer(asked.decoder, mean, asked.args, asked.kwargs, backend)
    obstacles = linearizer.plan(len(mean)).obstacles
    if obstacles:
        raise RuntimeError(
            f"this decoder cannot be captured: {'; '.join(dict.fromkeys(obstacles))}, so its "
            "gradients are not finished in the forward (sf.check_decoder tells more)"
        )


@contextlib.contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Run on a stream of its own, as what precedes a capture must."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)
