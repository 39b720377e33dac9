"""``make fuzz PROCESSES=2``: compares random programs over several processes with the oracles in one process."""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
        program = replace(program, derivatives=True)
        counts, right = shares(program, self.devices), expected(program)
        if right.verdict.values is None:
            return right.verdict
        try:
            found = self.running.run(examine_own, program, counts, right.values, right.gradients)
        except ProcessesError as error:
            self.running = None
            raise WrongError(f"{counts} replicas on {self.devices} devices: {error}\n\n{program.function}") from error
        faults = [f"process {p}: {fault}" for p, fault in enumerate(found) if fault]
        if faults:
            listed = "\n".join(faults)
            call = f"{program.call}"
            raise WrongError(f"{counts} replicas on {self.devices} devices:\n{listed}\n\n{program.function}\n{call}")
        return right.verdict

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


@dataclass(frozen=True)
class Expected:
    """What the oracles compute in one process, as NumPy arrays.

    Attributes:
        verdict: The oracles.
        values: The results.
        gradients: The gradient by each argument; None if no oracle has it.
    """

    verdict: Verdict
    values: Any = None
    gradients: Any = None


def expected(program: Program) -> Expected:
    """Runs a program by its oracles."""
    trial = Trial(program)
    right, by, refusal = first(trial.values, ["lockstep"] if "lockstep" in program.facts else ["vmap", "lockstep"])
    if by is None:
        return Expected(Verdict(None, refusal=refusal))
    derived_by, gradients = trial.derivatives_by(), None
    if derived_by is not None:
        oracle = Derivative(weights_of(right), trial.wrapper(derived_by))
        gradients, derived_by, refusal = first(
            lambda name: oracle(trial.mapped(name), trial.args, trial.kwargs), [derived_by]
        )
    return Expected(Verdict(by, derived_by, refusal=refusal), jax.device_get(right), jax.device_get(gradients))


def examine_own(program: Program, counts: Sequence[int], right: Any, gradients: Any) -> str | None:
    """Runs a program in this process, together with the others: on own rows, or on global arrays.

    Returns:
        What is wrong.
    """
    trial, weights = Trial(program), weights_of(right)
    how = random.Random(str(program) + "arrays").choice(["own rows", "own rows", "global arrays", "global, under jit"])
    ours, axes, out_axes = (
        replicax.pmap(trial.our_fun, **trial.options),
        (trial.options["in_axes"], 0),
        trial.options["out_axes"],
    )
    given = (trial.args, trial.kwargs)
    args, kwargs = of_this_process(given, axes, counts)
    wrap: Any = lambda fun: fun
    if how != "own rows" and not all(a.axis is None for a in program.arguments):
        args, kwargs = each_along(replicax.to_global, (args, kwargs), axes)
        wrap = jax.jit if how == "global, under jit" else wrap
    else:
        how = "own rows"
        right = of_this_process(right, out_axes, counts)
        weights = of_this_process(weights, out_axes, counts)
        gradients = gradients if gradients is None else of_this_process(gradients, axes, counts)
    try:
        fault = difference_of(replicax.fetch(wrap(ours)(*args, **kwargs)), right)
        if fault is None and gradients is not None:
            fault = difference_of(replicax.fetch(Derivative(weights, wrap)(ours, args, kwargs)), gradients)
            fault = fault and f"derivatives: {fault}"
    except Exception as error:
        fault = f"replicax raises {type(error).__name__}: {error}"
    return fault and f"on {how}, {fault}"


class Derivative:
    """The gradient of a weighted sum of results by all floating-point arguments, as a pytree like the arguments.

    Args:
        weights: The weight of each element of the results.
        wrap: Wraps the function that computes it, as in ``jax.jit``.
    """

    def __init__(self, weights: Any, wrap: Any) -> None:
        self.weights, self.wrap = weights, wrap

    def __call__(self, mapped: Any, args: Any, kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        smooth = [k for k, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)]

        def loss(values: Any) -> Any:
            changed = list(leaves)
            for k, value in zip(smooth, values, strict=True):
                changed[k] = value
            out_args, out_kwargs = jax.tree.unflatten(tree, changed)
            results = jax.tree.leaves(mapped(*out_args, **out_kwargs))
            total = jnp.float32(0)
            for x, weight in zip(results, jax.tree.leaves(self.weights), strict=True):
                if jnp.issubdtype(x.dtype, jnp.inexact):
                    total += sum(jnp.sum(part(x).astype(jnp.float32) * weight) for part in (jnp.real, jnp.imag))
            return total

        found = self.wrap(jax.grad(loss))([leaves[k] for k in smooth])
        nothing: list[Any] = [np.zeros(np.shape(x), np.int8) for x in leaves]
        for k, x in zip(smooth, found, strict=True):
            nothing[k] = x
        return jax.tree.unflatten(tree, nothing)


def weights_of(results: Any) -> Any:
    """A weight for each element of the results, so that swapped elements change a weighted sum."""
    leaves, tree = jax.tree.flatten(results)
    each = [np.cos(np.arange(x.size) + k).reshape(x.shape).astype(np.float32) for k, x in enumerate(leaves)]
    return jax.tree.unflatten(tree, each)


def each_along(convert: Any, tree: Any, axes: Any) -> Any:
    """Converts each array with its mapped axis."""
    return jax.tree.map(lambda axis, tree: convert(tree, axis), axes, tree, is_leaf=lambda a: a is None)


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
