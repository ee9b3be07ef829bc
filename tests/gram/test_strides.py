"""Gradients lie in memory as their tensors do, which compilers and DDP rely on."""

import itertools
import warnings

import pytest
import torch
from torch import nn

import fastsfvae as sf
from fastsfvae.gram.operator import gram
from fastsfvae.gram.query import prepare
from tests.gram.test_operator import close, query

M = 3
CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FORMATS = (None, torch.channels_last, torch.channels_last_3d)
# Axes of an image, whether it is channels-last, groups, side of the first image.
CASES = [
    case
    for case in itertools.product((1, 2, 3), (False, True), (1, 2), (2, 3))
    if case[0] > 1 or not case[1]
]
# Groups or an odd side, for what takes a while.
SOME = [case for case in CASES if case[3] - case[2] == 1]


def decoder_and_tensors(axes, last, groups, side, dtype=torch.float64):
    """A decoder of kernels 1, 2 and 3, strided, dilated, padded at one end; and (x, mean, log_var).

    Latents and their log-variances lie column by column.
    """
    torch.manual_seed(0)
    conv, transposed = CONV[axes - 1], TRANSPOSED[axes - 1]
    decoder = nn.Sequential(
        nn.Linear(M, 4 * side**axes),
        nn.Unflatten(1, (4, *[side] * axes)),
        transposed(4, 6, 3, stride=2, padding=1, output_padding=1, groups=groups),
        nn.Tanh(),
        conv(6, 4, 3, padding=2, dilation=2, groups=groups),
        nn.SiLU(),
        transposed(4, 4, 2, groups=groups, bias=False),
        nn.ReLU(),
        conv(4, 2, 1),
    ).to(dtype)
    z, log_var = torch.randn(2, M, 5, dtype=dtype).mT
    x = torch.randn(decoder(z).shape, dtype=dtype)
    if last:
        decoder, x = (t.to(memory_format=FORMATS[axes - 1]) for t in (decoder, x))
    return decoder, [t.requires_grad_() for t in (x, z, log_var)]


def losses(decoder):
    """Each way to the operator, as a function of (x, mean, log_var)."""
    mean, each = (
        sf.SamplingFreeLoss(decoder, reduction=r, chunk_size=c)
        for r, c in (("mean", 2), ("none", 2))
    )
    whole = sf.SamplingFreeLoss(decoder, reduction="none")

    def pulled(x, z, log_var):
        return sum(t.square().sum() for t in sf.pullback(decoder, z, x, chunk_size=2))

    return {"mean": mean, "each": each, "kept": whole, "pulled": pulled}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_have_their_tensors_own_strides(case):
    decoder, tensors = decoder_and_tensors(*case)
    for name, loss in losses(decoder).items():
        # The loss adds the divergence's own gradients to those of the latents.
        leaves = [*tensors[: 2 if name == "pulled" else 1], *decoder.parameters()]
        grads = torch.autograd.grad(loss(*tensors).sum(), leaves)
        for gradient, leaf in zip(grads, leaves, strict=True):
            assert gradient.stride() == leaf.stride(), (name, leaf.shape)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_the_operator_does_what_its_fake_says(case):
    decoder, tensors = decoder_and_tensors(*case)
    asked = query(decoder, tensors, chunk_size=2)
    for change in ({}, {"head": "sums", "inputs": ()}, {"head": "gram", "inputs": (), "x": None}):
        problem, given = prepare(asked._replace(**change))
        given = [t.detach() for t in given]
        needs = [True] * len(given)
        cotangents = [torch.ones_like(t) for t in gram(given, [], needs, *problem)]
        # Autograd and compilers meet it through the Functions above it alone.
        checks = "test_schema", "test_faketensor"
        torch.library.opcheck(gram, (given, cotangents, needs, *problem), test_utils=checks)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_compile(case):
    torch._dynamo.reset()
    decoder, tensors = decoder_and_tensors(*case)
    loss = losses(decoder)["mean"]
    # It asserts what a compiler's code relies on, and compiles no code.
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = [*tensors, *decoder.parameters()]
    results = []
    for call in (loss, compiled):
        value = call(*tensors)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    close(*results, tolerance=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("case", [(2, False, 1, 3), (2, True, 2, 2), (3, False, 1, 2)], ids=str)
def test_compiled_code(case):
    torch._dynamo.reset()
    decoder, tensors = decoder_and_tensors(*case)
    leaves = [*tensors, *decoder.parameters()]
    for name in ("mean", "each"):
        loss = losses(decoder)[name]
        compiled = torch.compile(loss, fullgraph=True)
        want, found = (
            torch.autograd.grad(call(*tensors).sum(), leaves) for call in (loss, compiled)
        )
        close(found, want, tolerance=1e-10)


def test_distributed_data_parallel_finds_them_in_order(tmp_path):
    decoder, tensors = decoder_and_tensors(2, False, 1, 3)

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder, self.loss = decoder, sf.SamplingFreeLoss(decoder)

        def forward(self, *tensors):
            return self.loss(*tensors)

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Step())
        with warnings.catch_warnings():
            # "Grad strides do not match bucket view strides"
            warnings.simplefilter("error")
            model(*tensors).backward()
    finally:
        torch.distributed.destroy_process_group()
