"""``python -m replicax.compat script.py …``: like ``python script.py …``, with :func:`replicax.compat.install`.

Python imports JAX before it runs this module, and JAX reads environment variables on import. But the script may set
some of them before it imports JAX. So this module replaces its process with a new interpreter that runs the script.
"""

from __future__ import annotations

import os
import subprocess
import sys

from replicax.compat._bootstrap import __file__ as bootstrap
from replicax.compat._virtual import VARIABLE, number, wanted
from replicax.errors import ReplicaxError

USAGE = """\
usage: python -m replicax.compat [--replicas N] SCRIPT [ARG ...]
       python -m replicax.compat [--replicas N] -m MODULE [ARG ...]

Runs a program like python does, with jax.pmap, jax.device_put_replicated and jax.device_put_sharded replaced by
replicax.

  --replicas N   the program sees N devices, for any number of real devices up to N; also REPLICAX_REPLICAS=N
"""


def _command(arguments: list[str], program: list[str]) -> list[str]:
    """The command that runs the program: this interpreter with its options, and the bootstrap script."""
    options = sys.orig_argv[1 : len(sys.orig_argv) - len(arguments)]
    if options[-2:] == ["-m", "replicax.compat"]:
        options = options[:-2]
    elif options and options[-1].endswith("mreplicax.compat"):
        options = options[:-1]
    return [sys.executable, *options, bootstrap, *program]


def _replicas(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of ``--replicas``, and the remaining arguments."""
    if arguments[:1] == ["--replicas"]:
        return " ".join(arguments[1:2]), arguments[2:]
    if arguments and arguments[0].startswith("--replicas="):
        return arguments[0].partition("=")[2], arguments[1:]
    return None, arguments


def main(arguments: list[str]) -> int:
    """Runs the program. On POSIX, it replaces this process and does not return."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    said, program = _replicas(arguments)
    try:
        wanted(None) if said is None else number(said, "--replicas", "--replicas 8")
    except ReplicaxError as error:
        print(f"replicax.compat: {error}", file=sys.stderr)
        return 2
    if not program or (program[0].startswith("-") and (program[0] != "-m" or len(program) < 2)):
        fault = f"cannot run {' '.join(program)!r}" if program else "the program is missing"
        print(f"replicax.compat: {fault}\n{USAGE}", end="", file=sys.stderr)
        return 2
    if said is not None:
        os.environ[VARIABLE] = said
    command = _command(arguments, program)
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "posix":
        os.execv(command[0], command)
    return subprocess.call(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
