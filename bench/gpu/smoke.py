"""Whether loss and gradients are right at full size, and the same twice: the first minute.

Decoder and loss in every dtype, on fused layers, on none and on those that are chosen, launched one
by one and from a graph. Each result is compared with float64, sample by sample and weight by
weight, with a second run's, bit by bit, and with the library's products in the same dtype. What is
wrong is run again kernel by kernel (`bench.gpu.launch_check`); all that follows goes on with what
works.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import fastsfvae as sf
from bench.cases_steps import shape_text
from bench.gpu import launch_check
from bench.measure import Context
from bench.peers import (
    DECODER_LOSSES,
    FUSED,
    SETTINGS,
    TRITON,
    UNFUSED,
    exact_gradients,
    loss_and_gradients,
)
from bench.problems import TOLERANCE, Problem, build_problem, products
from bench.timing import captured

DTYPES = "bfloat16", "tf32", "float32"
WAYS = FUSED, UNFUSED, TRITON
OP, WRONG = "smoke", "wrong"
# Seconds that looking for a wrong kernel may take, and how many failures are looked into.
SEARCH, SEARCHED = 60.0, 2

Results = tuple[Tensor, ...]


class Found(NamedTuple):
    """How far results are from others.

    Attributes:
        loss: relative.
        samples: largest relative error of one sample's gradient of z or log_var.
        weights: largest relative error of a parameter's gradient.
        weight: that parameter's name.
    """

    loss: float
    samples: float
    weights: float
    weight: str

    @property
    def worst(self) -> float:
        """Of all three; NaN where one is."""
        return float(torch.tensor([self.loss, self.samples, self.weights]).max())

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.1e}, samples {self.samples:.1e}, "
            f"weights {self.weights:.1e} ({self.weight})"
        )


def part(context: Context) -> None:
    """Compare, then look for the kernels that are to blame."""
    # Else the library may add up weight gradients in another order each time.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    name = "tiny" if context.quick else "celeba16"
    problem, text = build_problem(name, device=context.device), shape_text(name)
    exact: Results | None = None
    library: dict[tuple[str, str], Results] = {}
    for labels in _cases(context, text):
        if context.known(labels):
            continue
        with context.running(labels):
            try:
                exact = exact_gradients(problem) if exact is None else exact
                columns = _compared(context, problem, exact, library, labels)
            except Exception as reason:
                context.fail(labels, reason)
                continue
        context.recorder.write(**labels | columns)
    _step(context, name, text)
    _search(context, name)


def _cases(context: Context, text: str) -> Iterator[dict[str, str]]:
    for dtype in DTYPES[:1] if context.quick else DTYPES:
        # First the library's, which the others are compared with.
        for launch in ("eager", "graph") if context.device == "cuda" else ("eager",):
            for way in (UNFUSED, FUSED, TRITON):
                labels = {"op": OP, "implementation": way, "mode": f"both, {launch}"}
                yield labels | {"shape": text, "dtype": dtype}


def _compared(
    context: Context,
    problem: Problem,
    exact: Results,
    library: dict[tuple[str, str], Results],
    labels: dict[str, str],
) -> dict[str, str]:
    """The columns of one case."""
    dtype, way = labels["dtype"], labels["implementation"]
    launch = labels["mode"].rpartition(" ")[2]
    loss = DECODER_LOSSES[way](problem.decoder)

    def run() -> Results:
        with products(dtype):
            return loss_and_gradients(loss, problem, dtype)

    first, second = _twice(run, launch == "graph")
    found = distance(problem, first, exact)
    columns = {"error": f"{found.worst:.2e}"}
    notes = [str(found)]
    differing = [i for i, pair in enumerate(zip(first, second, strict=True)) if not _same(*pair)]
    if not differing:
        notes.append("the same twice")
    if way == UNFUSED:
        library[dtype, launch] = first
    elif (dtype, launch) in library:
        notes.append(f"from the library's: {distance(problem, first, library[dtype, launch])}")
    if differing:
        names = [_names(problem)[i] for i in differing]
        notes.insert(0, f"{WRONG}: differs from run to run: {', '.join(names)}")
    # Written so that NaN is wrong too.
    if not found.worst <= TOLERANCE[dtype]:
        notes.insert(0, f"{WRONG} against float64")
    return columns | {"note": "; ".join(notes)}


def _twice(run: Callable[[], Results], in_graph: bool) -> tuple[Results, Results]:
    if in_graph:
        replay, outputs = captured(run)
        results = []
        for _ in range(2):
            replay()
            torch.cuda.synchronize()
            results.append(tuple(t.clone() for t in outputs))
        return results[0], results[1]
    return run(), run()


def _same(a: Tensor, b: Tensor) -> bool:
    # Bits, as NaN is not equal to itself.
    return bool((a.contiguous().view(torch.int32) == b.contiguous().view(torch.int32)).all())


def _names(problem: Problem) -> list[str]:
    return ["loss", "z", "log_var", *(name for name, _ in problem.decoder.named_parameters())]


def distance(problem: Problem, got: Sequence[Tensor], want: Sequence[Tensor]) -> Found:
    """How far results of `loss_and_gradients` are from others'."""

    def relative(a: Tensor, b: Tensor) -> Tensor:
        a, b = a.double(), b.double()
        return (a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-300)

    loss, z, log_var, *weights = zip(got, want, strict=True)
    samples = torch.cat([relative(*z), relative(*log_var)]).max()
    errors = torch.stack([relative(a.flatten(), b.flatten()) for a, b in weights])
    at = int(errors.nan_to_num(torch.inf, torch.inf).argmax())
    one = relative(*(t.reshape(1) for t in loss))
    return Found(float(one), float(samples), float(errors[at]), _names(problem)[3 + at])


def _step(context: Context, name: str, text: str) -> None:
    """Whether a captured training step trains as its eager twin does."""
    labels = {"op": OP, "implementation": TRITON, "mode": "step, graph", "shape": text}
    labels["dtype"] = "bfloat16"
    if context.known(labels):
        return
    with context.running(labels):
        try:
            before, after, eager = _trained(name, context.device)
        except Exception as reason:
            context.fail(labels, reason)
            return
    error = float((after - eager).norm() / (eager - before).norm())
    note = "the captured training step's update of all parameters in three steps, from the eager"
    if not error <= TOLERANCE["bfloat16"]:
        note = f"{WRONG}: {note}"
    context.recorder.write(**labels, error=f"{error:.2e}", note=note)


def _trained(name: str, device: str) -> Iterator[Tensor]:
    """All parameters in a row: as they were, after three captured steps, after eager ones."""
    for capture in (True, False):
        problem = build_problem(name, device=device)
        parameters = [*problem.encoder.parameters(), *problem.decoder.parameters()]
        if capture:
            yield _flat(parameters)
        on_gpu = device == "cuda"
        optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True, capturable=on_gpu)
        loss = sf.SamplingFreeLoss(problem.decoder, backend="triton", **SETTINGS)
        step = sf.make_graphed_step(
            *(problem.encoder, loss, optimizer, problem.x),
            autocast=torch.bfloat16,
            capture=capture and on_gpu,
        )
        for _ in range(3):
            step(problem.x)
        yield _flat(parameters)


def _flat(parameters: Sequence[Tensor]) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in parameters])


def _search(context: Context, name: str) -> None:
    """Look for the kernels that are to blame for what failed, dtype by dtype."""
    failed = [row for row in context.rows(OP) if is_failure(row) and row["mode"] != "step, graph"]
    # The first of a dtype: what one way gets wrong, the other mostly does too.
    of_dtype = {row["dtype"]: row for row in reversed(failed)}
    for dtype, row in [*of_dtype.items()][:SEARCHED]:
        labels = {"op": launch_check.OP, "implementation": row["implementation"]}
        labels |= {"mode": "kernel by kernel", "shape": row["shape"], "dtype": dtype}
        if context.known(labels):
            continue
        with context.running(labels):
            left = min(SEARCH, context.deadline - time.monotonic())
            found = launch_check.search(context, name, row["implementation"], dtype, left)
        context.recorder.write(**labels, note=found)


def is_failure(row: Mapping[str, str]) -> bool:
    """Whether a row of this part says that something is wrong."""
    return row["note"].startswith((WRONG, "failed", "ended"))
