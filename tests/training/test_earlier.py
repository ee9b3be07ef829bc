"""Runs that an earlier version began: their checkpoint.pt is read, gone on from, and left alone."""

import pytest
import torch

import fastsfvae as sf
from fastsfvae import training
from fastsfvae.training.checkpoint import (
    CHECKPOINT,
    EARLIER_CHECKPOINT,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from fastsfvae.training.config import TrainConfig
from tests.training.test_faults import _assert_same_run
from tests.training.test_training import _interrupt_at

CONFIG = TrainConfig("sampling", model="tanh", latent_dim=3, batch_size=8, steps=60, seed=5)


def _begun_by_an_earlier_version(folder, steps):
    """A run whose state lies in a .pt file, as torch.save wrote it."""
    training.train(training.start(CONFIG, folder), _interrupt_at(steps))
    state = load_checkpoint(folder / CHECKPOINT)
    torch.save({"format": "fastsfvae checkpoint 1", **state}, folder / EARLIER_CHECKPOINT)
    (folder / CHECKPOINT).unlink()
    return (folder / EARLIER_CHECKPOINT).read_bytes()


def test_an_earlier_run_goes_on_to_the_bit(tmp_path):
    training.train(training.start(CONFIG, tmp_path / "whole"))
    folder = tmp_path / "run"
    # Within a window of averaged steps, which the file holds as well.
    earlier = _begun_by_an_earlier_version(folder, 30)
    assert sf.load(folder)[2].steps == 60 and not (folder / CHECKPOINT).exists()
    training.train(training.resume(folder))
    assert (folder / EARLIER_CHECKPOINT).read_bytes() == earlier
    assert newest_checkpoint(folder)[0].name == CHECKPOINT
    _assert_same_run(folder, tmp_path / "whole")


@pytest.mark.parametrize("behind", [0, 7, -7])
def test_of_two_files_the_one_of_more_steps_is_read(tmp_path, behind):
    _begun_by_an_earlier_version(tmp_path / "run", 20)
    path, state = newest_checkpoint(tmp_path / "run")
    assert path.name == EARLIER_CHECKPOINT
    # Whichever was written last: the times of copied files say nothing.
    save_checkpoint(path.with_name(CHECKPOINT), {**state, "step": 20 - behind, "seconds": 1e6})
    path, state = newest_checkpoint(tmp_path / "run")
    assert path.name == (EARLIER_CHECKPOINT if behind > 0 else CHECKPOINT)
    assert state["step"] == max(20, 20 - behind)


@pytest.mark.parametrize("damaged", [CHECKPOINT, EARLIER_CHECKPOINT])
def test_a_damaged_file_is_named_although_another_is_whole(tmp_path, damaged):
    folder = tmp_path / "run"
    _begun_by_an_earlier_version(folder, 5)
    save_checkpoint(folder / CHECKPOINT, load_checkpoint(folder / EARLIER_CHECKPOINT))
    (folder / damaged).write_bytes(b"damaged")
    for function in (sf.load, training.resume):
        with pytest.raises(ValueError, match=f"{damaged} is damaged .* or remove it") as caught:
            function(folder)
        assert "\n" not in str(caught.value)
    (folder / damaged).unlink()
    sf.load(folder)
