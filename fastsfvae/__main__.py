"""``python -m fastsfvae``: the same as the ``fastsfvae`` command."""

import sys

from fastsfvae.cli.main import main

sys.exit(main())
