"""What the commands share: options, missing packages, errors of one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import io
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

Arguments = TypeVar("Arguments")

_NUMBERS = {int: "a whole number", float: "a number"}
_SHOWN = 80


class UsageError(Exception):
    """A command line that cannot be carried out; its message is one line."""


def parse(
    prog: str,
    class_: type[Arguments],
    options: Sequence[str],
    default: Arguments | None = None,
) -> Arguments:
    """Parse options into a dataclass with tyro; errors become one line.

    An option may be written with hyphens or underscores, and its value behind a space or "=".

    Raises:
        UsageError: for options that do not fit.
        SystemExit: behind --help.
    """
    import tyro

    if not {"-h", "--help"} & {*options}:
        _check(*_types(class_), options)
    conf = tyro.conf
    shape: Any = Annotated[
        class_, conf.OmitArgPrefixes, conf.FlagCreatePairsOff, conf.PositionalRequiredArgs
    ]
    captured = io.StringIO()
    given: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(shape, args=list(options), prog=prog, **given)
    except SystemExit as exit_:
        if exit_.code == 0:
            raise
        lines = [line.strip("│ ") for line in captured.getvalue().splitlines()]
        box = [line for line in lines if not line.startswith(("╭", "╰"))]
        # What follows the first rule is a repetition of the help.
        rule = next((i for i, line in enumerate(box) if line.startswith("─")), len(box))
        # A value that a configuration refuses is reported in its own words.
        message = " ".join(box[:rule]).replace(f"Missing from {prog}:", "missing:")
        for name in ("config", "settings"):
            message = message.removeprefix(f"Error parsing {name}: ")
        raise UsageError(message) from None


def _types(class_: type) -> tuple[dict[str, Any], list[Any]]:
    """The types of a dataclass's options by their names, and of what is named by its place."""
    named: dict[str, Any] = {}
    placed: list[Any] = []
    hints = typing.get_type_hints(class_)
    for field in dataclasses.fields(class_):
        type_ = hints[field.name]
        if isinstance(type_, type) and dataclasses.is_dataclass(type_):
            named |= _types(type_)[0]
        elif field.default is dataclasses.MISSING:
            placed.append(type_)
        else:
            named[f"--{field.name.replace('_', '-')}"] = type_
    return named, placed


def _check(types: Mapping[str, Any], places: list[Any], options: Sequence[str]) -> None:
    """Raise UsageError for an option that is unknown, given twice, or has no fitting value."""
    seen, words, rest = set(), [], iter(options)
    for word in rest:
        if not word.startswith("-"):
            words.append(word)
            continue
        written, equals, value = word.partition("=")
        name = written.replace("_", "-")
        if name not in types:
            raise UsageError(f"unknown option {_quoted(written)}{nearest(name, types)}")
        if name in seen:
            raise UsageError(f"{name} is given twice: give it once")
        seen.add(name)
        if types[name] is bool:
            if equals:
                raise UsageError(f"{name} takes no value: leave out {_quoted(equals + value)}")
            continue
        given = value if equals else next(rest, None)
        if given is None or (not equals and given.startswith("--")):
            raise UsageError(f"{name} needs a value: give it behind a space or =")
        _check_value(name, types[name], given)
    if places and typing.get_origin(places[-1]) is list:
        return
    for type_, word in zip(places, words, strict=False):
        _check_value("", type_, word)
    if len(words) > len(places):
        raise UsageError(f"{_quoted(words[len(places)])} is too much: options begin with --")


def _check_value(name: str, type_: Any, value: str) -> None:
    if not value:
        raise UsageError(f"{name or 'an argument'} is empty: give a value, or leave it out")
    if value == "None" and type(None) in typing.get_args(type_):
        raise UsageError(f"{name} 'None' is its default: leave it out")
    if type_ in _NUMBERS:
        try:
            number = type_(value)
        except ValueError:
            raise UsageError(f"{name} {_quoted(value)} is not {_NUMBERS[type_]}") from None
        if type_ is int and abs(number) >= 2**63:
            raise UsageError(f"{name} {_quoted(value)} is beyond 64 bits: give less")
    choices = _choices(type_)
    if choices and value not in choices:
        what = f"{name} {_quoted(value)}".lstrip()
        raise UsageError(f"{what} is none of {', '.join(choices)}{nearest(value, choices)}")


def _choices(type_: Any) -> tuple[str, ...]:
    """The texts that a Literal, or a union of them, admits; none for any other type."""
    if typing.get_origin(type_) is typing.Literal:
        return typing.get_args(type_)
    return tuple(text for part in typing.get_args(type_) for text in _choices(part))


def nearest(given: str, known: Iterable[str]) -> str:
    """Ask whether the most similar of the known words was meant; "" where none is similar."""
    similar = difflib.get_close_matches(given, list(known), n=1)
    return f": did you mean {similar[0]}?" if similar else ""


def _quoted(text: str) -> str:
    """A text as it was given, of a length that fits a line."""
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def require_extras(packages: Sequence[str], extra: str) -> None:
    """Raise UsageError unless all packages are installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{', '.join(missing)} missing: install what is needed with "
            f'pip install "fastsfvae[{extra}]"'
        )


def one_line(error: Exception) -> str:
    """What another library's error says, in one line of a length that can be read."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 2 * _SHOWN else f"{text[: 2 * _SHOWN]}..."


def say(line: str) -> None:
    """Write a line to stderr; a reader that has gone ends no work."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def fail(prog: str, message: str, code: int = 2) -> int:
    """Write one line to stderr; return the exit code."""
    say(f"{prog}: {' '.join(message.split())}")
    return code
