"""The ``replicax`` command.

It imports only the standard library, so that it starts at once: importing JAX takes a second.
"""

from replicax_cli.command import main as main

__all__ = ["main"]
