"""Fitting latents, ours against optimisers of torch and PyPose: `python -m bench.uses.fit`.

    digits     an MLP decoder of the digits, trained here; m = 16, B = 64, from z = 0 and from the
               encoder's means; prior_var = 1, noise_var c = 0.5, as in its training, and 0.01,
               nearer to what it leaves. Time until the batch's mean F is within 1% of the best that
               long float64 runs found, and F at equal seconds.
    memory     the same decoder at B = 1024, one step: the peak of a process each.
    field      a decoder of coordinates as large as DeepSDF's (8 layers of 512, m = 256), drawn at
               random, one latent through 4,096 points: the error at equal seconds.
    proposals  effective samples of the log marginal likelihood, by the density they come from.

How many steps each needs is found first, without a clock; that many are then timed, all candidates
in turn. What they end with is evaluated in float64 before that. Adam and LBFGS get the fastest of
several rates. PyPose (`pip install --no-deps pypose`) optimises all parameters of a module as one
vector, so it takes the samples one by one; it is left out where it is not installed. Prints tables
and writes bench/results/uses/fit.csv.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastsfvae as sf
from bench.command import ROOT, make_parser
from bench.memory import rise
from bench.timing import take_turns
from bench.uses.table import Row, publish
from fastsfvae.data import digits

M, BATCH, LARGE = 16, 64, 1024
PRIOR_VAR = 1.0
OURS, DEFAULTS = "fit_latents", "fit_latents, defaults"
WITHIN = 1.01
ADAM_RATES = (0.03, 0.1, 0.3, 1.0)
LBFGS_RATES = (1.0,)
FIELD_STEPS = (1, 2)
FIELD_RATES = (0.01, 0.03, 0.1)
MOST_STEPS = 128
NOISE_VARS = (0.5, 0.01)
SECONDS = (0.03, 0.06, 0.12, 0.24)
POINTS = 4_096
PARTS = ("digits", "proposals", "memory", "field")


class Problem(NamedTuple):
    """Minimise F of a batch of data, from z0, with the variance c of the noise."""

    decoder: nn.Module
    x: Tensor
    z0: Tensor
    noise_var: float = 0.5

    @property
    def settings(self) -> dict[str, float]:
        """As keywords of ours."""
        return {"prior_var": PRIOR_VAR, "noise_var": self.noise_var}

    def double(self) -> Problem:
        """The same in float64."""
        x, z0 = self.x.double(), self.z0.double()
        return Problem(copy.deepcopy(self.decoder).double(), x, z0, self.noise_var)


def objective(problem: Problem, z: Tensor) -> Tensor:
    """F, ``[B]``."""
    error = (problem.x - problem.decoder(z)).square().sum(1)
    return error / (2 * problem.noise_var) + z.square().sum(1) / (2 * PRIOR_VAR)


def ours(problem: Problem, steps: int) -> Tensor:
    return sf.fit_latents(*problem[:3], steps=steps, tol=0, **problem.settings).z


def adam(rate: float, problem: Problem, steps: int) -> Tensor:
    z = problem.z0.clone().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=rate)
    for _ in range(steps):
        (z.grad,) = torch.autograd.grad(objective(problem, z).sum(), z)
        optimizer.step()
    return z.detach()


def lbfgs(rate: float, search: str | None, problem: Problem, steps: int) -> Tensor:
    z = problem.z0.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([z], rate, max_iter=steps, line_search_fn=search)

    def closure() -> Tensor:
        value = objective(problem, z).sum()
        (z.grad,) = torch.autograd.grad(value, z)
        return value

    optimizer.step(closure)
    return z.detach()


class _Residual(nn.Module):
    def __init__(self, problem: Problem, index: int):
        super().__init__()
        self.z, self.x = nn.Parameter(problem.z0[index : index + 1].clone()), problem.x[index]
        self.decode, self.noise_var = problem.decoder.forward, problem.noise_var

    def forward(self, _: Any) -> Tensor:
        of_data = (self.x - self.decode(self.z)[0]) / math.sqrt(self.noise_var)
        return torch.cat([of_data, self.z[0] / math.sqrt(PRIOR_VAR)])


def pypose(problem: Problem, steps: int) -> Tensor:
    """PyPose's Levenberg-Marquardt with its trust region, a sample at a time."""
    import pypose as pp

    found = []
    for index in range(len(problem.x)):
        residual = _Residual(problem, index)
        optimizer = pp.optim.LM(residual, strategy=pp.optim.strategy.TrustRegion())
        for _ in range(steps):
            optimizer.step(None)
        found.append(residual.z.detach())
    return torch.cat(found)


Method = Callable[[Problem, int], Tensor]


def methods() -> dict[str, Method]:
    found: dict[str, Method] = {OURS: ours}
    found |= {f"Adam {rate}": partial(adam, rate) for rate in ADAM_RATES}
    found |= {f"LBFGS {rate}": partial(lbfgs, rate, None) for rate in LBFGS_RATES}
    found["LBFGS Wolfe"] = partial(lbfgs, 1.0, "strong_wolfe")
    try:
        import pypose as _pypose  # noqa: F401
    except ImportError:
        return found
    return found | {"PyPose LM": pypose}


PEAKS: dict[str, Method] = {OURS: ours, "Adam": partial(adam, 0.1)}


def trained() -> tuple[nn.Module, nn.Module]:
    """An encoder and a decoder of the digits, by the README's loop."""
    torch.manual_seed(0)
    images = digits("train").images.flatten(1) / 255
    encoder = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 2 * M))
    decoder = nn.Sequential(nn.Linear(M, 256), nn.SiLU(), nn.Linear(256, 784))
    loss_fn = sf.SamplingFreeLoss(decoder, noise_var=0.5, gamma=0.5)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    for _ in range(1000):
        x = images[torch.randint(len(images), (64,))]
        loss = loss_fn(x, *encoder(x).chunk(2, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder, decoder.requires_grad_(False)


def best_known(problem: Problem) -> float:
    """The mean of the lowest F that long float64 runs find, sample by sample."""
    exact = problem.double()
    runs = ours(exact, 500), adam(0.1, exact, 2000)
    return torch.stack([objective(exact, z) for z in runs]).amin(0).mean().item()


def value_of(exact: Problem, z: Tensor) -> float:
    return objective(exact, z.double()).mean().item()


def steps_needed(method: Method, problem: Problem, goal: float, most: int) -> int | None:
    """The fewest steps with which the mean F, in float64, is at most `goal`; None beyond `most`."""
    exact = problem.double()

    def reached(steps: int) -> bool:
        return value_of(exact, method(problem, steps)) <= goal

    # Doubled first, and then one by one from the last that was not enough.
    enough = next((k for k in (2**i for i in range(most.bit_length())) if reached(k)), None)
    if enough is None:
        return None
    return next(k for k in range(enough // 2 + 1, enough + 1) if k == enough or reached(k))


def to_one_percent(case: str, problem: Problem, rounds: int) -> list[Row]:
    """Time to within 1% of the best, and what each has reached at equal seconds."""
    exact, best, candidates = problem.double(), best_known(problem), methods()
    start = value_of(exact, problem.z0)
    print(f"\n{case}: B = {len(problem.x)}, mean F {start:.3f} at the start, {best:.3f} at best")
    steps = {}
    for name, method in candidates.items():
        # Of PyPose a step takes a second.
        most = 8 if method is pypose else MOST_STEPS
        steps[name] = steps_needed(method, problem, WITHIN * best, most)
    runs = {name: partial(candidates[name], problem, k) for name, k in steps.items() if k}
    runs[DEFAULTS] = lambda: sf.fit_latents(*problem[:3], **problem.settings).z
    ms = {name: statistics.median(v) for name, v in take_turns(runs, rounds, warmup=1).items()}
    rows = []
    for name in [*candidates, DEFAULTS]:
        if name not in runs:
            rows.append(Row(case, name, "F/F* <= 1.01", note="not reached"))
            continue
        value = value_of(exact, runs[name]()) / best
        k = steps.get(name, "")
        rows.append(Row(case, name, "F/F* <= 1.01", k, ms[name], ms[name] / ms[OURS], value))
    adams = {name: k for name, k in steps.items() if name.startswith("Adam") and k}
    for seconds in SECONDS:
        # The first of our evaluations is at z0.
        count = max(0, int(1e3 * seconds / ms[OURS] * (steps[OURS] + 1)) - 1)
        reached = {OURS: (count, value_of(exact, ours(problem, count)) / best)}
        for name, k in adams.items():
            count = int(1e3 * seconds / ms[name] * k)
            reached[name] = count, value_of(exact, candidates[name](problem, count)) / best
        name = min(adams, key=lambda name: reached[name][1])
        for each in (OURS, name):
            rows.append(Row(case, each, f"{1e3 * seconds:.0f} ms", *reached[each][:1],
                            value=reached[each][1]))  # fmt: skip
    return rows


def peak(name: str) -> int:
    """Bytes by which a process's memory rises at its highest, in a child."""
    command = [sys.executable, "-m", "bench.uses.fit", "--peak", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


def print_peak(name: str) -> None:
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(M, 256), nn.SiLU(), nn.Linear(256, 784))
    problem = Problem(decoder.requires_grad_(False), torch.rand(LARGE, 784), torch.zeros(LARGE, M))
    method = PEAKS[name]
    method(Problem(decoder, problem.x[:2], problem.z0[:2]), 2)
    print(rise(lambda: method(problem, 2)))


class Field(nn.Module):
    """DeepSDF's decoder without its normalisation: a latent and a point to one number."""

    def __init__(self, m: int = 256, width: int = 512):
        super().__init__()
        sizes = [m + 3, width, width, width, width + m + 3, width, width, width]
        ends = [*[width] * 7, 1]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes, ends, strict=True))
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight)

    def forward(self, z: Tensor, points: Tensor) -> Tensor:
        """Decode."""
        h = given = torch.cat([z, points], 1)
        for index, layer in enumerate(self.layers):
            h = torch.cat([h, given], 1) if index == 4 else h
            h = layer(h)
            h = h.relu() if index < 7 else h
        return h


def field(points: int) -> list[Row]:
    """One latent of 256 through many points: the error at equal seconds."""
    torch.manual_seed(0)
    decoder, where, z0 = (
        Field().requires_grad_(False),
        torch.rand(points, 3) * 2 - 1,
        torch.zeros(1, 256),
    )
    with torch.no_grad():
        x = decoder(0.3 * torch.randn(1, 256).expand(points, -1), where)

    def error(z: Tensor) -> Tensor:
        return (x - decoder(z.expand(points, -1), where)).square().mean()

    def by_adam(rate: float, steps: int) -> Tensor:
        z = z0.clone().requires_grad_()
        optimizer = torch.optim.Adam([z], lr=rate)
        for _ in range(steps):
            (z.grad,) = torch.autograd.grad(error(z), z)
            optimizer.step()
        return z.detach()

    def by_us(steps: int) -> Tensor:
        return sf.fit_latents(decoder, x, z0, where, joint=True, steps=steps, tol=0).z

    exact, wide, at = copy.deepcopy(decoder).double(), x.double(), where.double()
    start = error(z0).item()

    def value_at(z: Tensor) -> float:
        with torch.no_grad():
            found = (wide - exact(z.double().expand(points, -1), at)).square().mean().item()
        return found / start

    case = f"field, {points} points"
    print(f"\n{case}: mean squared error {start:.4g} at the start")
    runs = {f"{k}": partial(by_us, k) for k in FIELD_STEPS} | {"Adam": partial(by_adam, 0.01, 2)}
    ms = {name: statistics.median(v) for name, v in take_turns(runs, rounds=2, warmup=1).items()}
    rows = []
    for steps in FIELD_STEPS:
        mine = ms[f"{steps}"]
        count = max(1, int(mine / (ms["Adam"] / 2)))
        found = {rate: value_at(by_adam(rate, count)) for rate in FIELD_RATES}
        rate = min(found, key=lambda rate: found[rate])
        quantity = f"error/first after {1e-3 * mine:.1f} s"
        rows.append(Row(case, OURS, quantity, steps, mine, value=value_at(by_us(steps))))
        spent = ms["Adam"] / 2 * count
        rows.append(Row(case, f"Adam {rate}", quantity, count, spent, value=found[rate]))
    return rows


def proposals(encoder: nn.Module, decoder: nn.Module) -> list[Row]:
    """Effective sample sizes of importance weights of 250 test digits, by proposal."""
    x = digits("test").images.flatten(1)[:250] / 255
    with torch.no_grad():
        mean, log_var = encoder(x).chunk(2, 1)
    rows = []
    for c, name in itertools.product((0.5, 0.05), sf.evaluate.PROPOSALS):
        start = time.perf_counter()
        found = sf.evaluate.log_marginal_likelihood(
            *(decoder, x, mean, log_var), noise_var=c, samples=256, proposal=name,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        ms = 1e3 * (time.perf_counter() - start)
        effective = found.effective_samples
        case = f"proposals, c = {c}, K = 256"
        rows.append(
            Row(case, name, "effective samples, median", "", ms, None, effective.median().item())
        )
        rows.append(Row(case, name, "log ML, mean", value=found.estimate.mean().item()))
    return rows


def main() -> None:
    parser = make_parser("uses.fit", __doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--points", type=int, default=POINTS, help="of the field")
    parser.add_argument("part", nargs="?", choices=PARTS, help="all by default")
    parser.add_argument("--peak", choices=PEAKS, help="print this one's peak memory and stop")
    options = parser.parse_args()
    if options.peak:
        print_peak(options.peak)
        return
    warnings.filterwarnings("ignore", module="torch|pypose")
    rows = []
    if options.part != "field":
        encoder, decoder = trained()
    if options.part in (None, "digits"):
        x = digits("test").images.flatten(1)[:BATCH] / 255
        with torch.no_grad():
            mean = encoder(x).chunk(2, 1)[0]
        starts = {"0": torch.zeros_like(mean), "the encoder": mean}
        for c, (start, z0) in itertools.product(NOISE_VARS, starts.items()):
            problem = Problem(decoder, x, z0, c)
            rows += to_one_percent(f"digits, c = {c}, from {start}", problem, options.rounds)
    if options.part in (None, "proposals"):
        rows += proposals(encoder, decoder)
    if options.part in (None, "memory"):
        for name in PEAKS:
            rows.append(
                Row(f"digits, B = {LARGE}", name, "peak MB, 2 steps", value=peak(name) / 1e6)
            )
    if options.part in (None, "field"):
        rows += field(options.points)
    publish("fit", rows, keeps=True)


if __name__ == "__main__":
    main()
