"""Where the public sets come from, and their download, which only ``--download`` starts."""

from __future__ import annotations

import hashlib
import os
import tarfile
import urllib.request
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fastsfvae.ground.progress import counter

OMNIGLOT_FILE = "chardata.mat"
OMNIGLOT_MD5 = "21ecaf34373511aa7691cf2e0802aa3d"

_BLOCK = 2**18
_SECONDS_WITHOUT_DATA = 30


class Source(NamedTuple):
    """Where a set is published and how much of it there is."""

    url: str
    size: str


class SystemFolder(NamedTuple):
    """Where a package of the system puts a set."""

    path: Path
    package: str


SYSTEM_FOLDERS = {
    "fashion-mnist": SystemFolder(
        Path("/usr/share/datasets/fashion-mnist"), "dataset-fashion-mnist"
    ),
}
SOURCES = {
    "mnist": Source("https://ossci-datasets.s3.amazonaws.com/mnist/", "12 MB"),
    "omniglot": Source(
        "https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT/chardata.mat",
        "32,415 characters of 28x28",
    ),
    "fashion-mnist": Source("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", "31 MB"),
    "omniglot-images": Source("https://github.com/brendenlake/omniglot", "16 MB"),
    "celeba": Source("https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html", "1.4 GB"),
    "chairs": Source(
        "https://www.di.ens.fr/willow/research/seeing3Dchairs/data/rendered_chairs.tar",
        "1,393 chairs of 62 views",
    ),
}


def missing(name: str, what: str) -> FileNotFoundError:
    """The error that says what is not there and how to get it."""
    url, size = SOURCES[name]
    if name not in SYSTEM_FOLDERS:
        return FileNotFoundError(f"{what}: put it there, or give --download ({size}, {url})")
    return FileNotFoundError(
        f"{what}: apt-get install {SYSTEM_FOLDERS[name].package} and leave out --data-dir, or say "
        f"with --data-dir where it lies, or give --download with --data-dir ({size}, {url})"
    )


def download(name: str, folder: Path) -> None:
    """Fetch a set into a folder, as torchvision lays it out where it has the set.

    Args:
        name: one of `SOURCES`.
        folder: made where it does not exist.

    Raises:
        RuntimeError: without a network, for a file that is not the published one, or without what
            the download needs, in one line; what was there stays.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _DOWNLOADS[name](folder)
    # torchvision and gdown raise errors of many classes, some of them over several lines.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RuntimeError(
            f"{name} could not be downloaded from {SOURCES[name].url} to {folder} ({reason})"
        ) from error


def _mnist(folder: Path) -> None:
    _torchvision().MNIST(folder, download=True)


def _fashion_mnist(folder: Path) -> None:
    _torchvision().FashionMNIST(folder, download=True)


def _omniglot(folder: Path) -> None:
    _fetch(SOURCES["omniglot"].url, folder / OMNIGLOT_FILE, OMNIGLOT_MD5)


def _omniglot_images(folder: Path) -> None:
    for background in (True, False):
        _torchvision().Omniglot(folder, background=background, download=True)


def _celeba(folder: Path) -> None:
    _torchvision().CelebA(folder, download=True)


def _chairs(folder: Path) -> None:
    archive = folder / "rendered_chairs.tar"
    if not archive.is_file():
        _fetch(SOURCES["chairs"].url, archive)
    # Under another name until it is whole: no digest is published that half a set would fail.
    unpacked = folder / "rendered_chairs.part"
    try:
        with tarfile.open(archive) as tar:
            _unpack(tar, unpacked)
    except tarfile.TarError as error:
        raise ValueError(f"{archive} is damaged: {error}; remove it and try again") from error
    os.replace(unpacked / "rendered_chairs", folder / "rendered_chairs")
    unpacked.rmdir()


_DOWNLOADS: dict[str, Callable[[Path], None]] = {
    "mnist": _mnist,
    "fashion-mnist": _fashion_mnist,
    "omniglot": _omniglot,
    "omniglot-images": _omniglot_images,
    "celeba": _celeba,
    "chairs": _chairs,
}


def _unpack(tar: tarfile.TarFile, folder: Path) -> None:
    """Unpack an archive, nothing of which may end outside of the folder."""
    if hasattr(tarfile, "data_filter"):
        tar.extractall(folder, filter="data")
        return
    # Before Python 3.10.12 and 3.11.4: plain files and folders alone.
    for member in tar:
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts or not (member.isfile() or member.isdir()):
            raise tarfile.TarError(f"{member.name!r} is not a file or folder inside of it")
        tar.extract(member, folder)


def _torchvision():
    try:
        from torchvision import datasets
    except ImportError as error:
        raise RuntimeError('it needs torchvision: pip install "fastsfvae[data]"') from error
    return datasets


def _fetch(url: str, path: Path, md5: str | None = None) -> None:
    """Download a file; it has its name only when it is whole."""
    partial = path.with_name(path.name + ".part")
    digest, size = hashlib.md5(usedforsecurity=False), 0
    try:
        with (
            urllib.request.urlopen(url, timeout=_SECONDS_WITHOUT_DATA) as response,
            partial.open("wb") as file,
        ):
            length = int(response.headers["Content-Length"] or 0)
            with counter(f"download {path.name}, bytes", length) as advance:
                while block := response.read(_BLOCK):
                    file.write(block)
                    digest.update(block)
                    size += len(block)
                    advance(len(block))
        # A connection that is lost ends the file without an error.
        if size < length:
            raise ValueError(f"the connection ended after {size} of {length} bytes")
        if md5 is not None and digest.hexdigest() != md5:
            raise ValueError(f"it has md5 {digest.hexdigest()}, the published file {md5}")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
