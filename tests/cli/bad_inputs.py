"""Command lines that cannot be carried out: (arguments, what the one line must name)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastsfvae.cli import main as cli

Case = tuple[list[str], str]

# What is no whole number, and what is no number at all.
_NO_INT = ("x", "1.5", "nan", "inf", "0x10", "1e3", "1 2", "½", "9" * 40, "", "None", "1\n2")
_NO_NUMBER = ("x", "1,5", "0x10", "1e", "½", "", "None", "1\n.2")
_BUILDERS = """
import sys
import torch
from torch import nn

def key(config): raise KeyError("a")
def divide(config): return 1 // 0
def lines(config): raise RuntimeError("one\\ntwo")
def leave(config): sys.exit(0)
def deep(config): return deep(config)
def nothing(config): return None
def three(config): return nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)
def one(config): return nn.Linear(1, 1)
def shapes(config): return nn.Flatten(), nn.Linear(config.latent_dim, 3)
number = 3

class Failing(nn.Module):
    def forward(self, x): raise IndexError("b")

def failing(config): return Failing(), Failing()
def no_extractor(): return 3
"""
BUILDERS = "key divide lines leave deep nothing three one shapes failing number missing".split()


def build(folder: Path) -> None:
    """Put runs, data, damaged runs and files that are in the way into a folder."""
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8)
    np.savez(folder / "a.npz", train=images[:16], test=images[16:])
    np.savez(folder / "other.npz", train=images[:16], test=images[8:16])
    np.savez(folder / "few.npz", train=images[:2], test=images[2:3])
    (folder / "wrong_models.py").write_text(_BUILDERS)
    (folder / "no_syntax.py").write_text("def f(:\n")
    for name, data, more in (
        ("run", "a.npz", []),
        ("second", "a.npz", ["--seed", "1"]),
        ("unlike", "other.npz", []),
        ("noisy", "a.npz", ["--noise-var", "0.25"]),
    ):
        command = ["train", *_tiny(folder / data), "--steps", "3", *more]
        assert cli.main([*command, "--out", str(folder / name)]) == 0
    for name in ("cut", "foreign", "no-config", "no-checkpoint", "bytes", "deep", "model", "swap"):
        shutil.copytree(folder / "run", folder / name)
    whole = (folder / "run/checkpoint.safetensors").read_bytes()
    (folder / "cut/checkpoint.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "foreign/config.json").write_text('{"lr": 1}')
    (folder / "no-config/config.json").unlink()
    (folder / "no-checkpoint/checkpoint.safetensors").unlink()
    (folder / "bytes/config.json").write_bytes(b"\xff\xfe")
    (folder / "deep/config.json").write_text("[" * 100_000)
    config = (folder / "run/config.json").read_text()
    (folder / "model/config.json").write_text(config.replace('"linear"', '"wrong_models:key"'))
    swapped = config.replace('"latent_dim": 2', '"latent_dim": 3')
    (folder / "swap/config.json").write_text(swapped)
    (folder / "file.txt").write_text("mine")
    (folder / "empty").mkdir()


def _tiny(data: Path) -> list[str]:
    options = ["--method", "sampling", "--model", "linear", "--latent-dim", "2"]
    options += ["--data", "npz", "--data-dir", str(data), "--image-size", "8", "--batch-size", "4"]
    return options


def _wrong_types(command: list[str], whole: str, numbers: str = "") -> Iterator[Case]:
    for name in whole.split():
        yield from (([*command, f"--{name}={text}"], f"--{name}") for text in _NO_INT)
    for name in numbers.split():
        yield from (([*command, f"--{name}={text}"], f"--{name}") for text in _NO_NUMBER)


def _below(command: list[str], least: dict[str, int]) -> Iterator[Case]:
    for name, number in least.items():
        field = name.replace("-", "_")
        yield [*command, f"--{name}", str(number - 1)], f"{field}={number - 1}"
        yield [*command, f"--{name}", str(-(2**62))], f"{field}={-(2**62)}"


def _unknown(command: list[str]) -> Iterator[Case]:
    yield [*command, "--bogus"], "unknown option '--bogus'"
    yield [*command, "--bogus=1"], "unknown option '--bogus'"
    yield [*command, "-x"], "unknown option '-x'"
    yield [*command, "--"], "unknown option '--'"
    yield [*command, "---steps"], "unknown option '---steps'"
    yield [*command, "--oot", "a"], "did you mean --out?"
    yield [*command, "--\N{SNOWMAN}"], "unknown option"
    yield [*command, "--out"], "--out needs a value"
    yield [*command, "--out", "--seed"], "--out needs a value"
    yield [*command, "--out="], "--out is empty"
    yield [*command, "--out", "new", "--out", "newer"], "--out is given twice"
    yield [*command, f"--{'x' * 5000}"], "unknown option"


def _taken(command: list[str]) -> Iterator[Case]:
    yield [*command, "--out", "run"], "exists"
    yield [*command, "--out", "file.txt"], "exists"
    yield [*command, "--out", "empty"], "exists"
    yield [*command, "--out", "."], "exists"
    yield [*command, "--out", "/"], "exists"


def _train() -> Iterator[Case]:
    tiny = ["train", *_tiny(Path("a.npz"))]
    plain = ["train", "--model", "linear"]
    counts = "image-every channels crop train-images steps schedule-steps samples mode-steps seed"
    yield from _wrong_types(plain, f"{counts} latent-dim", "lr gamma noise-var kl-weight")
    least = {"latent-dim": 1, "batch-size": 1, "steps": 1, "samples": 1, "mode-steps": 1}
    least |= {"schedule-steps": 0, "train-images": 0, "seed": 0, "image-size": 0, "crop": -1}
    yield from _below(["train", "--model", "linear"], least)
    yield from _unknown(plain)
    yield from _taken(tiny)
    for name in "method data likelihood bound backend precision output-activation init".split():
        for text in ("x", "None", "", "a b"):
            yield [*plain, f"--{name}={text}"], f"--{name}"
    for text in ("0", "-1", "nan", "inf", "1e400", "-0.0"):
        yield [*plain, "--lr", text], "lr="
        yield [*plain, "--noise-var", text], "noise_var="
    for text in ("-0.1", "1.1", "nan", "inf"):
        yield [*plain, "--gamma", text], "gamma="
    for text in (
        "x",
        "linear",
        "linear:",
        "linear:x",
        "steps:2",
        "constant:1",
        "linear:nan",
        "a:b",
    ):
        yield [*plain, "--gamma-schedule", text], "gamma"
    for text in ("cudda", "cuda:-1", "meta", "mps", "cpu:1", "0", "cpu\n", "\udcff"):
        yield [*plain, "--device", text], "device="
    for name in BUILDERS:
        yield ["train", "--model", f"wrong_models:{name}"], f"wrong_models:{name}"
    for name in ("foo", ":", "a:b:c", "..a:b", "no_syntax:f", "wrong_models:", "os:getcwd", "\n:f"):
        yield ["train", f"--model={name}"], "model="
    yield ["train", "--latent-dim", str(10**12)], "memory"
    yield ["train", "--latent-dim", str(10**18)], "fastsfvae train: "
    yield [*plain, "--batch-size", str(10**9)], "batch_size=1000000000"
    yield [*plain, "--image-size", "100000"], "--image-size"
    yield [*tiny, "--samples", str(10**12)], "memory"
    yield [*plain, "--train-images", "100000"], "train_images=100000"
    yield [*plain, "--channels", "2"], "channels=2"
    yield ["train", "--data", "npz"], "--data-dir"
    for place in ("nowhere.npz", "file.txt", "empty", "wrong_models.py", "a\0b", "x" * 300):
        yield ["train", "--data", "npz", "--data-dir", place, "--image-size", "8"], place[:9]
    yield ["train", "--data", "npz", "--data-dir", "a.npz"], "--image-size"
    yield ["train", "--data", "folder", "--data-dir", "empty"], "empty"
    yield ["train", "--data", "mnist", "--data-dir", "empty"], "empty"
    yield ["train", *_tiny(Path("few.npz"))], "batch_size=4"
    yield [*tiny, "--out", "file.txt/run"], "file.txt"
    yield [*tiny, "--out", "/proc/none/run"], "/proc"
    yield [*tiny, "--out", "x" * 300], "too long"
    yield [*tiny, "--out", "a\0b"], "null"
    yield [*plain, "--download"], "--download"
    yield ["train", "extra"], "'extra'"
    yield ["train", "--compile=yes"], "--compile takes no value"
    for place in ("nowhere", "empty", "file.txt", "cut", "foreign", "no-config", "no-checkpoint"):
        yield ["train", "--resume", "--out", place], place
    for place in ("bytes", "deep", "swap", "model"):
        yield ["train", "--resume", "--out", place], place.replace("model", "wrong_models:key")
    for change in ("lr=0.1", "seed=4", "latent-dim=3", "batch-size=2", "model=tanh", "method=iwae"):
        yield ["train", "--resume", "--out", "run", f"--{change}"], "only steps, "
    yield ["train", "--resume", "--out", "run", "--steps", "2"], "already at step 3"
    yield ["train", "--resume"], "give --out"


def _evaluate() -> Iterator[Case]:
    command = ["evaluate", "run"]
    whole = "samples elbo-samples images taylor-images taylor-reference gradient-repeats"
    yield from _wrong_types(command, whole)
    least = {"samples": 1, "elbo-samples": 1, "images": 0, "taylor-images": 0}
    yield from _below(command, least | {"taylor-reference": 2, "gradient-repeats": 0})
    yield from _unknown(command)
    yield from _taken(command)
    yield [*command, "--gradient-repeats", "1"], "gradient_repeats=1"
    for text in ("x", "prior", "None", "", "\n"):
        yield [*command, f"--proposal={text}"], "proposal"
    for place in (
        *("nowhere", "empty", "file.txt", "a.npz", "cut", "foreign", "no-config", "no-checkpoint"),
        *("bytes", "deep", "swap", "run/config.json", "/dev/null", "x" * 300, "a\0b"),
    ):
        yield ["evaluate", place], place[:2]
    yield ["evaluate", "model"], "wrong_models:key"
    yield ["evaluate"], "RUN"
    yield ["evaluate", "run", "second"], "'second'"
    for name in ("foo", ":", "nowhere:f", "wrong_models:no_extractor", "no_syntax:f", "os:getcwd"):
        yield [*command, f"--extractor={name}"], "extractor="
    for name in ("nowhere", "empty", "."):
        yield [*command, "--inception", name], "fastsfvae evaluate: "
    yield [*command, "--extractor", "a:b", "--download"], "give one"
    yield [*command, "--extractor", "a:b", "--inception", "c"], "give one"


def _compare() -> Iterator[Case]:
    command = ["compare", "run", "second"]
    yield from _wrong_types(command, "samples elbo-samples images")
    yield from _below(command, {"samples": 1, "elbo-samples": 1, "images": 0})
    yield from _unknown(command)
    yield from _taken(command)
    for text in ("x", "prior", "None", "", "\n"):
        yield [*command, f"--proposal={text}"], "proposal"
    for place in (
        *("nowhere", "empty", "file.txt", "a.npz", "cut", "foreign", "no-config", "no-checkpoint"),
        *("bytes", "deep", "swap", "run/config.json", "/dev/null", "x" * 300, "a\0b"),
    ):
        yield ["compare", "run", place], place[:2]
        yield ["compare", place, "run"], place[:2]
    yield ["compare", "run", "model"], "wrong_models:key"
    yield ["compare", "run,nowhere", "second"], "nowhere"
    yield ["compare", "run,run", "second"], "the seed of run, 0"
    yield ["compare", "run,second,run", "second"], "the seed of run, 0"
    yield ["compare", "second", "run,noisy"], "noise_var"
    yield ["compare", "run,unlike", "second"], "different test images"
    yield ["compare", "run,second"], "2 runs in one group: name at least two folders"
    for word in (",", "run,", ",run", "run,,second"):
        yield ["compare", word, "second"], f"{word!r} has a comma without a folder"
    yield ["compare"], "two folders"
    yield ["compare", "run"], "two folders"
    yield ["compare", "run", "unlike"], "different test images"
    yield ["compare", "run", "second", "noisy"], "noise_var=0.25"


def _reproduce() -> Iterator[Case]:
    command = ["reproduce", "table4", "--quick"]
    yield from _wrong_types(command, "steps seeds")
    for name in ("steps", "seeds"):
        for number in ("-1", str(-(2**62))):
            yield [*command, f"--{name}", number], "must not be negative"
    yield from _unknown(command)
    for name in (
        *("table6", "tabel4", "Table4", "figurea1", "figure 1", "", " ", "all", "None", "x" * 5000),
        *("table4,table5", "\N{SNOWMAN}", "\n", "../table4", "table4.md", "*", "0"),
    ):
        yield ["reproduce", name], "empty" if not name else "is none of table1, "
    yield ["reproduce", "tabel4"], "did you mean table4?"
    yield ["reproduce"], "NAME"
    yield ["reproduce", "--quick"], "NAME"
    yield ["reproduce", "table4", "table1"], "'table1'"
    for only in ("x", "sampling", "SAMPLING,*", "[", "?", "sampling,identity,torch", "\n"):
        yield [*command, f"--only={only}"], "is no cell of table4"
        yield ["reproduce", "table4", "--list", f"--only={only}"], "is no cell of table4"
    yield (
        [*command, "--only", "sampling, identity, torhc"],
        "did you mean sampling, identity, torch",
    )
    for name in ("x", "None", "", "cifar", "MNIST"):
        yield ["reproduce", "table2", f"--data={name}"], "--data"
    for name in ("mnist", "celeba", "digits"):
        yield [*command, "--data", name], f"leave out --data {name}"
    for place in ("file.txt", "file.txt/a", "/proc/none", "x" * 300, "a\0b"):
        yield [*command, "--out", place], "fastsfvae reproduce: "
    yield ["reproduce", "table4", "--quick=1"], "--quick takes no value"
    yield [*command, "--list=no"], "--list takes no value"


def cases() -> dict[str, list[Case]]:
    """All of them by their command."""
    tables = {"train": _train, "evaluate": _evaluate, "compare": _compare, "reproduce": _reproduce}
    return {name: list(table()) for name, table in tables.items()}
