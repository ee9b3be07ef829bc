"""The model card of an exported run. Needs huggingface_hub."""

from __future__ import annotations

import dataclasses
import math
import shlex
from typing import Any, NamedTuple

try:
    import huggingface_hub as hub
except ImportError as error:
    raise ImportError("exports need huggingface_hub: pip install 'fastsfvae[hub]'") from error

from fastsfvae.ground.provenance import VERSION
from fastsfvae.results import report
from fastsfvae.results.page import CAPTIONS
from fastsfvae.results.samples import without_density
from fastsfvae.training.config import CHANGEABLE, TrainConfig

LIBRARY = "fastsfvae"
PICTURES = tuple(f"{name}.png" for name in ("reconstructions", "samples", "manifold", "curves"))

# Data sets under the names that the hub has for them; others are not known to be there.
_DATA = {
    "digits": "ylecun/mnist",
    "mnist": "ylecun/mnist",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
}
_TASK = "unconditional-image-generation"
# What training maximises; the loss is minus that.
_OBJECTIVES = {
    "sampling-free": "the closed-form log-likelihood of the decoder linearised at the posterior "
    "mean, less the KL divergence. **It is no ELBO and bounds nothing**: a lower loss need not be "
    "a better model",
    "sampling": "the ELBO, estimated by draws of the posterior",
    "beta-vae": "the ELBO with a weighted KL divergence",
    "iwae": "the importance-weighted bound of log p(x)",
    "stl": "the ELBO by draws of the posterior, its gradient without the score of q",
    "dreg": "the importance-weighted bound of log p(x), its gradient doubly reparameterised",
    "hiwae": "the importance-weighted bound of log p(x) by hierarchical draws",
    "vlae": "the ELBO of a Laplace approximation at the posterior's mode",
    "exact-marginal": "log p(x) itself, in closed form",
    "rem": "log p(x) for the decoder by self-normalised weights, and another for the encoder: "
    "it is no ELBO",
    "free-bits": "the ELBO where the first nats of the KL divergence cost nothing: it is no ELBO",
    "delta-vae": "the ELBO, with posteriors of a minimum rate",
    "householder": "the ELBO, with posteriors of full covariance",
    "auto-encoder": "the log-density of x around the decoder at the mean: it is no ELBO",
    "rae": "the log-density of x around the decoder at the mean, regularised: it is no ELBO",
    "wae-mmd": "the log-density of x around the decoder at the mean, minus a weighted distance of "
    "the latents from the prior: it is no ELBO",
    "swae": "the log-density of x around the decoder at the mean, minus a weighted distance of "
    "the latents from the prior: it is no ELBO",
    "cwae": "the log-density of x around the decoder at the mean, minus a weighted distance of "
    "the latents from the prior: it is no ELBO",
}


class Card(NamedTuple):
    """What a model card says.

    Attributes:
        name: of the model: its folder's or its repository's.
        config: of the run, with the noise variance that was learned.
        step: optimiser steps done.
        command: what trained it; "" where that is not known.
        results: of the run after these steps, or why there are none.
        pictures: those that lie beside the card.
        license: as the hub names it; None where it is not known.
    """

    name: str
    config: TrainConfig
    step: int
    command: str
    results: report.Report | str
    pictures: tuple[str, ...]
    license: str | None = None

    def text(self) -> str:
        """The card, YAML and Markdown."""
        config, data = self.config, _DATA.get(self.config.data)
        title = self.name.rpartition("/")[2]
        found: dict[str, Any] = {}
        if isinstance(self.results, report.Report):
            # What is no bound is nothing to rank models by.
            test = {k: v for k, v in self.results.splits["test"].items() if k != "objective"}
            label = self.results.conventions["data"]
            results = [
                hub.EvalResult(
                    task_type=_TASK,
                    dataset_type=data or label,
                    dataset_name=label,
                    dataset_split="test",
                    metric_type=name,
                    metric_name=name,
                    metric_value=value.mean,
                )
                for name, value in test.items()
                if math.isfinite(value.mean)
            ]
            found = {"metrics": list(test), "eval_results": results or None}
        header = hub.ModelCardData(
            model_name=title,
            library_name=LIBRARY,
            pipeline_tag=_TASK,
            tags=["vae", "variational-autoencoder", config.method],
            datasets=[data] if data else None,
            license=self.license,
            **found,
        )
        parts = [f"# {title}", self._what(), *self._pictures(), self._load()]
        parts += ["## Results", *self._results(), "## Training", self._training()]
        return str(hub.ModelCard(f"---\n{header}\n---\n\n" + "\n\n".join(parts) + "\n"))

    def _what(self) -> str:
        config, results = self.config, self.results
        source = results.conventions["data"] if isinstance(results, report.Report) else config.data
        size = " x ".join(map(str, config.model_config.image_shape))
        learned = ", which was learned" if config.learned_noise_var else ""
        start = f", of which {config.warm_start} is a warm start" if config.warm_start else ""
        weight = ""
        if config.kl_weight != 1 or config.kl_weight_schedule != "constant":
            weight = (
                f" The KL divergence has the weight {config.kl_weight:g} in it (schedule: "
                f"{config.kl_weight_schedule})."
            )
        judged = (
            "Judge the model by the sampled ELBO or the log marginal likelihood (log ML), never "
            "by its loss."
        )
        if unjudged := without_density(config):
            judged = f"There is no log p(x) to judge it by: {unjudged}."
        return (
            f"A Gaussian variational auto-encoder, trained on `{source}` with fastsfvae by "
            f"`{config.method}`: model `{config.model}`, {config.latent_dim} latent dimensions, "
            f"{self.step:,} steps{start}. Images are {size} with pixels in [0, 1]; the decoder's "
            f"output is the mean of a Gaussian of variance c = {config.noise_var:g}{learned}.\n\n"
            f"Training maximises {_OBJECTIVES[config.method]}.{weight} {judged}"
        )

    def _pictures(self) -> list[str]:
        captions = ((name, CAPTIONS[name.removesuffix(".png")]) for name in self.pictures)
        return [f"![{caption}]({name})\n\n*{caption}.*" for name, caption in captions]

    def _load(self) -> str:
        own, build = ":" in self.config.model, ""
        note = ""
        if own:
            build = ", build=build"
            note = (
                f"\n\nEncoder and decoder are its author's own, `{self.config.model}`: "
                "`build` is that function. No name that stands in these files is imported."
            )
        return (
            "## How to load it\n\nWith `pip install 'fastsfvae[hub]'`:\n\n```python\n"
            "from fastsfvae.hub import TrainedVAE\n\n"
            f'vae = TrainedVAE.from_pretrained("{self.name}"{build})\n'
            "mean, log_var = vae.encoder(images)  # images [B, C, H, W] in [0, 1]\n"
            "reconstruction = vae.decoder(mean)  # the same as vae(images)\n```\n\n"
            f"The name is that of a folder or of a repository on the hub.{note}"
        )

    def _results(self) -> list[str]:
        if isinstance(self.results, str):
            return [f"None: {self.results}."]
        lines = ["| | train | test |", "|---|---|---|"]
        for label, *cells in report.rows(self.results, self.config):
            train, test = (" ".join(cell.split()) for cell in cells)
            lines.append(f"| {label} | {train} | {test} |")
        split = self.results.conventions["split"]
        meaning = "\n".join(f"- {note}" for note in report.notes(self.results, self.config))
        numbers = f"{meaning}\n- {split}; all conventions are in [results.json](results.json)"
        return ["\n".join(lines), numbers]

    def _training(self) -> str:
        parts = []
        if self.command:
            parts.append(f"```\n{self.command}\n```")
        versions = f"exported with fastsfvae {VERSION}"
        if isinstance(self.results, report.Report):
            c = self.results.conventions
            origin = f" at commit {c['commit']}" if c["commit"] else ""
            versions = f"measured with fastsfvae {c['fastsfvae']}{origin}, torch {c['torch']}; " + (
                versions
            )
        return "\n\n".join([*parts, versions[0].upper() + versions[1:] + "."])


def command(config: TrainConfig) -> str:
    """The command that trains a run: every option that is not its default.

    Args:
        config: of the run, as its own folder has it.
    """
    words = ["fastsfvae", "train"]
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), f"--{field.name.replace('_', '-')}"
        same = value == field.default or (field.name, value) == ("schedule_steps", config.steps)
        if field.name == "data_dir" and value:
            # Where it lay is nobody else's business.
            words += [flag, "DIR"]
        elif not same and (field.name == "steps" or field.name not in CHANGEABLE):
            words += [flag] if value is True else [flag, str(value)]
    return shlex.join(words)
