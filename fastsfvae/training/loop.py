"""Training: a plain loop whose state can be saved and resumed exactly.

All randomness is a function of (seed, step): a resumed run sees the same batches and the same noise
as one that was never interrupted. The loop never waits for the device except where it logs. Under
torchrun each process takes its share of every batch, and process 0 writes the files.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from fastsfvae._ranges import span
from fastsfvae.data.pixels import to_unit
from fastsfvae.objectives import Terms
from fastsfvae.training import distributed
from fastsfvae.training.interrupt import deferred_interrupt
from fastsfvae.training.methods import DETERMINISTIC
from fastsfvae.training.metrics_csv import METRICS, MetricsFile, Row
from fastsfvae.training.run import Run, save
from fastsfvae.training.seeds import LAYERS, NOISE, iterate_orders, mix_seed

FAILED = "failed.safetensors"
LOG_EVERY = 25
CHECKPOINT_EVERY = 500


class NonFiniteLoss(RuntimeError):
    """Training stopped at a loss that is NaN or infinite."""


Monitor = Callable[[Run, Row], None]


def train(run: Run, *monitors: Monitor) -> None:
    """Train until all steps are done, or Ctrl-C or SIGTERM; save the state either way.

    Args:
        run: changed in place.
        *monitors: called after every step with the run and the last row of metrics.csv, on the
            process that writes.

    Raises:
        NonFiniteLoss: at a NaN or infinite loss, with its step, images and terms. The state is
            then in failed.safetensors, the last good one still in checkpoint.safetensors.
        OSError: where a file cannot be written; the last checkpoint is intact.
    """
    run.model.train()
    config, row, writes = run.config, Row(), distributed.rank() == 0
    noise = torch.Generator(run.device)
    step = _make_step(run, noise)
    rows = distributed.rows(config.batch_size)
    orders = iterate_orders(len(run.images), config.batch_size, config.seed, run.step, rows)
    batches = run.images.batches(orders)
    metrics_path = run.folder / METRICS if writes else None
    started = time.perf_counter() - run.seconds
    try:
        with deferred_interrupt() as interrupted, MetricsFile(metrics_path) as metrics:
            while not (run.finished or _all_stop(run, interrupted.is_set())):
                _seed_step(run, noise)
                if run.step and run.step == run.phase.first:
                    run.model.objective = run.phase.objective
                for schedule, value in run.scheduled.values():
                    value.fill_(schedule.at(run.step))
                terms = step(to_unit(next(batches)))
                run.step += 1
                run.window.append(torch.stack(torch.broadcast_tensors(*terms)))
                # No row averages over two objectives.
                ends_phase = run.step == run.phase.first
                if run.step == 1 or run.step % LOG_EVERY == 0 or ends_phase or run.finished:
                    run.seconds = time.perf_counter() - started
                    row = _close_window(run)
                    metrics.write(row)
                if run.step % CHECKPOINT_EVERY == 0:
                    metrics.sync()
                    save(run)
                for monitor in monitors if writes else ():
                    monitor(run, row)
            run.seconds = time.perf_counter() - started
            # An interrupted window may hold a step that must not replace the last good checkpoint.
            _read_window(run)
            metrics.sync()
            save(run)
            # A process that resumes at once must find what process 0 has saved.
            distributed.wait()
    finally:
        if run.lock is not None:
            run.lock.release()


def _make_step(run: Run, noise: torch.Generator) -> Callable[[Tensor], Terms]:
    """What a batch ``[B, C, H, W]`` does to the run: forward, backward, update."""
    # A deterministic encoder's variance has no part in it.
    unused = run.config.method in DETERMINISTIC
    model = distributed.wrap(run.model, unused_parameters=unused)

    def step(x: Tensor) -> Terms:
        if run.phase.graphed is not None:
            return run.phase.graphed(x, noise)
        terms = model(x, noise)
        run.optimizer.zero_grad()
        with span("backward"):
            terms.loss.backward()
        with span("optimizer"):
            run.optimizer.step()
        return Terms(*(term.detach() for term in terms))

    return step


def _seed_step(run: Run, noise: torch.Generator) -> None:
    """Seed the objective's noise and that of layers such as Dropout, each process its own."""
    index = run.step * distributed.size() + distributed.rank()
    noise.manual_seed(mix_seed(run.config.seed, NOISE, index))
    layers = mix_seed(run.config.seed, LAYERS, index)
    # torch.manual_seed would call at every device there could be, which outlasts a small step.
    torch.default_generator.manual_seed(layers)
    if run.device.type == "cuda":
        with torch.cuda.device(run.device):
            torch.cuda.manual_seed(layers)


def _all_stop(run: Run, interrupted: bool) -> bool:
    """Whether to stop here: processes that train together must do so at the same step."""
    if distributed.size() == 1:
        return interrupted
    # Asking at every step would cost a message each.
    return run.step % LOG_EVERY == 0 and distributed.any_process(interrupted, run.device)


def _close_window(run: Run) -> Row:
    """Average the window into a row and empty it."""
    means = _read_window(run).mean((0, 2)).tolist()
    run.window.clear()
    changing = {name: schedule.at(run.step - 1) for name, (schedule, _) in run.scheduled.items()}
    if run.config.learned_noise_var:
        changing["noise_var"] = run.noise_var
    row = {"step": run.step, "seconds": round(run.seconds, 3)}
    return row | dict(zip(Terms._fields, means, strict=True)) | changing


def _read_window(run: Run) -> Tensor:
    """Fetch the window's terms ``[steps, len(Terms), B]``, of all processes; check them.

    Raises:
        NonFiniteLoss: at the first non-finite step, with the state saved.
    """
    if not run.window:
        return torch.empty(0)
    window = distributed.join(torch.stack(run.window)).cpu().double()
    bad = (~window.isfinite()).any(1)
    if not bad.any():
        return window
    save(run, FAILED)
    first = int(bad.any(1).nonzero()[0])
    step = run.step - len(window) + first + 1
    values = zip(Terms._fields, window[first].mean(1).tolist(), strict=True)
    terms = ", ".join(f"{name}={value:g}" for name, value in values)
    raise NonFiniteLoss(
        f"the loss is not finite at step {step} ({terms}; {_blame(run, window[first], step)}): "
        f"try a smaller --lr or a larger --noise-var; the state is in {run.folder / FAILED}"
    )


def _blame(run: Run, terms: Tensor, step: int) -> str:
    """Name the training images whose own terms, those behind the loss, are not finite."""
    size = run.config.batch_size
    order = next(iterate_orders(len(run.images), size, run.config.seed, step - 1))[0]
    images = order[~terms[1:].isfinite().all(0)].tolist()
    if len(images) in (0, size):
        return "all images of the batch" if images else "no image by itself"
    listed = ", ".join(map(str, images[:8])) + (", ..." if len(images) > 8 else "")
    return f"{len(images)} of {size} images: {listed}"
