"""The examples run as they stand, in a new folder, and say what they found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_there_are_examples_and_each_is_explained():
    assert len(EXAMPLES) >= 5
    pages = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    assert [path.name for path in EXAMPLES if f"examples/{path.name}" not in pages] == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example(path, tmp_path):
    writes = "--out" in path.read_text()
    command = [sys.executable, str(path), *(["--out", str(tmp_path / "written")] if writes else [])]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error::UserWarning"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 3 and "nan" not in done.stdout
    if writes:
        (written,) = (tmp_path / "written").iterdir()
        assert written.stat().st_size > (10_000 if written.suffix == ".png" else 500)
