"""Folders, Hugging Face's sets, tar shards: what is taken, for which part, and what is said."""

import io
import json
import sys
import tarfile
import warnings

import numpy as np
import pytest
from PIL import Image

from fastsfvae.cli import main as cli
from fastsfvae.data.load import load_set
from tests.data import hostile_folder

COLOURS = np.random.default_rng(0).integers(0, 256, (23, 8, 8, 3), dtype=np.uint8)
TEST = np.arange(23) % 10 == 9
SUBJECT = "hostile shards"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSFVAE_CACHE", str(tmp_path / "cache"))


def _png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


CONTENTS = [_png(pixels) for pixels in COLOURS]


def _write(folder, contents):
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def _tar(path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def _load(name, folder, split="train", **options):
    return load_set(name, str(folder), split, channels=3, size=8, **options)


def _pixels(loaded):
    return loaded.images.numpy().transpose(0, 2, 3, 1)


def _assert_parts(name, folder, train, test, **options):
    """Hold both parts to the pixels of those numbers; return what is said of them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for split, numbers in (("train", train), ("test", test)):
            found = _pixels(_load(name, folder, split, **options))
            np.testing.assert_array_equal(found, COLOURS[numbers])
    ours = [str(w.message) for w in caught if str(w.message).startswith(f"{folder}: ")]
    return [text.removeprefix(f"{folder}: ") for text in ours]


# --- folders


def test_a_folder_says_what_it_skips(tmp_path):
    images = {f"{i:02}.{'PNG' if i % 2 else 'png'}": CONTENTS[i] for i in range(23)}
    rest = {f"{i}.txt": b"x" for i in range(3)} | {"a.json": b"{}", "README": b"x"}
    hidden = {".git/a.png": CONTENTS[0], "._00.png": b"x", ".DS_Store": b"x"}
    folder = _write(tmp_path / "a", images | rest | hidden)
    said = _assert_parts("folder", folder, ~TEST, TEST)
    assert said == [
        "5 of 28 files are no images: .txt 3, .json 1, no ending 1",
        "2 hidden files and folders are skipped: ._00.png, .git",
    ]


def test_a_training_image_that_is_also_for_testing_is_left_out(tmp_path):
    contents = {f"train/{i:02}.png": CONTENTS[i] for i in range(12)}
    contents |= {f"Test/{i:02}.png": CONTENTS[i] for i in range(10, 15)}
    contents |= {"train/again.png": CONTENTS[0], "stray.png": CONTENTS[20]}
    folder = _write(tmp_path / "a", contents)
    # Behind the others by its name.
    said = _assert_parts("folder", folder, [*range(10), 0], range(10, 15))
    assert said == [
        "1 image lies outside of train/ and test/ and will not be read: stray.png",
        "2 training images are also for testing and left out of training: train/10.png = "
        "Test/10.png, train/11.png = Test/11.png; 1 image is a copy of another, and for training "
        "or testing as the other is: train/again.png = train/00.png",
    ]


def test_folders_behind_links_are_read_once(tmp_path):
    real = _write(tmp_path / "elsewhere", {f"{i:02}.png": CONTENTS[i] for i in range(12)})
    folder = _write(tmp_path / "a", {f"z/{i:02}.png": CONTENTS[i] for i in range(12, 23)})
    (folder / "b").symlink_to(real)
    (folder / "c").symlink_to(real)
    (folder / "a").symlink_to(folder / "z")
    (real / "loop").symlink_to(folder)
    assert _assert_parts("folder", folder, ~TEST, TEST) == []
    with pytest.raises(ValueError, match="00.png is a file: give the folder of the images"):
        _load("folder", real / "00.png")


@pytest.fixture
def bad_folder(tmp_path):
    contents = {f"train/{i:02}.png": CONTENTS[i] for i in range(12)}
    contents |= {f"test/{i:02}.png": CONTENTS[i] for i in range(12, 15)}
    contents |= {"train/bad.png": b"no image", "test/cut.png": CONTENTS[0][:90]}
    return _write(tmp_path / "images", contents)


def test_skip_bad_goes_on_and_lists_what_it_left_out(bad_folder, tmp_path, capsys):
    run = tmp_path / "run"
    data = ["--data", "folder", "--data-dir", str(bad_folder), "--image-size", "8"]
    rest = ["--model", "linear", "--latent-dim", "2", "--method", "sampling", "--batch-size", "4"]
    command = ["train", *data, *rest, "--steps", "2", "--out", str(run)]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not run.exists()
    # Those of both parts.
    assert "2 of 17 files cannot be read: test/cut.png cannot be decoded (" in error
    assert "train/bad.png cannot be decoded (it is no PNG" in error
    assert error.endswith(": replace or remove them, or give --skip-bad\n")

    assert cli.main([*command, "--skip-bad"]) == 0
    listed = (run / "left_out.txt").read_text().splitlines()
    names = [line.partition("\t")[0] for line in listed]
    assert names == [str(bad_folder / "test/cut.png"), str(bad_folder / "train/bad.png")]
    conventions = json.loads((run / "results.json").read_text())["conventions"]
    assert conventions["data_scale"] == "8 bits as stored"
    assert conventions["split"] == "12 train / 3 test images evaluated"
    # A resumed run keeps to it.
    assert cli.main(["train", "--resume", "--out", str(run), "--steps", "3"]) == 0
    assert (run / "left_out.txt").read_text().splitlines() == listed


def test_a_folder_of_nothing_readable_is_refused(tmp_path):
    folder = _write(tmp_path / "a", {"train/0.png": b"", "train/1.png": b"x"})
    with pytest.raises(ValueError, match="2 of 2 files cannot be read: .* nothing is left to trai"):
        _load("folder", folder, skip_bad=True)


# --- Hugging Face


def _rows(numbers):
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features({"picture": datasets.Image(), "label": datasets.Value("int64")})
    rows = [{"bytes": CONTENTS[i], "path": None} for i in numbers]
    columns = {"picture": rows, "label": list(numbers)}
    return datasets.Dataset.from_dict(columns, features=kinds)


def test_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "one"
    _rows(range(23)).save_to_disk(folder)
    assert _assert_parts("huggingface", folder, ~TEST, TEST) == []

    parts = {"train": range(12), "test": range(12, 20), "validation": range(20, 23)}
    folder = tmp_path / "parts"
    datasets.DatasetDict({k: _rows(v) for k, v in parts.items()}).save_to_disk(folder)
    said = _assert_parts("huggingface", folder, parts["train"], parts["test"])
    assert said == ["not read are the parts validation"]

    folder = tmp_path / "validation"
    del parts["test"]
    datasets.DatasetDict({k: _rows(v) for k, v in parts.items()}).save_to_disk(folder)
    said = _assert_parts("huggingface", folder, parts["train"], parts["validation"])
    assert said == ["there is no test part: validation is taken for testing"]

    folder = tmp_path / "train"
    datasets.DatasetDict(train=_rows(range(23))).save_to_disk(folder)
    said = _assert_parts("huggingface", folder, ~TEST, TEST)
    assert said == ["there is no test part: every tenth image of train is for testing"]


def test_hugging_face_is_refused_by_name(tmp_path):
    datasets = pytest.importorskip("datasets")
    with pytest.raises(FileNotFoundError, match="has no state.json and no dataset_dict.json: give"):
        _load("huggingface", tmp_path)
    datasets.Dataset.from_dict({"x": [1, 2]}).save_to_disk(tmp_path / "numbers")
    with pytest.raises(ValueError, match=r"has 0 columns of images, not one, among x \(Value\)"):
        _load("huggingface", tmp_path / "numbers")
    datasets.DatasetDict(a=_rows(range(3))).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match="other has the parts a: name them train and test"):
        _load("huggingface", tmp_path / "other")

    kinds = datasets.Features({"picture": datasets.Image()})
    rows = [{"bytes": content, "path": None} for content in CONTENTS]
    rows[3], rows[5] = {"bytes": b"x", "path": None}, None
    folder = tmp_path / "bad"
    datasets.Dataset.from_dict({"picture": rows}, features=kinds).save_to_disk(folder)
    with pytest.raises(ValueError, match="2 of 23 files cannot be read: row 3 cannot .*, row 5 .*"):
        _load("huggingface", folder)
    kept = np.setdiff1d(np.arange(23), [3, 5])
    _assert_parts("huggingface", folder, kept[~TEST[kept]], kept[TEST[kept]], skip_bad=True)

    (arrow,) = (tmp_path / "numbers").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"numbers is damaged \(.*\): save it again") as caught:
        _load("huggingface", tmp_path / "numbers")
    assert "\n" not in str(caught.value)


# --- tar shards


def _members(numbers):
    for i in numbers:
        yield f"d/{i:03}.png", CONTENTS[i]
        yield f"d/{i:03}.cls", b"1"


def test_shards(tmp_path):
    pytest.importorskip("webdataset")
    folder = tmp_path / "a"
    _tar(folder / "0.tar", _members(range(12)))
    mac = [("d/._x.png", b"x"), ("__MACOSX/d/y.png", CONTENTS[0]), ("d/lone.json", b"{}")]
    _tar(folder / "1.tar", [*mac, *_members(range(12, 23))])
    _write(folder, {"README.md": b""})
    said = _assert_parts("webdataset", folder, ~TEST, TEST)
    assert said == ["1 of 3 files are no shards: .md 1", "1 sample has no image, of 24"]

    for train, test in (("train/0.tar", "test/0.tar"), ("train-0.tgz", "test-0.tar")):
        folder = tmp_path / train[:6]
        _tar(folder / train, _members(range(12)), "w:gz" if train.endswith("gz") else "w")
        _tar(folder / test, _members(range(10, 23)))
        (said,) = _assert_parts("webdataset", folder, range(10), range(10, 23))
        assert said.startswith("2 training images are also for testing and left out of training: ")
        assert said.endswith(f"{train}: d/011 = {test}: d/011")


@pytest.mark.parametrize("cut", [512 * 9, -1024, -512, 700])
def test_a_cut_shard_is_named(tmp_path, cut, tally):
    pytest.importorskip("webdataset")
    path = tmp_path / "0.tar"
    with path.open("wb") as file, tarfile.open(fileobj=file, mode="w", bufsize=512) as tar:
        for name, content in _members(range(12)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    # Up to the two blocks that end it; more of them is padding.
    end = path.read_bytes().rstrip(b"\0")
    whole = end + bytes(-len(end) % 512 + 1024)
    path.write_bytes(whole[:cut])
    tally(SUBJECT, "faults")
    with pytest.raises(ValueError, match=r"0.tar is damaged or cut short \(.*\): fetch it again"):
        _load("webdataset", tmp_path)
    tally(SUBJECT, "refused")
    path.write_bytes(whole)
    assert len(_load("webdataset", tmp_path).images) == 11


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", 0), ("a.jpg", 1)], r"0.tar: a has 2 images \(png, jpg\), and which is meant"),
        ([("a.png", 0), ("a.png", 1)], "0.tar holds more than one a.png: give each a name"),
        ([("a.png", 0), ("b.png", 1), ("a.jpg", 2)], "0.tar: a is there twice: give each sample"),
        ([("1.5.png", 0), ("1.6.png", 1)], "0.tar: 1 has 2 images"),
    ],
)
def test_samples_that_are_not_plain_are_refused(tmp_path, members, message, tally):
    pytest.importorskip("webdataset")
    _tar(tmp_path / "0.tar", [(name, CONTENTS[i]) for name, i in members])
    tally(SUBJECT, "faults")
    with pytest.raises(ValueError, match=message):
        _load("webdataset", tmp_path)
    tally(SUBJECT, "refused")


@pytest.mark.parametrize(
    ("name", "library"),
    [("huggingface", "datasets"), ("webdataset", "webdataset"), ("folder", "PIL.Image")],
)
def test_a_library_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch, name, library):
    _tar(tmp_path / "0.tar", _members(range(3)))
    _write(tmp_path, {"0.png": CONTENTS[0], "state.json": b"{}"})
    monkeypatch.setitem(sys.modules, library, None)
    extra = {"folder": "data"}.get(name, name)
    with pytest.raises(RuntimeError, match=rf'pip install "fastsfvae\[{extra}\]"'):
        _load(name, tmp_path)


def test_shards_hold_the_same_pixels_as_files(tmp_path):
    """One way from bytes to pixels: what is read right in a folder is so in a shard."""
    pytest.importorskip("webdataset")
    cases = [case for case in hostile_folder.write(tmp_path / "files") if "/" in str(case.name)]
    cases = [c for c in cases if isinstance(c.becomes, np.ndarray) and isinstance(c.content, bytes)]
    cases = [c for c in cases if isinstance(c.name, str) and c.name.startswith(("png/", "tiff/"))]
    members = [(f"{i:03}.{c.name.rpartition('.')[2]}", c.content) for i, c in enumerate(cases)]
    _tar(tmp_path / "train" / "0.tar", members)
    _tar(tmp_path / "test" / "0.tar", [("0.png", CONTENTS[0])])
    loaded = load_set("webdataset", str(tmp_path), "train", channels=3, size=hostile_folder.SIDE)
    assert len(_pixels(loaded)) == len(cases) > 30
    for image, case in zip(_pixels(loaded), cases, strict=True):
        assert np.abs(image.astype(int) - case.becomes.astype(int)).max() <= case.tolerance


def test_a_changed_partition_is_seen(tmp_path):
    """Of the same files in the same order, one more is for testing."""
    folder = _write(tmp_path / "img_align_celeba", {f"{i}.jpg": CONTENTS[i] for i in range(6)})
    for tests in (2, 3):
        rows = [f"{i}.jpg {2 if i < tests else 0}\n" for i in range(6)]
        (folder.parent / "list_eval_partition.txt").write_text("".join(rows))
        assert _assert_parts("celeba", tmp_path, range(tests, 6), range(tests)) == []
