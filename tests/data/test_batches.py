"""Resident and streamed image sets: the same batches, and what each leaves out of a step."""

import threading
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastsfvae import training
from fastsfvae.data.batches import ImageSet
from fastsfvae.training.config import TrainConfig

IMAGES = torch.randint(0, 256, (20, 3, 4, 4), generator=torch.Generator().manual_seed(0)).byte()
ORDERS = [
    torch.randperm(20, generator=torch.Generator().manual_seed(epoch))[:18].reshape(3, 6)
    for epoch in range(3)
]
EXPECTED = [IMAGES[numbers] for order in ORDERS for numbers in order]


@pytest.mark.parametrize("budget", [None, 0, IMAGES.nbytes - 1, IMAGES.nbytes])
def test_resident_and_streamed_batches_are_the_same(budget):
    images = ImageSet(IMAGES, "cpu", budget)
    assert images.streamed == (budget is not None and budget < IMAGES.nbytes)
    batches = list(images.batches(iter(ORDERS)))
    assert len(batches) == len(EXPECTED)
    assert all(torch.equal(*pair) for pair in zip(batches, EXPECTED, strict=True))
    assert torch.equal(images[2:5], IMAGES[2:5]) and len(images) == 20


class _Copies(TorchDispatchMode):
    """Counts what crosses from the CPU to the meta device, which stands in for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        inputs = [x for x in arguments if isinstance(x, torch.Tensor)]
        if isinstance(result, torch.Tensor) and result.is_meta and any(x.is_cpu for x in inputs):
            self.count += 1
        return result


def test_a_resident_set_copies_nothing_to_the_device_in_a_step():
    with _Copies() as copies:
        images = ImageSet(IMAGES, "meta")
        assert copies.count == 1
        for step, batch in enumerate(images.batches(iter(ORDERS))):
            assert batch.is_meta and batch.shape == (6, 3, 4, 4)
            # The set once, then an epoch's order at its first step.
            assert copies.count == 2 + step // 3
    # The count is no blind one: a streamed set's every batch is seen.
    streamed = ImageSet(IMAGES, "meta", 0)
    with _Copies() as copies:
        assert len(list(streamed.batches(iter(ORDERS)))) == copies.count == 9


class _Gathers(ImageSet):
    """Tells when the second batch is gathered, and where."""

    def __init__(self):
        super().__init__(IMAGES, "cpu", 0)
        self.second = threading.Event()
        self.threads = []

    def _gather(self, numbers):
        self.threads.append(threading.current_thread())
        if len(self.threads) == 2:
            self.second.set()
        return super()._gather(numbers)


def test_a_streamed_set_is_gathered_ahead_in_another_thread():
    images = _Gathers()
    batches = images.batches(iter(ORDERS))
    next(batches)
    # The second batch comes while the first is used: nobody has asked for it.
    assert images.second.wait(10)
    batches.close()
    assert threading.current_thread() not in images.threads
    assert not any(thread.is_alive() for thread in images.threads)


def test_an_error_while_streaming_reaches_the_step():
    images = ImageSet(IMAGES, "cpu", 0)
    batches = images.batches(iter([ORDERS[0], torch.full((1, 6), 20)]))
    assert len(list(islice(batches, 3))) == 3
    with pytest.raises(IndexError, match="20"):
        next(batches)


def test_training_is_the_same_to_the_bit(tmp_path):
    config = TrainConfig("sampling", model="tanh", latent_dim=2, batch_size=8, steps=30)
    runs = {}
    # The bundled digits are 7 MB: they fit the one budget and not the other.
    for budget in (1.0, 0.001):
        runs[budget] = training.start(replace(config, data_budget=budget), tmp_path / str(budget))
        assert runs[budget].images.streamed == (budget < 1)
        training.train(runs[budget])
    resident, streamed = (run.model.state_dict() for run in runs.values())
    assert all(torch.equal(resident[name], streamed[name]) for name in resident)
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [0, None])
def test_batches_on_a_gpu(budget):
    images = ImageSet(IMAGES, "cuda", budget)
    assert images.streamed == (budget == 0)
    batches = list(images.batches(iter(ORDERS)))
    assert all(batch.is_cuda for batch in batches)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(batches, EXPECTED, strict=True))
    if images.streamed:
        assert images._gather(ORDERS[0][0]).is_pinned()
