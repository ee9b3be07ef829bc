"""The commands ``fastsfvae evaluate`` and ``fastsfvae compare``."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from fastsfvae import evaluate
from fastsfvae.cli.failing import fail
from fastsfvae.evaluate.frechet import load_extractor
from fastsfvae.evaluate.proposals import DEFAULT_PROPOSAL, ProposalName
from fastsfvae.ground.atomic import check_writable, new_folder, write_text
from fastsfvae.ground.options import UsageError, parse, say
from fastsfvae.ground.progress import counter
from fastsfvae.results import comparison, evaluation, page, report
from fastsfvae.results.samples import sample_latents
from fastsfvae.training import distributed

_GENERATED_BATCH = 250


@dataclasses.dataclass(frozen=True)
class EvaluateArguments:
    """Measure a trained run on its test images; write JSON, a page and pictures."""

    run: Annotated[Path, arg(metavar="RUN")]
    """Folder of the run, such as runs/sampling-free-mlp-1."""

    settings: evaluation.Settings = dataclasses.field(default_factory=evaluation.Settings)
    """How much work is done."""

    extractor: str = ""
    """FID and KID in the features of your own network: package.module:function builds it."""

    inception: str = ""
    """FID and KID in Inception's features: path of torch-fidelity's weights."""

    download: bool = False
    """FID and KID in Inception's features, whose weights are downloaded."""

    out: Annotated[str | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Folder of the results, which must not exist; default <run>/evaluation-<number>."""


@dataclasses.dataclass(frozen=True)
class CompareArguments:
    """Measure runs on the same test images: differences from the first, image by image.

    Spreads are over images; over seeds as well for groups of runs that differ in their seed alone.
    """

    runs: Annotated[list[str], arg(metavar="RUN[,RUN...] RUN[,RUN...] ...", help_behavior_hint="")]
    """Folders of two or more runs; those that are joined by commas form one group."""

    samples: int = report.WEIGHTS["compare"]
    """Importance weights per image of the log marginal likelihood."""

    proposal: ProposalName = DEFAULT_PROPOSAL
    """What they are drawn from: posterior, linearized, defensive or laplace."""

    elbo_samples: int = 20
    """Draws of the posterior per image of the sampled ELBO."""

    images: int = 0
    """Test images that are compared, the first so many; 0: all."""

    out: Annotated[str | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Folder of the results, which must not exist; default comparison-<number>."""


def evaluate_command(options: list[str]) -> int:
    """Run ``fastsfvae evaluate`` and return its exit code."""
    return _guarded("fastsfvae evaluate", options, _evaluate)


def compare_command(options: list[str]) -> int:
    """Run ``fastsfvae compare`` and return its exit code."""
    return _guarded("fastsfvae compare", options, _compare)


def _guarded(prog: str, options: list[str], command: Callable[[str, list[str]], None]) -> int:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(distributed.process_group())
            command(prog, options)
        except BrokenPipeError:
            raise
        except (UsageError, TypeError, ValueError, RuntimeError, OSError) as error:
            return fail(prog, str(error))
        except KeyboardInterrupt:
            return fail(prog, "interrupted, nothing was written", code=130)
    return 0


def _evaluate(prog: str, options: list[str]) -> None:
    arguments = parse(prog, EvaluateArguments, options)
    networks = (arguments.extractor, arguments.inception, arguments.download)
    if sum(map(bool, networks)) > 1:
        raise UsageError("--extractor, --inception and --download name one network: give one")
    stem = arguments.run / "evaluation"
    writes = distributed.rank() == 0
    if writes:
        _check_out(arguments.out, stem)
    extractor = _extractor(arguments)
    trained = evaluation.load_trained(arguments.run, arguments.settings.images)
    if writes:
        say(f"{trained.folder}: {len(trained.x):,} test images")
    # First, so that an extractor that does not fit is found out before the long part.
    distance, conventions = _distance(trained, extractor) if extractor is not None else ({}, {})
    found = evaluation.evaluate_trained(trained, arguments.settings)
    if not writes:
        return
    found = found._replace(
        sections=found.sections | distance, conventions=found.conventions | conventions
    )
    _show(
        *(arguments.out, stem, f"Evaluation of {found.run}", found, found.verdict),
        *(page.COLUMNS, page.cells(found), found.conventions),
        {name: page.png(figure) for name, figure in page.draw(trained, found).items()},
    )


def _compare(prog: str, options: list[str]) -> None:
    arguments = parse(prog, CompareArguments, options)
    groups = [_group(word) for word in arguments.runs]
    if len(groups) < 2:
        given = f"{len(groups[0])} runs in one group" if groups and groups[0][1:] else "1 run"
        given = given if groups else "no run"
        raise UsageError(f"{given}: name at least two folders, or groups, with a space between")
    settings = evaluation.Settings(
        samples=arguments.samples,
        proposal=arguments.proposal,
        elbo_samples=arguments.elbo_samples,
        images=arguments.images,
    )
    stem = Path("comparison")
    writes = distributed.rank() == 0
    if writes:
        _check_out(arguments.out, stem)
    runs = [[evaluation.load_trained(name, arguments.images) for name in group] for group in groups]
    found = comparison.compare(runs, settings)
    if not writes:
        return
    first, *others = names = comparison.names(runs)
    columns = [*names, *(f"{run} - {first}" for run in others)]
    conventions = comparison.conventions(runs, settings)
    _show(
        *(arguments.out, stem, "Comparison", found._asdict() | {"conventions": conventions}),
        *(found.verdict, columns, comparison.sections(found), conventions),
        {"side by side": page.png(comparison.side_by_side(runs))},
    )


def _group(word: str) -> list[str]:
    """The folders that a word names, joined by commas; what exists with a comma is one folder.

    Raises:
        UsageError: where nothing stands before, between or behind commas.
    """
    parts, folders = word.split(","), []
    while parts:
        # As many parts together as there is a folder of that name; else one.
        ends = (end for end in range(len(parts), 1, -1) if os.path.exists(",".join(parts[:end])))
        end = next(ends, 1)
        folders.append(",".join(parts[:end]))
        del parts[:end]
    if len(folders) > 1 and not all(folders):
        raise UsageError(f"{word!r} has a comma without a folder: give RUN,RUN,...")
    return folders


def _extractor(arguments: EvaluateArguments):
    if arguments.extractor:
        return load_extractor(arguments.extractor)
    if arguments.inception or arguments.download:
        # Where it is downloaded, once.
        with distributed.first_process_first():
            return evaluate.Inception(arguments.inception or None)
    return None


def _distance(
    trained: evaluation.Trained, extractor
) -> tuple[dict[str, dict[str, evaluation.Number]], dict[str, str]]:
    """FID and KID of as many samples as there are test images: a section and its conventions."""
    import torch

    generator, images = trained.generator(), len(trained.x)
    z, origin = sample_latents(trained.config, trained.encoder, images, generator)
    shown = distributed.rank() == 0
    with torch.no_grad(), counter("FID and KID, images", 2 * images, shown) as progress:
        generated = (trained.decoder(part) for part in z.split(_GENERATED_BATCH))
        distance = evaluate.frechet_distance(
            trained.x,
            generated,
            extractor.to(trained.x.device),
            seed=trained.config.seed,
            progress=progress,
        )
    title = "Distance of samples from test images" + (
        "" if distance.comparable else " (not comparable with published FID)"
    )
    numbers = {
        "FID": evaluation.Number(distance.fid),
        "KID": evaluation.Number(distance.kid),
        "KID, spread over subsets": evaluation.Number(distance.kid_spread),
    }
    conventions = {
        "distance": f"f(z) without observation noise, clamped to [0, 1], z ~ {origin}; "
        f"{distance.generated_images:,} samples, {distance.real_images:,} test images; "
        f"{distance.features} features of {distance.extractor}, resized by it alone",
        "distance_weights_sha256": distance.weights_sha256,
    }
    return {title: numbers}, conventions


def _check_out(out: str | None, stem: Path) -> None:
    """Refuse a folder of results that exists or cannot be written, before there are results."""
    if out is not None and Path(out).exists():
        raise UsageError(f"--out {out} exists: give another folder")
    check_writable(stem if out is None else Path(out))


def _show(
    out: str | None,
    stem: Path,
    title: str,
    fields: Any,
    verdict: str,
    columns: list[str],
    sections: dict[str, dict[str, list[str]]],
    conventions: dict[str, Any],
    figures: dict[str, bytes],
) -> None:
    """Write JSON, page and pictures into a new folder, all or nothing; print the table."""
    numbered = (stem.with_name(f"{stem.name}-{number}") for number in count(1))
    folder = next(f for f in numbered if not f.exists()) if out is None else Path(out)
    try:
        with new_folder(folder) as inside:
            write_text(inside / f"{stem.name}.json", report.json_text(fields))
            text = page.html(title, verdict, columns, sections, conventions, figures)
            write_text(inside / f"{stem.name}.html", text)
            for name, data in figures.items():
                (inside / f"{name.replace(' ', '-')}.png").write_bytes(data)
    finally:
        # All there is where the disk is full; behind the files, as its reader may be gone.
        page.print_table(title, columns, sections)
        print(verdict)
        if "log_ml" in conventions:
            print(f"log ML: {conventions['log_ml']}; {conventions['log_ml_elsewhere']}")
    print(f"results, pictures and conventions in {folder / f'{stem.name}.html'}")
