"""`make release-check`: the README's first example, by an installed package, not the clone's."""

import re
from pathlib import Path

import fastsfvae

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Run it as a newcomer pastes it."""
    package = Path(fastsfvae.__file__).resolve()
    if package.is_relative_to(ROOT) and "site-packages" not in package.parts:
        raise SystemExit(f"{package} is the clone's, not an installed package's")
    (example, *_) = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.S | re.M
    )
    exec(example, {})


if __name__ == "__main__":
    main()
