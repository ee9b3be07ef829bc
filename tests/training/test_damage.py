"""Full disks, folders that cannot be written, and files that are cut, flipped or malicious."""

import contextlib
import gzip
import os
import pickle
import random
import resource
import struct
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastsfvae import training
from fastsfvae.cli import main as cli
from fastsfvae.data import cache
from fastsfvae.data.load import load_images
from fastsfvae.training.checkpoint import (
    CHECKPOINT,
    EARLIER_CHECKPOINT,
    load_checkpoint,
    load_config,
    save_checkpoint,
)
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.metrics_csv import METRICS, MetricsFile, rewind_metrics

CONFIG = TrainConfig("sampling", model="tanh", latent_dim=2, batch_size=8, steps=50, seed=5)
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
STATE = {"weight": {"a": torch.arange(600.0).reshape(20, 30), "b": torch.ones(7)}, "step": 3}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSFVAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- no room


@contextlib.contextmanager
def _largest_file(size):
    """No file may grow beyond `size` bytes: what a full disk does, to this process alone."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _convert(images):
    return cache.open_cached("a", "f" * 64, lambda: (images.shape, [images[:1], images[1:]]))


def test_a_full_disk_while_converting(tmp_path, cache_folder):
    images = np.zeros((2, 1, 300, 300), np.uint8)
    with _largest_file(100_000):
        with pytest.raises(OSError, match=r"a-f+\.npy cannot be written \(File too large\): make"):
            _convert(images)
    assert [path.suffix for path in cache_folder.iterdir()] == [".lock"]
    # A disk that is full indeed: every write to this device fails so.
    (cache_folder / f"a-{'f' * 16}.npy.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot be written \(No space left on device\)"):
        _convert(images)
    assert _convert(images).shape == images.shape
    assert Path("/dev/full").exists()


def test_a_full_disk_while_training(tmp_path, capsys):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    training.train(training.start(CONFIG, whole))
    training.train(training.start(replace(CONFIG, steps=25, schedule_steps=50), folder))
    before = _contents(folder)
    size = (folder / CHECKPOINT).stat().st_size
    resume = ["train", "--resume", "--out", str(folder), "--steps", "50"]
    with _largest_file(size // 2):
        assert cli.main(resume) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        f"{folder}/checkpoint.safetensors could not be written (" in error and "is intact" in error
    )
    after = _contents(folder)
    assert after[folder / CHECKPOINT] == before[folder / CHECKPOINT]
    assert after.keys() == before.keys()
    # A disk that is full indeed.
    (folder / f"{CHECKPOINT}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="checkpoint.safetensors could not be written .*is intact"):
        training.train(training.resume(folder, replace(CONFIG, schedule_steps=50)))
    # With room again the run goes on as if nothing had been.
    training.train(training.resume(folder))
    assert _without_seconds(folder) == _without_seconds(whole)


def _without_seconds(folder):
    rows = (folder / METRICS).read_text().splitlines()
    return [row.split(",")[:1] + row.split(",")[2:] for row in rows]


def test_a_full_disk_under_the_metrics(tmp_path):
    path, columns = tmp_path / "metrics.csv", ("step", "loss")
    rewind_metrics(path, 0, columns)
    with MetricsFile(path) as file:
        file.write({"step": 25, "loss": -3.5})
    whole = path.read_bytes()
    with _largest_file(len(whole) + 5):
        with pytest.raises(OSError, match="metrics.csv could not be written .*: make room and"):
            with MetricsFile(path) as file:
                file.write({"step": 50, "loss": -3.25})
    # What was begun is dropped when the run goes on.
    assert path.read_bytes() == whole + b"50,-3"
    rewind_metrics(path, 50, columns)
    assert path.read_bytes() == whole


def test_a_full_disk_under_the_figures(tmp_path, capsys):
    folder = tmp_path / "run"
    training.train(training.start(replace(CONFIG, steps=1), folder))
    (folder / "samples.png").write_bytes(b"mine")
    (folder / "samples.png.tmp").symlink_to("/dev/full")
    assert cli.main(["train", "--resume", "--out", str(folder)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{folder}/samples.png could not be written (" in error
    assert (folder / "samples.png").read_bytes() == b"mine"


def test_a_run_that_cannot_be_started_leaves_its_name_free(tmp_path):
    with _largest_file(1000), pytest.raises(OSError, match="could not be written"):
        training.start(CONFIG, tmp_path / "run")
    training.start(CONFIG, tmp_path / "run")


@contextlib.contextmanager
def _bound_by_permissions():
    """The superuser may write everywhere: be nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_folders_that_cannot_be_written(monkeypatch):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        training.train(training.start(replace(CONFIG, steps=1), folder / "run"))
        (folder / "cache").mkdir()
        before = _contents(folder)
        for path in (folder / "run", folder / "cache", folder):
            path.chmod(0o555)
        monkeypatch.setenv("FASTSFVAE_CACHE", str(folder / "cache"))
        with _bound_by_permissions():
            with pytest.raises(OSError, match=r"run/.* could not be written \(.*Permission denied"):
                training.resume(folder / "run")
            with pytest.raises(OSError, match=r"Permission denied.*new"):
                training.start(CONFIG, folder / "new")
            with pytest.raises(OSError, match=r"npy cannot be written \(Permission denied\)"):
                _convert(np.zeros((2, 1, 3, 3), np.uint8))
            monkeypatch.setenv("FASTSFVAE_CACHE", str(folder / "new"))
            with pytest.raises(OSError, match=r"npy cannot be written \(Permission denied\)"):
                _convert(np.zeros((2, 1, 3, 3), np.uint8))
        assert _contents(folder) == before
        for path in (folder, folder / "run", folder / "cache"):
            path.chmod(0o755)


# --- damage


def _flips(content, count):
    """Contents with one bit of them flipped."""
    generator = random.Random(0)
    for position in generator.sample(range(8 * len(content)), count):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        yield bytes(flipped)


def _cuts(content, count):
    return (content[: len(content) * part // count] for part in range(count))


@pytest.fixture
def assert_named(tally):
    """Each damaged content is refused in one line that names the file, or read as the whole."""

    def check(kind, path, read, expected, damaged):
        subject, refused = f"damaged {kind}", 0
        for content in damaged:
            path.write_bytes(content)
            tally(subject, "faults")
            try:
                result = read()
            except ValueError as error:
                refused += 1
                assert path.name in str(error) and "\n" not in str(error)
            else:
                whole = expected is not None and expected(result)
                tally(subject, "taken for whole", int(not whole))
                assert whole
        tally(subject, "refused", refused)
        return refused

    return check


def _same_state(state):
    """Whether a state is STATE, to the bit."""
    weight = state["weight"]
    return (
        weight.keys() == STATE["weight"].keys()
        and all(torch.equal(weight[name], value) for name, value in STATE["weight"].items())
        and state["step"] == STATE["step"]
    )


def _save_earlier(path, state):
    """As versions up to 0.1.0 did."""
    torch.save({"format": "fastsfvae checkpoint 1", **state}, path)


@pytest.mark.parametrize("save", [save_checkpoint, _save_earlier])
def test_a_damaged_checkpoint_is_never_taken_for_a_whole_one(tmp_path, assert_named, save):
    earlier = save is _save_earlier
    path = tmp_path / (EARLIER_CHECKPOINT if earlier else CHECKPOINT)
    save(path, STATE)
    content = path.read_bytes()
    assert _same_state(load_checkpoint(path))
    refused = assert_named(
        "checkpoints", path, lambda: load_checkpoint(path), _same_state, _flips(content, 300)
    )
    # Of a .pt file what is left are times and padding.
    assert refused > 200 if earlier else refused == 300
    cuts = list(_cuts(content, 40))
    assert assert_named(
        "checkpoints", path, lambda: load_checkpoint(path), _same_state, cuts
    ) == len(cuts)


class _Poison:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", [CHECKPOINT, EARLIER_CHECKPOINT])
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "named"])
def test_a_checkpoint_runs_no_code(tmp_path, kind, name):
    path, mark = tmp_path / name, str(tmp_path / "mark")
    state = {"format": "fastsfvae checkpoint 1", "encoder": _Poison(mark)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(state))
    elif kind == "named":
        torch.save({**state, "encoder": os.system}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match=f"{name} is damaged or not a checkpoint") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    assert not Path(mark).exists()
    # The poison is one: loaded without care it acts.
    if kind in ("zip", "legacy"):
        torch.load(path.rename(tmp_path / "poison"), weights_only=False)
        assert Path(mark).exists()


def test_an_archive_of_images_runs_no_code(tmp_path):
    path, mark = tmp_path / "a.npz", str(tmp_path / "mark")
    np.savez(path, images=np.array([_Poison(mark)], dtype=object))
    with pytest.raises(ValueError, match="a.npz is damaged or not an .npz archive"):
        load_images("npz", str(path), "train", channels=1, size=8)
    assert not Path(mark).exists()
    np.load(path, allow_pickle=True)["images"]
    assert Path(mark).exists()


def _png(path):
    Image.fromarray(PIXELS[0]).save(path)


def _npz(path):
    np.savez_compressed(path, train=PIXELS, test=PIXELS)


def _idx(path):
    path.write_bytes(gzip.compress(struct.pack(">4i", 2051, 3, 8, 8) + PIXELS.tobytes()))


@pytest.mark.parametrize(
    ("write", "name", "file", "count"),
    [
        (_png, "folder", "train/0.png", 1),
        (_npz, "npz", "a.npz", 3),
        (_idx, "mnist", "train-images-idx3-ubyte.gz", 3),
    ],
)
def test_damaged_images_are_named(tmp_path, cache_folder, write, name, file, count, assert_named):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    write(path)
    content = path.read_bytes()
    folder = path if name == "npz" else tmp_path

    def read():
        # The cache knows a file by its size and time, which may not change within a tick.
        for old in cache_folder.glob("*"):
            old.unlink()
        return load_images(name, str(folder), "train", channels=1, size=8)

    def whole(images):
        return np.array_equal(images[:, 0].numpy(), PIXELS[:count])

    assert whole(read())
    cuts = list(_cuts(content, 30))
    assert assert_named("images", path, read, whole, cuts[:20]) == 20
    # A late cut may spare the pixels, and so may a flip: headers hold names and times.
    assert assert_named("images", path, read, whole, [*cuts[20:], *_flips(content, 200)]) > 50


def test_a_damaged_table_is_named(tmp_path, assert_named):
    images = tmp_path / "img_align_celeba"
    images.mkdir()
    for index in range(3):
        Image.fromarray(PIXELS[index]).save(images / f"{index}.jpg")
    path = tmp_path / "list_eval_partition.txt"
    content = b"0.jpg 0\n1.jpg 0\n2.jpg 2\n"

    def read():
        return load_images("celeba", str(tmp_path), "train", channels=1, size=8)

    for damaged in (b"", content[:-8], b"\xff\xfe" + content, b"0.jpg\n", content + b"3.jpg 0\n"):
        assert assert_named("tables", path, read, None, [damaged]) == 1
    path.write_bytes(content)
    assert len(read()) == 2


def test_damaged_metrics_are_named_or_cut_to_whole_rows(tmp_path, assert_named):
    path, columns = tmp_path / "metrics.csv", ("step", "seconds", "loss")
    rows = [b"step,seconds,loss", b"25,0.1,-3.5", b"50,0.2,-3.25", b"75,0.3,-3.125"]
    content = b"\n".join(rows) + b"\n"

    def read():
        rewind_metrics(path, 50, columns)
        return path.read_bytes().splitlines()

    def whole_rows(kept):
        return kept == rows[: len(kept)] and len(kept) <= 3

    damaged = [content[:size] for size in range(len(content))]
    assert assert_named("metrics", path, read, whole_rows, damaged) == len(rows[0]) + 1
    for damage in (b"\xff", b"x,0.1,-3.5\n", b"\x00"):
        assert (
            assert_named("metrics", path, read, None, [rows[0] + b"\n" + damage + b",0,0\n"]) == 1
        )
    path.write_bytes(content)
    assert read() == rows[:3]


def test_a_damaged_configuration_is_named(tmp_path, assert_named):
    path = tmp_path / "config.json"
    content = CONFIG.to_json().encode()
    damaged = [*_cuts(content, 30), b"\xff" + content, b"[" * 100_000, b"null", b'{"steps": 1}']
    named = assert_named("configurations", path, lambda: load_config(tmp_path), None, damaged)
    assert named == len(damaged)
