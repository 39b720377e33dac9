"""Runs every client on JAX's own pmap and on replicax, each in a new process, and prints tables."""

import ast
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
FEWER = (8, 3, 1)  # the real devices for clients with COUNTS_DEVICES, which see 8
OWN = "its own error"
MARK = "result of a case: "


def constants(name):
    """A client's constants, read without importing the client."""
    tree = ast.parse((HERE / f"on_{name}.py").read_text())
    named = {a.targets[0].id: a.value for a in tree.body if isinstance(a, ast.Assign) and hasattr(a.targets[0], "id")}
    return {key: ast.literal_eval(named[key]) for key in ("PACKAGES", "COUNTS_DEVICES") if key in named}


def run_cases(name):
    """Runs in the client's process: prints one line per case."""
    try:
        client = importlib.import_module(f"on_{name}")
    except Exception as error:
        traceback.print_exc()
        print(MARK + json.dumps(["import", OWN, str(error).partition("\n")[0][:160], []]), flush=True)
        return
    for case in client.CASES:
        told = ""
        numbers: list[float] = []
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


def run_client(name, *how, devices=DEVICES, removed=False):
    """Runs a client in a new interpreter with the options ``how``. Returns {case: (outcome, message, numbers)}."""
    env = {key: value for key, value in os.environ.items() if key != "REPLICAX_REPLICAS"}
    env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    env["JAX_PLATFORMS"] = "cpu"
    log = Path(os.environ.get("CLIENTS_LOGS", HERE / "logs"))
    log.mkdir(exist_ok=True)
    command = [sys.executable, *how, __file__, "--client", name, *(["--removed"] if removed else [])]
    which = ("replicax" if how else "stock") + (f"-{devices}" if "--replicas" in how else "")
    with open(log / f"{name}-{which}.txt", "w+") as out:
        subprocess.run(command, env=env, stdout=out, stderr=out, check=False)
        out.seek(0)
        rows = [json.loads(line.removeprefix(MARK)) for line in out if line.startswith(MARK)]
    return {case: tuple(result) for case, *result in rows}


def compare(before, after, rtol=1e-3):
    """The outcome of a case on replicax, compared with the outcome on JAX's own pmap."""
    outcome, _, numbers = after
    if outcome == "ok" and before[0] == "ok" and not np.allclose(numbers, before[2], rtol, rtol / 100):
        return f"differs: {numbers[:3]} for {before[2][:3]}"
    return outcome


def largest_difference(before, after):
    """The largest relative difference between the numbers of two outcomes, as text; empty without numbers."""
    ours, theirs = np.asarray(after[2]), np.asarray(before[2])
    if before[0] != "ok" or not ours.size:
        return ""
    worst = np.max(np.abs(ours - theirs) / np.maximum(np.maximum(np.abs(ours), np.abs(theirs)), 1e-6))
    return f", {worst:.0e}" if worst else ", same bits"


def tables(names):
    """The tables, the messages of the cases, and the failed cases."""
    plain = Table("client", "case", "jax.pmap", "replicax.compat", title=f"JAX {version('jax')}, {DEVICES} devices")
    counting = Table(
        "client", "case", f"jax.pmap, {DEVICES} devices", *(f"--replicas {DEVICES}, {d} device(s)" for d in FEWER),
        title=f"JAX {version('jax')}, programs that count their devices",
    )  # fmt: skip
    said, failed = [], []
    for name in names:
        told = constants(name)
        counts = told.get("COUNTS_DEVICES", False)
        compat = ("-m", "replicax.compat")
        ways = [(compat, DEVICES)] if not counts else [((*compat, "--replicas", str(DEVICES)), d) for d in FEWER]
        stock = run_client(name, removed=counts)
        ours = [run_client(name, *how, devices=devices) for how, devices in ways]
        heading = ", ".join(f"{package} {version(package)}" for package in told["PACKAGES"])
        if not all(ours):
            failed.append(f"{name}: did not start, see clients/logs")
        for case in dict.fromkeys([*stock, *(case for results in ours for case in results)]):
            before, *after = (results.get(case, ("no result", "", [])) for results in (stock, *ours))
            outcomes = [compare(before, each, 1e-4 if counts else 1e-3) for each in after]
            shown = [f"{o}, but says" if o == "ok" and r[1] and not counts else o
                     for o, r in zip([before[0], *outcomes], [before, *after], strict=True)]  # fmt: skip
            if counts:
                shown[1:] = [
                    o + largest_difference(before, r) if o == "ok" else o for o, r in zip(shown[1:], after, strict=True)
                ]
            (counting if counts else plain).add_row(heading, case, *shown)
            heading = ""
            said += [f"{name}, {case}, {who}: {r[1]}"
                     for who, r in zip(("jax", *["replicax"] * len(after)), (before, *after), strict=True)
                     if r[1]]  # fmt: skip
            if any(o not in ("ok", OWN) or (case == "import" and o != before[0]) for o in outcomes):
                failed.append(f"{name}, {case}")
    return [table for table in (plain, counting) if table.row_count], dict.fromkeys(said), failed


def main(names):
    shown, said, failed = tables(names or NAMES)
    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in shown:
        console.print(table)
    print(*said, *(f"FAILED under replicax: {line}" for line in failed), sep="\n")
    return bool(failed)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    if sys.argv[1:2] == ["--client"]:
        if "--removed" in sys.argv:
            importlib.import_module("removed").put_back()
        run_cases(sys.argv[2])
    else:
        sys.exit(main(sys.argv[1:]))
