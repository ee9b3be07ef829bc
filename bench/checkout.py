"""Another commit's code for bench.compare: `import bench.checkout` before fastsfvae.

The environment variable FASTSFVAE_CHECKOUT names the folder that the commit is checked out into.
"""

import importlib.util
import os
import sys
from pathlib import Path

CHECKOUT = "FASTSFVAE_CHECKOUT"


def _load_kernels(folder: Path) -> None:
    """For commits without fastsfvae/kernels, which points to this folder."""
    spec = importlib.util.spec_from_file_location(
        "fastsfvae.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


if root := os.environ.get(CHECKOUT):
    sys.path.insert(0, root)
    if not Path(root, "fastsfvae/kernels").is_dir():
        _load_kernels(Path(root, "kernels"))
