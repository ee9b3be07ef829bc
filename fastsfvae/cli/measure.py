"""The commands ``fastsfvae evaluate`` and ``fastsfvae compare``."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from fastsfvae import evaluate
from fastsfvae.evaluate.frechet import load_extractor
from fastsfvae.ground.atomic import replacing, write_text
from fastsfvae.ground.options import UsageError, fail, parse, require_extras
from fastsfvae.results import comparison, evaluation, page

_EXTRAS = ("tyro", "rich", "matplotlib")
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
    """Measure runs on the same test images: differences from the first, image by image."""

    runs: Annotated[list[Path], arg(metavar="RUN RUN ...", help_behavior_hint="")]
    """Folders of two or more runs."""

    samples: int = 1_000
    """Importance weights per image of the log marginal likelihood."""

    proposal: str = "defensive"
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
    try:
        require_extras(_EXTRAS, "train")
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
    folder = _folder(arguments.out, arguments.run / "evaluation")
    extractor = _extractor(arguments)
    trained = evaluation.load_trained(arguments.run, arguments.settings.images)
    print(f"{trained.folder}: {len(trained.x):,} test images", file=sys.stderr)
    found = evaluation.evaluate_trained(trained, arguments.settings)
    if extractor is not None:
        found = _with_distance(found, trained, extractor)
    figures = {name: page.png(figure) for name, figure in page.draw(trained, found).items()}
    sections = page.cells(found)
    title = f"Evaluation of {found.run}"
    _write(folder, "evaluation", found.to_json(), figures)
    text = page.html(title, page.COLUMNS, sections, found.conventions, figures)
    write_text(folder / "evaluation.html", text)
    page.print_table(title, page.COLUMNS, sections)
    print(f"results, pictures and conventions in {folder / 'evaluation.html'}")


def _compare(prog: str, options: list[str]) -> None:
    arguments = parse(prog, CompareArguments, options)
    if len(arguments.runs) < 2:
        raise UsageError(f"{len(arguments.runs)} run: name at least two folders")
    settings = evaluation.Settings(
        samples=arguments.samples,
        proposal=arguments.proposal,
        elbo_samples=arguments.elbo_samples,
        images=arguments.images,
    )
    folder = _folder(arguments.out, Path("comparison"))
    runs = [evaluation.load_trained(name, arguments.images) for name in arguments.runs]
    found = comparison.compare(
        runs,
        samples=settings.samples,
        proposal=settings.proposal,
        elbo_samples=settings.elbo_samples,
    )
    first, *others = names = comparison.names(runs)
    columns = [*names, *(f"{run} - {first}" for run in others)]
    rows = {
        name: [
            f"{v.mean:,.2f} ± {v.standard_error:.2f}" for v in (*means, *found.differences[name])
        ]
        for name, means in found.means.items()
    }
    sections = {"Test images, ± standard error over images; differences are paired": rows}
    conventions = comparison.conventions(runs, settings)
    figures = {"side by side": page.png(comparison.side_by_side(runs))}
    _write(folder, "comparison", {**found.to_json(), "conventions": conventions}, figures)
    text = page.html("Comparison", columns, sections, conventions, figures)
    write_text(folder / "comparison.html", text)
    page.print_table("Comparison", columns, sections)
    print(f"results, picture and conventions in {folder / 'comparison.html'}")


def _extractor(arguments: EvaluateArguments):
    if arguments.extractor:
        return load_extractor(arguments.extractor)
    if arguments.inception or arguments.download:
        return evaluate.Inception(arguments.inception or None)
    return None


def _with_distance(
    found: evaluation.Evaluation, trained: evaluation.Trained, extractor
) -> evaluation.Evaluation:
    """Add FID and KID between the test images and as many samples of the prior."""
    import torch

    generator, m = trained.generator(), trained.mean.shape[1]
    z = torch.randn(len(trained.x), m, generator=generator, device=trained.x.device)
    with torch.no_grad():
        generated = (trained.decoder(part) for part in z.split(_GENERATED_BATCH))
        distance = evaluate.frechet_distance(
            trained.x, generated, extractor.to(trained.x.device), seed=trained.config.seed
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
        "distance": f"f(z) without observation noise, clamped to [0, 1], z ~ N(0, I); "
        f"{distance.generated_images:,} samples, {distance.real_images:,} test images; "
        f"{distance.features} features of {distance.extractor}, resized by it alone",
        "distance_weights_sha256": distance.weights_sha256,
    }
    return found._replace(
        sections=found.sections | {title: numbers}, conventions=found.conventions | conventions
    )


def _folder(out: str | None, stem: Path) -> Path:
    """The folder to write into, which does not exist yet."""
    if out is None:
        return next(
            folder
            for folder in (stem.with_name(f"{stem.name}-{number}") for number in count(1))
            if not folder.exists()
        )
    if Path(out).exists():
        raise UsageError(f"--out {out} exists: give another folder")
    return Path(out)


def _write(folder: Path, name: str, fields: dict[str, Any], figures: dict[str, bytes]) -> None:
    folder.mkdir(parents=True)
    write_text(folder / f"{name}.json", json.dumps(fields, indent=2, allow_nan=False) + "\n")
    for title, data in figures.items():
        with replacing(folder / f"{title.replace(' ', '-')}.png") as file:
            file.write(data)
