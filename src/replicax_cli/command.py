"""The subcommands of ``replicax``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from replicax_cli import launch


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the ``replicax`` command.

    Args:
        argv: The words after ``replicax``; those of this process when None.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser("replicax", description="Parallel map for JAX.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    launch.add_to(commands)
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return int(options.run(options))
