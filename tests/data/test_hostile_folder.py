"""A folder of everything that lies among images: each read right, skipped, or refused by name."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from fastsfvae.data import load
from fastsfvae.data.text import printable
from tests.data import hostile_folder
from tests.data.hostile_folder import SIDE, SKIPPED, UNREADABLE

SUBJECT = "hostile images"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "images"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTSFVAE_CACHE", str(folder.with_name("cache")))
        yield folder, hostile_folder.write(folder)


def _load(folder, split, **options):
    return load.load_set("folder", str(folder), split, channels=3, size=SIDE, crop=SIDE, **options)


def _in_order(cases):
    """The images as a listing has them: by folder, then by name."""
    images = [case for case in cases if case.becomes is not SKIPPED]
    return sorted(images, key=lambda case: os.fsdecode(case.name).split("/"))


def _parts(cases):
    """The expected images of each part: every tenth to test, copies where the first one went."""
    parts, of_name = {"train": [], "test": []}, {}
    for number, case in enumerate(_in_order(cases)):
        part = of_name.get(case.copy_of, "test" if number % 10 == 9 else "train")
        of_name[case.name] = part
        if case.becomes is not UNREADABLE:
            parts[part].append(case)
    return parts


def test_each_is_read_right_or_left_out_by_name(hostile, tally):
    folder, cases = hostile
    assert len({case.name for case in cases}) == len(cases) >= 40
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = {split: _load(folder, split, skip_bad=True) for split in ("train", "test")}
        again = _load(folder, "test", skip_bad=True)
    tally(SUBJECT, "faults", len(cases))
    for split, expected in _parts(cases).items():
        images = loaded[split].images.numpy().transpose(0, 2, 3, 1)
        assert len(images) == len(expected)
        for image, case in zip(images, expected, strict=True):
            off = np.abs(image.astype(int) - case.becomes.astype(int)).max()
            tally(SUBJECT, "taken for whole", int(off > case.tolerance))
            assert off <= case.tolerance, case.name

    bad = sorted(printable(case.name) for case in cases if case.becomes is UNREADABLE)
    for split in (*loaded.values(), again):
        assert sorted(name for name, _ in split.left_out) == [str(folder / name) for name in bad]
    tally(SUBJECT, "refused", len(bad))

    train, test = ({x.tobytes() for x in part.images.numpy()} for part in loaded.values())
    tally(SUBJECT, "in both splits", len(train & test))
    assert not train & test

    # Each is said once, in one line, however often the set is loaded.
    said = [str(warning.message) for warning in caught]
    assert all("\n" not in text and text.startswith(f"{folder}: ") for text in said)
    (others,) = (text for text in said if "are no images" in text)
    assert ": .txt 1, .json 1, " in others or ".json 1" in others
    (frames,) = (text for text in said if "several frames" in text)
    count = sum(case.frames for case in cases)
    assert f"{count} files have several frames, of which the first is read: " in frames
    (copies,) = (text for text in said if "copies" in text)
    for name in ("b.png", "c.bmp", "link.png"):
        assert f"twice/{name} = twice/a.png" in copies
    assert len(said) == 5


def test_a_cut_file_is_refused_where_pillow_was_told_to_fill_it_up(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSFVAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    folder = tmp_path / "train"
    folder.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).save(
        folder / "0.jpg"
    )
    path = Path(folder / "0.jpg")
    path.write_bytes(path.read_bytes()[:1500])
    Image.open(path).load()
    with pytest.raises(ValueError, match="0.jpg cannot be decoded .*truncated"):
        _load(tmp_path, "train")
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_without_leave_the_unreadable_are_named_and_nothing_is_kept(hostile):
    folder, cases = hostile
    names = [case.name for case in _in_order(cases) if case.becomes is UNREADABLE]
    images = len(_in_order(cases))
    with pytest.raises(ValueError) as caught:
        _load(folder, "train")
    message = str(caught.value)
    assert f"{folder}: {len(names)} of {images} files cannot be read: " in message
    assert all(name in message for name in names[:10])
    assert f"and {len(names) - 10} more: replace or remove them, or give --skip-bad" in message
    assert "\n" not in message
