"""What a release says of itself in several files is one thing."""

import re

import pytest

from fastsfvae import __version__
from tests.repository.pages import ROOT

yaml = pytest.importorskip("yaml")
PROJECT = (ROOT / "pyproject.toml").read_text()
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
RUNS = [step["run"] for job in WORKFLOW["jobs"].values() for step in job["steps"] if "run" in step]


def test_the_version_and_its_date_are_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    released = re.search(
        r"^## (\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)$",
        (ROOT / "CHANGELOG.md").read_text(),
        re.MULTILINE,
    )
    assert released
    assert released.groups() == (citation["version"], str(citation["date-released"]))
    assert citation["version"] == __version__
    assert citation["repository-code"] in PROJECT and citation["license"] == "Apache-2.0"


def test_the_workflow_calls_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    called = {run.split()[1] for run in RUNS if run.startswith("make ")}
    assert {"lint", "test", "docs", "release-check"} <= called <= targets
    others = [run for run in RUNS if not run.startswith("make ")]
    assert others and all((ROOT / run.split()[-1]).exists() for run in others if ".py" in run)


def test_the_workflow_tries_what_is_said_to_be_supported():
    tried = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]
    assert tried["python"] == ["3.10", "3.11", "3.12", "3.13"]
    stated = re.findall(r"Python :: (3\.\d+)", PROJECT)
    assert stated and set(stated) <= set(tried["python"])
    (oldest,) = re.findall(r'"torch>=([\d.]+)"', PROJECT)
    pinned = [(ROOT / name).read_text() for name in tried["constraints"]]
    versions = [re.search(r"^torch==([\d.]+)$", text, re.MULTILINE)[1] for text in pinned]
    numbers = [tuple(map(int, version.split("."))) for version in versions]
    assert versions[0].startswith(f"{oldest}.") and numbers[1] > numbers[0]
