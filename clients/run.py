"""Runs every client on JAX's own pmap and on replicax, in processes of their own, and prints a table."""

import importlib
import json
import os
import subprocess
import sys
import traceback
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
NAMES = sorted(path.stem.removeprefix("on_") for path in HERE.glob("on_*.py"))
DEVICES = 8
OWN = "its own error"
MARK = "result of a case: "


def run_cases(name):
    """In a client's process: one line for each case."""
    client = importlib.import_module(f"on_{name}")
    for case in client.CASES:
        told, numbers = "", []
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                numbers = case() or []
            told = next((str(w.message) for w in caught if "devices" in str(w.message)), "")
            outcome = "ok"
        except BaseException as error:  # absl raises SystemExit
            traceback.print_exc()
            outcome = type(error).__name__
            told = str(error).strip()
            if getattr(client, "OF_ITS_OWN", {}).get(case, MARK) in told:
                outcome = OWN
        print(MARK + json.dumps([case.__doc__, outcome, told.partition("\n")[0][:160], numbers]), flush=True)


def run_client(name, compat):
    """From outside: {case: (outcome, what was said, numbers)}."""
    env = {key: value for key, value in os.environ.items() if key != "REPLICAX_COMPAT"}
    env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    env["JAX_PLATFORMS"] = "cpu"
    if compat:
        env["REPLICAX_COMPAT"] = "1"
    log = Path(os.environ.get("CLIENTS_LOGS", HERE / "logs"))
    log.mkdir(exist_ok=True)
    with open(log / f"{name}-{'replicax' if compat else 'stock'}.txt", "w+") as out:
        subprocess.run([sys.executable, __file__, "--client", name], env=env, stdout=out, stderr=out, check=False)
        out.seek(0)
        rows = [json.loads(line.removeprefix(MARK)) for line in out if line.startswith(MARK)]
    return {case: tuple(result) for case, *result in rows}


def compare(before, after):
    """What replicax made of a case, held against what JAX's own pmap made of it."""
    outcome, _, numbers = after
    if outcome == "ok" and before[0] == "ok" and not np.allclose(numbers, before[2], rtol=1e-3):
        return f"differs: {numbers[:3]} for {before[2][:3]}"
    return outcome


def main(names):
    table = Table("client", "case", "jax.pmap", "replicax.compat", title=f"JAX {version('jax')}, {DEVICES} devices")
    said, failed = [], []
    for name in names or NAMES:
        stock, ours = run_client(name, compat=False), run_client(name, compat=True)
        packages = importlib.import_module(f"on_{name}").PACKAGES
        heading = ", ".join(f"{package} {version(package)}" for package in packages)
        if not ours:
            failed.append(f"{name}: did not start, see clients/logs")
        for case in dict.fromkeys([*stock, *ours]):
            before, after = (results.get(case, ("no result", "", [])) for results in (stock, ours))
            outcome = compare(before, after)
            table.add_row(heading, case, *("ok, but says" if o == "ok" and r[1] else o
                                           for o, r in ((before[0], before), (outcome, after))))  # fmt: skip
            heading = ""
            said += [f"{name}, {case}, {who}: {r[1]}" for who, r in (("jax", before), ("replicax", after)) if r[1]]
            if outcome not in ("ok", OWN):
                failed.append(f"{name}, {case}")
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    print(*said, *(f"FAILED under replicax: {line}" for line in failed), sep="\n")
    return bool(failed)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    if sys.argv[1:2] == ["--client"]:
        run_cases(sys.argv[2])
    else:
        sys.exit(main(sys.argv[1:]))
