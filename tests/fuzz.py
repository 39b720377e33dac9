"""``make fuzz``: compares random programs with the oracles, for some minutes, in several worker processes.

A wrong collective may crash or hang its process. Then the last program of that worker is reported, and the worker is
started again.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

import conftest  # noqa: F401  simulates devices, before JAX starts
from fuzz_programs import Program
from fuzz_statements import COLLECTIVES
from fuzzing import LANES, Campaign

SECONDS_FOR_ONE = 300  # a program that takes longer counts as hanging
ROUND = 100  # examples from one seed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=None, help="what all programs follow from; random by default")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to make one failing program smaller")
    parser.add_argument("--work-in", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.seed is None:
        options.seed = random.randrange(10**6)
    if options.work_in:
        return work(options.work_in, options.seed, options.minutes, options.patience)
    with tempfile.TemporaryDirectory() as folder:
        return supervise(Path(folder), options)


# ---------------------------------------------------------------------------------------------------------------
# One worker


def work(folder: Path, seed: int, minutes: float, patience: float) -> int:
    """Runs programs until the time is up, and saves the results in the folder."""

    def announce(program: Program) -> None:
        replace(folder / "program", program.script("replicax.testing.lockstep", program.derivatives))

    campaign = Campaign(time.monotonic() + 60 * minutes, patience, announce, lambda: save(folder, campaign))
    rounds = 0
    while time.monotonic() < campaign.deadline:
        campaign.run(1000 * seed + rounds, ROUND)
        rounds += 1
        save(folder, campaign)
    return 0


def save(folder: Path, campaign: Campaign) -> None:
    counts = [[*key, number] for key, number in campaign.counts.items()]
    replace(folder / "result", json.dumps({"counts": counts, "failures": campaign.failures}))


def replace(path: Path, text: str) -> None:
    """Atomically replaces a file that others may read."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)


# ---------------------------------------------------------------------------------------------------------------
# The supervisor


class Worker:
    """A worker process, with the results of this process and of earlier ones that crashed or hung."""

    def __init__(self, folder: Path, options: argparse.Namespace, number: int, end: float) -> None:
        self.folder, self.options, self.end = folder, options, end
        self.seed = 1000 * options.seed + 100 * number
        self.counts: Counter[tuple[str, str]] = Counter()
        self.failures: list[str] = []
        folder.mkdir()
        self.start()

    def start(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()
        self.began = time.monotonic()
        self.log = (self.folder / "log").open("w+")
        minutes = (self.end - self.began) / 60
        command = [sys.executable, __file__, "--work-in", self.folder, "--seed", self.seed, "--minutes", minutes]
        command += ["--patience", self.options.patience]
        self.process = subprocess.Popen([*map(str, command)], stdout=self.log, stderr=self.log)

    def result(self) -> tuple[Counter[tuple[str, str]], list[str]]:
        path = self.folder / "result"
        saved = json.loads(path.read_text()) if path.exists() else {"counts": [], "failures": []}
        counts = Counter({(kind, what): number for kind, what, number in saved["counts"]})
        return self.counts + counts, self.failures + saved["failures"]

    def watch(self) -> bool:
        """Whether the worker is still running. Restarts its process if it crashed or hung."""
        program = self.folder / "program"
        code = self.process.poll()
        if code == 0:
            return False
        if code is None:
            idle = time.monotonic() - self.began if not program.exists() else time.time() - program.stat().st_mtime
            if idle < SECONDS_FOR_ONE:
                return True
            self.process.kill()
            self.process.wait()
        self.counts, self.failures = self.result()
        self.log.seek(0)
        how = f"ended with code {code}" if code is not None else f"did nothing for {SECONDS_FOR_ONE} s"
        last = program.read_text() if program.exists() else "(none yet)"
        self.failures.append(
            f"The process {how}. Its last words:\n{self.log.read()[-3000:]}\nIts last program:\n{last}"
        )
        self.seed += 1
        if time.monotonic() > self.end - 10 or len(self.failures) > 50:
            return False
        self.start()
        return True


def supervise(folder: Path, options: argparse.Namespace) -> int:
    console = Console(width=120 if not sys.stdout.isatty() else None)
    console.print(f"{options.minutes:g} minutes of random programs, {options.workers} at a time: seed {options.seed}")
    start = time.monotonic()
    workers = [Worker(folder / str(k), options, k, start + 60 * options.minutes) for k in range(options.workers)]
    try:
        with console.status("starting") as status:
            while sum(worker.watch() for worker in workers):
                time.sleep(1)
                counts, failures = total(workers)
                status.update(f"{counts['programs', 'all']} programs, {len(failures)} failures")
    except KeyboardInterrupt:
        console.print("interrupted")
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
    counts, failures = total(workers)
    report(console, counts, failures, options.seed, time.monotonic() - start)
    return 1 if failures or not counts["programs", "all"] else 0


def total(workers: list[Worker]) -> tuple[Counter[tuple[str, str]], list[str]]:
    results = [worker.result() for worker in workers]
    return sum((counts for counts, _ in results), Counter()), [f for _, failures in results for f in failures]


def report(console: Console, counts: Counter[tuple[str, str]], failures: list[str], seed: int, seconds: float) -> None:
    for k, failure in enumerate(failures, 1):
        console.rule(f"failure {k} of {len(failures)}")
        console.print(failure, markup=False, highlight=False, soft_wrap=True)
    titles = {"oracle": "values held against", "derivatives": "derivatives held against", "replicas": "replicas"}
    by_collective = collectives(counts)
    console.print(table("programs by collective", ["alone", "in groups"], by_collective))
    others = {fact: [n] for (kind, fact), n in sorted(counts.items()) if kind == "contents"}
    others = {fact: n for fact, n in others.items() if fact.removesuffix(" in groups") not in by_collective}
    console.print(table("programs by what else is in them", ["programs"], others))
    for kind, title in titles.items():
        rows = {what: [n] for (k, what), n in sorted(counts.items()) if k == kind}
        console.print(table(title, ["programs"], rows))
    at_cuts, uncut = counts["lanes", "collectives at a cut"], counts["lanes", "collectives in what cannot be cut"]
    if at_cuts + uncut:
        console.print(
            f"lanes={LANES}: {counts['lanes', 'programs in segments']} programs in segments; of their "
            f"{at_cuts + uncut} collectives {100 * at_cuts / (at_cuts + uncut):.0f} % are at a cut, the others inside "
            f"of loops and branches"
        )
    for (kind, why), number in sorted(counts.items()):
        if kind == "refused":
            console.print(f"refused {number} ×: {why}", markup=False, highlight=False)
    programs = counts["programs", "all"]
    console.print(
        f"{programs} programs in {seconds / 60:.1f} minutes ({60 * programs / max(seconds, 1):.0f} a minute), "
        f"{sum(n for (kind, _), n in counts.items() if kind == 'derivatives')} of them with derivatives; "
        f"{len(failures)} failures; seed {seed}"
    )


def collectives(counts: Counter[tuple[str, str]]) -> dict[str, list[int]]:
    """The number of programs with each collective: without groups, with groups."""
    return {
        name: [counts["contents", name] - (n := counts["contents", f"{name} in groups"]), n] for name in COLLECTIVES
    }


def table(title: str, columns: list[str], rows: dict[str, list[int]]) -> Table:
    made = Table(title=title, title_justify="left")
    for column in ("", *columns):
        made.add_column(column, justify="left" if not column else "right")
    for name, numbers in rows.items():
        made.add_row(name, *map(str, numbers))
    return made


if __name__ == "__main__":
    sys.exit(main())
