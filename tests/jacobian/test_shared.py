"""Further inputs that all samples share, with as many rows as the batch has samples."""

import functools

import pytest
import torch
from torch import nn

import fastsfvae as sf

B = M = 4


class Table(nn.Module):
    """Attends to the rows of a table, beside a code of each sample's own."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(M, 3)

    def forward(self, z, table, code=None):
        weights = torch.softmax(self.query(z) @ table[:, :3].T, -1)
        y = weights @ table + table.mean(0)
        return y if code is None else y + code


class Bias(nn.Module):
    """Adds a vector of m = B numbers to all samples."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(M, M)

    def forward(self, z, bias):
        return torch.tanh(self.linear(z)) + bias


class Grid(nn.Module):
    """An output of as many numbers as there are samples."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(M, 6)

    def forward(self, z, grid):
        return self.linear(z).sin().sum(1, keepdim=True) * grid + grid.square()


class Nested(nn.Module):
    """Shared tensors in a dictionary."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(M, M)

    def forward(self, z, parts):
        return torch.sigmoid(self.linear(z)) @ parts["basis"] + parts["offset"]


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make(kind):
    """A decoder, its further inputs by position and by name, and which of them are shared."""
    torch.manual_seed(0)
    table, code = draw(B, 7, seed=1), draw(B, 7, seed=2)
    cases = {
        "by position": (Table(), (table, code), {}, (0,)),
        "by name": (Table(), (), {"table": table, "code": code}, ("table",)),
        "mixed": (Table(), (table,), {"code": code}, (0,)),
        "vector": (Bias(), (draw(M, seed=3),), {}, (0,)),
        "output": (Grid(), (draw(B, seed=4),), {}, (0,)),
        "nested": (
            Nested(),
            ({"basis": draw(B, 5, seed=5), "offset": draw(5, seed=6)},),
            {},
            (0,),
        ),
        "integers": (Picks(), (draw(B, 5, seed=7), torch.tensor([3, 0, 0, 1])), {}, (0,)),
    }
    decoder, *rest = cases[kind]
    return decoder.double(), *rest


class Picks(nn.Module):
    """Each sample picks a row of a table that all share, by its own number."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(M, 5)

    def forward(self, z, table, number):
        return self.linear(z).tanh() * table[number]


KINDS = ["by position", "by name", "mixed", "vector", "output", "nested", "integers"]


def jacobian_of(decoder, z, args, kwargs):
    """J [B, m, *out], row by row of the whole batch's."""
    J = torch.func.jacrev(lambda z: decoder(z, *args, **kwargs))(z)
    samples = torch.arange(len(z))
    return J[samples, ..., samples, :].movedim(-1, 1)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_values_do_not_depend_on_the_chunks(kind, chunk_size, backend):
    decoder, args, kwargs, shared = make(kind)
    z = draw(B, M, seed=0)
    options = {"chunk_size": chunk_size, "shared": shared, "backend": backend}
    output, J = sf.decode_with_jacobian(decoder, z, *args, **options, **kwargs)
    expected = jacobian_of(decoder, z, args, kwargs)
    torch.testing.assert_close(output, decoder(z, *args, **kwargs), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(J, expected, rtol=1e-12, atol=1e-12)

    G = expected.flatten(2) @ expected.flatten(2).mT
    found = sf.pullback(decoder, z, None, *args, **options, **kwargs)
    torch.testing.assert_close(found.gram, G, rtol=1e-12, atol=1e-12)
    v = draw(B, M, seed=8)
    _, pushed = sf.jvp(decoder, z, v, *args, **options, **kwargs)
    along = torch.einsum("bm,bm...->b...", v, expected)
    torch.testing.assert_close(pushed, along, rtol=1e-12, atol=1e-12)
    u = draw(*output.shape, seed=9)
    _, pulled = sf.vjp(decoder, z, u, *args, shared=shared, **kwargs)
    back = torch.einsum("b...,bm...->bm", u, expected)
    torch.testing.assert_close(pulled, back, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("kind", ["by position", "by name", "vector", "output"])
def test_the_loss_and_its_gradients(kind, chunk_size):
    decoder, args, kwargs, shared = make(kind)
    tensors = [t.requires_grad_() for t in (*args, *kwargs.values())]
    z, log_var = draw(B, M, seed=0).requires_grad_(), draw(B, M, seed=10).requires_grad_()
    with torch.no_grad():
        x = decoder(z, *args, **kwargs) + draw(*decoder(z, *args, **kwargs).shape, seed=11)
    wanted = [z, log_var, *tensors, *decoder.parameters()]

    J = jacobian_of(decoder, z, args, kwargs).flatten(2)
    r = (x - decoder(z, *args, **kwargs)).flatten(1)
    density = sf.low_rank_log_prob(r, J, log_var.exp(), noise_var=0.5, gamma=0.5)
    kl = 0.5 * (log_var.exp() + z.square() - 1 - log_var).sum(-1)
    expected = (kl - density).mean()
    loss_fn = sf.SamplingFreeLoss(decoder, chunk_size=chunk_size, shared=shared)
    loss = loss_fn(x, z, log_var, *args, **kwargs)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    pairs = zip(
        torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True
    )
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)


def test_every_use_of_a_jacobian_takes_it():
    decoder, args, _, shared = make("by position")
    z, log_var = draw(B, M, seed=0), draw(B, M, seed=1)
    x = decoder(z, *args)
    # The same decoder, whose table no batch can be mistaken for.
    bound = Nobody(decoder, args[0])
    code, given = args[1], (*args,)
    cases = {
        "elbo": lambda f, *a, **k: sf.sampling_free_elbo(f, x, z, log_var, *a, **k).elbo,
        "probes": lambda f, *a, **k: (
            sf.sampling_free_elbo(
                *(f, x, z, log_var, *a),
                likelihood="expected",
                probes=2,
                generator=torch.Generator().manual_seed(0),
                **k,
            ).elbo
        ),
        "factor": lambda f, *a, **k: (
            sf.sampling_free_elbo(f, x, z, torch.diag_embed(log_var.exp()), *a, **k).elbo
        ),
        "log_volume": lambda f, *a, **k: sf.log_volume(f, z, *a, damping=0.1, **k),
        "isometry": lambda f, *a, **k: sf.isometry_loss(f, z, *a, **k),
        "isometry by probes": lambda f, *a, **k: sf.isometry_loss(f, z, *a, probes=log_var, **k),
        "singular": lambda f, *a, **k: sf.singular_directions(f, z, 2, *a, **k).values,
        "fit": lambda f, *a, **k: sf.fit_latents(f, x + 0.1, z + 0.1, *a, prior_var=1.0, **k).z,
        "weighted fit": lambda f, *a, **k: (
            sf.fit_latents(f, x + 0.1, z, *a, weight=torch.ones_like(x), prior_var=1.0, **k).z
        ),
        "kalman": lambda f, *a, **k: (
            sf.kalman_update(f, x + 1, z, log_var.exp(), 0.5, *a, **k).mean
        ),
        "gaussian": lambda f, *a, **k: (
            sf.LinearizedGaussian.from_decoder(f, z, log_var.exp(), 0.5, *a, **k).variance
        ),
    }
    for name, use in cases.items():
        mine, theirs = use(decoder, *given, shared=shared), use(bound, code)
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10, msg=name)
    assert sf.check_decoder(decoder, z, *args, shared=shared).ok


class Nobody(nn.Module):
    """A decoder with a table of its own."""

    def __init__(self, decoder, table):
        super().__init__()
        self.decoder = decoder
        self.register_buffer("table", table)

    def forward(self, z, code):
        return self.decoder(z, self.table, code)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "integers"])
def test_what_is_cut_by_chance_is_refused_with_the_way_out(kind, chunk_size):
    decoder, args, kwargs, shared = make(kind)
    with pytest.raises(RuntimeError, match="give shared=") as refused:
        sf.decode_with_jacobian(decoder, draw(B, M, seed=0), *args, chunk_size=chunk_size, **kwargs)
    assert repr(shared[0]) in str(refused.value).partition("give shared=")[2]


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_a_table_of_equal_rows_is_not_taken_for_codes_of_the_samples(chunk_size):
    # Cut up, it would be right until it is trained, and silently wrong from then on.
    table = torch.zeros(B, 7, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="give shared="):
        decoder = Table().double()
        sf.decode_with_jacobian(decoder, draw(B, M, seed=0), table, chunk_size=chunk_size)


def test_nor_is_one_whose_first_rows_alone_are_equal():
    # The check runs on a few samples.
    table = draw(4 * B, 7, seed=1)
    table[: 2 * B] = 0
    with pytest.raises(RuntimeError, match="give shared="):
        sf.decode_with_jacobian(Table().double(), draw(4 * B, M, seed=0), table)


def test_positions_in_a_message_are_those_of_the_call():
    class Two(nn.Module):
        def forward(self, z, first, second):
            return z.sum(1, keepdim=True) * first.mean(0) * second.mean(0)

    given = draw(B, M, seed=0), draw(B, 3, seed=1), draw(B, 3, seed=2)
    with pytest.raises(RuntimeError, match=r"give shared=\(1,\)"):
        sf.decode_with_jacobian(Two(), *given, shared=(0,))


def test_a_mixing_decoder_is_refused_one_sample_at_a_time_as_well():
    class Centred(nn.Module):
        def forward(self, z):
            return z - z.mean(0)

    with pytest.raises(RuntimeError, match="mixes the samples"):
        sf.decode_with_jacobian(Centred(), draw(B, M, seed=0), chunk_size=1)


@pytest.mark.parametrize(
    ("shared", "error", "said"),
    [
        ((2,), ValueError, r"no further input 2, but 0, 1"),
        ((-1,), ValueError, "no further input -1"),
        (("tabel",), ValueError, "no further input 'tabel'"),
        ((1.0,), TypeError, "names of further inputs and positions"),
        ((True,), TypeError, "names of further inputs and positions"),
    ],
)
def test_what_is_no_input_is_refused(shared, error, said):
    decoder, args, kwargs, _ = make("by position")
    with pytest.raises(error, match=said):
        sf.decode_with_jacobian(decoder, draw(B, M, seed=0), *args, shared=shared, **kwargs)


def test_one_may_be_named_alone_and_by_a_partial():
    decoder, args, _, _ = make("by position")
    z = draw(B, M, seed=0)
    expected = decoder(z, *args)
    one, _ = sf.decode_with_jacobian(decoder, z, *args, shared=0)
    torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)
    partial = functools.partial(decoder, table=args[0])
    two, _ = sf.decode_with_jacobian(partial, z, code=args[1], shared="table")
    torch.testing.assert_close(two, expected, rtol=1e-12, atol=1e-12)


def test_a_plain_function_shares_too():
    table, z = draw(B, 3, seed=1), draw(B, M, seed=0)
    decode = lambda z, table: z.sum(1, keepdim=True) * table.mean(0)  # noqa: E731
    output, _ = sf.decode_with_jacobian(decode, z, table, shared=(0,), chunk_size=1)
    torch.testing.assert_close(output, decode(z, table), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_compiled():
    decoder, args, _, shared = make("by position")
    loss_fn = sf.SamplingFreeLoss(decoder, shared=shared)
    compiled = torch.compile(loss_fn, fullgraph=True, dynamic=True)
    table = args[0].requires_grad_()
    for batch in (B, 6):
        z, log_var = draw(batch, M, seed=0), draw(batch, M, seed=1)
        x, code = draw(batch, 7, seed=2), draw(batch, 7, seed=3)
        mine, theirs = (
            torch.autograd.grad(f(x, z, log_var, table, code), table)[0]
            for f in (compiled, loss_fn)
        )
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.slow
def test_a_compiled_loss_takes_an_input_of_two_rows_whole():
    decoder = Pair().double()
    loss_fn = sf.SamplingFreeLoss(decoder)
    pair = draw(2, 5, seed=4)
    z, log_var, x = draw(B, M, seed=0), draw(B, M, seed=1), draw(B, 5, seed=2)
    compiled = torch.compile(loss_fn, fullgraph=True, dynamic=True)
    torch.testing.assert_close(
        compiled(x, z, log_var, pair), loss_fn(x, z, log_var, pair), rtol=1e-12, atol=1e-12
    )


class Pair(nn.Module):
    """Adds what two rows are to all samples alike."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(M, 5)

    def forward(self, z, pair):
        return torch.tanh(self.linear(z) * pair[0]) + pair[1]
