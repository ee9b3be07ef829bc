"""Train and evaluate the cells of a table or figure; what is finished is not done again.

Below the folder of results, ``runs/<cell>-seed<k>-<digest>/`` is an ordinary training run and
``runs/records/<cell>-seed<k>-<digest>.json`` what was measured of it. The digests stand for the
configuration, so that another version of a protocol never meets the files of this one. Tables share
the runs of a cell that both have; where one has trained it past the step that another measures it
at, that one trains it anew, in a folder with -2 behind its name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fastsfvae import training
from fastsfvae.ground.atomic import write_text
from fastsfvae.ground.provenance import commit, device_name
from fastsfvae.reproduce.cells import Cell, Result
from fastsfvae.training.checkpoint import CONFIG, FolderLock, load_config, newest_checkpoint
from fastsfvae.training.config import CHANGEABLE, TrainConfig
from fastsfvae.training.monitors import monitors

RUNS = "runs"
_RECORDS = "records"
_INPUT_ERRORS = (TypeError, ValueError, RuntimeError, OSError)


class Interrupted(Exception):
    """Ctrl-C or SIGTERM; what was trained is saved."""


def run_cells(cells: Sequence[Cell], out: Path, say: Callable[[str], object]) -> None:
    """Bring every cell that can be run to its end.

    Args:
        cells: what to run.
        out: the folder of results.
        say: told, in one line each, what is run, missing or failed.

    Raises:
        Interrupted: between two steps, with the state saved.
    """
    for cell in cells:
        if (missing := _missing_data(cell.config)) is not None:
            say(f"{cell.name}: left out, {missing}")
            continue
        for seed in range(cell.seeds):
            try:
                _run(cell, seed, out, say)
            except _INPUT_ERRORS as error:
                say(f"{cell.name}, seed {seed}: failed, {error}")


def stored_results(cells: Sequence[Cell], out: Path) -> list[Result]:
    """The runs that were measured at one step or more, in the cells' order; nothing is trained."""
    results = []
    for cell in cells:
        for seed in range(cell.seeds):
            path, folder = _paths(cell, seed, out)
            record = _read(path)
            folder = folder.with_name(record.get("folder", folder.name))
            result = Result(cell, seed, folder, record)
            if result.steps:
                results.append(result)
    return results


def stored_records(cells: Sequence[Cell], out: Path) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """What is stored of the cells' runs, also of those that were begun and not measured yet."""
    for cell in cells:
        for seed in range(cell.seeds):
            path, _ = _paths(cell, seed, out)
            if path.is_file():
                yield cell, _read(path)


def _run(cell: Cell, seed: int, out: Path, say: Callable[[str], object]) -> None:
    path, folder = _paths(cell, seed, out)
    record = _read(path)
    left = _steps_left(cell, record)
    if left:
        say(f"{cell.name}, seed {seed}: {cell.at[-1]:,} steps")
    if left and cell.step_ratio is not None and "step_ratio" not in record:
        # From the start: a run cannot go back to what another ratio would make of it.
        record["step_ratio"] = cell.step_ratio
        _write(path, record)
    run = None
    for step in left:
        run = _prepare(cell, seed, step, folder) if run is None else _extend(run, step)
        with monitors(run) as watching:
            training.train(run, *watching)
        if not run.finished:
            raise Interrupted
        run.model.eval()
        seconds = {"seconds": round(run.seconds, 2)}
        record["measured"][str(step)] = cell.measure(run) | seconds
        record |= _origin(cell, run)
        # Another call may have measured other steps meanwhile, of a run beside this one.
        record["measured"] = _read(path)["measured"] | record["measured"]
        _write(path, record)


def _prepare(cell: Cell, seed: int, step: int, folder: Path) -> training.Run:
    """Start the run, or take it up, to be trained to a step."""
    folder = _not_past(step, folder)
    if folder.exists():
        # Only how long and where it runs is this call's.
        now = {name: getattr(cell.config, name) for name in CHANGEABLE} | {"steps": step}
        return training.resume(folder, dataclasses.replace(load_config(folder), **now))
    # Its schedules last until the end, not until it is first measured.
    length = cell.config.schedule_steps or cell.at[-1]
    changes: dict[str, Any] = {"seed": seed, "steps": step, "schedule_steps": length}
    return training.start(dataclasses.replace(cell.config, **changes), folder)


def _not_past(step: int, folder: Path) -> Path:
    """The folder, or one beside it, whose run is nearest to the step and not past it."""
    reached, first = {}, folder.name
    for number in itertools.count(2):
        if not folder.exists():
            break
        # Whoever takes the run up says what is wrong with its files.
        steps = newest_checkpoint(folder)[1].get("step", 0)
        if steps <= step:
            reached[folder] = steps
        folder = folder.with_name(f"{first}-{number}")
    return max(reached, key=reached.__getitem__, default=folder)


def _extend(run: training.Run, step: int) -> training.Run:
    """Let a finished run go on to a later step; to take it up from its files would cost seconds."""
    run.config = dataclasses.replace(run.config, steps=step)
    run.lock = FolderLock(run.folder)
    write_text(run.folder / CONFIG, run.config.to_json())
    return run


def _missing_data(config: TrainConfig) -> str | None:
    """Why a configuration's data cannot be read; None if it can."""
    try:
        for split in ("train", "test"):
            config.load_images(split)
    except _INPUT_ERRORS as error:
        return str(error)
    return None


def _paths(cell: Cell, seed: int, out: Path) -> tuple[Path, Path]:
    """The record and the run's folder."""
    trained = {k: v for k, v in vars(cell.config).items() if k not in CHANGEABLE and k != "seed"}
    length = 0 if cell.continues else cell.at[-1]
    name = f"{cell.slug}-seed{seed}"
    folder = out / RUNS / f"{name}-{_digest(trained, length)}"
    record = out / RUNS / _RECORDS / f"{name}-{_digest(trained, length, repr(cell.measure))}.json"
    return record, folder


def _digest(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _read(path: Path) -> dict[str, Any]:
    """A stored record, or an empty one."""
    return json.loads(path.read_text()) if path.is_file() else {"measured": {}}


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=1) + "\n")


def _steps_left(cell: Cell, record: dict[str, Any]) -> list[int]:
    return [step for step in cell.at if str(step) not in record["measured"]]


def _origin(cell: Cell, run: training.Run) -> dict[str, Any]:
    """Where a record comes from."""
    return {
        "cell": cell.name,
        "folder": run.folder.name,
        "config": dataclasses.asdict(run.config),
        "measure": repr(cell.measure),
        "device": device_name(run.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
    }
