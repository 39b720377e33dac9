"""``make fuzz PROCESSES=2``: compares random programs over several processes with the oracles in one process."""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import replicax
from fuzz import report
from fuzz_programs import Program
from fuzzing import Campaign, Trial, Verdict, WrongError, difference_of, first
from replicax.errors import ProcessesError
from replicax.testing import Processes, processes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=None, help="what all programs follow from; random by default")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--processes", type=int, default=2, help="the number of processes, of 4 devices each")
    parser.add_argument("--devices", type=int, nargs="+", help="the devices of each process")
    options = parser.parse_args()
    options.devices = options.devices or [4] * options.processes
    number = random.randrange(10**6) if options.seed is None else options.seed
    console, start = Console(width=120 if not sys.stdout.isatty() else None), time.monotonic()
    console.print(f"{options.minutes:g} minutes of random programs on {options.devices} devices: seed {number}")
    gang = Gang(options.devices)
    campaign = Campaign(start + 60 * options.minutes, examine=gang.examine)
    try:
        while time.monotonic() < campaign.deadline:
            campaign.run(1000 * number, 100, shrink=False)
            number += 1
    finally:
        gang.close()
    report(console, campaign.counts, campaign.failures, number, time.monotonic() - start)
    return 1 if campaign.failures or not campaign.counts["programs", "all"] else 0


class Gang:
    """Processes that are started again if they were ended."""

    def __init__(self, devices: Sequence[int]) -> None:
        self.devices = devices
        self.running: Processes | None = None
        self.programs = 0

    def examine(self, program: Program) -> Verdict:
        """Compares one program with its oracle.

        Raises:
            WrongError: replicax is wrong in a process.
        """
        if self.programs % 60 == 0:  # compiled programs take memory
            self.close()
        self.programs += 1
        if self.running is None:
            self.running = processes(len(self.devices), devices=self.devices, timeout=300)
        counts = shares(program, self.devices)
        try:
            verdicts = self.running.run(examine_own, program, counts)
        except ProcessesError as error:
            self.running = None
            raise WrongError(f"{counts} replicas on {self.devices} devices: {error}\n\n{program.function}") from error
        faults = [f"process {p}: {fault}" for p, (_, _, fault) in enumerate(verdicts) if fault]
        if faults:
            listed = "\n".join(faults)
            call = f"{program.call}"
            raise WrongError(f"{counts} replicas on {self.devices} devices:\n{listed}\n\n{program.function}\n{call}")
        by, refusal, _ = verdicts[0]
        return Verdict(by, refusal=refusal)

    def close(self) -> None:
        if self.running is not None:
            self.running.close()
        self.running = None


def shares(program: Program, devices: Sequence[int]) -> list[int]:
    """The replicas of each process: in proportion to the devices, uneven, or none in one process."""
    n, total = program.replicas, sum(devices)
    ends = [n * sum(devices[: k + 1]) // total for k in range(len(devices))]
    even = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    draw = random.Random(str(program))
    kind = draw.choice(["even", "uneven", "empty"])
    if kind == "even" or all(a.axis is None for a in program.arguments):
        return even
    cuts = sorted(draw.randint(0, n) for _ in devices[1:])
    uneven = [end - start for start, end in zip([0, *cuts], [*cuts, n], strict=True)]
    if kind == "empty":
        k = draw.randrange(len(devices))
        uneven[k - 1] += uneven[k]
        uneven[k] = 0
    return uneven


def examine_own(program: Program, counts: Sequence[int]) -> tuple[str | None, str | None, str | None]:
    """Runs a program in this process, together with the others.

    Returns:
        The oracle; why no oracle runs the program; and what is wrong.
    """
    trial = Trial(program)
    right, by, refusal = first(trial.values, ["lockstep"] if "lockstep" in program.facts else ["vmap", "lockstep"])
    if by is None:
        return None, refusal, None
    args, kwargs = of_this_process((trial.args, trial.kwargs), (trial.options["in_axes"], 0), counts)
    try:
        ours = replicax.pmap(trial.our_fun, **trial.options)(*args, **kwargs)
        ours = jax.block_until_ready(ours)
    except Exception as error:
        return by, None, f"replicax raises {type(error).__name__}: {error}"
    return by, None, difference_of(ours, of_this_process(right, trial.options["out_axes"], counts))


def of_this_process(tree: Any, axes: Any, counts: Sequence[int]) -> Any:
    """The rows of this process, of each array along its mapped axis."""
    k = jax.process_index()
    start, stop = sum(counts[:k]), sum(counts[: k + 1])

    def rows(axis: int | None, tree: Any) -> Any:
        return tree if axis is None else jax.tree.map(lambda x: cut(x, axis), tree)

    def cut(x: Any, axis: int) -> Any:
        moved = jnp.moveaxis(x, axis, 0)[start:stop]
        out = jnp.moveaxis(moved, 0, axis)
        return np.asarray(out) if isinstance(x, np.ndarray) else out

    return jax.tree.map(rows, axes, tree, is_leaf=lambda a: a is None)


if __name__ == "__main__":
    sys.exit(main())
