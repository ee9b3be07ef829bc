"""The loss inside what users wrap around a training step."""

import os

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastsfvae as sf
from fastsfvae.gram import query as queries
from fastsfvae.ground.garbage import uncollected
from tests.decoders import M, batch, build
from tests.gram.test_operator import is_swept


def step(loss, decoder, tensors):
    value = loss(*tensors)
    return value.detach(), *torch.autograd.grad(value, [*tensors, *decoder.parameters()])


def equal(ours, theirs, tolerance=1e-12):
    for mine, want in zip(ours, theirs, strict=True):
        assert (mine - want).abs().max() <= tolerance * (1 + want.abs().max())


class Conditional(nn.Module):
    """A label for each sample, a shift for all of them, and a number."""

    def __init__(self):
        super().__init__()
        self.label, self.layer, self.out = nn.Embedding(3, 8), nn.Linear(M, 8), nn.Linear(8, 6)

    def forward(self, z, label, gain=1.0, *, shift):
        return self.out(torch.tanh(self.layer(z) + self.label(label)) * gain) + shift


def spectral():
    norm = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(norm(nn.Linear(M, 9)), nn.SiLU(), nn.Linear(9, 6)).double().eval()


COMPILED = {
    "conditional": lambda: Conditional().double(),
    "spectral_norm": spectral,
    **{n: lambda n=n: build(n) for n in ("higgins", "weight_norm", "shared", "frozen", "residual")},
}


def problem(name, decoder, size):
    """(x, mean, log_var), further inputs, and all that a gradient is wanted of."""
    generator = torch.Generator().manual_seed(size)
    further = {}
    if name == "conditional":
        shift = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
        further = {"label": torch.randint(3, (size,), generator=generator), "shift": shift}
    with torch.no_grad():
        shape = decoder(torch.zeros(size, M, dtype=torch.float64), **further).shape
    tensors = [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_()
        for s in (shape, (size, M), (size, M))
    ]
    trained = [p for p in decoder.parameters() if p.requires_grad]
    leaves = [*tensors, *trained, *([further["shift"]] if further else [])]
    return tensors, further, leaves


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", COMPILED)
def test_compile_in_one_graph_for_all_batch_sizes(name, reduction):
    torch._dynamo.reset()
    torch.manual_seed(0)
    decoder = COMPILED[name]()
    module, oracle = (
        sf.SamplingFreeLoss(decoder, reduction=reduction, chunk_size=2, backend=backend)
        for backend in ("torch", "reference")
    )
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for size in (5, 7, 9):
        tensors, further, leaves = problem(name, decoder, size)
        results = []
        for loss in (compiled, module, oracle):
            value = loss(*tensors, **further).sum()
            results.append((value.detach(), *torch.autograd.grad(value, leaves)))
        graphs.append(counter.frame_count)
        equal(results[0], results[1])
        equal(results[0], results[2], 1e-10)
    assert graphs[0] == graphs[-1]


def test_compile_says_what_it_cannot_take():
    torch._dynamo.reset()

    class Huber(nn.Linear):
        def forward(self, z, *_):
            h = super().forward(z)
            return nn.functional.huber_loss(h, h.flip(1), reduction="none")

    decoder = Huber(M, 6).double()
    tensors = batch(decoder)
    compiled = torch.compile(sf.SamplingFreeLoss(decoder), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"as one graph \(huber_loss has no rule\): call the loss"):
        compiled(*tensors)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="further decoder inputs one by one, not in a list"):
        compiled(*tensors, [tensors[1]])


def test_function_transforms_and_functional_call():
    decoder = build("residual")
    x, mean, log_var = batch(decoder)
    loss = sf.SamplingFreeLoss(decoder)

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = decoder

        def forward(self, mean):
            return loss(x, mean, log_var)

    model = Step()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def value(parameters, mean):
        return torch.func.functional_call(model, parameters, (mean,))

    by_parameters, by_mean = torch.func.grad(value, argnums=(0, 1))(parameters, mean.detach())
    _, _, want_mean, _, *want = step(loss, decoder, (x, mean, log_var))
    equal([by_mean, *by_parameters.values()], [want_mean, *want])


def test_latents_that_depend_on_each_other_under_a_mapped_backward():
    decoder = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 9)).double()
    x, z = torch.randn(4, 9).double(), torch.randn(4, 3).double()

    def objective(z, backend="torch"):
        return sf.sampling_free_elbo(decoder, x, z, z.sin() - 1, backend=backend).elbo

    jacobian = torch.autograd.functional.jacobian
    want = jacobian(lambda z: objective(z, "reference"), z)
    equal([jacobian(objective, z, vectorize=True)], [want])


def test_autocast_rounds_no_more_than_autograd_under_autocast(monkeypatch):
    decoder, exact = build("higgins", torch.float32), build("higgins")
    tensors = batch(decoder, dtype=torch.float32)
    want = step(sf.SamplingFreeLoss(exact), exact, batch(exact))

    def lowered():
        with torch.autocast("cpu", torch.bfloat16):
            value = sf.SamplingFreeLoss(decoder, chunk_size=2)(*tensors)
        grads = torch.autograd.grad(value, [*tensors, *decoder.parameters()])
        return value.detach(), *grads

    ours = lowered()
    monkeypatch.setattr(queries, "prepare", lambda _: None)
    theirs = lowered()
    for mine, other, truth in zip(ours, theirs, want, strict=True):
        assert mine.dtype == torch.float32
        scale = truth.abs().max()
        bound = 2 * (other - truth).abs().max() + 2 * torch.finfo(torch.bfloat16).eps * scale
        assert (mine - truth).abs().max() <= bound


def test_gradients_accumulate():
    decoder = build("tanh")
    x, mean, log_var = batch(decoder, 6)
    loss = sf.SamplingFreeLoss(decoder, reduction="sum", chunk_size=2)
    loss(x, mean, log_var).backward()
    whole = [p.grad.clone() for p in decoder.parameters()]
    decoder.zero_grad()
    for rows in (slice(0, 2), slice(2, 6)):
        (0.5 * loss(x[rows], mean[rows], log_var[rows])).backward()
    equal([p.grad for p in decoder.parameters()], [0.5 * g for g in whole])


def test_spectral_norm_and_tied_weights(monkeypatch):
    torch.manual_seed(0)
    norm = nn.utils.parametrizations.spectral_norm
    tied = nn.Linear(9, 9)
    layers = norm(nn.Linear(M, 9)), nn.SiLU(), tied, nn.SiLU(), tied, nn.SiLU(), nn.Linear(9, 5)
    decoder = nn.Sequential(*layers).double().eval()
    tensors = batch(decoder)
    loss = sf.SamplingFreeLoss(decoder, chunk_size=2)
    held = list(decoder.parameters())
    assert is_swept(decoder, tensors)
    ours = step(loss, decoder, tensors)
    monkeypatch.setattr(queries, "prepare", lambda _: None)
    equal(ours, step(loss, decoder, tensors), 1e-10)
    # Tracing leaves an optimizer's parameters where they are.
    assert all(a is b for a, b in zip(held, decoder.parameters(), strict=True))


class Autoencoder(nn.Module):
    """A module that computes the loss, as DistributedDataParallel wants it."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(7, 2 * M).double(), build("tanh")
        self.loss = sf.SamplingFreeLoss(self.decoder)

    def forward(self, x):
        return self.loss(x, *self.encoder(x).chunk(2, 1))


def _data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 7, generator=generator, dtype=torch.float64)


def _model():
    torch.manual_seed(1)
    return Autoencoder()


def _worker(rank, folder):
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(os.path.join(folder, "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(_model())
    model(_data()[3 * rank : 3 * rank + 3]).backward()
    grads = [p.grad for p in model.module.parameters()]
    torch.save(grads, os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path):
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    model = _model()
    model(_data()).backward()
    for rank in (0, 1):
        equal(torch.load(tmp_path / f"{rank}.pt"), [p.grad for p in model.parameters()])


@pytest.mark.gpu
def test_cuda_graph_replays_a_step():
    decoder = build("higgins", torch.float32).cuda()
    tensors = tuple(t.detach().cuda().requires_grad_() for t in batch(build("higgins")))
    tensors = tuple(t.detach().float().requires_grad_() for t in tensors)
    loss = sf.SamplingFreeLoss(decoder)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            want = step(loss, decoder, tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with uncollected(), torch.cuda.graph(graph):
        ours = step(loss, decoder, tensors)
    graph.replay()
    torch.cuda.synchronize()
    equal(ours, want, 1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_exported_loss_outlives_the_process(reduction):
    decoder = build("tanh")
    tensors = [t.detach() for t in batch(decoder)]

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.loss, self.decoder = sf.SamplingFreeLoss(decoder, reduction=reduction), decoder

        def forward(self, x, mean, log_var):
            return self.loss(x, mean, log_var)

    module = Loss()
    module(*tensors)
    exported = torch.export.export(module, tuple(tensors), strict=False)
    # A program's number means nothing elsewhere.
    assert not any("fastsfvae" in str(node.target) for node in exported.graph.nodes)
    other = [t + 0.5 for t in tensors]
    equal([exported.module()(*other)], [module(*other)])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_jacrev_of_a_total(reduction):
    decoder = build("tanh")
    x, mean, log_var = (t.detach() for t in batch(decoder))

    def gradient(backend):
        loss = sf.SamplingFreeLoss(decoder, reduction=reduction, backend=backend)
        return torch.func.jacrev(lambda mean: loss(x, mean, log_var))(mean)

    equal([gradient("torch")], [gradient("reference")])
