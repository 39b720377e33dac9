"""``python -m replicax.compat script.py …``: as ``python script.py …``, with :func:`replicax.compat.install`.

Python imports JAX on the way to this module, and JAX reads its environment variables when it is imported, while the
script may want to set some first. So an interpreter of its own, which takes the place of this one, runs the script,
with ``REPLICAX_COMPAT=1``.
"""

from __future__ import annotations

import os
import site
import subprocess
import sys

USAGE = """\
usage: python -m replicax.compat SCRIPT [ARG ...]
       python -m replicax.compat -m MODULE [ARG ...]

Runs a program as python itself would, with replicax in the place of jax.pmap, jax.device_put_replicated and
jax.device_put_sharded.
"""


def _command(arguments: list[str]) -> list[str]:
    """This interpreter with its own options, on the program."""
    options = sys.orig_argv[1 : len(sys.orig_argv) - len(arguments)]
    if options[-2:] == ["-m", "replicax.compat"]:
        options = options[:-2]
    elif options and options[-1].endswith("mreplicax.compat"):
        options = options[:-1]
    return [sys.executable, *options, *arguments]


def _switch_is_installed() -> bool:
    """Whether interpreters read the file that heeds the variable when they start."""
    folders = [*site.getsitepackages(), site.getusersitepackages()]
    return not sys.flags.no_site and any(os.path.exists(os.path.join(f, "replicax_compat.pth")) for f in folders)


def main(arguments: list[str]) -> int:
    """Runs the program that the arguments name; where the system can, without coming back."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0].startswith("-") and (arguments[0] != "-m" or len(arguments) < 2):
        print(f"replicax.compat: not {' '.join(arguments)!r}\n{USAGE}", end="", file=sys.stderr)
        return 2
    if not _switch_is_installed():
        print(
            "replicax.compat: replicax lies on the path, and is not installed, as this needs. Install it, as with "
            "pip install, or call replicax.compat.install() in the program.",
            file=sys.stderr,
        )
        return 2
    command = _command(arguments)
    os.environ["REPLICAX_COMPAT"] = "1"
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "posix":
        os.execv(command[0], command)
    return subprocess.call(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
