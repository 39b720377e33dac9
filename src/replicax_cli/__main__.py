"""``python -m replicax_cli``: the ``replicax`` command."""

import sys

from replicax_cli.command import main

sys.exit(main())
