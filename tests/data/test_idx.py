"""MNIST and Fashion-MNIST share their files' names; which of them a folder holds is known."""

import gzip
import hashlib
import itertools
import struct
import warnings

import numpy as np
import pytest
import torch

from fastsfvae.cli import main as cli
from fastsfvae.data import download, idx, load
from fastsfvae.data.load import download_images, load_images, load_labels
from fastsfvae.reproduce import EXPERIMENTS, Options

NAMES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
SETS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}


def _images(name, split):
    seed = list(SETS).index(name) * 2 + list(NAMES).index(split)
    return np.random.default_rng(seed).integers(0, 256, (4, 28, 28), dtype=np.uint8)


def _content(name, split):
    images = _images(name, split)
    return struct.pack(">4i", 2051, *images.shape) + images.tobytes()


def _put(folder, name, split, suffix=".gz", as_split=None):
    folder.mkdir(parents=True, exist_ok=True)
    content = _content(name, split)
    path = folder / (NAMES[as_split or split] + suffix)
    path.write_bytes(gzip.compress(content) if suffix else content)


@pytest.fixture(autouse=True)
def published(tmp_path, monkeypatch):
    """The tiny files are the published ones, and the system's package is not installed."""
    monkeypatch.setenv("FASTSFVAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(load, "_said", set())
    known = {
        hashlib.sha256(_content(name, split)).hexdigest(): (name, split)
        for name in SETS
        for split in NAMES
    }
    monkeypatch.setattr(idx, "_PUBLISHED", known)
    system = download.SYSTEM_FOLDERS["fashion-mnist"]._replace(path=tmp_path / "system")
    monkeypatch.setitem(download.SYSTEM_FOLDERS, "fashion-mnist", system)
    return system.path


def _load(name, folder, split):
    return load_images(name, str(folder), split, channels=1, size=28)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("layout", ["", "raw", "FashionMNIST/raw"])
def test_fashion_mnist(tmp_path, layout, suffix):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for split in NAMES:
            _put(tmp_path / layout, "fashion-mnist", split, suffix)
            images = _load("fashion-mnist", tmp_path, split)
            np.testing.assert_array_equal(images[:, 0].numpy(), _images("fashion-mnist", split))


def test_the_systems_package_is_found_by_itself(published):
    for split in NAMES:
        _put(published, "fashion-mnist", split)
        images = _load("fashion-mnist", "", split)
        np.testing.assert_array_equal(images[:, 0].numpy(), _images("fashion-mnist", split))
    # There already: nothing is fetched, no place is asked for.
    download_images("fashion-mnist", "")


@pytest.mark.parametrize("option", [[], ["--download"], ["--data-dir", "nowhere"]])
def test_missing_names_three_ways(tmp_path, published, option, capsys):
    option = [str(tmp_path / each) if each == "nowhere" else each for each in option]
    assert cli.main(["train", "--data", "fashion-mnist", *option]) == 2
    error = capsys.readouterr().err
    place = tmp_path / "nowhere" if "--data-dir" in option else published
    assert f"{place} has no train-images-idx3-ubyte.gz" in error and error.count("\n") == 1
    for way in ("apt-get install dataset-fashion-mnist", "--data-dir", "--download", "31 MB, http"):
        assert way in error
    assert not published.exists()


@pytest.mark.parametrize(
    ("given", "asked", "swapped"),
    # All but the right one.
    [(g, a, s) for g, a, s in itertools.product(SETS, SETS, [False, True]) if g != a or s],
)
def test_the_wrong_set_or_split_is_refused(tmp_path, given, asked, swapped):
    for split in NAMES:
        other = next(each for each in NAMES if each != split)
        _put(tmp_path, given, split, as_split=other if swapped else split)
    held = "test" if swapped else "train"
    message = f"holds the {held} images of {given}, not the train images of {asked}: "
    if given != asked:
        message += f"give --data {given}, or "
    for _ in range(2):  # A refused file is not in the cache.
        with pytest.raises(ValueError, match=message):
            _load(asked, tmp_path, "train")


@pytest.mark.parametrize("name", SETS)
def test_what_is_not_published_is_said_at_every_start(tmp_path, name, monkeypatch):
    monkeypatch.setattr(idx, "_PUBLISHED", {})
    _put(tmp_path, name, "train")
    for _ in range(2):
        with pytest.warns(UserWarning, match="is not the published file of .*MNIST: its 4 images"):
            _load(name, tmp_path, "train")
        monkeypatch.setattr(load, "_said", set())


@pytest.mark.parametrize("name", ["table3", "table4", "figure2", "wallclock", "bias"])
def test_reproduce_takes_it(name):
    cells = EXPERIMENTS[name].cells(Options(data="fashion-mnist"))
    assert {(cell.config.data, cell.config.data_dir) for cell in cells} == {("fashion-mnist", "")}
    if name == "table3":
        assert cells[0].at[-1] == 30 * 60_000 // 20


LABELS = {"train": "train-labels-idx1-ubyte", "test": "t10k-labels-idx1-ubyte"}


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_labels(tmp_path, suffix):
    folder = tmp_path / "FashionMNIST/raw"
    folder.mkdir(parents=True)
    for split, labels in (("train", [3, 0, 9]), ("test", [7])):
        content = struct.pack(">2i", 2049, len(labels)) + bytes(labels)
        path = folder / (LABELS[split] + suffix)
        path.write_bytes(gzip.compress(content) if suffix else content)
        found = load_labels("fashion-mnist", str(tmp_path), split)
        assert found.tolist() == labels and found.dtype == torch.int64


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged, or no file of MNIST labels"),
        (struct.pack(">2i", 2051, 1) + b"\1", "is damaged, or no file of MNIST labels"),
        (struct.pack(">2i", 2049, 2) + b"\1", "is damaged, or no file of MNIST labels"),
        (None, "has no train-labels-idx1-ubyte.gz"),
    ],
    ids=["empty", "images", "cut off", "missing"],
)
def test_labels_that_are_not_there(tmp_path, content, message):
    if content is not None:
        (tmp_path / LABELS["train"]).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_labels("mnist", str(tmp_path), "train")


def test_labels_of_other_sets():
    assert load_labels("digits", "", "train").shape == (9_000,)
    with pytest.raises(ValueError, match="data='omniglot' has no labels: take digits"):
        load_labels("omniglot", "", "train")
