"""The two small parts of Omniglot, as zips and unpacked, in the layout of the published ones."""

import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from fastsfvae.cli import main as cli
from fastsfvae.data import load
from fastsfvae.data.load import load_set

SMALL1, SMALL2 = "images_background_small1", "images_background_small2"
# Greek is in both.
ALPHABETS = {SMALL1: ("Balinese", "Greek"), SMALL2: ("Greek", "Tagalog")}
DRAWERS = 20


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSFVAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(load, "_said", set())


def _drawing(alphabet, drawer):
    """Ink on paper: dark, one bit a pixel."""
    rng = np.random.default_rng([len(alphabet), ord(alphabet[0]), drawer])
    return rng.integers(0, 2, (28, 28)).astype(bool)


def _png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()


def _zip(folder, name, change=None):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
        archive.mkdir(name) if hasattr(archive, "mkdir") else archive.writestr(f"{name}/", "")
        archive.writestr(f"__MACOSX/{name}/Greek/._x.png", b"a system's own")
        for alphabet in ALPHABETS[name]:
            for drawer in range(1, DRAWERS + 1):
                pixels = _drawing(alphabet, drawer)
                if change == (alphabet, drawer):
                    pixels = ~pixels
                path = f"{name}/{alphabet}/character01/0001_{drawer:02}.png"
                archive.writestr(path, _png(pixels))


def _unpack(folder, name):
    with zipfile.ZipFile(folder / f"{name}.zip") as archive:
        archive.extractall(folder)
    (folder / f"{name}.zip").unlink()


def _load(folder, split):
    return load_set("omniglot-images", str(folder), split, channels=1, size=28)


def _expected(alphabets, split):
    drawers = [n for n in range(1, DRAWERS + 1) if (n % 10 == 0) == (split == "test")]
    return np.stack([255 * _drawing(a, n).astype(np.uint8) for a in alphabets for n in drawers])


@pytest.mark.parametrize("unpacked", [(), (SMALL1,), (SMALL2,), (SMALL1, SMALL2)])
@pytest.mark.parametrize("names", [(SMALL1,), (SMALL2,), (SMALL1, SMALL2)])
def test_one_or_both_zipped_or_not(tmp_path, names, unpacked):
    place = tmp_path / "data"
    for name in names:
        _zip(place, name)
        if name in unpacked:
            _unpack(place, name)
    alphabets = sorted({alphabet for name in names for alphabet in ALPHABETS[name]})
    said = f"a part: {20 * len(alphabets)} drawings of {len(alphabets)} alphabets"
    with pytest.warns(UserWarning, match=said):
        train = _load(place, "train")
    np.testing.assert_array_equal(train.images[:, 0].numpy(), _expected(alphabets, "train"))
    test = _load(place, "test").images
    np.testing.assert_array_equal(test[:, 0].numpy(), _expected(alphabets, "test"))
    assert load.data_label("omniglot-images", str(place)) == f"omniglot-images, {said}"


def test_the_place_may_be_the_part_itself(tmp_path):
    _zip(tmp_path / "data", SMALL2)
    for place in (tmp_path / "data" / f"{SMALL2}.zip", tmp_path / "data" / SMALL2):
        if not place.exists():
            _unpack(tmp_path / "data", SMALL2)
        with pytest.warns(UserWarning, match="a part: 40 drawings of 2 alphabets"):
            loaded = _load(place, "test")
        np.testing.assert_array_equal(
            loaded.images[:, 0].numpy(), _expected(ALPHABETS[SMALL2], "test")
        )


def test_two_drawings_of_one_name_that_differ_are_refused(tmp_path):
    _zip(tmp_path / "data", SMALL1)
    _zip(tmp_path / "data", SMALL2, change=("Greek", 7))
    with pytest.raises(ValueError, match="small1.zip: .*0001_07.png and .*small2.*07.png differ"):
        _load(tmp_path / "data", "train")


@pytest.mark.parametrize("kind", ["cut short", "a broken drawing"])
def test_a_damaged_zip_is_refused(tmp_path, kind):
    _zip(tmp_path / "data", SMALL1)
    path = tmp_path / "data" / f"{SMALL1}.zip"
    content = path.read_bytes()
    broken = content.replace(_png(_drawing("Greek", 3)), bytes(len(_png(_drawing("Greek", 3)))))
    assert broken != content
    path.write_bytes(content[: len(content) // 2] if kind == "cut short" else broken)
    with pytest.raises(ValueError, match=r"small1.zip is damaged \(.*\): fetch it again"):
        _load(tmp_path / "data", "train")


def test_part_of_the_whole_set_is_still_refused(tmp_path):
    _zip(tmp_path / "data", SMALL1)
    (tmp_path / "data" / "images_background").mkdir()
    with pytest.raises(ValueError, match="has 0 drawings, the published set 19280"):
        _load(tmp_path / "data", "train")


@pytest.mark.slow
def test_results_name_the_part(tmp_path, capsys):
    _zip(tmp_path / "data", SMALL1)
    out = tmp_path / "run"
    given = ["--data", "omniglot-images", "--data-dir", str(tmp_path / "data"), "--out", str(out)]
    model = ["--model", "linear", "--latent-dim", "2", "--method", "sampling", "--steps", "1"]
    assert cli.main(["train", *given, *model, "--batch-size", "4"]) == 0
    said = "a part: 40 drawings of 2 alphabets"
    assert said in capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    assert results["conventions"]["data"] == f"omniglot-images, {said}"
    assert cli.main(["evaluate", str(out), "--samples", "10", "--images", "4"]) == 0
    found = json.loads((out / "evaluation-1" / "evaluation.json").read_text())
    assert found["conventions"]["data"] == f"omniglot-images, {said}"
