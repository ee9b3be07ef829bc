"""``python -m fastsfvae``: the same as the ``fastsfvae`` command."""

import sys

from fastsfvae.cli import main

sys.exit(main())
