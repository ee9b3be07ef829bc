"""What is built holds what it should, and imports where one stands: in a clone and outside."""

import fnmatch
import os
import shutil
import subprocess
import sys
from importlib.metadata import PathDistribution
from pathlib import Path
from typing import NamedTuple

import pytest

import fastsfvae

ROOT = Path(__file__).parents[2]
# What may lie in a clone and belongs to no build.
STRAY = {
    "build/lib/fastsfvae/stale.py",
    "fastsfvae.egg-info/SOURCES.txt",
    "fastsfvae/__pycache__/stale.pyc",
    "runs/run/results.json",
    "notes.txt",
}
MODULES = ("fastsfvae", "fastsfvae.kernels.gram_project", "fastsfvae.kernels.audit")


class Built(NamedTuple):
    """The names of the project's files, a copy of them, and what was built there, unpacked."""

    sources: set[str]
    clone: Path
    wheel: Path
    sdist: Path

    def package(self) -> set[str]:
        """What a wheel holds beside its description."""
        own = {name for name in self.sources if name.startswith("fastsfvae/")}
        kernels = {name for name in self.sources if name.startswith("kernels/")}
        # It copies a clone's files.
        kernels -= {name for name in kernels if name.startswith("kernels/hub/")}
        return own - {"fastsfvae/kernels/__init__.py"} | {f"fastsfvae/{name}" for name in kernels}


def tracked():
    """The project's files by git, with those that are not added yet where a build takes them."""

    def listed(*arguments):
        command = ["git", "-C", str(ROOT), "ls-files", *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return {name for name in done.stdout.splitlines() if (ROOT / name).is_file()}

    names = listed()
    folders = {name.partition("/")[0] for name in names if "/" in name}
    return names | listed("--others", "--exclude-standard", "--", *folders)


def unpacked():
    """The project's files in an unpacked sdist, which has no git."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    return {
        name
        for name in files(ROOT) - {"PKG-INFO"}
        if not any(fnmatch.filter(name.split("/"), pattern) for pattern in ignored)
    }


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def build(folder, out, *arguments):
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out), *arguments]
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("install")
    clone, dist = folder / "clone", folder / "dist"
    sources = tracked() if (ROOT / ".git").exists() else unpacked()
    for name in sources | STRAY:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        if name in sources:
            shutil.copy(ROOT / name, clone / name)
        else:
            (clone / name).touch()
    build(clone, dist)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    shutil.unpack_archive(wheel, folder / "wheel", "zip")
    shutil.unpack_archive(sdist, folder)
    return Built(sources, clone, folder / "wheel", folder / sdist.name.removesuffix(".tar.gz"))


def origins(folder, *installed):
    """Where a script that stands in `folder` finds MODULES, with the given folders installed.

    -S leaves out what an editable installation puts onto sys.path.
    """
    code = f"from importlib.util import find_spec\nfor m in {MODULES}: print(find_spec(m).origin)"
    others = [path for path in sys.path if path and Path(path).resolve() != ROOT.resolve()]
    done = subprocess.run(
        [sys.executable, "-B", "-S", "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, installed), *others])},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [Path(line) for line in done.stdout.splitlines()]


def test_a_build_leaves_nothing_behind(built):
    assert files(built.clone) == built.sources | STRAY


def test_a_wheel_holds_the_package_alone(built):
    found = {name for name in files(built.wheel) if ".dist-info/" not in name}
    assert found == built.package()
    data = {"data/mnist10k.npz", "data/ATTRIBUTION.md", "ops/measured.json", "py.typed"}
    assert {f"fastsfvae/{name}" for name in data} < found
    installed = (built.wheel / "fastsfvae/kernels/__init__.py").read_text()
    assert installed == (built.clone / "kernels/__init__.py").read_text()


def test_a_wheel_says_what_it_is(built):
    (folder,) = built.wheel.glob("*.dist-info")
    described = PathDistribution(folder)
    assert described.version == fastsfvae.__version__
    (command,) = described.entry_points
    assert command.name == "fastsfvae" and command.load()(["--version"]) == 0
    assert files(folder / "licenses") == {"LICENSE", "fastsfvae/data/ATTRIBUTION.md"}


def test_an_sdist_holds_the_whole_project(built):
    assert files(built.sdist) == built.sources | {"PKG-INFO"}
    assert os.access(built.sdist / ".ci/run", os.X_OK)


def test_a_wheel_of_the_sdist_is_the_same(built, tmp_path):
    build(built.sdist, tmp_path, "-t", "wheel")
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "wheel", "zip")
    assert files(tmp_path / "wheel") == files(built.wheel)


def test_an_installed_package_finds_its_kernels(built, tmp_path):
    package = built.wheel / "fastsfvae"
    kernels = package / "kernels"
    found = [package / "__init__.py", kernels / "gram_project.py", kernels / "audit.py"]
    assert origins(tmp_path, built.wheel) == found


@pytest.mark.slow
@pytest.mark.parametrize("installed", [False, True])
def test_a_clone_finds_its_kernels(built, installed):
    kernels = built.clone / "kernels"
    found = [built.clone / "fastsfvae/__init__.py"]
    found += [kernels / "gram_project.py", kernels / "audit.py"]
    assert origins(built.clone, *[built.wheel] * installed) == found
