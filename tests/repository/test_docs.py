"""The pages' examples run, their links lead somewhere, and they speak of all that is public."""

import ast
import inspect
import re
from importlib.util import find_spec

import pytest
import torch
from torch import nn

import fastsfvae as sf
from fastsfvae import objectives, training
from fastsfvae.training.config import TrainConfig
from tests.repository.pages import PAGES, ROOT, python

BY_NAME = {page.stem: page.read_text() for page in PAGES}
CODE = "\n".join(block for text in BY_NAME.values() for block in python(text))
OBJECTIVES = {
    name
    for name, value in vars(objectives).items()
    if getattr(value, "__module__", "").startswith("fastsfvae.objectives.")
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the run that `make train` leaves, after few steps."""
    folder = tmp_path_factory.mktemp("clone")
    training.train(training.start(TrainConfig(steps=5), folder / "runs/sampling-free-mlp-1"))
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_pages_examples_run_and_its_links_exist(page, tmp_path, monkeypatch, trained):
    monkeypatch.setenv("FASTSFVAE_CACHE", str(tmp_path))
    monkeypatch.chdir(trained)
    text = page.read_text()
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    torch.manual_seed(0)
    names: dict = {"torch": torch, "nn": nn, "sf": sf}
    for block in python(text):
        exec(block, names)


def test_the_commands_that_pages_name_exist():
    """Targets of make, modules that Python runs, scripts, and files that pytest is given."""
    texts = [
        *BY_NAME.values(),
        *((ROOT / f"{n}.md").read_text() for n in ("README", "CONTRIBUTING")),
    ]
    said = "\n".join(texts)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", said, re.MULTILINE))
    assert len(named) > 8 and named <= targets
    modules = set(re.findall(r"python -m ((?:fastsfvae|bench|tests)[\w.]*)", said))
    assert len(modules) > 8 and [m for m in modules if find_spec(m) is None] == []
    paths = set(re.findall(r"(?:python|pytest|=\d) ((?:examples|bench|tests)/[\w/.]+)", said))
    assert len(paths) > 5 and [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(
    "module, public",
    [
        ("fastsfvae", {*sf.__all__} - {"evaluate"}),
        ("fastsfvae.evaluate", {*sf.evaluate.__all__} - {"PAPER_SAMPLES", "PROPOSALS"}),
        ("fastsfvae.objectives", OBJECTIVES),
    ],
)
def test_the_reference_has_every_public_name(module, public):
    shown = re.findall(rf"^::: {module}\.(\w+)(?:\.\1)?$", BY_NAME["api"], re.MULTILINE)
    assert len(shown) == len(set(shown)) and public <= set(shown)
    # No docstring, no entry.
    root = {"fastsfvae": sf, "fastsfvae.evaluate": sf.evaluate}.get(module, objectives)
    assert [name for name in shown if not inspect.getdoc(getattr(root, name))] == []


@pytest.mark.parametrize(
    "prefix, public",
    [
        ("sf", {*sf.__all__}),
        ("evaluate", {*sf.evaluate.__all__} - {"Inception"}),
        ("objectives", OBJECTIVES - {"Objective"}),
    ],
)
def test_every_public_name_has_an_example(prefix, public):
    """In a block that the first test runs; Inception needs weights that nobody has here."""
    assert {name for name in public if not re.search(rf"\b{prefix}\.{name}\b", CODE)} == set()


def test_the_module_map_names_all_modules():
    """One line for every module, those behind a folder's line apart."""
    text = BY_NAME["architecture"]
    named = set(re.findall(r"(\w+)\.py`", text))
    modules = {path.stem for path in (ROOT / "fastsfvae").glob("*.py") if path.stem[0] != "_"}
    assert not modules - named
    rooms = {str(path.parent.relative_to(ROOT)) for path in ROOT.glob("fastsfvae/**/__init__.py")}
    # The room of a clone that only points to kernels/ is named by that.
    assert rooms - {"fastsfvae", "fastsfvae/kernels"} == {
        name for name in re.findall(r"`(fastsfvae/[\w/]+)/`", text)
    }
    rows = re.findall(r"^\| ((?:`[\w/.]+`(?:, )?)+) \|", text, re.MULTILINE)
    files = [name for row in rows for name in re.findall(r"`([\w/]+(?:\.py|/))`", row)]
    folder = ROOT / "fastsfvae"
    missing = [name for name in files if not ((ROOT / name).exists() or (folder / name).exists())]
    assert files and not missing


def test_the_messages_of_troubleshooting_are_the_librarys():
    """Each is quoted word by word, so that a search finds it."""
    said = ""
    for path in (ROOT / "fastsfvae").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            # An f-string's constant parts come one after another, parted where a value is.
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said += node.value + "\n"
    tables = BY_NAME["troubleshooting"].split("\n| message |")[1:]
    rows = [row for table in tables for row in table.partition("\n\n")[0].splitlines()[2:]]
    messages = [re.match(r"\| `([^`]+)`", row) for row in rows]
    assert len(messages) > 25 and all(messages)
    assert [found[1] for found in messages if found and found[1] not in said] == []
