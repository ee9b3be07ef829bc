"""The ``fastsfvae`` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fastsfvae.ground.options import fail
from fastsfvae.ground.provenance import VERSION

_USAGE = """\
usage: fastsfvae COMMAND [OPTIONS]

commands:
  train      train a VAE, by default on the bundled MNIST digits
  evaluate   measure a run on its test images: numbers, a page with pictures
  compare    measure runs on the same images: paired differences, one picture
  reproduce  train and measure a table or figure of the paper; set it beside the paper

fastsfvae COMMAND --help lists a command's options; fastsfvae --version prints the version."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    0: done. 1: training met a non-finite loss. 2: bad input, with one line on stderr.
    130: interrupted, with the state saved.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    match arguments:
        case [] | ["-h" | "--help"]:
            print(_USAGE)
            return 0
        case ["--version"]:
            print(VERSION)
            return 0
        case ["train", *options]:
            from fastsfvae.cli.train import train_command

            return train_command(options)
        case ["evaluate", *options]:
            from fastsfvae.cli.measure import evaluate_command

            return evaluate_command(options)
        case ["compare", *options]:
            from fastsfvae.cli.measure import compare_command

            return compare_command(options)
        case ["reproduce", *options]:
            from fastsfvae.cli.reproduce import reproduce_command

            return reproduce_command(options)
    return fail(
        "fastsfvae",
        f"unknown command {arguments[0]!r}: the commands are 'train', 'evaluate', 'compare', "
        "'reproduce'",
    )
