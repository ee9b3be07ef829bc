"""Exports: what is in them; they come back to the bit, and nothing is lost or imported."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastsfvae as sf
from fastsfvae import training
from fastsfvae.cli import main as cli
from fastsfvae.models import build as build_model
from fastsfvae.results.card import _OBJECTIVES, command
from fastsfvae.training.checkpoint import load_checkpoint, load_config
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.methods import METHODS

hub = pytest.importorskip("huggingface_hub")
from fastsfvae.hub import TrainedVAE  # noqa: E402 - needs the package

SMALL = TrainConfig("sampling", model="tanh", latent_dim=2, batch_size=8, steps=2, data="npz")
WHOLE = {"README.md", "config.json", "model.safetensors", "results.json", "curves.png"}
WHOLE |= {"manifold.png", "reconstructions.png", "samples.png"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "private" / "images.npz"
    path.parent.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    np.savez(path, train=images[:40], test=images[40:])
    return path


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSFVAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run with results and pictures, trained by the command."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    options = ["--data", "npz", "--data-dir", str(data), "--image-size", "8", "--model", "tanh"]
    options += ["--latent-dim", "2", "--batch-size", "8", "--steps", "4", "--learned-noise-var"]
    assert cli.main(["train", *options, "--device", "cpu", "--out", str(folder)]) == 0
    return folder


def _train(data, folder, **changes):
    config = replace(SMALL, data_dir=str(data), image_size=8, **changes)
    run = training.start(config, folder)
    training.train(run)
    return run


def _contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# --- what is in it


def test_an_export_is_the_run(finished, tmp_path):
    vae = TrainedVAE.from_run(finished)
    vae.save_pretrained(tmp_path / "out")
    assert _contents(tmp_path / "out").keys() == WHOLE
    again = TrainedVAE.from_pretrained(tmp_path / "out")
    assert _same(vae, again) and again.step == 4 and not again.training
    assert again.config == vae.config
    # The variance that was learned, not that of the start; nothing of this machine.
    learned = sf.load(finished)[2].noise_var
    assert again.config.noise_var == learned != 0.5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["noise_var"] == learned
    assert (again.config.data_dir, again.config.device) == ("", "auto")
    x = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(x), again.decoder(again.encoder(x)[0]))
    for name in WHOLE - {"README.md", "config.json", "model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (finished / name).read_bytes()


def test_load_takes_both(finished, tmp_path):
    TrainedVAE.from_run(finished).save_pretrained(tmp_path / "out")
    (*ours, config), (*theirs, other) = sf.load(tmp_path / "out"), sf.load(finished)
    assert all(_same(*pair) for pair in zip(ours, theirs, strict=True))
    assert config == replace(other, data_dir="", device="auto")


def test_the_card(finished, tmp_path):
    TrainedVAE.from_run(finished).save_pretrained(tmp_path / "user-vae", license="mit")
    text = (tmp_path / "user-vae" / "README.md").read_text()
    card = hub.ModelCard(text)
    assert card.data.library_name == "fastsfvae" and card.data.license == "mit"
    assert {"vae", "sampling-free"} <= {*card.data.tags} and card.data.datasets is None
    # The numbers are those of results.json, on the test images, and the objective is none of them.
    test = json.loads((finished / "results.json").read_text())["splits"]["test"]
    shown = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert shown == {name: value["mean"] for name, value in test.items() if name != "objective"}
    assert f"| log ML | - | {test['log ML']['mean']:.2f} ± " in text
    assert "It is no ELBO" in text and "which was learned" in text
    assert 'TrainedVAE.from_pretrained("user-vae")' in text and "torch 2" in text
    # The command trains the same, and does not say where the data lie.
    line = re.search(r"^fastsfvae train .*$", text, re.MULTILINE).group()
    assert "--learned-noise-var" in line and "--steps 4" in line and "--data-dir DIR" in line
    assert str(finished.parent) not in text and "private" not in text
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) == 5 and all((tmp_path / "user-vae" / link).is_file() for link in links)


def test_the_card_loads_the_model(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    TrainedVAE.from_run(finished).save_pretrained("out")
    (block,) = re.findall(r"```python\n(.*?)```", Path("out/README.md").read_text(), re.DOTALL)
    names = {"images": torch.rand(3, 1, 8, 8)}
    exec(block, names)
    assert torch.equal(names["reconstruction"], names["vae"](names["images"]))


def test_the_command_trains_the_same(finished):
    from fastsfvae.cli.train import TrainArguments
    from fastsfvae.ground.options import parse

    config = load_config(finished)
    _, _, *options = command(config).split()
    parsed = parse("", TrainArguments, options, TrainArguments(TrainConfig())).config
    assert replace(parsed, data_dir=config.data_dir, device="cpu", schedule_steps=4) == config


def test_a_run_without_results(data, tmp_path):
    _train(data, tmp_path / "run", method="sampling-free")
    TrainedVAE.from_run(tmp_path / "run").save_pretrained(tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "None: the run was interrupted, or not evaluated." in text and ".png" not in text
    assert _contents(tmp_path / "out").keys() == {"README.md", "config.json", "model.safetensors"}


def test_a_run_that_has_not_begun_is_refused(data, tmp_path):
    training.start(replace(SMALL, data_dir=str(data), image_size=8), tmp_path / "run")
    with pytest.raises(ValueError, match="run has not been trained for a step: resume it first"):
        TrainedVAE.from_run(tmp_path / "run")


def test_results_of_another_step_are_left_out(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    training.train(training.resume(folder, replace(load_config(folder), steps=6)))
    TrainedVAE.from_run(folder).save_pretrained(tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "None: those of the run are from step 4, before it went on." in text
    assert "--steps 6 --learned-noise-var --schedule-steps 4" in text
    assert "results.json" not in _contents(tmp_path / "out")


def test_every_method_is_described():
    assert _OBJECTIVES.keys() == {*METHODS}


# --- round trips


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "householder", "flows": 3},
        {"method": "delta-vae", "min_rate": 0.2},
        {"method": "rae", "regularizer": "spectral-norm"},
        {"method": "hiwae", "samples": 3},
        {"method": "sampling-free", "learned_noise_var": True},
        {"model": "linear", "output_activation": "sigmoid"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_what_methods_make_of_the_networks_comes_back(data, tmp_path, changes):
    run = _train(data, tmp_path / "run", **changes)
    vae = TrainedVAE.from_run(tmp_path / "run")
    vae.save_pretrained(tmp_path / "out")
    again = TrainedVAE.from_pretrained(tmp_path / "out")
    assert _same(vae, again) and again.learned.keys() == run.model.learned.keys()
    run.model.eval()
    x = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        for one, other in zip(run.encoder(x), again.encoder(x), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(run.decoder(run.encoder(x)[0]), again(x))
    for name, module in run.model.learned.items():
        assert _same(module, again.learned[name])


def test_an_export_that_is_loaded_and_saved_keeps_its_card(finished, tmp_path):
    TrainedVAE.from_run(finished).save_pretrained(tmp_path / "a")
    card = tmp_path / "a" / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    again = TrainedVAE.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    assert _contents(tmp_path / "b").keys() == WHOLE
    assert (tmp_path / "b" / "README.md").read_bytes() == card.read_bytes()
    again.save_pretrained(tmp_path / "c", license="mit")
    kept = (tmp_path / "c" / "README.md").read_text()
    assert hub.ModelCard(kept).data.license == "mit" and "My own words." in kept


def test_results_are_not_those_of_changed_weights(finished, tmp_path):
    vae = TrainedVAE.from_run(finished)
    with torch.no_grad():
        next(vae.decoder.parameters())[0, 0] += 1
    vae.save_pretrained(tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "None: the weights were changed after they had been loaded." in text
    assert _contents(tmp_path / "out").keys() == {"README.md", "config.json", "model.safetensors"}
    assert _same(vae, TrainedVAE.from_pretrained(tmp_path / "out"))


# --- what is refused


def test_nothing_but_an_untouched_export_gives_way(finished, tmp_path):
    vae, before = TrainedVAE.from_run(finished), _contents(finished)
    with pytest.raises(FileExistsError, match="finished holds something else than an export"):
        vae.save_pretrained(finished)
    assert _contents(finished) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file is a file: give another folder"):
        vae.save_pretrained(tmp_path / "file")
    out = tmp_path / "out"
    out.mkdir()
    vae.save_pretrained(out)
    first = _contents(out)
    vae.save_pretrained(out)
    # The order within a header is safetensors' own.
    assert {**first, "model.safetensors": 0} == {**_contents(out), "model.safetensors": 0}
    for name in ("README.md", "notes.txt", "samples.png"):
        whole = (out / name).read_bytes() if (out / name).exists() else None
        (out / name).write_bytes(b"mine")
        with pytest.raises(FileExistsError, match=f"{name} is not as it was exported: give"):
            vae.save_pretrained(out)
        assert (out / name).read_bytes() == b"mine"
        (out / name).unlink() if whole is None else (out / name).write_bytes(whole)
    vae.save_pretrained(out)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == ["file", "out"]


def test_an_export_that_cannot_be_written_spares_the_earlier_one(finished, tmp_path, monkeypatch):
    vae = TrainedVAE.from_run(finished)
    vae.save_pretrained(tmp_path / "out")
    before = _contents(tmp_path / "out")

    def full(path, state):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastsfvae.hub.save_checkpoint", full)
    with pytest.raises(OSError, match="out could not be written .No space left"):
        vae.save_pretrained(tmp_path / "out")
    assert _contents(tmp_path / "out") == before


def test_folders_are_told_apart(finished, tmp_path):
    with pytest.raises(ValueError, match="no model.safetensors, so it is no export: take a run by"):
        TrainedVAE.from_pretrained(finished)
    TrainedVAE.from_run(finished).save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="is an export, not a run: load it by from_pretrained"):
        TrainedVAE.from_run(tmp_path / "out")
    with pytest.raises(OSError, match="'some/where' is no folder, and was not found on the hub"):
        TrainedVAE.from_pretrained("some/where")
    path = tmp_path / "out" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for function in (TrainedVAE.from_pretrained, sf.load):
        with pytest.raises(ValueError, match="model.safetensors is damaged .*checksum"):
            function(tmp_path / "out")


MODEL = """
from pathlib import Path
Path("imported").touch()
import fastsfvae.models as models

def build(config):
    return models.build(models.ModelConfig("tanh", config.latent_dim, config.image_shape))
"""


def _own(config):
    return build_model(replace(config, name="tanh"))


def test_a_model_of_ones_own_is_not_imported(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("own_model_of_a_test.py").write_text(MODEL)
    _train(data, tmp_path / "run", model="own_model_of_a_test:build")
    TrainedVAE.from_run("run").save_pretrained("out")
    assert 'from_pretrained("out", build=build)' in Path("out/README.md").read_text()
    del sys.modules["own_model_of_a_test"]
    Path("imported").unlink()
    for function in (TrainedVAE.from_pretrained, sf.load):
        with pytest.raises(
            ValueError, match="is not imported for an .*: give the function"
        ) as told:
            function("out")
        assert "\n" not in str(told.value)
        loaded = function("out", build=_own)
        encoder = loaded[0] if isinstance(loaded, tuple) else loaded.encoder
        assert _same(encoder, sf.load("run", build=_own)[0])
    assert not Path("imported").exists() and "own_model_of_a_test" not in sys.modules
    with pytest.raises(ValueError, match="encoder.x. of x .* must return the tuple"):
        sf.load("out", build=lambda config: (nn.Flatten(), nn.Flatten()))
    with pytest.raises(ValueError, match="does not hold this encoder's weights"):
        sf.load("out", build=lambda config: build_model(replace(config, name="mlp")))


def test_a_build_function_without_use_is_refused(finished):
    with pytest.raises(ValueError, match="model='tanh' is the library's own: leave it out"):
        sf.load(finished, build=_own)


# --- the hub


class _Uploaded:
    repo_id = "user/vae"
    commit_url = "https://huggingface.co/user/vae/commit/1"


def test_what_is_uploaded(finished, monkeypatch, tmp_path):
    calls = []

    def create_repo(self, repo_id, **settings):
        calls.append((repo_id, settings))
        return _Uploaded()

    def upload_folder(self, *, folder_path, **settings):
        calls.append((_contents(Path(folder_path)), settings))
        return _Uploaded()

    monkeypatch.setattr(hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(hub.HfApi, "upload_folder", upload_folder)
    vae = TrainedVAE.from_run(finished)
    url = vae.push_to_hub("vae", private=True, branch="next", commit_message="x")
    (made, settings), (files, upload) = calls
    assert (made, url) == ("vae", _Uploaded.commit_url)
    assert settings == {"private": True, "exist_ok": True}
    assert upload == {
        "repo_id": "user/vae",
        "revision": "next",
        "create_pr": False,
        "commit_message": "x",
    }
    assert files.keys() == WHOLE
    # The card names the repository; the rest is what a folder holds.
    assert 'from_pretrained("user/vae")' in files["README.md"].decode()
    (tmp_path / "down").mkdir()
    for name, content in files.items():
        (tmp_path / "down" / name).write_bytes(content)

    def snapshot_download(repo_id, *, allow_patterns, revision, **settings):
        assert (repo_id, revision) == ("user/vae", "next") and {*allow_patterns} >= WHOLE
        return str(tmp_path / "down")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert _same(TrainedVAE.from_pretrained("user/vae", revision="next"), vae)


def test_the_mixins_other_ways_lead_to_the_same(finished, monkeypatch, tmp_path):
    """`push_to_hub` of `save_pretrained`, and the card by itself."""
    uploads = []
    monkeypatch.setattr(hub.HfApi, "create_repo", lambda self, repo_id, **settings: _Uploaded())

    def upload_folder(self, *, folder_path, **settings):
        uploads.append(_contents(Path(folder_path)))
        return _Uploaded()

    monkeypatch.setattr(hub.HfApi, "upload_folder", upload_folder)
    vae = TrainedVAE.from_run(finished)
    assert isinstance(vae, hub.PyTorchModelHubMixin)
    assert vae.save_pretrained(tmp_path / "vae") is None and uploads == []
    url = vae.save_pretrained(tmp_path / "both", repo_id="vae", push_to_hub=True, private=True)
    (files,) = uploads
    assert url == _Uploaded.commit_url and files.keys() == WHOLE
    assert str(vae.generate_model_card()).split("\n## ")[1:] != []
    assert "no ELBO" in str(vae.generate_model_card())


def test_an_upload_that_fails_is_one_line(finished):
    with pytest.raises(OSError, match="user/vae could not be uploaded .*Offline") as caught:
        TrainedVAE.from_run(finished).push_to_hub("user/vae")
    assert "\n" not in str(caught.value)


# --- the command


def test_the_export_command(finished, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert cli.main(["export", str(finished), "--out", out, "--license", "mit"]) == 0
    assert f"exported to {out}" in capsys.readouterr().out
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
    wrong = {
        ("export", str(finished)): "nothing to do: give --out FOLDER, --push USER/NAME",
        ("export", str(tmp_path), "--out", out): "config.json does not exist: name the folder",
        ("export", str(finished), "--out", str(finished)): "holds something else than an export",
        ("export", out, "--out", f"{out}2"): "is an export, not a run",
        ("export", str(finished), "--push", "user/vae"): "user/vae could not be uploaded",
        ("export",): "RUN",
    }
    for words, message in wrong.items():
        assert cli.main([*words]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("fastsfvae export: ") and message in error and "\n" not in error


def test_without_the_package_one_line_says_what_to_install(finished, tmp_path):
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "from fastsfvae.hub import TrainedVAE\n"
        "TrainedVAE.from_run(sys.argv[1]).save_pretrained('out')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(finished)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ,
    )
    assert done.stderr.splitlines()[-1] == (
        "ImportError: exports need huggingface_hub: pip install 'fastsfvae[hub]'"
    )
    assert not (tmp_path / "out").exists()


def test_the_weights_are_a_plain_safetensors_file(finished, tmp_path):
    from safetensors.torch import load_file

    vae = TrainedVAE.from_run(finished)
    vae.save_pretrained(tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == {k.removeprefix("learned.") for k in vae.state_dict()}
    assert not {"optimizer", "window"} & load_checkpoint(tmp_path / "out/model.safetensors").keys()
