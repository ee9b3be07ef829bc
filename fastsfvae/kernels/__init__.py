"""The folder kernels/ of a clone, under the name that it is installed by.

Only a clone has this file: in an installed package, `fastsfvae/kernels` is that folder itself.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "kernels")]
