"""What the processes of one training run share under torchrun; with one process, nothing to do."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    """This process's number; process 0 is the one that writes."""
    return dist.get_rank() if _initialized() else 0


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _initialized() else 1


def local_rank() -> int:
    """This process's number on its machine: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started, if it did."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _initialized():
        yield
        return
    # Its functions take the group of their import as a default argument. DDP imports it, and with a
    # group at hand that one, with its threads, would outlive the interpreter and abort the process.
    import torch.distributed.nn.functional  # noqa: F401

    if torch.cuda.is_available():
        # NCCL's collectives run on the current device.
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        # A DDP module's cycles would keep the group's threads beyond its end.
        gc.collect()
        dist.destroy_process_group()


@contextmanager
def first_process_first() -> Iterator[None]:
    """Let process 0 through before the others, which then find what it has prepared on disk."""
    if rank() > 0:
        dist.barrier()
    try:
        yield
    finally:
        if rank() == 0 and size() > 1:
            dist.barrier()


def wrap(model: nn.Module, *, unused_parameters: bool) -> nn.Module:
    """Average the gradients of a module that computes the loss over the processes.

    Args:
        model: from data to loss, with all that is trained inside.
        unused_parameters: whether some may get no gradient.
    """
    if size() == 1:
        return model
    parallel = nn.parallel.DistributedDataParallel
    return parallel(model, find_unused_parameters=unused_parameters)


def rows(batch_size: int) -> slice:
    """This process's share of a batch; the shares in order are the whole."""
    share = batch_size // size()
    return slice(rank() * share, (rank() + 1) * share)


def join(tensor: Tensor) -> Tensor:
    """Put the processes' shares together along the last axis, on every process."""
    if size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, dim=-1)


def share(count: int) -> slice:
    """This process's part of so many things; the parts in order are the whole.

    Of fewer things than processes each process has all.
    """
    bounds = _bounds(count)
    return slice(bounds[rank()], bounds[rank() + 1]) if bounds else slice(0, count)


def join_shares(part: Tensor, count: int) -> Tensor:
    """Put the processes' parts of `share` together along the first axis, on every process.

    Args:
        part: this process's, ``[n, ...]``, of any device; it comes back on the same.
        count: things in all.
    """
    bounds = _bounds(count)
    if not bounds:
        return part
    sizes = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
    # Gathered tensors must have one shape, and bool is no type of all back ends.
    padded = torch.zeros(max(sizes), *part.shape[1:], dtype=torch.float64)
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    whole = torch.cat([p[:size] for p, size in zip(parts, sizes, strict=True)])
    return whole.to(part.device, part.dtype)


def _bounds(count: int) -> list[int]:
    """Where the shares begin, and the last one's end; none where there is nothing to share."""
    if size() == 1 or count < size():
        return []
    return [count * process // size() for process in range(size() + 1)]


def speaks_of_failure() -> bool:
    """Whether this process is to say what went wrong: the first one that asks.

    A fault that all processes meet is one line. What the others meet because the first has ended is
    no news.
    """
    with contextlib.suppress(RuntimeError):
        if _initialized():
            store = dist.distributed_c10d._get_default_store()
            return store.add("fastsfvae/failures", 1) == 1
    return int(os.environ.get("RANK", "0")) == 0


def wait() -> None:
    """Return when every process has come here."""
    if size() > 1:
        dist.barrier()


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any process."""
    if size() == 1:
        return flag
    flags = torch.tensor([float(flag)], device=device)
    dist.all_reduce(flags)
    return bool(flags.item())


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
