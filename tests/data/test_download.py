"""Downloads from a local server; the files are tiny, in the true formats."""

import functools
import gzip
import hashlib
import http.server
import struct
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image

from fastsfvae.cli import main as cli
from fastsfvae.data import download, files
from fastsfvae.data.load import DATA_SETS, download_images, load_images

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)


class _Handler(http.server.SimpleHTTPRequestHandler):
    cut = False

    def log_message(self, *_):
        pass

    def copyfile(self, source, outputfile):
        content = source.read()
        outputfile.write(content[: len(content) // 2] if self.cut else content)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder and the address that it is served at."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setenv("FASTSFVAE_CACHE", str(tmp_path / "cache"))
    handler = functools.partial(_Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def _md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def _publish(monkeypatch, name, url):
    source = download.SOURCES[name]._replace(url=url)
    monkeypatch.setitem(download.SOURCES, name, source)


def _write_png(path, pixels):
    path.parent.mkdir(parents=True)
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(
    ("name", "published"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")]
)
def test_idx(served, tmp_path, monkeypatch, name, published):
    folder, url = served
    resources = []
    for split, kind in ((s, k) for s in ("train", "t10k") for k in ("images-idx3", "labels-idx1")):
        path = folder / f"{split}-{kind}-ubyte.gz"
        shape = (6, 28, 28) if kind == "images-idx3" else (6,)
        header = struct.pack(f">{1 + len(shape)}i", 2048 + len(shape), *shape)
        content = PIXELS if len(shape) == 3 else np.arange(6, dtype=np.uint8)
        path.write_bytes(gzip.compress(header + content.tobytes()))
        resources.append((path.name, _md5(path)))
    monkeypatch.setattr(getattr(torchvision.datasets, published), "mirrors", [f"{url}/"])
    monkeypatch.setattr(getattr(torchvision.datasets, published), "resources", resources)
    place = tmp_path / "new" / name
    download_images(name, str(place))
    images = load_images(name, str(place), "train", channels=1, size=28)
    np.testing.assert_array_equal(images[:, 0].numpy(), PIXELS)
    # What is there is not fetched again, nor asked for.
    monkeypatch.setattr(getattr(torchvision.datasets, published), "mirrors", [])
    download_images(name, str(place))


def test_omniglot_by_its_checksum(served, tmp_path, monkeypatch):
    folder, url = served
    (folder / "chardata.mat").write_bytes(b"published")
    _publish(monkeypatch, "omniglot", f"{url}/chardata.mat")
    with pytest.raises(RuntimeError, match="omniglot could .*it has md5 .*, the published file 2"):
        download_images("omniglot", str(tmp_path / "data"))
    assert list((tmp_path / "data").iterdir()) == []
    monkeypatch.setattr(download, "OMNIGLOT_MD5", _md5(folder / "chardata.mat"))
    download_images("omniglot", str(tmp_path / "data"))
    assert (tmp_path / "data" / "chardata.mat").read_bytes() == b"published"
    assert len(list((tmp_path / "data").iterdir())) == 1
    # A file of the user's own under that name is theirs to replace.
    (tmp_path / "data" / "chardata.mat").write_bytes(b"mine")
    download_images("omniglot", str(tmp_path / "data"))
    assert (tmp_path / "data" / "chardata.mat").read_bytes() == b"mine"


def test_omniglot_images(served, tmp_path, monkeypatch):
    folder, url = served
    sums = {}
    for name in ("images_background", "images_evaluation"):
        _write_png(tmp_path / name / "Greek" / "character01" / "0001_01.png", PIXELS[0] > 127)
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            for path in (tmp_path / name).rglob("*.png"):
                archive.write(path, path.relative_to(tmp_path))
        sums[name] = _md5(folder / f"{name}.zip")
    monkeypatch.setattr(torchvision.datasets.Omniglot, "download_url_prefix", url)
    monkeypatch.setattr(torchvision.datasets.Omniglot, "zips_md5", sums)
    monkeypatch.setattr(
        files, "_OMNIGLOT", {"train": ("images_background", 1), "test": ("images_evaluation", 1)}
    )
    download_images("omniglot-images", str(tmp_path / "data"))
    for split in ("train", "test"):
        images = load_images("omniglot-images", str(tmp_path / "data"), split, channels=1, size=28)
        np.testing.assert_array_equal(images[0, 0].numpy(), 255 * (PIXELS[0] > 127))


@pytest.fixture
def chairs(served, tmp_path, monkeypatch):
    """Ten chairs of one view in a served archive; the archive and the folder they belong in."""
    folder, url = served
    for chair in range(10):
        view = tmp_path / "rendered_chairs" / f"{chair}" / "renders" / "0.png"
        _write_png(view, np.full((4, 4, 3), chair, np.uint8))
    with tarfile.open(folder / "rendered_chairs.tar", "w") as archive:
        archive.add(tmp_path / "rendered_chairs", "rendered_chairs")
    monkeypatch.setattr(files, "_CHAIRS", 10)
    monkeypatch.setattr(files, "_VIEWS", 1)
    _publish(monkeypatch, "chairs", f"{url}/rendered_chairs.tar")
    return folder / "rendered_chairs.tar", tmp_path / "data"


@pytest.fixture(params=["data_filter", None])
def tar_filter(request, monkeypatch):
    """tarfile as this Python has it, and as it was before 3.10.12 and 3.11.4."""
    if request.param is None:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    elif not hasattr(tarfile, "data_filter"):
        pytest.skip("this Python's tarfile has no filters")


def test_chairs(chairs, tar_filter):
    _, place = chairs
    download_images("chairs", str(place))
    images = load_images("chairs", str(place), "train", channels=3, size=4)
    assert images[:, 0, 0, 0].tolist() == list(range(9))
    assert {path.name for path in place.iterdir()} == {"rendered_chairs", "rendered_chairs.tar"}


def test_a_lost_connection(chairs, monkeypatch):
    archive, place = chairs
    monkeypatch.setattr(_Handler, "cut", True)
    size = archive.stat().st_size
    with pytest.raises(RuntimeError, match=f"ended after {size // 2} of {size} bytes") as caught:
        download_images("chairs", str(place))
    assert "\n" not in str(caught.value)
    assert list(place.iterdir()) == []
    monkeypatch.setattr(_Handler, "cut", False)
    download_images("chairs", str(place))
    assert len(load_images("chairs", str(place), "test", channels=3, size=4)) == 1


def test_an_archive_that_is_cut(chairs):
    archive, place = chairs
    place.mkdir()
    content = archive.read_bytes()
    (place / archive.name).write_bytes(content[: len(content) // 2 + 100])
    with pytest.raises(RuntimeError, match=r"rendered_chairs.tar is damaged: .*remove it and try"):
        download_images("chairs", str(place))
    assert not (place / "rendered_chairs").exists()
    # The killed attempt's part is no obstacle.
    (place / archive.name).write_bytes(content)
    download_images("chairs", str(place))
    assert len(load_images("chairs", str(place), "train", channels=3, size=4)) == 9


@pytest.mark.parametrize(
    ("name", "kind", "link"),
    [
        ("rendered_chairs/../../out", tarfile.REGTYPE, ""),
        ("/out", tarfile.LNKTYPE, "/etc/passwd"),
        ("rendered_chairs/link", tarfile.SYMTYPE, "/etc"),
        ("rendered_chairs/pipe", tarfile.FIFOTYPE, ""),
    ],
)
def test_an_archive_that_reaches_outside(chairs, tar_filter, name, kind, link):
    archive, place = chairs
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    with tarfile.open(archive, "a") as tar:
        tar.addfile(member)
    with pytest.raises(RuntimeError, match=r"rendered_chairs.tar is damaged: .*remove it and try"):
        download_images("chairs", str(place))
    assert {path.name for path in place.iterdir()} <= {"rendered_chairs.part", archive.name}


def test_the_command(chairs, capsys):
    _, place = chairs
    out = place.parent / "run"
    data = ["--data", "chairs", "--data-dir", str(place), "--image-size", "4"]
    model = ["--model", "linear", "--latent-dim", "2", "--method", "sampling", "--steps", "1"]
    train = ["train", *data, *model, "--batch-size", "2", "--out", str(out)]
    assert cli.main(train) == 2
    assert "put it there, or give --download (1,393 chairs of 62 v" in capsys.readouterr().err
    assert not place.exists()
    assert cli.main([*train, "--download"]) == 0
    # Data that is gone can be fetched again for a resumed run.
    (place / "rendered_chairs").rename(place / "away")
    resume = ["train", "--out", str(out), "--steps", "2", "--resume"]
    assert cli.main(resume) == 2
    assert cli.main([*resume, "--download"]) == 0
    assert cli.main(["train", "--download", "--out", str(out / "other")]) == 2
    error = capsys.readouterr().err
    assert "data='digits': --download is for mnist, omniglot, " in error


@pytest.mark.parametrize("name", list(download.SOURCES))
def test_without_a_network(name, tmp_path, monkeypatch):
    nowhere = "http://127.0.0.1:9"
    _publish(monkeypatch, name, f"{nowhere}/file")
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"{nowhere}/"])
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [f"{nowhere}/"])
    monkeypatch.setattr(torchvision.datasets.Omniglot, "download_url_prefix", nowhere)
    # Google Drive is asked through this function.
    monkeypatch.setattr(torchvision.datasets.celeba, "download_file_from_google_drive", _refuse)
    with pytest.raises(RuntimeError, match=f"{name} could not be downloaded from {nowhere}") as e:
        download_images(name, str(tmp_path))
    assert "refused" in str(e.value) and "\n" not in str(e.value)


def _refuse(*_):
    raise RuntimeError("connection\nrefused")


def test_what_is_not_downloaded(tmp_path):
    for name in DATA_SETS.keys() - download.SOURCES.keys():
        with pytest.raises(ValueError, match=f"data='{name}': --download is for mnist, omniglot, "):
            download_images(name, str(tmp_path))
    with pytest.raises(ValueError, match="say where it lies with --data-dir"):
        download_images("mnist", "")
