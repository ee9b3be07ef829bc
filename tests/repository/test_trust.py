"""The table of `make trust`: what runs found is added up, and nothing is lost on the way."""

import json
import subprocess
import sys

import pytest

from tests import trust


def test_counts_are_added_and_the_largest_errors_kept():
    first = {"counts": {"a": {"cases": 2, "NaNs": 0}}, "errors": {"a": {"J": 1e-9, "r": 2e-9}}}
    second = {"counts": {"a": {"cases": 3}, "b": {"faults": 1000}}, "errors": {"a": {"J": 3e-9}}}
    counts, errors = trust.join([first, second])
    assert counts == {"a": {"cases": 5, "NaNs": 0}, "b": {"faults": 1000}}
    assert errors == {"a": {"J": 3e-9, "r": 2e-9}}
    lines = trust.table(counts, errors).splitlines()
    assert "| a | 5 cases, 0 NaNs | J 3.0e-09, r 2.0e-09 |" in lines
    assert "| b | 1,000 faults |  |" in lines
    assert "5 cases, 1,000 faults, 0 NaNs, 0 lost runs, 0 taken for whole" in lines[-1]


def test_every_part_names_files_that_exist():
    for part in trust.PARTS:
        for name in part.modules:
            assert (trust.ROOT / trust.file_of(name)).is_file()


@pytest.mark.slow
def test_a_run_records_what_its_tests_count(tmp_path):
    (tmp_path / "test_a.py").write_text(
        "def test_a(tally, largest_error):\n"
        "    tally('x', 'cases', 2)\n"
        "    tally('x', 'cases')\n"
        "    largest_error('x', 'J', 2.0)\n"
        "    largest_error('x', 'J', float('nan'))\n"
        "    largest_error('x', 'J', 1.0)\n"
    )
    record = tmp_path / "record.json"
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "--record", str(record)]
    subprocess.run([*command, str(tmp_path)], cwd=trust.ROOT, check=True, capture_output=True)
    found = json.loads(record.read_text())
    assert found["counts"] == {"x": {"cases": 3}}
    # A NaN is larger than any error.
    assert found["errors"]["x"]["J"] != found["errors"]["x"]["J"]
