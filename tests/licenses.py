"""`make licenses`: the licence of everything that is installed here; fails on an unknown one."""

import re
import sys
from importlib import metadata

# Words that name a permissive or a weakly reciprocal licence, which a library may depend on.
_FREE = re.compile(
    r"apache|bsd|\bmit\b|mit-cmu|isc|psf|python software|mpl|mozilla|unlicense|zlib|0bsd|hpnd|cc0"
    r"|public domain",
    re.IGNORECASE,
)
# The proprietary libraries of CUDA, which a CUDA build of torch brings along.
_VENDOR = re.compile(r"^(nvidia|cuda)", re.IGNORECASE)


def licence(package: metadata.PackageMetadata) -> str:
    """What a distribution says of its licence, shortest form first."""
    stated = package.get("License-Expression")
    classifiers = [
        line.split("::")[-1].strip()
        for line in package.get_all("Classifier") or ()
        if line.startswith("License ::")
    ]
    text = (package.get("License") or "").strip().split("\n")[0][:60]
    return stated or ", ".join(classifiers) or text or "unknown"


def main() -> int:
    """Print a line for each distribution; return 1 if one has no known free licence."""
    found = {d.metadata["Name"]: licence(d.metadata) for d in metadata.distributions()}
    bad = []
    for name, terms in sorted(found.items(), key=lambda item: str(item[0]).lower()):
        free = bool(_FREE.search(terms))
        note = "" if free else "vendor's terms" if _VENDOR.match(str(name)) else "CHECK"
        if note == "CHECK":
            bad.append(name)
        print(f"{name:32} {terms:60} {note}")
    print(
        f"{len(found)} distributions, {len(bad)} to check" + (f": {', '.join(bad)}" if bad else "")
    )
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
