"""The table of what was found."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

HEAD = """# Decoders of public packages

`make zoo` wrote this: {machine}, {date}, {minutes:.0f} minutes.

Random weights in small configurations, float64, {m} latents, {b} samples; the value of the loss and
all its gradients are compared with plain reverse mode, and are right within 1e-10 of the largest.
"Swept" is the fast path, chunk by chunk with hand-written gradients; "autograd" is slower and as
right. The first call traces the decoder; a step is the loss with all gradients, and the last column
how many times as long vmap(jacfwd) takes for the same. The networks are small: times are overhead.

{summary}
"""


def report(results: list[dict[str, Any]], versions: dict[str, str], machine: str, seconds: float):
    """The text of the file."""
    from bench.zoo.entry import M
    from bench.zoo.judge import B

    date = time.strftime("%Y-%m-%d")
    options = {"machine": machine, "date": date, "minutes": seconds / 60, "m": M, "b": B}
    lines = [HEAD.format(summary=summary(results), **options)]
    lines += ["| decoder | found | error | path | first call | step | vmap(jacfwd) |"]
    lines += ["|---|---|---|---|---|---|---|"]
    lines += [row(one) for one in results]
    notes = [f"- `{one['name']}`: {one['why']}" for one in results if "why" in one]
    if notes:
        lines += ["", "## What was said", "", *notes]
    slower = [f"- `{one['name']}`: {'; '.join(one['slower'])}" for one in results if is_slow(one)]
    if slower:
        lines += ["", "## Why autograd takes the gradients", "", *slower]
    packages = ", ".join(f"{name} {number}" for name, number in sorted(versions.items()))
    return "\n".join([*lines, "", "## Versions", "", packages, ""])


def is_slow(one: dict[str, Any]) -> bool:
    """Whether a decoder that ran is not swept."""
    return bool(one.get("slower"))


def summary(results: list[dict[str, Any]]) -> str:
    """How many of each kind."""
    counts = Counter(one["outcome"] for one in results)
    swept = sum(one["outcome"] == "right" and not is_slow(one) for one in results)
    parts = [f"{number} {kind}" for kind, number in counts.most_common()]
    return f"{len(results)} decoders: {', '.join(parts)}; {swept} right and swept."


def row(one: dict[str, Any]) -> str:
    """A decoder's line."""
    cells = [f"`{one['name']}`", one["outcome"]]
    cells.append(f"{one['error']:.0e}" if "error" in one else "")
    cells.append(("autograd" if is_slow(one) else "swept") if "slower" in one else "")
    cells.append(f"{one['first']:.2f} s" if "first" in one else "")
    cells.append(f"{one['step']:.0f} ms" if "step" in one else "")
    cells.append(f"{one['ratio']:.1f}" if "ratio" in one else "fails" if "peer" in one else "")
    return "| " + " | ".join(cells) + " |"
