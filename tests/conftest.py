"""Simulates eight devices for every test, and lets XLA compile fast instead of optimizing."""

import itertools
import os

# LLVM's optimizations take half of the suite's compile time. The optimized HLO stays the same without them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import pytest

import replicax

replicax.simulate_devices(8)

#: Files for the type checker only; nothing runs them.
collect_ignore = ["typed_calls.py"]


def pytest_report_header():
    """Shows which package is under test: the sources, or an installed wheel."""
    return f"replicax {replicax.__version__}: {replicax.__path__[0]}"


def pytest_addoption(parser):
    parser.addoption("--part", default="1/1", help="the part of the long cases of tables to run, such as 1/2")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items, config):
    """Marks as long all cases of a test but those that ``few`` keeps: ``make test`` skips them.

    With ``--part``, drops the long cases of tables that are in the other parts.
    """
    whole = not any("::" in arg for arg in config.args)
    for _, group in itertools.groupby(items, lambda item: (item.parent, getattr(item, "originalname", item.name))):
        cases = [item for item in group if item.get_closest_marker("long") is None]
        if (few := cases[0].get_closest_marker("few") if cases else None) is not None:
            ids = [item.callspec.id for item in cases]
            if whole and (unknown := [name for name in named(few) if name not in ids]):
                raise pytest.UsageError(f"{cases[0].nodeid}: few names {unknown}. Its cases are {ids}.")
            for item in cases:
                if item.callspec.id not in kept(few, ids):
                    item.add_marker("long")
    part, parts = map(int, config.getoption("part").split("/"))
    dropped = set()
    for _, group in itertools.groupby(items, lambda item: (item.parent, getattr(item, "originalname", item.name))):
        cases = [item for item in group if item.get_closest_marker("long") is not None]
        if len(cases) >= TABLE:
            dropped |= {item for k, item in enumerate(cases) if k % parts != part - 1}
    if dropped:
        config.hook.pytest_deselected(items=[item for item in items if item in dropped])
        items[:] = [item for item in items if item not in dropped]


#: A test with so many long cases is a table, of which ``--part`` runs a part.
TABLE = 4


def named(few):
    return [name for name in few.args if isinstance(name, str)]


def kept(few, ids):
    """``few(k)`` keeps k cases, evenly spread, and ``few("8on8", "7on3")`` those with these ids."""
    if names := named(few):
        return {*names} & {*ids} or {*ids}  # none of them: others were asked for by name
    return {ids[k * len(ids) // few.args[0]] for k in range(few.args[0])}
