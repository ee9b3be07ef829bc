"""Arrays of every kind that is taken, to the value, and the refusal of every other by name."""

import io
import warnings

import numpy as np
import pytest
import torch

from fastsfvae.data.load import load_set

GREY = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
# Random bytes are never 0 and 255 by themselves with certainty.
GREY[0, 0, :2] = 0, 255
TEST = np.arange(20) % 10 == 9
SUBJECT = "hostile arrays"
UNIT, SIGNED = GREY / 255, GREY / 127.5 - 1


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSFVAE_CACHE", str(tmp_path / "cache"))


def _write(path, stored):
    if path.suffix == ".pt":
        torch.save(stored, path)
    elif path.suffix == ".npz":
        np.savez(path, **stored)
    else:
        np.save(path, stored)
    return path


def _load(path, split="train", channels=1):
    return load_set("npz", str(path), split, channels=channels, size=8)


def _said(path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = _load(path)
        _load(path, "test")
    texts = [str(warning.message) for warning in caught]
    assert all(text.startswith(f"{path}: ") and "\n" not in text for text in texts)
    return loaded, [text.removeprefix(f"{path}: ") for text in texts]


@pytest.mark.parametrize(
    ("stored", "scale"),
    [
        (GREY, "uint8"),
        (np.asfortranarray(GREY), "uint8"),
        (GREY.astype(np.int64), "int64 in 0..255"),
        (GREY.astype(">i2"), "int16 in 0..255"),
        (GREY.astype(np.uint16) * 257, "uint16 by 65535"),
        (GREY.astype(">u2") * 257, "uint16 by 65535"),
        (UNIT, "float64 in [0, 1]"),
        (UNIT.astype(np.float32), "float32 in [0, 1]"),
        (UNIT.astype(np.float16), "float16 in [0, 1]"),
        (UNIT.astype(">f4"), "float32 in [0, 1]"),
        (SIGNED, "float64 in [-1, 1]"),
        (SIGNED.astype(np.float32), "float32 in [-1, 1]"),
        (torch.tensor(GREY), "uint8"),
        (torch.tensor(UNIT).float(), "float32 in [0, 1]"),
        (torch.tensor(SIGNED).half(), "float16 in [-1, 1]"),
        (torch.tensor(GREY.swapaxes(1, 2).copy()).transpose(1, 2), "uint8"),
        (torch.tensor(UNIT, requires_grad=True), "float64 in [0, 1]"),
    ],
    ids=lambda stored: getattr(stored, "dtype", None) and str(stored.dtype),
)
def test_every_scale_is_taken_to_the_value(tmp_path, stored, scale, tally):
    path = _write(tmp_path / ("a.pt" if isinstance(stored, torch.Tensor) else "a.npy"), stored)
    loaded, said = _said(path)
    tally(SUBJECT, "faults")
    right = np.array_equal(loaded.images[:, 0].numpy(), GREY[~TEST])
    tally(SUBJECT, "taken for whole", int(not right))
    assert right
    np.testing.assert_array_equal(_load(path, "test").images[:, 0].numpy(), GREY[TEST])
    assert loaded.scale == scale and said == []


def test_the_scale_is_that_of_both_arrays(tmp_path):
    # By itself the test array would be read in [0, 1].
    dark = np.where(GREY < 128, GREY, 128).astype(np.uint8)
    path = _write(tmp_path / "a.npz", {"train": dark / 127.5 - 1, "test": SIGNED.clip(0)})
    np.testing.assert_array_equal(_load(path).images[:, 0].numpy(), dark)
    bright = np.rint(127.5 * (SIGNED.clip(0) + 1))
    np.testing.assert_array_equal(_load(path, "test").images[:, 0].numpy(), bright)
    path = _write(tmp_path / "b.pt", {"train": torch.tensor(GREY > 99), "test": GREY[:2] > 300})
    with pytest.raises(ValueError, match="b.pt is damaged or .* objects other than tensors"):
        _load(path)
    path = _write(tmp_path / "c.npz", {"images": GREY > 99})
    np.testing.assert_array_equal(_load(path).images[:, 0].numpy(), 255 * (GREY > 99)[~TEST])


def test_what_rounding_changes_is_said(tmp_path):
    values = np.random.default_rng(1).random((20, 8, 8))
    loaded, (said,) = _said(_write(tmp_path / "a.npy", values))
    change = np.abs(np.rint(255 * values) / 255 - values).max()
    assert np.abs(loaded.images[:, 0].numpy() / 255 - values[~TEST]).max() <= change
    assert said == (
        f"float64 in [0, 1], kept as 255ths: this changes a pixel, in [0, 1], by up to {change:.2g}"
    )
    _, (said,) = _said(_write(tmp_path / "b.npy", (65535 * values).astype(np.uint16)))
    assert said.startswith("uint16 by 65535, kept as 255ths: this changes a pixel, in [0, 1], by")


def test_no_row_is_in_both_parts(tmp_path):
    rows = GREY.copy()
    rows[9], rows[4] = rows[2], rows[3]
    loaded, (said,) = _said(_write(tmp_path / "a.npy", rows))
    # 9 goes to training, where 2 went.
    np.testing.assert_array_equal(loaded.images[:, 0].numpy(), rows[:19])
    assert said.startswith("2 images are copies of another") and said.endswith(
        "images 4 = images 3, images 9 = images 2"
    )
    path = _write(tmp_path / "b.npz", {"train": GREY[:15], "test": GREY[12:]})
    loaded, (said,) = _said(path)
    np.testing.assert_array_equal(loaded.images[:, 0].numpy(), GREY[:12])
    assert said == (
        "3 training images are also for testing and left out of training: train 12 = test 0, "
        "train 13 = test 1, train 14 = test 2"
    )
    loaded, (said,) = _said(_write(tmp_path / "c.npz", {"train": GREY, "test": GREY}))
    assert len(loaded.images) == 20 and said.startswith("train and test are the same images")


def _objects():
    buffer = io.BytesIO()
    np.save(buffer, np.array([GREY[0], GREY[1, :4]], dtype=object), allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "stored", "message"),
    [
        ("a.npy", 2 * UNIT, "array images is float64 in [0, 2]: scale it to [0, 1] or [-1, 1]"),
        ("a.npy", UNIT - 0.2, "array images is float64 in [-0.2, 0.8]: scale it"),
        ("a.npy", 255 * UNIT, "array images is float64 in [0, 255]: scale it"),
        ("a.npy", np.where(UNIT > 0.9, np.nan, UNIT), "array images is float64 in [nan, nan]"),
        ("a.npy", np.where(UNIT > 0.9, np.inf, UNIT), "array images is float64 in [0, inf]"),
        ("a.npy", 1 * (GREY > 99), "array images is int64 and holds only 0 and 1: store it as bo"),
        ("a.npy", GREY // 255, "array images is uint8 and holds only 0 and 1: store it as bool"),
        ("a.npy", GREY - 5.0 * (GREY > 9), "array images is float64 in [0, 250]"),
        ("a.npy", GREY.astype(int) - 9, "array images is int64 in [-9, 246]: store images as"),
        ("a.npy", GREY.astype(np.uint16), "array images is uint16 but reaches 255 only, not 65535"),
        ("a.npy", GREY * 1j, "array images is of dtype complex128"),
        ("a.npy", GREY.astype("U3"), "array images is of dtype <U3"),
        ("a.npy", np.zeros((9, 8, 8), [("a", "u1")]), "array images is of dtype [('a', 'u1')]"),
        ("a.npy", GREY[0], "array images is (8, 8): give [N, H, W]"),
        ("a.npy", np.ones((9, 3, 8, 3), np.uint8), "is (9, 3, 8, 3), with channels first or last"),
        ("a.npy", np.ones((9, 4, 8, 8), np.uint8), "array images is (9, 4, 8, 8): give"),
        (
            "a.npy",
            _objects,
            "a.npy is damaged or not an .npz archive, .npy or .pt file of numbers ",
        ),
        ("a.npy", _objects, "it holds an array of objects or a pickle, which is never unpickled"),
        ("a.npz", {"train": GREY}, "a.npz holds ['train']: name the arrays train and test, or"),
        ("a.npz", {"train": GREY, "test": UNIT}, "give both one dtype and images of one size"),
        ("a.npz", {"train": GREY, "test": GREY[:, 1:]}, "give both one dtype and images of one"),
        ("a.pt", torch.nn.Linear(2, 2).state_dict(), "a dict of ['weight', 'bias'], as a state_d"),
        ("a.pt", torch.nn.Linear(2, 2), "it holds objects other than tensors, which are never unp"),
        ("a.pt", [torch.tensor(GREY)], "it holds a list: save one tensor of all images"),
        ("a.pt", {"images": [torch.tensor(GREY)]}, "array images is a list: store one array or t"),
        ("a.pt", torch.tensor(UNIT).to_sparse(), "tensor of layout torch.sparse_coo: store it den"),
        ("a.pt", lambda: b"no file of tensors", "torch.save did not write it, or it is damaged"),
        ("a.npy", lambda: b"", "a.npy is damaged or not an .npz archive, .npy or .pt file of num"),
    ],
)
def test_all_others_are_refused_by_name(tmp_path, name, stored, message, tally):
    path = tmp_path / name
    path.write_bytes(stored()) if callable(stored) and not isinstance(
        stored, torch.nn.Module
    ) else _write(path, stored)
    tally(SUBJECT, "faults")
    with pytest.raises(ValueError) as caught:
        _load(path)
    tally(SUBJECT, "refused")
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*.npy"))
