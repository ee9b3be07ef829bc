"""Every loader on tiny files in the true formats, and the cache that they fill."""

import gzip
import hashlib
import io
import json
import shutil
import struct
from typing import get_args

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from fastsfvae.cli import main as cli
from fastsfvae.data import cache, files, omniglot
from fastsfvae.data.load import DATA_SETS, load_images
from fastsfvae.training.config import DataSet


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSFVAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _write_idx(path, images):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = struct.pack(">4i", 2051, *images.shape) + images.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def _write_png(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _load(name, folder, split="train", channels=3, size=8, **options):
    return load_images(name, str(folder), split, channels=channels, size=size, **options)


# --- formats


@pytest.mark.parametrize("layout", ["", "raw", "MNIST/raw"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist(tmp_path, layout, suffix):
    train, test = _pixels(5, 28, 28), _pixels(3, 28, 28, seed=1)
    _write_idx(tmp_path / layout / f"train-images-idx3-ubyte{suffix}", train)
    _write_idx(tmp_path / layout / f"t10k-images-idx3-ubyte{suffix}", test)
    for split, expected in (("train", train), ("test", test)):
        images = _load("mnist", tmp_path, split, channels=1, size=28)
        np.testing.assert_array_equal(images.numpy(), expected[:, None])
    padded = _load("mnist", tmp_path, channels=1, size=28, padding=2)
    np.testing.assert_array_equal(padded[..., 2:-2, 2:-2].numpy(), train[:, None])
    assert int(padded.sum()) == int(train.sum())


def test_omniglot(tmp_path, monkeypatch):
    images = {"data": _pixels(5, 28, 28), "testdata": _pixels(3, 28, 28, seed=1)}
    # As MATLAB stores them: an image a column, in column-major order, grey levels in [0, 1].
    columns = {name: x.transpose(0, 2, 1).reshape(len(x), -1).T / 255 for name, x in images.items()}
    path = tmp_path / omniglot.OMNIGLOT_FILE
    scipy.io.savemat(path, columns | {"target": np.zeros((50, 5))}, do_compression=True)
    with pytest.raises(ValueError, match="chardata.mat has md5 .*, the published file 21ecaf3437"):
        _load("omniglot", tmp_path, channels=1, size=28)
    monkeypatch.setattr(omniglot, "OMNIGLOT_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    for split, name in (("train", "data"), ("test", "testdata")):
        for place in (tmp_path, path):
            loaded = _load("omniglot", place, split, channels=1, size=28)
            np.testing.assert_array_equal(loaded[:, 0].numpy(), images[name])


@pytest.mark.parametrize("shape", [(20, 8, 8), (20, 8, 8, 3), (20, 3, 8, 8)])
def test_npz(tmp_path, shape):
    images = _pixels(*shape)
    np.savez(tmp_path / "a.npz", images=images)
    expected = {3: images[:, None]}.get(len(shape), images)
    if shape[-1] == 3:
        expected = np.moveaxis(images, -1, 1)
    test = np.arange(20) % 10 == 9
    for split, rows in (("train", ~test), ("test", test)):
        loaded = _load("npz", tmp_path / "a.npz", split, channels=expected.shape[1])
        np.testing.assert_array_equal(loaded.numpy(), expected[rows])
    np.savez(tmp_path / "b.npz", train=images[:4], test=images[4:])
    loaded = _load("npz", tmp_path / "b.npz", "test", channels=expected.shape[1])
    np.testing.assert_array_equal(loaded.numpy(), expected[4:])


def test_folder_splits_and_channels(tmp_path):
    images = _pixels(20, 8, 8, 3)
    for index, image in enumerate(images):
        _write_png(tmp_path / "a" / "deep" / f"{index:02}.png", image)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    test = np.arange(20) % 10 == 9
    expected = np.moveaxis(images, -1, 1)
    np.testing.assert_array_equal(_load("folder", tmp_path / "a").numpy(), expected[~test])
    np.testing.assert_array_equal(_load("folder", tmp_path / "a", "test").numpy(), expected[test])

    # ITU-R 601 luma, rounded.
    grey = _load("folder", tmp_path / "a", channels=1).double()[:, 0]
    luma = np.moveaxis(images[~test], -1, 0).astype(float)
    luma = 0.299 * luma[0] + 0.587 * luma[1] + 0.114 * luma[2]
    assert np.abs(grey.numpy() - luma).max() <= 0.5 + 1e-3

    # Folders of that name are the split; none is filled up from the other.
    _write_png(tmp_path / "b" / "train" / "0.png", images[0])
    assert len(_load("folder", tmp_path / "b")) == 1
    with pytest.raises(FileNotFoundError, match="b has no test images"):
        _load("folder", tmp_path / "b", "test")


def test_crop_and_resize(tmp_path):
    # Constant 4x4 blocks: their centre square halves to 2x2 blocks of the same colours.
    image = np.zeros((16, 20, 3), np.uint8)
    image[4:12, 6:14] = np.kron(_pixels(2, 2, 3), np.ones((4, 4, 1), np.uint8))
    _write_png(tmp_path / "train" / "0.png", image)
    cropped = _load("folder", tmp_path, crop=8)
    np.testing.assert_array_equal(cropped[0].numpy(), np.moveaxis(image[4:12, 6:14], -1, 0))
    whole = _load("folder", tmp_path, size=16)
    np.testing.assert_array_equal(whole[0].numpy(), np.moveaxis(image[:, 2:18], -1, 0))
    # A resize keeps a constant image, and the mean of any to about a grey level.
    half = _load("folder", tmp_path, size=8).double().mean((0, 2, 3))
    assert (half - torch.tensor(image[:, 2:18].mean((0, 1)))).abs().max() < 1
    with pytest.raises(ValueError, match="0.png is 20x16, smaller than crop=17"):
        _load("folder", tmp_path, crop=17)


def test_transparency_is_laid_on_white(tmp_path):
    image = np.zeros((8, 8, 4), np.uint8)
    image[:4] = 10, 20, 30, 255
    _write_png(tmp_path / "train" / "0.png", image)
    loaded = _load("folder", tmp_path)[0]
    assert loaded[:, :4].flatten(1).unique(dim=1).tolist() == [[10], [20], [30]]
    assert (loaded[:, 4:] == 255).all()


@pytest.mark.parametrize("inner", ["", "celeba"])
def test_celeba(tmp_path, inner):
    base = tmp_path / inner
    folder = base / "img_align_celeba"
    folder.mkdir(parents=True)
    for index in range(6):
        image = np.full((218, 178, 3), 40 * index, np.uint8)
        Image.fromarray(image).save(folder / f"{index:06}.jpg", quality=95)
    (base / "list_eval_partition.txt").write_text(
        "".join(f"{index:06}.jpg {part}\n" for index, part in enumerate([0, 0, 1, 2, 0, 2]))
    )
    for split, indices in (("train", [0, 1, 4]), ("test", [3, 5])):
        images = _load("celeba", tmp_path, split, size=64, crop=DATA_SETS["celeba"].crop)
        assert images.shape == (len(indices), 3, 64, 64)
        for image, index in zip(images, indices, strict=True):
            assert (image.int() - 40 * index).abs().max() <= 2
    (folder / "000004.jpg").unlink()
    with pytest.raises(ValueError, match="celeba has 5 images, .*partition.txt lists 6"):
        _load("celeba", tmp_path, size=64)
    # A folder of nothing but images: every tenth is for testing.
    (base / "list_eval_partition.txt").unlink()
    assert len(_load("celeba", folder, size=64)) == 5


def test_omniglot_images(tmp_path, monkeypatch):
    counts = {"train": ("images_background", 4), "test": ("images_evaluation", 2)}
    monkeypatch.setattr(files, "_OMNIGLOT", counts)
    drawings = {}
    for split, (name, count) in counts.items():
        # One bit a pixel, as published; by alphabet and character.
        drawings[split] = _pixels(count, 28, 28, seed=count) > 127
        for index, drawing in enumerate(drawings[split]):
            place = tmp_path / "omniglot-py" / name / "Greek" / f"character{index // 2:02}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawing).save(place / f"{index:04}_01.png")
    for split, expected in drawings.items():
        for folder in (tmp_path, tmp_path / "omniglot-py"):
            images = _load("omniglot-images", folder, split, channels=1, size=28)
            np.testing.assert_array_equal(images[:, 0].numpy(), 255 * expected)
    place.joinpath("0001_01.png").unlink()
    with pytest.raises(ValueError, match="evaluation has 1 drawings, the published set 2"):
        _load("omniglot-images", tmp_path, "test", channels=1, size=28)


def test_chairs_are_split_by_chair(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHAIRS", 11)
    monkeypatch.setattr(files, "_VIEWS", 2)
    views = _pixels(11, 2, 8, 8, 3)
    for chair in range(11):
        for view in range(2):
            name = tmp_path / "rendered_chairs" / f"{chair:02}" / "renders" / f"image_{view}.png"
            _write_png(name, views[chair, view])
    (tmp_path / "rendered_chairs" / "all_chair_names.mat").write_bytes(b"")
    expected = np.moveaxis(views, -1, 2)
    train = expected[[*range(9), 10]].reshape(-1, 3, 8, 8)
    np.testing.assert_array_equal(_load("chairs", tmp_path).numpy(), train)
    inside = _load("chairs", tmp_path / "rendered_chairs", "test")
    np.testing.assert_array_equal(inside.numpy(), expected[9])
    (tmp_path / "rendered_chairs" / "04" / "renders" / "image_1.png").unlink()
    with pytest.raises(ValueError, match="04/renders has 1 views, the published set 2: unpack it"):
        _load("chairs", tmp_path)
    shutil.rmtree(tmp_path / "rendered_chairs" / "04")
    with pytest.raises(ValueError, match="chairs has 10 chairs, the published set 11: unpack it"):
        _load("chairs", tmp_path)


# --- the cache


def _open(shape, images):
    return cache.open_cached("a", "f" * 64, lambda: (shape, images))


def _leftovers(folder):
    """What lies in the cache but for the locks, which stay."""
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


def test_a_set_is_converted_once_and_again_when_it_changed(tmp_path):
    _write_png(tmp_path / "train" / "0.png", _pixels(8, 8, 3))
    first = _load("folder", tmp_path)
    path = next((tmp_path / "cache").glob("*.npy"))
    before = path.stat().st_mtime_ns
    assert torch.equal(_load("folder", tmp_path), first)
    assert path.stat().st_mtime_ns == before

    # The file is the caller's to read: what they write stays with them.
    _load("folder", tmp_path).zero_()
    assert torch.equal(_load("folder", tmp_path), first)

    other = _pixels(8, 8, 3, seed=5)
    _write_png(tmp_path / "train" / "0.png", other)
    _write_png(tmp_path / "train" / "1.png", other)
    changed = _load("folder", tmp_path)
    np.testing.assert_array_equal(changed.numpy(), np.moveaxis(np.stack([other] * 2), -1, 1))


@pytest.mark.parametrize("damage", ["flip", "truncate", "no record", "record"])
def test_a_damaged_conversion_is_done_again(cache_folder, damage):
    images = _pixels(4, 1, 3, 3)
    _open(images.shape, [images])
    (path,) = cache_folder.glob("*.npy")
    record = path.with_suffix(".json")
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text("{")
    loaded = _open(images.shape, [images[:1], images[1:]])
    np.testing.assert_array_equal(loaded.numpy(), images)
    assert json.loads(record.read_text())["made_from"] == "f" * 64


def test_an_interrupted_conversion_is_not_taken_for_a_finished_one(cache_folder):
    images = _pixels(4, 1, 3, 3)

    def interrupted():
        yield images[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _open(images.shape, interrupted())
    assert _leftovers(cache_folder) == []
    with pytest.raises(ValueError, match="2 images where 4 were announced"):
        _open(images.shape, [images[:2]])
    assert _leftovers(cache_folder) == []
    loaded = _open(images.shape, [images])
    np.testing.assert_array_equal(loaded.numpy(), images)


def test_a_full_disk(cache_folder, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", full)
    images = _pixels(4, 1, 3, 3)
    with pytest.raises(OSError, match=r"a-f+.npy cannot be written \(No space left on device\)"):
        _open(images.shape, [images])
    assert _leftovers(cache_folder) == []


# --- bad input


def _damaged(tmp_path, kind):
    """Write a damaged file; return the data set's name, its place and what the error says."""
    idx = tmp_path / "train-images-idx3-ubyte"
    header = struct.pack(">4i", 2051, 3, 28, 28)
    archive = tmp_path / "a.npz"
    picture = tmp_path / "train" / "0.png"
    if kind == "idx of a wrong count":
        idx.write_bytes(header + bytes(2 * 784))
        return "mnist", tmp_path, "ubyte announces 3 images of 28x28 but holds 1568 bytes"
    if kind == "idx of labels":
        idx.write_bytes(struct.pack(">4i", 2049, 3, 28, 28))
        return "mnist", tmp_path, "ubyte is not a file of MNIST images (magic 2049"
    if kind == "empty idx":
        idx.write_bytes(b"")
        return "mnist", tmp_path, "ubyte is damaged"
    if kind == "truncated gzip":
        content = gzip.compress(header + _pixels(3 * 784).tobytes())
        idx.with_name(idx.name + ".gz").write_bytes(content[: len(content) // 2])
        return "mnist", tmp_path, "ubyte.gz is damaged"
    if kind == "truncated npz":
        buffer = io.BytesIO()
        np.savez(buffer, images=_pixels(9, 28, 28))
        archive.write_bytes(buffer.getvalue()[:-100])
        return "npz", archive, "a.npz is damaged or not an .npz archive"
    if kind == "npz of floats":
        np.savez(archive, images=255 * np.ones((3, 28, 28)))
        return "npz", archive, "array images is float64 in [255, 255]: scale it to [0, 1] or"
    if kind == "npz of other arrays":
        np.savez(archive, x=_pixels(3, 28, 28))
        return "npz", archive, "a.npz holds ['x']"
    if kind == "npz of vectors":
        np.savez(archive, images=_pixels(3, 784))
        return "npz", archive, "array images is (3, 784): give [N, H, W]"
    if kind == "npz of another size":
        np.savez(archive, images=_pixels(20, 9, 9))
        return "npz", archive, "images of 1x9x9 (C x H x W), not 1x28x28"
    _write_png(picture, _pixels(64, 64, 3))
    content = picture.read_bytes()
    picture.write_bytes(content[: len(content) // 2] if kind == "truncated png" else b"GIF89a")
    return "folder", tmp_path, "0.png cannot be decoded"


@pytest.mark.parametrize(
    "kind",
    [
        *("idx of a wrong count", "idx of labels", "empty idx", "truncated gzip"),
        *("truncated npz", "npz of floats", "npz of other arrays", "npz of vectors"),
        *("npz of another size", "truncated png", "no png"),
    ],
)
def test_damaged_files_are_named(tmp_path, kind, capsys):
    name, place, message = _damaged(tmp_path, kind)
    out = tmp_path / "run"
    assert cli.main(["train", "--data", name, "--data-dir", str(place), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist", "train-images-idx3-ubyte.gz, itself or in MNIST/raw: put it there, or give"),
        ("omniglot", "has no chardata.mat: put it there, or give --download (32,415 characters"),
        ("omniglot-images", "no folder images_background, itself or in omniglot-py: put it there"),
        ("celeba", "no folder img_align_celeba and no .jpg files: put it there, or give --downl"),
        ("chairs", "rendered_chairs has no <id>/renders: put it there, or give --download (1,39"),
        ("folder", "has no train images"),
        ("npz", "is not a file: give the .npz archive"),
        ("huggingface", "has no state.json and no dataset_dict.json: give the folder that save_to"),
        ("webdataset", "has no shards (.tar): give the folder that holds them"),
    ],
)
def test_missing_data(name, message, tmp_path, capsys):
    arguments = ["train", "--data", name, "--out", str(tmp_path / "run")]
    assert cli.main([*arguments, "--data-dir", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert cli.main(arguments) == 2
    assert "say where it lies with --data-dir" in capsys.readouterr().err


# --- training


def test_train_on_a_folder_of_images(tmp_path, capsys):
    for index, image in enumerate(_pixels(30, 10, 10, 3)):
        _write_png(tmp_path / "images" / f"{index:02}.png", image)
    data = ["--data", "folder", "--data-dir", str(tmp_path / "images"), "--image-size", "8"]
    model = ["--model", "linear", "--latent-dim", "2", "--method", "sampling"]
    run = tmp_path / "run"
    rest = ["--steps", "3", "--batch-size", "4", "--out", str(run)]
    assert cli.main(["train", *data, *model, *rest]) == 0
    results = json.loads((run / "results.json").read_text())
    assert results["conventions"]["split"] == "27 train / 3 test images evaluated"
    assert results["conventions"]["data"] == "folder"
    assert results["splits"]["test"]["sampled ELBO"]["mean"] < 0
    capsys.readouterr()
    # Moved data is found again at its new place.
    (tmp_path / "images").rename(tmp_path / "moved")
    resume = ["train", "--resume", "--out", str(run), "--steps", "5"]
    assert cli.main(resume) == 2
    assert "has no train images" in capsys.readouterr().err
    assert cli.main([*resume, "--data-dir", str(tmp_path / "moved")]) == 0


def test_the_command_offers_every_set():
    assert set(get_args(DataSet)) == set(DATA_SETS)
