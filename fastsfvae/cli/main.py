"""The ``fastsfvae`` command."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch

from fastsfvae.ground.options import UsageError, fail, nearest, require_extras, say
from fastsfvae.ground.provenance import VERSION

_USAGE = """\
usage: fastsfvae COMMAND [OPTIONS]

commands:
  train      train a VAE, by default on the bundled MNIST digits
  evaluate   measure a run on its test images: numbers, a page with pictures
  compare    measure runs on the same images: paired differences, one picture
  reproduce  train and measure a table or figure of the paper; set it beside the paper
  export     write a run's model with a model card; upload it to the Hugging Face hub

fastsfvae COMMAND --help lists a command's options; fastsfvae --version prints the version."""
_COMMANDS = ("train", "evaluate", "compare", "reproduce", "export")
_EXTRAS = ("tyro", "rich", "matplotlib", "safetensors")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        arguments: behind the command's name; None takes those of the process, which is then the
            command's own: its environment and its streams are set up for it.

    Returns:
        0: done. 1: training met a non-finite loss, or a table is not complete. 2: bad input, with
        one line on stderr. 130: interrupted, with the state saved.
    """
    if arguments is not None:
        return _run(list(arguments))
    with contextlib.suppress(OSError):
        _let_idle_threads_sleep(sys.argv[1:])
    _open_streams()
    try:
        code = _run(sys.argv[1:])
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has seen enough; what is on disk is whole. The interpreter would
        # write what is left once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    return code


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    name, *options = arguments
    if arguments == ["--version"]:
        print(VERSION)
        return 0
    if name not in _COMMANDS:
        listed = ", ".join(map(repr, _COMMANDS))
        hint = nearest(name, (*_COMMANDS, "--help", "--version"))
        return fail("fastsfvae", f"unknown command {name!r}: the commands are {listed}{hint}")
    prog = f"fastsfvae {name}"
    try:
        require_extras(_EXTRAS, "train")
        with _notes(prog):
            return _command(name)(options)
    except UsageError as error:
        return fail(prog, str(error))
    except Warning as error:
        # Under python -W error.
        return fail(prog, str(error))


def _command(name: str) -> Callable[[list[str]], int]:
    """The function behind a name; each loads what it alone needs."""
    if name == "train":
        from fastsfvae.cli.train import train_command

        return train_command
    if name == "reproduce":
        from fastsfvae.cli.reproduce import reproduce_command

        return reproduce_command
    if name == "export":
        from fastsfvae.cli.export import export_command

        return export_command
    from fastsfvae.cli.measure import compare_command, evaluate_command

    return evaluate_command if name == "evaluate" else compare_command


@contextlib.contextmanager
def _notes(prog: str) -> Iterator[None]:
    """Show each warning once, in one line; afterwards all is as the caller had it."""
    from fastsfvae.training import distributed

    said, callers = set(), warnings.showwarning

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        text = " ".join(str(message).split())
        if text not in said and distributed.rank() == 0:
            said.add(text)
            say(f"{prog}: note: {text}")
        # A caller in this process may record warnings; what would be printed is dropped.
        callers(message, category, filename, lineno, io.StringIO(), line)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _let_idle_threads_sleep(arguments: Sequence[str]) -> None:
    """Start the process anew with an environment under which idle OpenMP threads soon sleep.

    By default they spin: where other work runs beside it, every step waits for threads that hold a
    core and do nothing. OpenMP reads the variable when torch is loaded, which is behind us.
    """
    chosen = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
    computes = arguments and arguments[0] in _COMMANDS and not {"-h", "--help"} & {*arguments}
    if chosen or not computes or torch.get_num_threads() == 1 or not sys.executable:
        return
    os.environ["GOMP_SPINCOUNT"] = "1000"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _open_streams() -> None:
    """Let no file of a run take the number of a stream that is closed, and print any text."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    # An ASCII terminal has no ±: it gets a question mark, not an error behind hours of work.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
