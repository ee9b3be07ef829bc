"""The README is short, its example runs, its commands are understood, and its links exist."""

import re
import shlex

import pytest
import torch
from torch import nn

import fastsfvae as sf
from tests.repository.pages import PAGES, ROOT, blocks, python

README = (ROOT / "README.md").read_text()
OWN = "https://github.com/fastsfvae/fastsfvae"
RAW = "https://raw.githubusercontent.com/fastsfvae/fastsfvae"

COMMANDS = sorted(
    {
        line.partition(" #")[0].strip()
        for text in (README, *(page.read_text() for page in PAGES))
        for _, block in blocks(text)
        for line in block.splitlines()
        if re.match(r"(torchrun .* -m )?fastsfvae \w", line)
    }
)


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_its_first_table_says_what_the_pages_measured():
    """Its numbers have their source elsewhere; a new measurement changes both."""
    benchmarks, method = ((ROOT / f"docs/{n}.md").read_text() for n in ("benchmarks", "method"))
    times = re.search(r"on two CPU cores: ([\d.]+) sampling steps; by .*? ([\d.]+)", README)
    ours, plain = times.groups()
    assert f"torch backend | 426 | {ours}x" in benchmarks
    assert f"vmap(jacfwd) | 1211 | {plain}x" in benchmarks
    gain, length = re.search(r"gain ([\d.]+) nats .*nothing after ([\d,]+)", README).groups()
    assert f"the start is {gain} nats of log ML ahead of one draw" in method
    assert f"After {length} steps (" in method and "nothing is left" in method
    step = re.search(r"a step takes ([\d.]+) sampling steps", README)[1]
    (row,) = [line for line in README.splitlines() if line.startswith("| `precision`, the paper")]
    assert row.split("|")[5].strip() == step


def test_the_example_trains_a_convolutional_decoder(capsys):
    """As a newcomer pastes it."""
    (example,) = python(README)
    torch.manual_seed(0)
    names = {}
    exec(example, names)
    digits = names["images"].mean(0).sub(names["images"]).square().flatten(1).sum(1).mean()
    # Less than what the mean digit leaves: the example learns something.
    assert names["terms"].squared_error.mean() < 0.75 * digits
    printed = capsys.readouterr().out
    assert "conv_transpose2d" in printed and "verdict: right" in printed


def test_five_lines_of_a_users_own_loop_change():
    """Before it is the sampled loss without its constant, behind it the sampling-free one."""
    (lines,) = [text.splitlines() for language, text in blocks(README) if language == "diff"]
    assert sum(line[0] in "+-" for line in lines) <= 5

    def run(side):
        torch.manual_seed(0)
        decoder = nn.Linear(3, 6)
        head = nn.Linear(6, 6)
        x = torch.rand(4, 6)
        names = {"torch": torch, "sf": sf, "decoder": decoder, "loader": [x]}
        names["encoder"] = lambda x: head(x).chunk(2, dim=1)
        exec("\n".join(line[1:] for line in lines if line[0] in " " + side), names)
        return names["loss"], sf.SamplingFreeLoss(decoder, noise_var=0.5), x, head(x).chunk(2, 1)

    after, loss_fn, x, posterior = run("+")
    torch.testing.assert_close(after, loss_fn(x, *posterior))
    before, _, x, (mean, log_var) = run("-")
    torch.manual_seed(0)
    decoder, _, _ = nn.Linear(3, 6), nn.Linear(6, 6), torch.rand(4, 6)
    z = mean + (0.5 * log_var).exp() * torch.randn(4, 3)
    likelihood = torch.distributions.Normal(decoder(z), 0.5**0.5).log_prob(x).sum(1)
    constant = -3 * torch.tensor(2 * torch.pi * 0.5).log()
    posterior = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(before, (kl - likelihood + constant).mean())


def test_the_example_of_a_rule_is_right():
    from fastsfvae.jacobian.run.cache import Linearizer

    class Plain(nn.Module):
        def forward(self, h):
            return (h + (h * h + 4).sqrt()) / 2

    class Custom(nn.Module):
        def forward(self, h):
            return torch.ops.example.squareplus(h)

    torch.manual_seed(0)
    first, last = nn.Linear(3, 8).double(), nn.Linear(8, 5).double()
    plain, custom = (nn.Sequential(first, middle(), last) for middle in (Plain, Custom))
    (example,) = python((ROOT / "CONTRIBUTING.md").read_text())
    exec(example, {})
    x, z, log_var = (torch.rand(4, n, dtype=torch.float64) for n in (5, 3, 3))
    losses = [sf.SamplingFreeLoss(decoder)(x, z, log_var) for decoder in (plain, custom)]
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, [*plain.parameters()]) for loss in losses]
    torch.testing.assert_close(*gradients)
    assert Linearizer(custom, z).plan(4).obstacles == []


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_are_understood(command, capsys):
    """Options of `train` are read; of the others each has to be one that its help names."""
    pytest.importorskip("tyro")
    from fastsfvae.cli.main import main
    from fastsfvae.cli.train import TrainArguments
    from fastsfvae.ground.options import parse
    from fastsfvae.training.config import TrainConfig

    name, *options = shlex.split(command.partition("fastsfvae ")[2])
    if name == "train":
        parsed = parse("fastsfvae train", TrainArguments, options, TrainArguments(TrainConfig()))
        assert (parsed == TrainArguments(TrainConfig())) == (not options)
        return
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    known = capsys.readouterr().out
    assert [word for word in options if word[:2] == "--" and f"{word} " not in known] == []


def test_its_links_lead_somewhere():
    """Absolute, as other sites show it too; each to a file of the repository."""
    links = re.findall(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)", README, re.MULTILINE)
    targets = [one or other for one, other in links]
    own = [target for target in targets if target.startswith((f"{OWN}/blob/main/", f"{RAW}/main/"))]
    assert len(own) > 15 and set(targets) == set(own)
    paths = [re.sub(r"^\S+?/main/", "", target).partition("#")[0] for target in own]
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_a_label_has_a_link():
    labels = set(re.findall(r"\]\[([^\]]+)\]", README))
    assert labels == set(re.findall(r"^\[([^\]]+)\]: ", README, re.MULTILINE))
