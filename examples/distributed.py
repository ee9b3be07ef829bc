"""Data-parallel training: DDP wraps the module that computes the loss, not the decoder.

    torchrun --nproc-per-node=2 examples/distributed.py

Every process takes its share of one batch; with a mean over the batch, the mean of their losses is
the loss of the joined batch, and DDP's mean of their gradients its gradient. Process 0 prints both
beside those of one process, step by step. Runs on GPUs by nccl where each process has one, else on
the CPU by gloo. It needs the library alone.
"""

import copy
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastsfvae as sf
from fastsfvae.data import digits

M, BATCH, STEPS = 8, 64, 50


class LossOf(nn.Module):
    """Encoder and decoder, whose forward is the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 2 * M))
        self.decoder = nn.Sequential(nn.Linear(M, 128), nn.ReLU(), nn.Linear(128, 784))

    def forward(self, x: Tensor) -> Tensor:
        """The loss of x [B, 784]."""
        loss_fn = sf.SamplingFreeLoss(self.decoder, likelihood="expected")
        return loss_fn(x, *self.encoder(x).chunk(2, dim=1))


def main() -> None:
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit("start it by torchrun --nproc-per-node=2 examples/distributed.py")
    local, processes = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpus = torch.cuda.device_count() >= processes
    device = torch.device("cuda", local) if on_gpus else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpus else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    # The same in all processes: weights, and the batches that they share out.
    torch.manual_seed(0)
    model = LossOf().to(device)
    alone = copy.deepcopy(model)
    wrapped = DistributedDataParallel(model, device_ids=[local] if on_gpus else None)
    optimizer, beside = (torch.optim.Adam(m.parameters(), lr=2e-3) for m in (model, alone))
    images = digits("train").images.flatten(1).to(device) / 255
    for step in range(STEPS):
        x = images[torch.randint(len(images), (BATCH,)).to(device)]
        loss, joined = wrapped(x.chunk(world)[rank]), alone(x)
        for one, of in ((optimizer, loss), (beside, joined)):
            one.zero_grad()
            of.backward()
            one.step()
        mean = loss.detach()
        dist.all_reduce(mean)
        if rank == 0 and step % 10 == 0:
            print(f"step {step:2d}: loss {mean / world:.4f} by {world} processes", end="")
            print(f", {joined:.4f} by one with the joined batch")
    weights = zip(model.parameters(), alone.parameters(), strict=True)
    apart = max(float((a - b).detach().abs().max()) for a, b in weights)
    if rank == 0:
        print(f"weights after {STEPS} steps differ by at most {apart:.0e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
