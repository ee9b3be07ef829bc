"""Folders of image files: any, CelebA, the rendered chairs, Omniglot."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

from fastsfvae.data.convert import Found, Source
from fastsfvae.data.decode import SUFFIXES, Item
from fastsfvae.data.download import missing
from fastsfvae.data.split import PARTS, every_tenth
from fastsfvae.data.text import counted, printable, some

_CHAIRS, _VIEWS = 1_393, 62
_OMNIGLOT = {"train": ("images_background", 19_280), "test": ("images_evaluation", 13_180)}
_NAMED = 5


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is a system's own and no data."""
    return name.startswith(".") or name == "__MACOSX"


def walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """All files below a folder, sorted, and what is hidden and was not entered or taken.

    Links are followed; a folder that is reached again, e.g. by a loop, is not read again.

    Raises:
        ValueError: for a folder that cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(
            f"{printable(error.filename)} cannot be listed ({error.strerror}): allow it, or "
            "remove it"
        ) from error

    files, hidden, seen = [], [], set()
    # What links lead to comes last: a folder is known by its own name, where it has one in here.
    starts = [folder]
    for start in starts:
        for root, folders, names in os.walk(start, onerror=refuse):
            status = os.stat(root)
            if (key := (status.st_dev, status.st_ino)) in seen:
                folders.clear()
                continue
            seen.add(key)
            hidden += [Path(root, name) for name in (*folders, *names) if is_hidden(name)]
            files += [Path(root, name) for name in names if not is_hidden(name)]
            # In place, which is how os.walk is told where to go.
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            starts += [path for name in folders if (path := Path(root, name)).is_symlink()]
    return sorted(files), sorted(hidden)


def by_ending(
    files: list[Path], endings: tuple[str, ...], what: str
) -> tuple[list[Path], list[str]]:
    """The files that end so, and a note of the others where there are any."""
    taken = [path for path in files if path.name.lower().endswith(endings)]
    if len(taken) == len(files):
        return taken, []
    others = Counter(path.suffix.lower() or "no ending" for path in set(files) - set(taken))
    ordered = sorted(others.items(), key=lambda pair: (-pair[1], pair[0]))
    listed = some([f"{printable(ending)} {count:,}" for ending, count in ordered])
    left = len(files) - len(taken)
    return taken, [f"{left:,} of {len(files):,} files are no {what}: {listed}"]


def find_folder(folder: Path) -> Found:
    """Images below `folder`: those of its ``train``/``test`` folders, else every tenth to test."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give the folder of the images, unpacked")
    if not folder.is_dir():
        return _found(folder, [])
    files, hidden = walk(folder)
    images, notes = by_ending(files, SUFFIXES, "images")
    # What a system drops beside files without being asked is not worth a word.
    hidden = [path for path in hidden if path.name.lower().endswith(SUFFIXES) or path.is_dir()]
    if hidden:
        what = counted(len(hidden), "hidden file or folder is", "hidden files and folders are")
        notes.append(f"{what} skipped: {some(_names(folder, hidden), _NAMED)}")
    of_part: dict[str, list[Path]] = {"train": [], "test": []}
    outside: list[Path] = []
    for path in images:
        top = path.relative_to(folder).parts[0].lower()
        of_part.get(top, outside).append(path)
    if not any((folder / name).is_dir() for name in os.listdir(folder) if name.lower() in PARTS):
        return _found(folder, images, notes=notes)
    if outside:
        what = counted(len(outside), "image lies", "images lie")
        notes.append(
            f"{what} outside of train/ and test/ and will not be read: "
            f"{some(_names(folder, outside), _NAMED)}"
        )
    parts = ["test"] * len(of_part["test"]) + ["train"] * len(of_part["train"])
    return _found(folder, of_part["test"] + of_part["train"], parts, notes=notes)


def find_celeba(folder: Path) -> Found:
    """CelebA's aligned images, split by ``list_eval_partition.txt`` where that is beside them.

    `folder` holds ``img_align_celeba`` or torchvision's ``celeba`` around it, or the .jpg files
    themselves. Training takes partition 0, testing partition 2; without partitions every tenth
    image is for testing.
    """
    for base in (folder / "img_align_celeba", folder / "celeba" / "img_align_celeba", folder):
        if images := _visible(base, ".jpg"):
            break
    else:
        raise missing("celeba", f"{folder} has no folder img_align_celeba and no .jpg files")
    partition = base.parent / "list_eval_partition.txt"
    if not partition.is_file():
        return _found(base, images)
    text = partition.read_text(errors="replace")
    rows = [line.split() for line in text.splitlines() if line.strip()]
    if any(len(row) != 2 for row in rows):
        raise ValueError(f"{partition} is damaged: each line is a file name and a partition")
    if sorted(name for name, _ in rows) != [path.name for path in images]:
        raise ValueError(
            f"{base} has {len(images)} images, {partition} lists {len(rows)} or others: unpack "
            "img_align_celeba.zip again"
        )
    of_part = {"0": "train", "2": "test"}
    taken = [(base / name, of_part[part]) for name, part in rows if part in of_part]
    return _found(base, *_apart(taken), beside=[partition], published=True)


def find_chairs(folder: Path) -> Found:
    """``rendered_chairs/<id>/renders/*.png``; every tenth chair, with all its views, to test."""
    root = folder if folder.name == "rendered_chairs" else folder / "rendered_chairs"
    chairs = sorted(path for path in root.glob("*/renders") if path.is_dir())
    if not chairs:
        raise missing("chairs", f"{root} has no <id>/renders")
    taken = []
    for number, chair in enumerate(chairs):
        views = _visible(chair, ".png")
        _check_count(chair, len(views), _VIEWS, "views")
        taken += [(path, every_tenth(number)) for path in views]
    _check_count(root, len(chairs), _CHAIRS, "chairs")
    return _found(root, *_apart(taken), published=True)


def find_omniglot(folder: Path) -> Found:
    """Omniglot's drawings; its background alphabets to train, its evaluation alphabets to test.

    `folder` holds ``images_background`` and ``images_evaluation``, or torchvision's ``omniglot-py``
    around them.
    """
    taken = []
    for part, (name, count) in _OMNIGLOT.items():
        roots = (folder / name, folder / "omniglot-py" / name)
        if (root := next((path for path in roots if path.is_dir()), None)) is None:
            raise missing(
                "omniglot-images", f"{folder} has no folder {name}, itself or in omniglot-py"
            )
        paths, _ = by_ending(walk(root)[0], SUFFIXES, "images")
        _check_count(root, len(paths), count, "drawings")
        taken += [(path, part) for path in paths]
    return _found(folder, *_apart(taken), published=True)


def _found(
    folder: Path,
    paths: list[Path],
    parts: Sequence[str | None] | None = None,
    *,
    beside: Sequence[Path] = (),
    notes: Sequence[str] = (),
    published: bool = False,
) -> Found:
    def items() -> Iterator[Item]:
        for path, part in zip(paths, parts or [None] * len(paths), strict=True):
            yield Item(printable(path.relative_to(folder)), part, partial(_open, path))

    source = Source(len(paths), items(), [])
    return Found([*paths, *beside], lambda: source, list(notes), published)


def _open(path: Path) -> BinaryIO:
    # A pipe would wait for its writer for ever.
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no regular file")
    return path.open("rb")


def _names(folder: Path, paths: list[Path]) -> list[str]:
    return [printable(path.relative_to(folder)) for path in paths]


def _visible(folder: Path, suffix: str) -> list[Path]:
    """The files right in a folder that end so."""
    if not folder.is_dir():
        return []
    paths = (path for path in folder.iterdir() if path.suffix.lower() == suffix)
    return sorted(path for path in paths if not is_hidden(path.name) and not path.is_dir())


def _apart(taken: list[tuple[Path, str]]) -> tuple[list[Path], list[str]]:
    """Paths and parts, those for testing first."""
    taken = sorted(taken, key=lambda pair: pair[1] == "train")
    return [path for path, _ in taken], [part for _, part in taken]


def _check_count(folder: Path, count: int, published: int, what: str) -> None:
    """Refuse an archive that was unpacked in part."""
    if count != published:
        raise ValueError(
            f"{folder} has {count} {what}, the published set {published}: unpack it again, or "
            "train on a part as --data folder"
        )
