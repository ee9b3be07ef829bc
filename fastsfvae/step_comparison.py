"""A user's question before training: what does a step cost, with my networks on this machine?"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsfvae import _checks
from fastsfvae._checks import Backend, Likelihood
from fastsfvae.ground.options import one_line
from fastsfvae.ground.provenance import device_name
from fastsfvae.jacobian.shared import bind
from fastsfvae.jacobian.validate import Shared, copied, refuse_wrappers
from fastsfvae.likelihoods import gaussian_kl, low_rank_log_prob
from fastsfvae.loss import SamplingFreeLoss
from fastsfvae.objectives.sampling import Sampling

# The first round traces or compiles, and makes Adam's state; behind it caches are still cold.
WARM_UP = 2
_LEAST, _MOST = 3, 100
_OURS, _SAMPLING, _JACFWD = "sampling-free", "sampling", "vmap(jacfwd)"

# Of data x, the posterior's mean and its log-variance, to a loss.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class StepComparison:
    """The result of `compare_step`; `print` it.

    A step is encoder, loss, gradients and Adam.

    Attributes:
        sampling_free_ms: milliseconds of a sampling-free step, the median over the rounds.
        sampling_ms: likewise of a step by one reparameterised draw.
        jacfwd_ms: likewise of a sampling-free step by vmap(jacfwd), the closed form and autograd;
            None where it was not measured.
        to_sampling: a sampling-free step's time over a sampling one's, the median over the rounds
            of the ratio in each; not the ratio of the medians.
        to_jacfwd: likewise over vmap(jacfwd)'s.
        rounds: counted, each with one step of every kind.
        device: what they ran on.
        jacfwd_obstacle: why vmap(jacfwd) was not measured; empty where it was.
    """

    sampling_free_ms: float
    sampling_ms: float
    jacfwd_ms: float | None
    to_sampling: float
    to_jacfwd: float | None
    rounds: int
    device: str
    jacfwd_obstacle: str = ""

    def __str__(self) -> str:
        """One line."""
        if self.jacfwd_ms is None or self.to_jacfwd is None:
            beside = f"vmap(jacfwd) cannot: {self.jacfwd_obstacle}"
        else:
            beside = f"{_short(self.to_jacfwd, 2)} times vmap(jacfwd)'s "
            beside += f"({_short(self.jacfwd_ms, 3)} ms)"
        return (
            f"sampling-free step {_short(self.sampling_free_ms, 3)} ms: "
            f"{_short(self.to_sampling, 2)} times a sampling step "
            f"({_short(self.sampling_ms, 3)} ms), {beside}; {self.rounds} rounds, {self.device}"
        )


def compare_step(
    encoder: Callable[..., Any],
    decoder: Callable[..., Tensor],
    x: Tensor,
    *args: Tensor,
    noise_var: float = 0.5,
    gamma: float = 0.5,
    kl_weight: float = 1.0,
    likelihood: Likelihood = "precision",
    backend: Backend = "auto",
    chunk_size: int | None = None,
    probes: int | None = None,
    shared: Shared = (),
    seconds: float = 10.0,
) -> StepComparison:
    """Time a training step of your networks, sampling-free, sampling, and by vmap(jacfwd).

        print(sf.compare_step(encoder, decoder, x))

    The three take turns, so that what else the machine does meets all of them. Each trains copies
    of the networks by an Adam of its own, in the modes that they are in and under the autocast that
    is active around the call: yours, their gradients and buffers, and torch's random numbers are
    afterwards what they were.

    vmap(jacfwd) holds the whole Jacobian and what autograd keeps of it, many times B m n numbers.
    Where it runs out of memory, or the decoder has an operation that it cannot take, the result
    says so and the others are measured. Call with a smaller batch where the machine has no room.

    Args:
        encoder: ``x -> (mean [B, m], log_var [B, m])``, a module or a method of one.
        decoder: ``z [B, m] -> [B, *out]``, likewise.
        x: a batch of data ``[B, *out]``, on the networks' device.
        *args: tensors that go to the decoder after z; those whose first axis is B go with their
            samples, except those that `shared` names by position.
        noise_var: as in `SamplingFreeLoss`, like all up to `shared`; of a sampling step
            `noise_var` and `kl_weight` count, of vmap(jacfwd)'s `gamma` and `likelihood` as well.
        gamma: see there.
        kl_weight: see there.
        likelihood: see there.
        backend: see there.
        chunk_size: see there.
        probes: see there; vmap(jacfwd) takes all m tangents nevertheless.
        shared: see there.
        seconds: about how long to measure. Fewer rounds are taken where steps are slow, but three
            at least, and 100 at most. In front of them are two that are not counted; the first,
            which traces or compiles, is not part of the time either.

    Returns:
        `StepComparison`.

    Raises:
        TypeError, ValueError, RuntimeError: for networks of which no copy can be made, an encoder
            that returns something else, or whatever `SamplingFreeLoss` refuses, in one line.
    """
    _checks.floating("x", x)
    _checks.not_negative("seconds", seconds)
    if not all(isinstance(arg, Tensor) for arg in args):
        raise TypeError(f"further inputs must be tensors, got {[type(a).__name__ for a in args]}")
    for name, network in (("encoder", encoder), ("decoder", decoder)):
        if not isinstance(_module(network), nn.Module):
            raise TypeError(
                f"{name} is a {type(network).__name__}, of whose parameters no copy can be made: "
                "give an nn.Module or a method of one"
            )
        refuse_wrappers(_module(network), f"the {name}")
    of_all: dict[str, Any] = {"noise_var": noise_var, "kl_weight": kl_weight}
    of_both = of_all | {"gamma": gamma, "likelihood": likelihood}
    own: dict[str, Any] = {"backend": backend, "chunk_size": chunk_size}
    own |= {"probes": probes, "shared": shared}

    def sampling_free(decoder: Callable[..., Tensor]) -> Loss:
        loss = SamplingFreeLoss(decoder, **of_both, **own)
        return lambda x, mean, log_var: loss(x, mean, log_var, *args)

    def sampling(decoder: Callable[..., Tensor]) -> Loss:
        objective = Sampling(lambda z: decoder(z, *args), **of_all)
        return lambda x, mean, log_var: objective(x, mean, log_var).loss

    def jacfwd(decoder: Callable[..., Tensor]) -> Loss:
        bound = bind(decoder, args, {}, shared)
        return closed_form_loss(bound.decoder, *bound.args, **of_both)

    device = _describe(x.device)
    with _undisturbed(x.device) as autocast:
        makers = {_OURS: sampling_free, _SAMPLING: sampling, _JACFWD: jacfwd}
        steps = {
            name: _step(make, *copied("compare_step", (encoder, decoder)), x, autocast)
            for name, make in makers.items()
        }
        rounds, obstacle = _measure(steps, seconds)
    return _summarise(rounds, device, obstacle)


def timed_step(
    loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, device: torch.device
) -> float:
    """Milliseconds of a training step: loss, gradients and update."""
    started = time.perf_counter()
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def vmap_jacfwd(decoder: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """(z, *args) -> (output ``[B, *out]``, J ``[B, m, n]``) by one jacfwd a sample, under vmap.

    Further inputs whose first extent is B go with their samples.
    """

    def decode_with_jacobian(z: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
        along = [0 if arg.shape[:1] == z.shape[:1] else None for arg in args]

        def one(z: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
            pairs = zip(args, along, strict=True)
            given = [arg if axis is None else arg.unsqueeze(0) for arg, axis in pairs]
            output = decoder(z.unsqueeze(0), *given).squeeze(0)
            return output, output

        decode = torch.func.vmap(torch.func.jacfwd(one, has_aux=True), in_dims=(0, *along))
        columns, output = decode(z, *args)
        return output, columns.flatten(1, -2).mT

    return decode_with_jacobian


def closed_form_loss(
    decoder: Callable[..., Tensor], *args: Tensor, kl_weight: float = 1.0, **settings: Any
) -> Loss:
    """The sampling-free loss as one writes it without this library: vmap(jacfwd) and autograd.

    Args:
        decoder: ``z [B, m] -> [B, *out]``.
        *args: as in `vmap_jacfwd`.
        kl_weight: factor of the KL divergence.
        **settings: those of `low_rank_log_prob`, except `backend`.
    """
    decode = vmap_jacfwd(decoder)

    def loss(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
        output, jacobian = decode(mean, *args)
        if output.shape != x.shape:
            raise ValueError(f"one sample at a time the decoder returns {tuple(output.shape)}")
        log_likelihood = low_rank_log_prob(
            (x - output).flatten(1), jacobian, log_var.exp(), backend="reference", **settings
        )
        return (kl_weight * gaussian_kl(mean, log_var) - log_likelihood).mean()

    return loss


def _module(network: Callable[..., Any]) -> Any:
    """The module that a network is, or is a method of."""
    return getattr(network, "__self__", network)


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[torch.autocast]:
    """Give the caller's autocast, for forwards alone; keep torch's random numbers as they are."""
    kind = device.type
    autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
    devices = [device] if kind == "cuda" else []
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices):
        with torch.autocast(kind, enabled=False), warnings.catch_warnings():
            # torch.func's first use loads parts of PyTorch that PyTorch itself has deprecated.
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
            yield autocast


def _step(
    make: Callable[[Callable[..., Tensor]], Loss],
    encoder: Callable[..., Any],
    decoder: Callable[..., Tensor],
    x: Tensor,
    autocast: torch.autocast,
) -> Callable[[], float]:
    """A training step of copies, which returns its milliseconds."""
    x, loss = x.detach().clone(), make(decoder)
    parameters = [*_module(encoder).parameters(), *_module(decoder).parameters()]
    trained = dict.fromkeys(p for p in parameters if p.requires_grad)
    if not trained:
        raise ValueError("encoder and decoder have no parameter that requires a gradient")
    optimizer = torch.optim.Adam(trained, fused=True)

    def forward() -> Tensor:
        with autocast:
            # A posterior is no place for eight bits.
            mean, log_var = (
                t.to(torch.promote_types(t.dtype, x.dtype)) for t in _posterior(encoder(x))
            )
            value = loss(x, mean, log_var)
        # Inside of the caller's region the casts of weights would outlive their update.
        torch.clear_autocast_cache()
        return value

    return lambda: timed_step(forward, optimizer, x.device)


def _posterior(returned: Any) -> tuple[Tensor, Tensor]:
    """Raise unless an encoder has returned mean and log-variance."""
    given = f"a {type(returned).__name__}"
    if isinstance(returned, Tensor):
        given += f" of shape {tuple(returned.shape)}"
    elif isinstance(returned, (tuple, list)) and len(returned) == 2:
        _checks.latent(*returned)
        return returned[0], returned[1]
    raise TypeError(
        f"encoder(x) is {given}: return (mean, log_var), each [B, m], such as "
        "h.chunk(2, dim=1) of a tensor h [B, 2m]"
    )


def _measure(
    steps: dict[str, Callable[[], float]], seconds: float
) -> tuple[list[dict[str, float]], str]:
    """Milliseconds of each counted round, and why vmap(jacfwd) has none; "" where it has."""
    rounds: list[dict[str, float]] = []
    obstacle, until = "", 0.0
    while len(rounds) < WARM_UP + _LEAST or (
        len(rounds) < WARM_UP + _MOST and time.perf_counter() < until
    ):
        rounds.append({})
        for name, step in [*steps.items()]:
            try:
                rounds[-1][name] = step()
            # Whatever torch.func or the decoder under it raises.
            except Exception as error:
                if name != _JACFWD:
                    raise
                del steps[name]
                obstacle = one_line(error)
        if len(rounds) == 1:
            until = time.perf_counter() + seconds
    return rounds[WARM_UP:], obstacle


def _summarise(rounds: list[dict[str, float]], device: str, obstacle: str) -> StepComparison:
    def times(name: str) -> float:
        return statistics.median(times[name] for times in rounds)

    def ratio(name: str) -> float:
        return statistics.median(times[_OURS] / times[name] for times in rounds)

    return StepComparison(
        sampling_free_ms=times(_OURS),
        sampling_ms=times(_SAMPLING),
        jacfwd_ms=None if obstacle else times(_JACFWD),
        to_sampling=ratio(_SAMPLING),
        to_jacfwd=None if obstacle else ratio(_JACFWD),
        rounds=len(rounds),
        device=device,
        jacfwd_obstacle=obstacle,
    )


def _describe(device: torch.device) -> str:
    """The device, and what else a time depends on: threads, the caller's autocast."""
    threads = torch.get_num_threads()
    name = f"cpu, {threads} thread{'s' * (threads > 1)}"
    name = name if device.type == "cpu" else device_name(device)
    if torch.is_autocast_enabled(device.type):
        dtype = str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")
        name += f", {dtype} autocast"
    return name


def _short(value: float, digits: int) -> str:
    """So many digits, but all of those in front of the point."""
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text else text
