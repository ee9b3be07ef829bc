"""A training run: what it consists of, how it is started, saved and taken up again."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn

from fastsfvae.data.batches import ImageSet
from fastsfvae.data.load import Loaded
from fastsfvae.data.pixels import to_unit
from fastsfvae.ground.atomic import write_text
from fastsfvae.ground.locks import file_locks
from fastsfvae.objectives import (
    ExactMarginal,
    Objective,
    RegularizedAutoEncoder,
    SamplingFree,
    Terms,
    VariationalLaplace,
)
from fastsfvae.training import distributed
from fastsfvae.training.capture import Step, capture_objective
from fastsfvae.training.checkpoint import (
    CHECKPOINT,
    CONFIG,
    FolderLock,
    load_config,
    load_modules,
    newest_checkpoint,
    save_checkpoint,
)
from fastsfvae.training.config import CHANGEABLE, TrainConfig
from fastsfvae.training.methods import WITHOUT_PRIOR
from fastsfvae.training.metrics_csv import METRICS, rewind_metrics
from fastsfvae.training.model import Model
from fastsfvae.training.networks import build_networks
from fastsfvae.training.objective import learned_modules, make_objective, make_start
from fastsfvae.training.schedules import Schedule
from fastsfvae.training.seeds import EVALUATION, WEIGHTS, mix_seed

LEFT_OUT = "left_out.txt"
# They may ask for a Jacobian that a decoder does not have.
_LINEARISING = (SamplingFree, VariationalLaplace, ExactMarginal, RegularizedAutoEncoder)
COLUMNS = ("step", "seconds", *Terms._fields)


@dataclass
class Phase:
    """A part of a run that is trained by one objective.

    Attributes:
        first: steps that are done before it begins.
        objective: called with every batch.
        graphed: its step as a CUDA graph, if it is to be one.
    """

    first: int
    objective: Objective
    graphed: Step | None = None


@dataclass
class Run:
    """Everything that a training step reads or changes.

    Attributes:
        folder: where its files lie.
        config: what is trained.
        device: where the modules and the images lie.
        model: encoder, decoder and the objective of the next step.
        phases: what it is trained by, one after another; the last is its method's.
        optimizer: of the encoder and the decoder.
        images: training images.
        scale: how the images' stored values became 0..255.
        scheduled: the settings that change while training, each its schedule and the 0-d tensor
            on the device that the objective reads.
        step: optimiser steps done.
        seconds: time spent training.
        window: terms of the steps since the last row of metrics.csv, ``[len(Terms), B]`` each, on
            the device: reading them every step would make the host wait for it.
        lock: held while this process trains in the folder.
    """

    config: TrainConfig
    device: torch.device
    model: Model
    phases: list[Phase]
    optimizer: torch.optim.Optimizer
    images: ImageSet
    scale: str
    scheduled: dict[str, tuple[Schedule, Tensor]]
    folder: Path = Path()
    step: int = 0
    seconds: float = 0.0
    window: list[Tensor] = field(default_factory=list)
    lock: FolderLock | None = None

    @property
    def encoder(self) -> nn.Module:
        """The module x -> (mean, log_var)."""
        return self.model.encoder

    @property
    def decoder(self) -> nn.Module:
        """The module z -> x."""
        return self.model.decoder

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What is trained, by its name in a checkpoint."""
        networks = {"encoder": self.encoder, "decoder": self.decoder}
        return networks | dict(self.model.learned.items())

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of metrics.csv."""
        learned = ("noise_var",) if self.config.learned_noise_var else ()
        return (*COLUMNS, *self.scheduled, *learned)

    @property
    def noise_var(self) -> float:
        """The variance c of the observation noise, as far as it is learned."""
        if not self.config.learned_noise_var:
            return self.config.noise_var
        return self.model.learned["noise_var"]().item()

    @property
    def judged(self) -> TrainConfig:
        """The configuration with `noise_var`: what densities are judged by."""
        return replace(self.config, noise_var=self.noise_var)

    @property
    def objective(self) -> Objective:
        """The method's own, which the run ends with."""
        return self.phases[-1].objective

    @property
    def phase(self) -> Phase:
        """What the next step is part of."""
        return next(phase for phase in reversed(self.phases) if phase.first <= self.step)

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.config.steps


def start(config: TrainConfig, out: str | os.PathLike[str] | None = None) -> Run:
    """Prepare a new run; the folder is made only when everything else has succeeded.

    Args:
        config: what to train.
        out: the run's folder, which must not exist; None takes the first free
            ``runs/<method>-<model>-<number>``.

    Raises:
        TypeError, ValueError, RuntimeError: for a configuration, model or device that does not
            work, in one line.
        FileExistsError: where `out` exists.
    """
    writes = distributed.rank() == 0
    if writes and out is not None and Path(out).exists():
        raise _exists(out)
    # A resumed run of more steps must not stretch its schedules.
    config = replace(config, schedule_steps=config.schedule_steps or config.steps)
    run, data = _prepare(config)
    _capture(run)
    if writes:
        run.folder = _make_folder(config, out)
        run.lock = FolderLock(run.folder)
        try:
            rewind_metrics(run.folder / METRICS, 0, run.columns)
            save(run)
            _write_left_out(run.folder, data)
            # The last of all: a folder that has it can be resumed.
            write_text(run.folder / CONFIG, config.to_json())
        except Exception:
            # A disk that was full, or a state that no file can hold, must not use up the name.
            for name in (METRICS, CHECKPOINT, LEFT_OUT):
                (run.folder / name).unlink(missing_ok=True)
            run.folder.rmdir()
            raise
    return run


def resume(folder: str | os.PathLike[str], config: TrainConfig | None = None) -> Run:
    """Take up a run at its last checkpoint, exactly as if it had not been interrupted.

    Args:
        folder: the run's folder.
        config: the run's own with other `steps`, `device`, `backend`, ...; None keeps all.

    Raises:
        ValueError: for a folder without a run or with one that is being trained, a damaged or
            foreign file, or a changed setting.
    """
    folder = Path(folder)
    saved = load_config(folder)
    writes = distributed.rank() == 0
    lock = FolderLock(folder) if writes else None
    config = saved if config is None else config
    for name, value in vars(saved).items():
        if name not in CHANGEABLE and getattr(config, name) != value:
            raise ValueError(
                f"{name}={getattr(config, name)!r} but {folder} was trained with {value!r}: "
                f"only {', '.join(CHANGEABLE)} can change on --resume"
            )
    path, state = newest_checkpoint(folder)
    run, _ = _prepare(config)
    run.folder, run.lock = folder, lock
    _restore(run, path, state)
    if run.step > config.steps:
        raise ValueError(
            f"steps={config.steps} but {folder} is already at step {run.step}: give more steps"
        )
    _capture(run)
    if writes:
        rewind_metrics(folder / METRICS, run.step, run.columns)
        write_text(folder / CONFIG, config.to_json())
    return run


def save(run: Run, name: str = CHECKPOINT) -> None:
    """Write the run's state into its folder, atomically; every process takes part."""
    window = distributed.join(torch.stack(run.window)) if run.window else torch.empty(0)
    if distributed.rank() > 0:
        return
    save_checkpoint(
        run.folder / name,
        {
            **{name: module.state_dict() for name, module in run.modules.items()},
            "optimizer": run.optimizer.state_dict(),
            "step": run.step,
            "seconds": run.seconds,
            "window": window,
        },
    )


def _restore(run: Run, path: Path, state: dict) -> None:
    load_modules(path, state, **run.modules)
    try:
        run.optimizer.load_state_dict(state["optimizer"])
        for group in run.optimizer.param_groups:
            # How it runs is this configuration's, not the checkpoint's.
            group["capturable"] = run.config.cuda_graph
        run.step, run.seconds = int(state["step"]), float(state["seconds"])
        run.model.objective = run.phase.objective
        for schedule, value in run.scheduled.values():
            # As the last step left it: what is evaluated may never be trained again.
            value.fill_(schedule.at(max(run.step - 1, 0)))
        if len(state["window"]):
            rows = distributed.rows(run.config.batch_size)
            run.window = list(state["window"][:, :, rows].to(run.device))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold the state of a training run: {error!r}") from error


def _write_left_out(folder: Path, data: Loaded) -> None:
    """List the images that could not be read, where there are any: a path and the reason each."""
    if data.left_out:
        write_text(
            folder / LEFT_OUT, "".join(f"{name}\t{reason}\n" for name, reason in data.left_out)
        )


def _prepare(config: TrainConfig) -> tuple[Run, Loaded]:
    # What cannot run should say so before anything is read or written.
    file_locks()
    device = config.training_device()
    if config.batch_size % distributed.size():
        raise ValueError(
            f"batch_size={config.batch_size} is shared by {distributed.size()} processes: give a "
            "multiple of their number"
        )
    config.check_share(config.batch_size // distributed.size())
    with distributed.first_process_first():
        data = config.load_set("train")
        # A set that cannot be tested on should say so before anything is trained.
        config.load_images("test")
    images = data.images
    if config.batch_size > len(images):
        raise ValueError(
            f"batch_size={config.batch_size} but there are {len(images)} training images"
        )
    if len(images) < 2 and config.method in WITHOUT_PRIOR:
        raise ValueError(
            f"method={config.method!r} with one training image: no density can be fitted to its "
            "latents, give more images"
        )
    torch.manual_seed(mix_seed(config.seed, WEIGHTS, 0))
    encoder, decoder = (module.to(device) for module in build_networks(config))
    scheduled = {
        name: (schedule, torch.tensor(getattr(config, name), device=device))
        for name, schedule in config.schedules.items()
        if not schedule.constant
    }
    values = {name: value for name, (_, value) in scheduled.items()}
    learned = learned_modules(config).to(device)
    beside = dict(learned.items())
    phases = [Phase(config.start.steps, make_objective(config, decoder, beside, **values))]
    if config.start.steps:
        phases.insert(0, Phase(0, make_start(config, decoder, beside, **values)))
    bf16 = config.precision == "bf16"
    model = Model(encoder, decoder, phases[0].objective, learned, autocast=bf16)
    if config.compile:
        model.compile()
    # What cannot run should say so before anything is written: a decoder or backend that cannot be
    # linearised, more draws than the memory holds.
    for phase in phases:
        if isinstance(phase.objective, _LINEARISING):
            z = torch.zeros(2, config.latent_dim, device=device)
            phase.objective(to_unit(images[:2].to(device)), z, z)
    if config.samples > 1:
        draws = config.samples * (config.batch_size // distributed.size())
        with torch.no_grad():
            decoder.eval()(torch.zeros(draws, config.latent_dim, device=device))
        decoder.train()
    optimizer = torch.optim.Adam(
        model.parameters(), lr=config.lr, fused=True, capturable=config.cuda_graph
    )
    budget = round(config.data_budget * 2**30) or None
    image_set = ImageSet(images, device, budget)
    run = Run(config, device, model, phases, optimizer, image_set, data.scale, scheduled)
    return run, data


def _capture(run: Run) -> None:
    """Record the steps' graphs; only now, since they read weights and moments where they lie."""
    if not run.config.cuda_graph:
        return
    x = to_unit(run.images[: run.config.batch_size])
    settings = x, run.config.latent_dim, torch.bfloat16 if run.model.autocast else None
    for phase in run.phases:
        given = phase.objective, run.encoder, run.optimizer
        phase.graphed = capture_objective(*given, *settings)


def evaluation_generator(config: TrainConfig, device: torch.device) -> torch.Generator:
    """The noise of a run's final evaluation, apart from all that it was trained with."""
    return torch.Generator(device).manual_seed(mix_seed(config.seed, EVALUATION, 0))


def _make_folder(config: TrainConfig, out: str | os.PathLike[str] | None) -> Path:
    model = config.model.replace(":", "-")
    numbered = (Path("runs") / f"{config.method}-{model}-{number}" for number in count(1))
    for folder in numbered if out is None else [Path(out)]:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            # Another run may have been started meanwhile: making it is what decides.
            continue
        return folder
    raise _exists(out)


def _exists(out: str | os.PathLike[str] | None) -> FileExistsError:
    return FileExistsError(f"--out {out} exists: give another folder, or continue it with --resume")
