"""What the commands of this folder share."""

from __future__ import annotations

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def make_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Of `python -m bench.<name>`, whose help is the module's docstring as it stands."""
    return argparse.ArgumentParser(
        prog=f"python -m bench.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
