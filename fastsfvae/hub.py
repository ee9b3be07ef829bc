"""Trained models in folders that the Hugging Face hub understands, and on the hub.

    vae = TrainedVAE.from_run("runs/sampling-free-mlp-1")
    vae.save_pretrained("digits-vae")               # or vae.push_to_hub("user/digits-vae")
    vae = TrainedVAE.from_pretrained("digits-vae")  # or "user/digits-vae"

A folder holds the weights as model.safetensors, the run's configuration as config.json, a model
card as README.md, and the results and pictures of the run. Nothing in it is executed when it is
loaded. docs/hub.md is the page on it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastsfvae.ground.atomic import new_folder
from fastsfvae.ground.options import one_line
from fastsfvae.results.card import LIBRARY, PICTURES, Card, command, hub
from fastsfvae.results.report import RESULTS, Report, load_report
from fastsfvae.training.checkpoint import (
    CONFIG,
    EXPORTED,
    Build,
    Saved,
    load_checkpoint,
    load_config,
    load_saved,
    save_checkpoint,
)
from fastsfvae.training.config import CHANGEABLE, TrainConfig

if TYPE_CHECKING:
    from typing_extensions import Self

CARD = "README.md"
# How it runs is its user's, and where the data lay is nobody else's.
_OF_THE_MACHINE = {name: getattr(TrainConfig, name) for name in CHANGEABLE if name != "steps"}


class TrainedVAE(nn.Module, hub.PyTorchModelHubMixin, library_name=LIBRARY):
    """A trained encoder and decoder with the configuration of their run.

    A `PyTorchModelHubMixin`, whose three methods are stricter here: what they write appears whole
    or not at all, takes the place of nothing but an export, and is read only if its checksum holds.
    It is made by `from_run` or `from_pretrained`, on the CPU and in evaluation mode.

    Attributes:
        encoder: x ``[B, C, H, W]`` -> (mean, log_var), each ``[B, m]``; of a householder run the
            covariance's factor ``[B, m, m]`` in place of log_var.
        decoder: z ``[B, m]`` -> ``[B, C, H, W]``.
        learned: what was trained beside them, such as the observation noise's variance.
        config: of the run, with the noise_var that was learned, where it was.
        step: optimiser steps done.
    """

    encoder: nn.Module
    decoder: nn.Module
    learned: nn.ModuleDict

    def __init__(self, saved: Saved, files: dict[str, bytes], card: Card | None = None) -> None:
        super().__init__()
        self.encoder, self.decoder, self.learned = saved.encoder, saved.decoder, saved.learned
        self.config = dataclasses.replace(saved.config, **_OF_THE_MACHINE)
        self.step = saved.step
        self._card = card
        self._files = files
        self._digest = _digest(self)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct images: the decoder at the posterior mean.

        Args:
            x: ``[B, C, H, W]`` with pixels in [0, 1].

        Returns:
            ``[B, C, H, W]``.
        """
        output: Tensor = self.decoder(self.encoder(x)[0])
        return output

    @classmethod
    def from_run(cls, run: str | os.PathLike[str], *, build: Build | None = None) -> Self:
        """Take a run's last checkpoint.

        Its results and pictures come along where they are of that checkpoint.

        Args:
            run: the folder, e.g. ``runs/sampling-free-mlp-1``.
            build: as in `fastsfvae.load`.

        Raises:
            ValueError: as `fastsfvae.load`, or for a folder that is no run's, or a run at step 0.
        """
        folder = Path(run)
        if (folder / EXPORTED).is_file():
            raise ValueError(f"{folder} is an export, not a run: load it by from_pretrained")
        saved = load_saved(folder, build)
        if not saved.step:
            raise ValueError(f"{folder} has not been trained for a step: resume it first")
        files: dict[str, bytes] = {}
        results: Report | str = load_report(folder) or "the run was interrupted, or not evaluated"
        if isinstance(results, Report):
            if (at := results.conventions["steps"]) == saved.step:
                files = _read(folder, (RESULTS, *PICTURES))
            else:
                results = f"those of the run are from step {at:,}, before it went on"
        pictures = tuple(name for name in PICTURES if name in files)
        asked = load_config(folder)
        if saved.step < asked.steps:
            asked = dataclasses.replace(asked, steps=saved.step)
        card = Card("", saved.config, saved.step, command(asked), results, pictures)
        return cls(saved, files, card)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        build: Build | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """Load what `save_pretrained` or `push_to_hub` wrote; nothing in it is executed.

        Args:
            pretrained_model_name_or_path: a folder, or else a repository of the hub,
                ``user/name``.
            build: the function that builds (encoder, decoder) of a model of your own, trained by
                ``--model package.module:function``. It is never imported by the name in a file.
            revision: branch, tag or commit of the repository.
            token: of the hub's account; None takes the one that is stored.
            cache_dir: where the hub's files are kept.
            force_download: whether to fetch them although they are there.
            local_files_only: whether to take what is there and ask nobody.

        Raises:
            OSError: neither the folder nor the repository can be read.
            ValueError: for a folder that holds no export, damaged files, or a model of your own
                without `build`.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            settings: dict[str, Any] = {
                "revision": revision,
                "token": token,
                "cache_dir": cache_dir,
                "force_download": force_download,
                "local_files_only": local_files_only,
            }
            folder = _download(str(pretrained_model_name_or_path), settings)
        if not (folder / EXPORTED).is_file():
            raise ValueError(
                f"{folder} has no {EXPORTED}, so it is no export: take a run by from_run"
            )
        saved = load_saved(folder, build)
        files = _read(folder, (CARD, RESULTS, *PICTURES))
        return cls(saved, files)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        *,
        repo_id: str = "",
        license: str | None = None,
        push_to_hub: bool = False,
        **push_settings: Any,
    ) -> str | None:
        """Write weights, configuration, model card, results and pictures, all or nothing.

        A model that was loaded by `from_pretrained` keeps its card. Where the weights are no longer
        those that were loaded, results and pictures are left out, and the card says so.

        Args:
            save_directory: a folder that is not there yet, is empty, or holds an earlier export as
                it was written, which gives way.
            repo_id: name of the repository that the card tells to load; "" takes the folder's.
            license: of the model, as the hub names it, e.g. "apache-2.0"; None says nothing.
            push_to_hub: whether to upload it as well, to `repo_id` or else the folder's name.
            **push_settings: those of `push_to_hub`.

        Returns:
            The address of the commit, if it was uploaded.

        Raises:
            FileExistsError: for a folder that holds anything else.
            ImportError: safetensors is not installed.
            OSError: it cannot be written; nothing of it is left.
        """
        folder = Path(os.path.abspath(save_directory))
        _check_replaceable(folder)
        files = self._contents(repo_id or folder.name, license)
        networks = {"encoder": self.encoder, "decoder": self.decoder, **self.learned}
        state = {name: module.state_dict() for name, module in networks.items()}
        with new_folder(folder, replace=True) as inside:
            for name, content in files.items():
                (inside / name).write_bytes(content)
            files_written = {name: _sha256(content) for name, content in files.items()}
            save_checkpoint(inside / EXPORTED, {**state, "step": self.step, "files": files_written})
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or folder.name, license=license, **push_settings)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Export of a fastsfvae run",
        license: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes, as one commit of a repository.

        Args:
            repo_id: ``user/name``; made where it does not exist.
            private: whether a repository that is made is; None takes the account's default.
            token: of the hub's account; None takes the one that is stored.
            branch: to commit to; None takes main.
            create_pr: whether to open a pull request instead.
            commit_message: of the commit.
            license: as in `save_pretrained`.

        Returns:
            The address of the commit.

        Raises:
            ImportError: safetensors is not installed.
            OSError: it could not be uploaded.
        """
        try:
            api = hub.HfApi(token=token)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            with tempfile.TemporaryDirectory() as folder:
                self.save_pretrained(Path(folder, "export"), repo_id=repo_id, license=license)
                commit = api.upload_folder(
                    repo_id=repo_id,
                    folder_path=Path(folder, "export"),
                    revision=branch,
                    create_pr=create_pr,
                    commit_message=commit_message,
                )
        # Of the package, of what it reaches the hub by, and of what the hub says.
        except Exception as error:
            raise OSError(
                f"{repo_id} could not be uploaded ({_line(error)}): see whether you are logged in, "
                "by `hf auth login`, and may write there"
            ) from error
        return str(commit.commit_url)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> hub.ModelCard:
        """The card that `save_pretrained` writes."""
        return hub.ModelCard(self._contents("", None)[CARD].decode())

    def _contents(self, name: str, license: str | None) -> dict[str, bytes]:
        """All files beside the weights."""
        files, card = self._files, self._card
        if _digest(self) != self._digest:
            files, card = {}, self._bare("the weights were changed after they had been loaded")
        if CARD in files:
            text = files[CARD].decode()
            if license is not None:
                kept = hub.ModelCard(text)
                kept.data["license"] = license
                text = str(kept)
        else:
            card = card or self._bare("they were lost with the card of an earlier export")
            text = card._replace(name=name, license=license).text()
        return {CONFIG: self.config.to_json().encode(), **files, CARD: text.encode()}

    def _bare(self, reason: str) -> Card:
        return Card("", self.config, self.step, "", reason, ())


def _read(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """The contents of those files that are there."""
    paths = (folder / name for name in names)
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def _check_replaceable(folder: Path) -> None:
    """Raise unless what is there can be made again."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give another folder")
    found = [path for path in folder.iterdir() if path.name != EXPORTED]
    if not found and not (folder / EXPORTED).exists():
        return
    try:
        written = load_checkpoint(folder / EXPORTED)["files"]
    except (ValueError, KeyError):
        raise FileExistsError(
            f"{folder} holds something else than an export: give another folder"
        ) from None
    for path in found:
        if not path.is_file() or written.get(path.name) != _sha256(path.read_bytes()):
            raise FileExistsError(f"{path} is not as it was exported: give another folder")


def _download(repo_id: str, settings: dict[str, Any]) -> Path:
    """Fetch the files of an export into the hub's cache, and no others."""
    names = [CONFIG, EXPORTED, CARD, RESULTS, *PICTURES]
    try:
        return Path(hub.snapshot_download(repo_id, allow_patterns=names, **settings))
    except Exception as error:
        raise OSError(
            f"{repo_id!r} is no folder, and was not found on the hub ({_line(error)})"
        ) from error


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest(module: nn.Module) -> str:
    """A checksum of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
