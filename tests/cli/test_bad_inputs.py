"""Every bad input is one line and exit code 2; nothing on disk is made, changed or lost."""

import hashlib
import os
import random
import subprocess
import sys

import pytest

from fastsfvae.cli import main as cli
from tests.cli.bad_inputs import build, cases

CASES = cases()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTSFVAE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("fastsfvae.results.run_figures.save_figures", lambda run: [])
        folder = tmp_path_factory.mktemp("here")
        patch.chdir(folder)
        build(folder)
        # What builders of models import is this folder's.
        patch.setattr(sys, "path", [str(folder), *sys.path])
        patch.setattr(sys, "dont_write_bytecode", True)
        yield folder


def _tree(folder):
    """Names, kinds, modes and contents of all that lies in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path} {path.stat().st_mode}".encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def _wrong(code, out, error, named):
    """What a command did that it must not do; "" where all is well."""
    lines = [line for line in error.splitlines() if ": note: " not in line]
    if code != 2:
        return f"exit code {code}"
    if len(lines) != 1 or out:
        return f"{len(lines)} lines: {error[:2000]}{out[:200]}"
    return "" if named in lines[0] else f"{named!r} is not in: {lines[0][:400]}"


@pytest.mark.parametrize("command", CASES)
def test_bad_inputs(command, folder, capsys, tally):
    subject = f"bad inputs of fastsfvae {command}"
    before, found = _tree(folder), []
    assert len(CASES[command]) >= 60
    capsys.readouterr()
    for arguments, named in CASES[command]:
        try:
            code = cli.main(arguments)
        # What is raised is a fault like any other, to be listed with the rest.
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
        wrong = _wrong(code, *capsys.readouterr(), named)
        if _tree(folder) != before:
            wrong, before = f"{wrong}; files changed", _tree(folder)
        tally(subject, "cases")
        tally(subject, "not one line", int(bool(wrong)))
        if wrong:
            found.append(f"{' '.join(arguments)[:200]}: {wrong}")
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("command", CASES)
def test_bad_inputs_of_processes(command, folder, tally, request):
    before = _tree(folder)
    # No process can be given a NUL.
    able = [case for case in CASES[command] if "\0" not in "".join(case[0])]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    count = request.config.getoption("--processes")
    for arguments, named in random.Random(0).sample(able, count):
        start = [sys.executable, "-m", "fastsfvae", *arguments]
        done = subprocess.run(
            start, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
        )
        wrong = _wrong(done.returncode, done.stdout, done.stderr, named)
        tally("bad inputs in processes", "cases")
        tally("bad inputs in processes", "not one line", int(bool(wrong)))
        assert not wrong, arguments
        assert _tree(folder) == before
