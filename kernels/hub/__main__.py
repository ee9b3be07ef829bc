"""Write the folder that the Hugging Face package `kernels` loads: sources, builds, card and tests.

    python -m fastsfvae.kernels.hub [FOLDER]

`torch-ext/` and `build.toml` are what kernel-builder builds from, `build/torch-cuda` and
`build/torch-cpu` what it would build of Python alone. The package is `package/` with every module
of the library that it imports, found by following imports. These are copied as they are, but for

- absolute imports, which become relative: the hub loads a package under a name of its own;
- the operators' namespace, which becomes that name: several versions live in one process.

A module that stands in `package/` already is taken in place of the library's.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path, PurePosixPath

from ..audit import REQUIRED

NAME = "gram-woodbury"
MODULE = NAME.replace("-", "_")
LICENSE = "apache-2.0"
# By the hub's convention: not yet for production.
VERSION = 0
# The oldest `kernels` that it was tried on.
MINVER = "0.17.2"
# On a CPU the kernels run in Triton's interpreter alone, and their plain twins always.
BACKENDS = ("cuda", "cpu")
CUDA_CAPABILITIES = [f"{arch // 10}.{arch % 10}" for arch in sorted(REQUIRED)]

HERE = Path(__file__).parent
KERNELS, CLONE = HERE.parent, HERE.parents[1]
COPIES = "_fastsfvae"
# What copied modules read beside themselves.
DATA = ("kernels/tiles.json",)

BUILD_TOML = f"""\
[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "{LICENSE}"
backends = {json.dumps(BACKENDS)}

[torch-noarch]
pyext = ["py", "json"]
cuda_capabilities = {json.dumps(CUDA_CAPABILITIES)}
"""
# kernel-builder writes these two itself.
OPS = '''\
"""The namespace of this build's operators."""

import torch

_NAMESPACE = "{id}"
ops = getattr(torch.ops, _NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an operator."""
    return f"{{_NAMESPACE}}::{{op_name}}"
'''
COMPATIBLE = '''\
"""The package above, where older versions of `kernels` look for it."""

import importlib.util
import sys
from pathlib import Path

_ID = "{id}"
if _ID not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_ID, Path(__file__).parents[1] / "__init__.py")
    sys.modules[_ID] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_ID])
__all__ = sys.modules[_ID].__all__
globals().update({{name: getattr(sys.modules[_ID], name) for name in __all__}})
'''


def package_files() -> dict[str, str]:
    """The package's texts by their paths: `package/`, and what it imports of the library."""
    own = HERE / "package"
    files = {path.relative_to(own).as_posix(): path.read_text() for path in own.rglob("*.py")}
    waiting = sorted(files)
    while waiting:
        path = waiting.pop()
        for found in _imported(path, files[path]):
            target = f"{COPIES}/{found}"
            if target not in files:
                files[target] = _adapted(found)
                waiting.append(target)
    return files | {f"{COPIES}/{name}": _origin(name).read_text() for name in DATA}


def _origin(name: str) -> Path:
    """Where a file of the library lies in a clone."""
    inside = name.startswith("kernels/")
    return KERNELS / name.removeprefix("kernels/") if inside else CLONE / "fastsfvae" / name


def _imported(path: str, text: str) -> set[str]:
    """The library's files that a file of the package imports, with the packages they are in."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        above = PurePosixPath(path).parts[: -node.level]
        base = [*above, *(node.module.split(".") if node.module else ())]
        if base[:1] != [COPIES]:
            continue
        for alias in node.names:
            parts = [*base[1:], alias.name]
            # Of a.b.c: the packages a and a.b, and the module a.b.c.
            for stop in range(1, len(parts) + 1):
                stem = "/".join(parts[:stop])
                found |= {n for n in (f"{stem}/__init__.py", f"{stem}.py") if _origin(n).is_file()}
    return found


def _adapted(name: str) -> str:
    """A module of the library with relative imports, and operators in the build's namespace."""
    text = _origin(name).read_text()
    dots = "." * len(PurePosixPath(name).parts)
    text = re.sub(r"^(\s*from )fastsfvae\.", rf"\1{dots}", text, flags=re.MULTILINE)
    text = re.sub(r"^(\s*from )fastsfvae ", rf"\1{dots} ", text, flags=re.MULTILINE)
    text, operators = re.subn(r'"fastsfvae::(\w+)"', r'add_op_namespace_prefix("\1")', text)
    if operators:
        last = "from torch import Tensor\n"
        if last not in text:
            raise ValueError(f"{name} names operators and has no line {last!r} to import behind")
        text = text.replace(last, f"{last}\nfrom {dots}._ops import add_op_namespace_prefix\n", 1)
    return text


def build(folder: Path) -> list[str]:
    """Write all into a new folder, whole or not at all.

    Args:
        folder: does not exist, or is empty.

    Returns:
        The files' paths below it.

    Raises:
        FileExistsError: it holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists: remove it, or name another folder")
    files = {"build.toml": BUILD_TOML, "LICENSE": (CLONE / "LICENSE").read_text()}
    # Where kernel-builder reads it, where its upload does, and where the hub shows it.
    files |= dict.fromkeys(
        ("CARD.md", "build/CARD.md", "README.md"), (HERE / "CARD.md").read_text()
    )
    files |= {f"tests/{path.name}": path.read_text() for path in (HERE / "tests").glob("*.py")}
    package = package_files()
    files |= {f"torch-ext/{MODULE}/{name}": text for name, text in package.items()}
    for backend in BACKENDS:
        variant = f"build/torch-{backend}"
        files |= {f"{variant}/{name}": text for name, text in _variant(backend, package).items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        whole = Path(scratch, folder.name)
        for name, text in files.items():
            (whole / name).parent.mkdir(parents=True, exist_ok=True)
            (whole / name).write_text(text)
        os.replace(whole, folder)
    return sorted(files)


def _variant(backend: str, package: dict[str, str]) -> dict[str, str]:
    """A build's files. Its name has a digest of the sources: equal names are equal packages."""
    sources = "".join(f"{name}\n{package[name]}" for name in sorted(package))
    unique = hashlib.sha256(sources.encode()).hexdigest()[:12]
    names = {"id": f"_{MODULE}_{backend}_{unique}"}
    files = package | {
        "_ops.py": OPS.format(**names),
        f"{MODULE}/__init__.py": COMPATIBLE.format(**names),
    }
    archs = {"archs": CUDA_CAPABILITIES} if backend == "cuda" else {}
    metadata = {
        **names,
        "name": NAME,
        "version": VERSION,
        "kernels-minver": MINVER,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend, **archs},
        "digest": {"algorithm": "sha256", "files": {n: _digest(files[n]) for n in sorted(files)}},
    }
    return files | {"metadata.json": json.dumps(metadata, indent=2) + "\n"}


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fastsfvae.kernels.hub", description=(__doc__ or "").partition("\n")[0]
    )
    default = Path("build/hub", NAME)
    parser.add_argument("folder", nargs="?", type=Path, default=default, help=f"default: {default}")
    folder = parser.parse_args(arguments).folder
    try:
        files = build(folder)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{folder}: {len(files)} files; kernels.get_local_kernel(Path({str(folder)!r})) loads it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
