"""The README's examples run, its commands are understood, and what it points to exists."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

import fastsfvae as sf
from fastsfvae.jacobian.run.cache import Linearizer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(page):
    """(language, text) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def python(page):
    return [text for language, text in blocks(page) if language == "python"]


COMMANDS = [
    line.partition(" #")[0].strip()
    for _, text in blocks(README)
    for line in text.splitlines()
    if "fastsfvae train" in line
]


def test_the_python_examples_train_and_judge_a_model():
    """All blocks one after another, as a newcomer pastes them."""
    first, *others = python(README)
    assert len(others) == 3
    torch.manual_seed(0)
    names = {}
    exec(first, names)
    digits = names["images"].mean(0).sub(names["images"]).square().sum(1).mean()
    # Less than what the mean digit leaves: the example learns something.
    assert names["terms"].squared_error.mean() < 0.75 * digits
    for block in others:
        exec(block, names)
    # The estimate of log p(x) lies above the sampled ELBO, by the bound's own gap.
    assert names["bound"].elbo.mean() < names["log_ml"].estimate.mean() < 0


def test_the_example_of_a_rule_is_right():
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
def test_the_training_commands_are_understood(command):
    pytest.importorskip("tyro")
    from fastsfvae.cli.train import TrainArguments
    from fastsfvae.ground.options import parse
    from fastsfvae.training.config import TrainConfig

    words = shlex.split(command)
    options = words[words.index("train") + 1 :]
    parsed = parse("fastsfvae train", TrainArguments, options, TrainArguments(TrainConfig()))
    assert (parsed == TrainArguments(TrainConfig())) == (not options)


def test_what_the_readme_points_to_exists():
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README)
    modules = re.findall(r"^\| ((?:`[\w/.]+`(?:, )?)+) \|", README, re.MULTILINE)
    files = [name for cell in modules for name in re.findall(r"`([\w/]+(?:\.py|/))`", cell)]
    folder = ROOT / "fastsfvae"
    missing = [
        name
        for name in [*links, *files]
        if not (ROOT / name).exists() and not (folder / name).exists()
    ]
    assert links and files and not missing


def test_the_readme_names_all_modules():
    """One line of the map for every module, those behind a folder's line apart."""
    named = set(re.findall(r"(\w+)\.py`", README))
    modules = {path.stem for path in (ROOT / "fastsfvae").glob("*.py") if path.stem[0] != "_"}
    assert not modules - named
    rooms = {str(path.parent.relative_to(ROOT)) for path in ROOT.glob("fastsfvae/**/__init__.py")}
    # The room of a clone that only points to kernels/ is named by that.
    assert rooms - {"fastsfvae", "fastsfvae/kernels"} == {
        name for name in re.findall(r"`(fastsfvae/[\w/]+)/`", README)
    }


PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pages_examples_run_and_their_links_exist(page, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSFVAE_CACHE", str(tmp_path))
    text = page.read_text()
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    torch.manual_seed(0)
    names: dict = {"torch": torch, "nn": nn, "sf": sf}
    for block in python(text):
        exec(block, names)
