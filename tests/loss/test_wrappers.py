"""The loss inside what wraps a training step or runs it elsewhere: scalers, averages, threads."""

import copy
import multiprocessing
import os
import threading

import pytest
import torch
from torch.distributed.fsdp import fully_shard

import fastsfvae as sf
from tests.decoders import batch, build
from tests.loss.test_compatibility import equal, step
from tests.loss.test_compose import _data, _model


def test_a_grad_scaler_changes_no_bit():
    # Its factor is a power of two, and the gradients of the forward are scaled as a whole.
    decoder = build("higgins", torch.float32)
    tensors = batch(decoder, dtype=torch.float32)
    loss = sf.SamplingFreeLoss(decoder, chunk_size=2)
    with torch.autocast("cpu", torch.float16):
        loss(*tensors).backward()
    want = [p.grad.clone() for p in decoder.parameters()]
    decoder.zero_grad()
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    with torch.autocast("cpu", torch.float16):
        value = loss(*tensors)
    scaler.scale(value).backward()
    scaler.unscale_(optimizer)
    equal([p.grad for p in decoder.parameters()], want, 0)
    before = [p.detach().clone() for p in decoder.parameters()]
    scaler.step(optimizer)
    scaler.update()
    equal(
        [p.detach() for p in decoder.parameters()],
        [old - 0.1 * grad for old, grad in zip(before, want, strict=True)],
        4 * torch.finfo(torch.float32).eps,
    )


def test_an_average_of_weights_is_a_decoder_like_any_other():
    decoder, tensors = build("tanh"), batch(build("tanh"))
    average = torch.optim.swa_utils.AveragedModel(decoder)
    loss = sf.SamplingFreeLoss(average)
    equal([loss(*tensors)], [sf.SamplingFreeLoss(decoder)(*tensors)], 0)
    by_hand = copy.deepcopy(decoder)
    for factor in (1, 2):
        with torch.no_grad():
            for mine, mean in zip(decoder.parameters(), by_hand.parameters(), strict=True):
                mine.mul_(1.1)
                mean.copy_(mine if factor == 1 else (mean + mine) / 2)
        # The first update copies, the second averages; the loss reads what is there now.
        average.update_parameters(decoder)
        equal([loss(*tensors)], [sf.SamplingFreeLoss(by_hand)(*tensors)])


@pytest.mark.parametrize("name", ["tanh", "weight_norm", "residual"])
def test_a_decoder_first_met_in_inference_mode_is_trained_afterwards(name):
    decoder, fresh = build(name), build(name)
    tensors = batch(decoder)
    loss = sf.SamplingFreeLoss(decoder, chunk_size=2)
    with torch.inference_mode():
        value = loss(*tensors)
        gram = sf.pullback(decoder, tensors[1]).gram
    want = step(sf.SamplingFreeLoss(fresh, chunk_size=2), tensors, fresh.parameters())
    # PyTorch takes other kernels for some operations where no graph is recorded.
    equal([value], want[:1], 1e-14)
    equal([gram], [sf.pullback(fresh, tensors[1]).gram], 1e-14)
    equal(step(loss, tensors, decoder.parameters()), want, 0)


def test_threads_share_a_decoder_and_trace_their_own():
    shared, tensors = build("residual"), batch(build("residual"))
    names = ["tanh", "higgins", "layer_norm", "shared"]
    want = {
        name: step(sf.SamplingFreeLoss(d), batch(d), [*d.parameters()])
        for name in names
        for d in [build(name)]
    }
    of_shared = step(sf.SamplingFreeLoss(build("residual")), tensors, [])
    together, found, failed = threading.Barrier(len(names)), {}, []

    def work(name):
        try:
            own = build_in_turn(name)
            together.wait()
            mine = step(sf.SamplingFreeLoss(own), batch(own), [*own.parameters()])
            of_all = [step(sf.SamplingFreeLoss(shared), tensors, []) for _ in range(5)]
            found[name] = mine, of_all
        except Exception as error:
            failed.append(error)

    # Building seeds the one global generator.
    lock = threading.Lock()

    def build_in_turn(name):
        with lock:
            return build(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    for name in names:
        mine, of_all = found[name]
        equal(mine, want[name], 0)
        for one in of_all:
            equal(one, of_shared, 0)


def _in_child(decoder, path):
    # Threads of OpenMP do not survive a fork; nor do autograd's, so that there is no backward here.
    torch.set_num_threads(1)
    x, mean, log_var = batch(decoder)
    with torch.no_grad():
        torch.save([*sf.sampling_free_elbo(decoder, x, mean, log_var)], path)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_evaluates_the_same(tmp_path, known):
    decoder, path = build("tanh"), tmp_path / "found.pt"
    with torch.no_grad():
        want = [*sf.sampling_free_elbo(decoder, *batch(decoder))]
    if not known:
        # A copy has no plan yet.
        decoder = copy.deepcopy(decoder)
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(decoder, path))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    equal(torch.load(path), want, 0)


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(os.path.join(tmp_path, "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_fully_sharded_modules(process_group):
    # The module that computes the loss may be sharded as a whole, a decoder by itself may not.
    plain, sharded = _model(), _model()
    plain(_data()).backward()
    fully_shard(sharded, mesh=process_group)
    sharded(_data()).backward()
    for mine, want in zip(sharded.parameters(), plain.parameters(), strict=True):
        equal([mine.grad.full_tensor()], [want.grad])
    decoder = build("tanh")
    fully_shard(decoder, mesh=process_group)
    with pytest.raises(TypeError, match="shard the module that computes the loss instead"):
        sf.SamplingFreeLoss(decoder)
