"""Lets a plain checkout run without an installation: `import bench.checkout` before fastsfvae.

The folder kernels/ is installed as `fastsfvae.kernels`; where nothing is installed, it is loaded
under that name from here. Also a pytest plugin: `pytest -p bench.checkout`.
"""

import importlib.util
import os
import sys
from pathlib import Path

# Another one where two commits are compared.
CHECKOUT = "FASTSFVAE_CHECKOUT"
ROOT = Path(os.environ.get(CHECKOUT, Path(__file__).resolve().parent.parent))


def _load_kernels() -> None:
    folder = ROOT / "kernels"
    spec = importlib.util.spec_from_file_location(
        "fastsfvae.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
if "fastsfvae.kernels" not in sys.modules:
    _load_kernels()
