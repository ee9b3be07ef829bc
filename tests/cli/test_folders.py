"""Folders of results are whole or not there, and are refused before there are results."""

import os

import pytest

from fastsfvae.cli import measure
from fastsfvae.ground.atomic import check_writable, new_folder
from fastsfvae.ground.options import UsageError


def test_a_folder_appears_when_it_is_whole(tmp_path):
    place = tmp_path / "deep" / "results"
    with new_folder(place) as inside:
        (inside / "a").write_text("1")
        assert not place.exists()
    assert (place / "a").read_text() == "1"
    assert os.listdir(place.parent) == ["results"]
    # As readable as any other folder.
    (tmp_path / "other").mkdir()
    assert place.stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_folder_that_fails(tmp_path, error):
    place = tmp_path / "results"
    with pytest.raises(type(error)) as caught, new_folder(place) as inside:
        (inside / "a").write_text("1")
        raise error
    assert os.listdir(tmp_path) == []
    if isinstance(error, OSError):
        assert str(caught.value) == (
            f"{place} could not be written (No space left on device): nothing of it is left"
        )


def test_what_has_come_to_stand_there_stays(tmp_path):
    place = tmp_path / "results"
    with pytest.raises(OSError, match="could not be written"), new_folder(place) as inside:
        (inside / "a").write_text("1")
        place.mkdir()
        (place / "mine").write_text("2")
    assert os.listdir(tmp_path) == ["results"] and os.listdir(place) == ["mine"]


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch):
    check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file cannot .*: give another place"):
        check_writable(tmp_path / "file" / "b")
    if os.geteuid():
        tmp_path.chmod(0o500)
        with pytest.raises(OSError, match="cannot be written"):
            check_writable(tmp_path / "b")
        tmp_path.chmod(0o700)
    with pytest.raises(UsageError, match="exists: give another folder"):
        measure._check_out(str(tmp_path), tmp_path)
    # Root writes anywhere but on what is mounted read-only.
    monkeypatch.setattr("tempfile.mkdtemp", _read_only)
    with pytest.raises(OSError, match=r"Read-only file system\): give another place") as caught:
        measure._check_out(None, tmp_path / "evaluation")
    assert "\n" not in str(caught.value)


def _read_only(*args, **settings):
    raise OSError(30, "Read-only file system")
