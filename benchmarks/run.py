"""``make bench``: runs the benchmarks and prints a table of ratios with their limits. ``QUICK=1`` takes two minutes.

The number of devices is fixed when JAX starts. So the cases run in one process per number of simulated devices, one
after the other. In each process, the ways of a case run interleaved.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

import replicax
import report
from cases import GROUPS
from measure import Case, blank, run

HERE = Path(__file__).parent

PATIENCE = 1800  # seconds until a process is killed

#: Limits NumPy's linear algebra, and the LAPACK that JAX calls, to one thread per calling process or device, so that
#: two of them do not compete for two cores.
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

PEERS = ("jax", "jaxlib", "numpy", "torch", "joblib", "parajax")


def arguments() -> argparse.Namespace:
    """Parses the command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, for a first look")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="cases whose group or title has this text",
    )
    parser.add_argument("--keep", action="store_true", help="keep the rows of the JSON that are not measured")
    parser.add_argument("--list", action="store_true", help="print the cases and run none")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 where a limit is not met")
    parser.add_argument("--json", type=Path, default=HERE / "results.json", help="where to write the results")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the table between the markers of this file")
    parser.add_argument("--devices", type=int, help=argparse.SUPPRESS)  # set in subprocesses
    return parser.parse_args()


def chosen(quick: bool, only: list[str]) -> list[Case]:
    """The cases, in the order of the report."""
    return [
        case
        for group, module in GROUPS.items()
        for case in module.cases(quick)
        if not only or any(text in group or text in case.title for text in only)
    ]


def run_here(cases: list[Case], devices: int, options: argparse.Namespace, console: Console) -> None:
    """Runs the cases with this number of devices in this process, and appends their rows to the file as JSON lines."""
    if devices:
        replicax.simulate_devices(devices)
    for case in cases:
        if case.devices != devices:
            continue
        if devices == 0 and jax.default_backend() != "gpu":
            rows = [blank(case, limit) | {"verdict": "skipped", "why": "no GPU here"} for limit in case.limits]
        else:
            try:
                rows = run(case, quick=options.quick)
            except Exception as fault:  # continue with the other cases
                traceback.print_exc()
                why = f"{type(fault).__name__}: {fault}".splitlines()[0]
                rows = [blank(case, limit) | {"verdict": "FAILED", "why": why} for limit in case.limits]
        if devices == 0 and jax.default_backend() == "gpu":
            here = report.machine_line(machine() | {"gpu": jax.devices()[0].device_kind})
            rows = [row | {"machine": here} for row in rows]
        for row in rows:
            console.print("  ".join(report.cells(row)[:-1]), markup=False, highlight=False, soft_wrap=True)
        with options.json.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def run_in_processes(cases: list[Case], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs one process per number of devices, one after the other. Returns the rows in the order of the cases."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for devices in sorted({case.devices for case in cases}):
        with tempfile.TemporaryDirectory() as folder:
            lines = Path(folder) / "rows"
            command = [sys.executable, __file__, "--devices", str(devices), "--json", str(lines)]
            command += ["--quick"] * options.quick + [f"--only={text}" for text in options.only]
            with contextlib.suppress(subprocess.TimeoutExpired):  # cases without rows are reported as FAILED
                subprocess.run(command, env=os.environ | ONE_THREAD, check=False, timeout=PATIENCE)
            for line in lines.read_text().splitlines() if lines.exists() else ():
                row = json.loads(line)
                found[_name(row)] = row
    lost = {"verdict": "FAILED", "why": "the process ended before this case did"}
    rows = [blank(case, limit) for case in cases for limit in case.limits]
    return [found.get(_name(row), row | lost) for row in rows]


def _name(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[key]) for key in ("line", "case", "devices", "words"))


def machine() -> dict[str, Any]:
    """The machine and the versions."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    versions = {"Python": platform.python_version()}
    for name in PEERS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": f"{names[0] if names else platform.processor()} ({platform.machine()})",
        "system": platform.system(),
        "versions": versions,
    }


_key = itemgetter("line", "case", "devices", "words")


def merged(earlier: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The earlier rows, replaced by new rows for the same number; then the other new rows."""
    new = {_key(row): row for row in with_rows_of_a_gpu(earlier, rows)}
    return [new.pop(_key(row), row) for row in earlier] + list(new.values())


def with_rows_of_a_gpu(earlier: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, with earlier rows of a GPU in place of those that are skipped because this machine has none."""
    before = {_key(row): row for row in earlier if row["devices"] == 0 and "ratio" in row}
    return [before.get(_key(row), row) if row["verdict"] == "skipped" else row for row in rows]


def main() -> int:
    """Runs the cases, reports the results, returns the exit status."""
    options, console = arguments(), report.console()
    cases = chosen(options.quick, options.only)
    if options.list:
        for case in cases:
            console.print(f"{case.devices or 'GPU'}  {case.line}: {case.title}", highlight=False, soft_wrap=True)
        return 0
    if options.devices is not None:
        run_here(cases, options.devices, options, console)
        return 0
    earlier = json.loads(options.json.read_text()) if options.json.exists() else {"rows": []}
    new = run_in_processes(cases, options)
    results = {"machine": machine(), "quick": options.quick, "rows": with_rows_of_a_gpu(earlier["rows"], new)}
    if options.keep and earlier["rows"]:  # rows of another machine say so
        here, there = report.machine_line(machine()), report.machine_line(earlier["machine"])
        new = [row if here == there or "ratio" not in row else {"machine": here} | row for row in new]
        results = earlier | {"rows": merged(earlier["rows"], new)}
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    report.show(results, console)
    if options.page is not None:
        report.write_between_markers(options.page, report.markdown(results))
    bad = {"FAILED"} | ({"NOT MET"} if options.strict else set())
    return int(any(row["verdict"] in bad for row in results["rows"]))


if __name__ == "__main__":
    sys.exit(main())
