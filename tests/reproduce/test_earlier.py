"""Tables that are made again where the runs behind their numbers are not."""

import csv
import io
from dataclasses import replace

import pytest

from fastsfvae.reproduce import EXPERIMENTS, Options, figures, reproduce
from fastsfvae.reproduce.cells import Experiment
from tests.reproduce.test_reproduce import CONFIG, OtherWeights, _cell


def _experiment(cells, draw=lambda results: None):
    return Experiment("a title", lambda options: cells, draw, ())


def _reproduced(monkeypatch, tmp_path, cells, only="", **options):
    monkeypatch.setitem(EXPERIMENTS, "table4", _experiment(cells))
    reproduce("table4", Options(**options), tmp_path, only)
    text = (tmp_path / "table4-runs.csv").read_text()
    return list(csv.DictReader(io.StringIO(text))), (tmp_path / "table4.md").read_text()


def test_numbers_of_runs_that_are_not_here_stay(tmp_path, monkeypatch):
    cells = [_cell(), replace(_cell(), name="other", config=replace(CONFIG, lr=2e-3))]
    before, page = _reproduced(monkeypatch, tmp_path, cells)
    assert "4 runs; 4 of the protocol's 4 are finished" in page
    # As in a fresh clone: the tables are here, the runs are not.
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    after, page = _reproduced(monkeypatch, tmp_path, cells, only="other")
    assert "4 runs; 4 of the protocol's 4 are finished" in page
    origin = ("commit", "seconds")
    plain = [{k: v for k, v in row.items() if k not in origin} for row in after]
    expected = [{k: v for k, v in row.items() if k not in origin} for row in before]
    # In the protocol's order, wherever the numbers come from.
    assert [row["cell"] for row in after] == [row["cell"] for row in before]
    assert sorted(plain, key=str) == sorted(expected, key=str)
    # Once more: what was read is written as it was.
    again, _ = _reproduced(monkeypatch, tmp_path, cells, only="other")
    assert again == after


def test_numbers_of_an_earlier_version_stay(tmp_path, monkeypatch):
    """Its configuration had fewer fields; beside a later one's they are empty columns."""
    cells = [_cell(), replace(_cell(), name="other", config=replace(CONFIG, lr=2e-3))]
    before, _ = _reproduced(monkeypatch, tmp_path, cells)
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    path = tmp_path / "table4-runs.csv"
    for left_out in (["draws", "warm_start"], []):
        if left_out:
            columns = [name for name in before[0] if name not in left_out]
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(before)
        after, _ = _reproduced(monkeypatch, tmp_path, cells, only="other")
        assert len(after) == len(before)


def test_numbers_of_another_protocol_do_not(tmp_path, monkeypatch):
    _reproduced(monkeypatch, tmp_path, [_cell()])
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    for changed in (
        replace(_cell(), config=replace(CONFIG, lr=5e-3)),
        replace(_cell(), measure=OtherWeights()),
        replace(_cell(), name="renamed"),
    ):
        other = replace(changed, name="new")
        rows, _ = _reproduced(monkeypatch, tmp_path, [changed, other], only="new")
        assert {row["cell"] for row in rows} == {"new"}
        _reproduced(monkeypatch, tmp_path, [_cell()])
        for folder in (tmp_path / "runs").glob("new*"):
            assert folder.is_dir()


def test_a_picture_of_models_that_are_not_here_is_left_alone(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")

    def draw(results):
        for result in results:
            result.load()
        return figures.row_of_panels(1, 2, 2)[0]

    monkeypatch.setitem(EXPERIMENTS, "table4", _experiment([_cell()], draw))
    reproduce("table4", Options(), tmp_path)
    picture = (tmp_path / "table4.png").read_bytes()
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    reproduce("table4", Options(seeds=1), tmp_path)
    assert (tmp_path / "table4.png").read_bytes() == picture
