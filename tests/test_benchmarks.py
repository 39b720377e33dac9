"""Checks the benchmarks: their arithmetic, their table, and that all ways of a case give equal results."""

import json
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import measure
import report
import run
import workloads
from cases import GROUPS
from measure import HAND, OURS, Absent, Case, Measured, Ratio

SECONDS = {OURS: [2.0, 3.0, 4.0, 5.0], HAND: [1.0, 1.0, 2.0, 2.0], "slow": [4.0, 4.0, 4.0, 1.0]}


def test_ratio_is_taken_round_by_round():
    measured = measure.ratio([2.0, 3.0, 2.0, 2.5, 9.0])
    assert (measured.median, measured.low, measured.high) == (2.5, 2.0, 6.0)
    assert measured.least == 2.0


def test_median_of_many_rounds_is_known_more_closely_than_the_rounds_spread():
    measured = measure.ratio([float(k) for k in range(1, 401)])
    assert measured.low < measured.least < measured.median
    assert measured.least == pytest.approx(200 - 1.96 * 10, abs=1.5)


def test_over_compares_with_the_fastest_that_is_there():
    assert measure.over(OURS, "slow", HAND, most=1.0).of(SECONDS) == [2.0, 3.0, 2.0, 2.5]
    without = {name: each for name, each in SECONDS.items() if name != HAND}
    assert measure.over(OURS, "slow", HAND, most=1.0).of(without) == [0.5, 0.75, 1.0, 5.0]


def test_added_is_the_difference_over_what_it_may_be():
    assert measure.added(OURS, HAND, 0.5, words="").of(SECONDS) == [2.0, 4.0, 4.0, 6.0]


def test_growth_is_a_ratio_of_ratios():
    seconds = {"ours 2": [6.0, 6.0], "ours 1": [2.0, 1.0], "theirs 2": [4.0, 4.0], "theirs 1": [2.0, 4.0]}
    limit = measure.growth(("ours 2", "ours 1"), ("theirs 2", "theirs 1"), most=1.0, words="")
    assert limit.of(seconds) == [1.5, 6.0]


@pytest.mark.parametrize(
    ("median", "least", "most", "expected"),
    [
        (0.9, 0.8, 1.0, "met"),
        (1.0, 1.0, 1.0, "met"),
        (1.1, 0.9, 1.0, "within noise"),
        (1.1, 1.05, 1.0, "NOT MET"),
        (-3.0, -4.0, 1.0, "met"),
        (0.9, 0.8, None, "faster"),
        (1.1, 0.9, None, "even"),
        (1.1, 1.05, None, "slower"),
    ],
)
def test_verdict(median, least, most, expected):
    assert measure.verdict(Ratio(median, 0, 9, least), most) == expected


def test_interleaved_times_what_a_way_takes_and_nothing_else():
    calls = []

    def before():
        calls.append("before")
        time.sleep(0.005)

    ways = {"a": lambda: calls.append("a") or time.sleep(0.002), "b": lambda: calls.append("b") or Measured(7.0, None)}
    taken = measure.interleaved(ways, 3, calls=2, before=before, warm_up=1)
    assert {clock: {name: len(each) for name, each in ways.items()} for clock, ways in taken.items()} == {
        "wall": {"a": 3, "b": 3},
        "caller": {"a": 3, "b": 3},
    }
    assert calls.count("a") == calls.count("b") == (3 + 1) * 2
    assert calls.count("before") == (3 + 1) * 2
    assert taken["wall"]["b"] == [7.0] * 3
    assert min(taken["wall"]["a"]) >= 0.002
    assert max(taken["caller"]["a"]) < 0.002, "a sleep costs the caller no processor time"


def test_ways_with_different_results_are_found():
    measure.agree({"a": lambda: np.ones((2, 3)), "b": lambda: lambda: jnp.ones(6)}, 1e-6)
    with pytest.raises(AssertionError, match="wrong"):
        measure.agree({"a": lambda: np.ones(3), "wrong": lambda: np.array([1, 1, 1.1])}, 1e-6)
    with pytest.raises(AssertionError, match="wrong returns 2 arrays"):
        measure.agree({"a": lambda: np.ones(3), "wrong": lambda: (1, 2)}, 1e-6)


def results():
    ways: dict[str, Callable[[], Any] | Absent] = {
        OURS: lambda: Measured(2.0, 1),
        HAND: lambda: Measured(1.0, 1),
        "torch": Absent("not installed"),
    }
    limits = (
        measure.over(OURS, HAND, most=1.5),
        measure.over(OURS, "torch", most=None),
        measure.over(HAND, OURS, most=None),
    )
    case = Case("twice", "speed | promised", 2, lambda stack: ways, limits, seconds=(0.01, 0.01))
    machine = {"date": "2026-01-01", "cores": 2, "processor": "abacus", "system": "X", "versions": {"jax": "1.2"}}
    return json.loads(json.dumps({"machine": machine, "rows": measure.run(case, quick=True)}))


def test_rows_hold_what_was_measured():
    lost, skipped, won = results()["rows"]
    assert lost["ratio"] == {"median": 2.0, "low": 2.0, "high": 2.0, "least": 2.0}
    assert (lost["verdict"], skipped["verdict"], won["verdict"]) == ("NOT MET", "skipped", "faster")
    assert lost["ways"][HAND] == {"seconds": 1.0, "over_first": {"median": 0.5, "low": 0.5, "high": 0.5, "least": 0.5}}


def test_table_shows_every_row_the_losing_and_the_skipped_too():
    text = report.markdown(results())
    assert (
        "| 2.00 | 2.00 to 2.00 | ≤ 1.50 | NOT MET | 2 | twice | replicax / by hand | by hand 0.50, torch: not" in text
    )
    assert "| – |  | – | skipped | 2 | twice | replicax / torch | not installed |" in text
    assert "speed \\| promised" in text
    assert "1 NOT MET, 1 faster, 1 skipped" in text
    assert len({line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    console = report.console()
    with console.capture() as captured:
        report.show(results(), console)
    assert re.search(r"2\.00 +2\.00 to 2\.00 +≤ 1\.50 +NOT MET", captured.get())


def test_table_goes_between_the_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for text in ("new", "newer"):
        report.write_between_markers(page, text)
        assert page.read_text() == f"before\n{report.BEGIN}\n{text}\n{report.END}\nafter\n"
    page.write_text(f"{report.END} {report.BEGIN}")
    with pytest.raises(ValueError, match="once each, in this order"):
        report.write_between_markers(page, "new")


def row(devices, case, verdict, **more):
    return {"line": "l", "case": case, "devices": devices, "words": "w", "limit": 1.0, "verdict": verdict, **more}


def test_rows_of_a_gpu_stay_with_their_machine_where_there_is_none():
    measured = row(0, "a", "met", ratio={"median": 1.0}, machine="a machine with a GPU")
    earlier = [measured, row(2, "b", "met"), row(0, "c", "skipped", why="no GPU here")]
    none_here = [row(0, "a", "skipped", why="no GPU here"), row(2, "b", "NOT MET"), row(0, "c", "skipped", why="none")]
    assert run.with_rows_of_a_gpu(earlier, none_here) == [measured, *none_here[1:]]
    assert run.merged(earlier, none_here[:1]) == earlier
    again = row(0, "a", "NOT MET", ratio={"median": 2.0}, machine="another")
    assert run.merged(earlier, [again]) == [again, *earlier[1:]]
    assert report.other_machines([measured, again, again]) == [
        "On the GPU: a machine with a GPU",
        "On the GPU: another",
    ]


def test_the_page_says_on_which_gpu():
    found = results()
    line = report.machine_line(found["machine"] | {"gpu": "NVIDIA X"})
    assert line.startswith("2026-01-01, NVIDIA X, 2 cores of abacus")
    found["rows"][0] |= {"machine": line, "devices": 0}
    found["rows"][1]["machine"] = "another machine"
    says = f"jax 1.2. On the GPU: {line}. Of 'speed | promised': another machine. In all: "
    assert says in report.markdown(found).splitlines()[0]


def every_case():
    return [case for module in GROUPS.values() for case in module.cases(False)]


def test_no_two_numbers_are_called_the_same():
    names = [(case.line, case.title, case.devices, limit.words) for case in every_case() for limit in case.limits]
    assert len(set(names)) == len(names)


@pytest.mark.few("unreplicate, 1 small array", "1 small array of NumPy")
@pytest.mark.parametrize(
    "title",
    [
        "1 small array of NumPy",
        "100 small NumPy leaves, one result",
        "1 small array in place, a static and a keyword argument",
        "unreplicate, 1 small array",
        "local_replicas, 1 small array",
        "a small program",
        "100 × psum, ppermute, all_gather, 8 replicas",
        "N = 1,024, an MLP of 101,770 parameters",
        "a training step of an MLP, 64 replicas",  # a GPU case, which also runs on CPUs
    ],
)
def test_ways_give_equal_results(title):
    case = next(case for case in reversed(every_case()) if case.title == title)
    with ExitStack() as stack:
        ways = {name: way for name, way in case.prepare(stack).items() if not isinstance(way, Absent)}
        assert {OURS, *case.limits[0].ways} <= ways.keys()
        before = None if case.before is jax.clear_caches else case.before  # keeps other tests fast
        measure.agree(ways, case.tolerance, before)


def test_lanes_of_a_gpu_give_equal_results():
    case = next(case for case in every_case() if case.title == "escape times, 16")
    with ExitStack() as stack:
        ways = case.prepare(stack)
        assert {*case.limits[0].ways, "lanes=4"} < ways.keys()
        measure.agree(ways, 1e-6)


def test_large_program_has_the_size_it_claims():
    def count(jaxpr):
        parts = [part for eqn in jaxpr.eqns for value in eqn.params.values() for part in jax.tree.leaves(value)]
        inner = [getattr(part, "jaxpr", part) for part in parts]
        return len(jaxpr.eqns) + sum(count(part) for part in inner if hasattr(part, "eqns"))

    program = partial(workloads.large, equations=5000)
    traced = jax.make_jaxpr(program, axis_env=[(workloads.AXIS, 8)])(jnp.ones(16))
    assert count(traced.jaxpr) == pytest.approx(5000, rel=0.1)
