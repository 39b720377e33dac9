"""Compares random programs with the oracles, and counts them.

The oracle is ``jax.vmap`` if it has correct rules for the program, else ``replicax.testing.lockstep``. ``jax.pmap`` is
a second oracle if there is a device per replica. An error that only replicax raises is a failure, too.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from jax import lax

import replicax
from fuzz_programs import SMOOTH, Function, Line, Program
from fuzz_statements import programs
from replicax import MismatchError
from replicax.testing import lockstep
from replicax.testing._check import compare, gradient

#: The relative tolerance: rounding errors accumulate in a program. Wrong results differ by much more.
RTOL = 1e-3

#: The collectives that XLA does not support on CPUs.
NOT_IN_PMAP = {"pbroadcast", "ragged_all_to_all"}

#: How a device runs its replicas: ``make fuzz LANES=sequential`` sets it for the worker processes, too.
LANES: Any = os.environ.get("REPLICAX_FUZZ_LANES", "auto")
LANES = int(LANES) if LANES.isdecimal() else LANES


class WrongError(AssertionError):
    """replicax and an oracle differ, or only replicax raises an error."""


@dataclass(frozen=True)
class Verdict:
    """The oracles with which a program was compared; None if no oracle can run it.

    If a device does not run all lanes at once, the program is cut at some collectives, and others are inside of what
    cannot be cut.
    """

    values: str | None
    derivatives: str | None = None
    beside_pmap: bool = False
    refusal: str | None = None
    at_cuts: int = 0
    uncut: int = 0


class Trial:
    """A program as functions, with its arguments."""

    def __init__(self, program: Program) -> None:
        self.program = program
        scope: dict[str, Any] = {"jax": jax, "jnp": jnp, "np": np, "lax": lax, "inner": jax.vmap}
        exec(compile(program.function, "<program>", "exec"), scope)
        call = {key: eval(text, scope) for key, text in program.call.items()}
        self.args, self.kwargs = call["args"], call["kwargs"]
        ours = scope | {"inner": replicax.pmap}
        exec(compile(program.function, "<program>", "exec"), ours)
        self.fun, self.our_fun = scope["program"], ours["program"]
        self.options = {"axis_name": "i", "in_axes": call["in_axes"], "out_axes": call["out_axes"]}
        if program.needs_size:
            self.options["axis_size"] = program.replicas

    def mapped(self, by: str) -> Callable[..., Any]:
        match by:
            case "vmap":
                return jax.vmap(self.fun, **self.options)
            case "lockstep":
                return lockstep(self.fun, **self.options)
            case "jax.pmap":
                return jax.pmap(self.fun, **self.options, devices=jax.devices()[: self.program.replicas])
        devices = jax.devices()[: self.program.devices]
        return replicax.pmap(self.our_fun, **self.options, devices=devices, lanes=LANES)

    def wrapper(self, by: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """``jax.jit``, or the identity if jit is not possible."""
        if by == "replicax":
            return jax.jit if self.program.under_jit else _as_it_is
        needs_numbers = by == "lockstep" and self.program.facts & {"while_loop", "ragged_all_to_all"}
        return _as_it_is if needs_numbers or by == "jax.pmap" else jax.jit

    def values(self, by: str) -> Any:
        return self.wrapper(by)(self.mapped(by))(*self.args, **self.kwargs)

    def derivatives(self, by: str) -> Any:
        return gradient(self.mapped(by), self.args, self.kwargs, self.wrapper(by))

    def collectives(self) -> tuple[int, int]:
        """The number of collectives at which the program is cut, and inside of equations that cannot be cut."""
        mapped: Any = self.mapped("replicax")
        plan = mapped.trace(*self.args, **self.kwargs).lanes
        return (plan.cut, plan.inside) if plan.at_once < plan.lanes else (0, 0)

    def runs_in_pmap(self) -> bool:
        """Whether ``jax.pmap`` can run the program without a hang."""
        facts = self.program.facts
        axes = [*(axis for _, axis in self.program.results), *(a.axis for a in self.program.arguments)]
        if self.program.replicas > len(jax.devices()) or -1 in axes:  # jax.pmap misreads axis -1
            return False
        if all(a.axis is None for a in self.program.arguments):
            return False
        return not facts & {*NOT_IN_PMAP, "communicates apart", "complex sum"}

    def derivatives_by(self) -> str | None:
        """The oracle with correct derivatives of the map, or None."""
        facts, types = self.program.facts, [a.dtype for a in self.program.arguments]
        if not self.program.derivatives or "no reverse derivative" in facts or not {*types} & {*SMOOTH}:
            return None
        by_lockstep = facts & {"lockstep", "communicating choice, replicas apart"}
        if "derived by pmap alone" in facts or (by_lockstep and "a rule of the user's" in facts):
            return "jax.pmap" if self.runs_in_pmap() else None  # lockstep ignores custom rules
        return "lockstep" if by_lockstep else "vmap"


def _as_it_is(fun: Callable[..., Any]) -> Callable[..., Any]:
    return fun


def examine(program: Program) -> Verdict:
    """Compares one program with its oracles.

    Raises:
        WrongError: replicax is wrong.
    """
    trial = Trial(program)
    right, by, refusal = first(trial.values, ["lockstep"] if "lockstep" in program.facts else ["vmap", "lockstep"])
    try:
        ours = trial.values("replicax")
    except Exception as error:
        if by is None:
            return Verdict(None, refusal=refusal)
        raise WrongError(_report(program, by, False, f"replicax raises {_name(error)}")) from error
    if by is None:
        return Verdict(None, refusal=f"only by the oracles: {refusal}")
    _agree(trial, by, False, ours, right)
    at_cuts, uncut = trial.collectives()
    beside_pmap = program.beside_pmap and trial.runs_in_pmap()
    if beside_pmap:
        theirs, name, _ = first(trial.values, ["jax.pmap"])
        beside_pmap = name is not None
        if beside_pmap:
            _agree(trial, "jax.pmap", False, ours, theirs)
    derived_by = trial.derivatives_by()
    if derived_by is not None:
        others = ["lockstep"] if derived_by == "vmap" and "a rule of the user's" not in program.facts else []
        right, derived_by, refusal = first(trial.derivatives, [derived_by, *others])
        if derived_by is None:
            return Verdict(by, None, beside_pmap, f"derivative: {refusal}", at_cuts, uncut)
        try:
            ours = trial.derivatives("replicax")
        except Exception as error:
            raise WrongError(_report(program, derived_by, True, f"replicax raises {_name(error)}")) from error
        _agree(trial, derived_by, True, ours, right)
    return Verdict(by, derived_by, beside_pmap, None, at_cuts, uncut)


def first(compute: Callable[[str], Any], oracles: Sequence[str]) -> tuple[Any, str | None, str | None]:
    """The result and the name of the first oracle that raises no error; otherwise the last oracle's error."""
    refusal = None
    for name in oracles:
        try:
            return jax.block_until_ready(compute(name)), name, None
        except Exception as error:
            refusal = f"{name}: {_name(error)}"
    return None, None, refusal


def _name(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:300]}"


def _agree(trial: Trial, by: str, derivatives: bool, ours: Any, right: Any) -> None:
    if problem := difference_of(ours, right):
        second = "; ".join(
            _second_opinion(trial, other, derivatives, ours) for other in ("vmap", "lockstep") if other != by
        )
        raise WrongError(_report(trial.program, by, derivatives, f"{problem}\nAnd {second}."))


def difference_of(ours: Any, right: Any) -> str | None:
    try:
        compare(str, ours, right, RTOL)
    except MismatchError as error:
        return str(error)
    return None


def _second_opinion(trial: Trial, by: str, derivatives: bool, ours: Any) -> str:
    right, name, _ = first(trial.derivatives if derivatives else trial.values, [by])
    if name is None:
        return f"{by} refuses it"
    return f"{by} {'does not agree' if difference_of(ours, right) else 'agrees'} with replicax"


def _report(program: Program, by: str, derivatives: bool, problem: str) -> str:
    which = "derivatives from outside" if derivatives else "values"
    reference = {"vmap": "jax.vmap", "lockstep": "replicax.testing.lockstep"}.get(by, by)
    return f"{which}, by {by}: {problem}\n\n{program.script(reference, derivatives)}"


# ---------------------------------------------------------------------------------------------------------------
# Smaller programs


def smallest(program: Program, fails: Callable[[Program], bool]) -> Program:
    """Removes statements while the program still fails. Hypothesis shrinks only its own choices."""
    tried: set[str] = set()
    while True:
        for candidate in _smaller(program):
            key = _key(candidate)
            if key in tried:
                continue
            tried.add(key)
            if fails(candidate):
                program = candidate
                break
        else:
            return program


def _smaller(program: Program) -> Iterator[Program]:
    if len(program.results) > 1:
        yield from (replace(program, results=(one,)) for one in program.results[::-1])
        yield from (replace(program, results=program.results[:k]) for k in range(len(program.results) - 1, 0, -1))
    yield from (replace(program, body=body) for body in _without_one(program.body))
    if len(arguments := program.arguments) > 1 and not (program.in_dict or program.keyword):
        yield from (replace(program, arguments=(*arguments[:k], *arguments[k + 1 :])) for k in range(len(arguments)))
    if program.in_dict:
        yield replace(program, in_dict=False)
    if program.keyword:
        yield replace(program, keyword=False)
    if program.under_jit:
        yield replace(program, under_jit=False)


def _without_one(body: Sequence[Line | Function]) -> Iterator[tuple[Line | Function, ...]]:
    """Yields the body without one of its statements, starting with the last."""
    for k in reversed(range(len(body))):
        statement, before, after = body[k], tuple(body[:k]), tuple(body[k + 1 :])
        yield before + after
        if isinstance(statement, Function):
            yield from ((*before, replace(statement, body=inner), *after) for inner in _without_one(statement.body))


# ---------------------------------------------------------------------------------------------------------------
# Many programs


def _key(program: Program) -> str:
    return f"{program} {program.replicas} {program.devices} {program.call}"


@dataclass
class Campaign:
    """Runs random programs, and collects counts and failures.

    Attributes:
        deadline: The time at which to stop, by ``time.monotonic``.
        patience: The number of seconds, up to a factor of 1.5, for shrinking one failing program.
        before: Called with each program before it runs.
        after: Called after each correct program.
        examine: Compares one program with its oracles; raises ``WrongError``.
        counts: The number of programs, by feature.
        failures: For each failure, the report of the smallest failing program.
    """

    deadline: float = float("inf")
    patience: float = 60.0
    before: Callable[[Program], None] = lambda program: None
    after: Callable[[], None] = lambda: None
    examine: Callable[[Program], Verdict] = examine
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    _last: frozenset[str] = frozenset()
    _until: float = float("inf")
    _failed: dict[str, tuple[Program, WrongError]] = field(default_factory=dict)

    def run(self, number: int, examples: int, collectives: Sequence[str] | None = None, *, shrink: bool = True) -> None:
        """Runs up to ``examples`` Hypothesis examples from a seed, until one fails. Skips variations."""
        self._until, self._failed = float("inf"), {}

        @seed(number)
        @settings(
            max_examples=examples,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
            report_multiple_bugs=False,
        )
        @given(programs(collectives))
        def each(program: Program) -> None:
            self._try(program)

        try:
            each()
        except WrongError:
            self._until = time.monotonic() + self.patience
            program = min((program for program, _ in self._failed.values()), key=lambda p: len(str(p)))
            program = smallest(program, self._fails) if shrink else program
            self.failures.append(str(self._failed[_key(program)][1]))
        except Exception as error:  # raised by Hypothesis itself
            self.failures.append("\n\n".join([_name(error), *(str(e) for _, e in self._failed.values())][:2]))

    def _try(self, program: Program) -> None:
        if self._failed:  # Hypothesis is shrinking
            if self._fails(program):
                raise self._failed[_key(program)][1]
            return
        if time.monotonic() > self.deadline or self._is_variation(program):
            return
        try:
            self._count(program, self._examine(program))
        except WrongError as error:
            self._until = time.monotonic() + self.patience / 2
            self._failed[_key(program)] = (program, error)
            raise
        self.after()
        if self.counts["programs", "all"] % 60 == 0:
            jax.clear_caches()

    def _fails(self, program: Program) -> bool:
        """Whether a program fails. When the time for shrinking is over, only known failures count."""
        if _key(program) not in self._failed and time.monotonic() < self._until:
            try:
                self._examine(program)
            except WrongError as error:
                self._failed[_key(program)] = (program, error)
        return _key(program) in self._failed

    def _examine(self, program: Program) -> Verdict:
        self.before(program)
        return self.examine(program)

    def _is_variation(self, program: Program) -> bool:
        """Whether most lines are those of the previous program, as in Hypothesis's mutations."""
        lines = frozenset(str(program).splitlines())
        shared, self._last = len(lines & self._last), lines
        return 2 * shared > len(lines)

    def _count(self, program: Program, verdict: Verdict) -> None:
        n, d = program.replicas, min(program.devices, jax.device_count())
        relation = (
            "N < D" if n < d else "N = D" if n == d else "N > D, dividing" if n % d == 0 else "N > D, not dividing"
        )
        seen = [("programs", "all"), ("replicas", relation), *(("contents", fact) for fact in program.facts)]
        seen.append(("oracle", verdict.values or "none"))
        if verdict.beside_pmap:
            seen.append(("oracle", "jax.pmap besides"))
        if verdict.derivatives:
            seen.append(("derivatives", verdict.derivatives))
        if verdict.refusal:
            seen.append(("refused", verdict.refusal))
        self.counts.update(seen)
        self.counts["lanes", "programs in segments"] += verdict.at_cuts + verdict.uncut > 0
        self.counts["lanes", "collectives at a cut"] += verdict.at_cuts
        self.counts["lanes", "collectives in what cannot be cut"] += verdict.uncut
