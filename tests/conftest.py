"""Simulates eight devices for every test, and lets XLA compile fast instead of optimizing.

With ``REPLICAX_TEST_DEVICES=real`` in the environment, the tests run on the devices of this machine instead, such as
one GPU or one CPU device. Tests that need eight devices are skipped if there are fewer: ``real_devices.py`` lists those
of ``make test``. So are the examples of the documentation, which simulate devices.
"""

import itertools
import os

# LLVM's optimizations take half of the suite's compile time. The optimized HLO stays the same without them.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    if os.environ.get("REPLICAX_TEST_DEVICES") != "real"
    else "",
)
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several workers share a GPU

import jax
import pytest

import real_devices
import replicax
from real_devices import REAL

if REAL:
    # By default, GPUs and TPUs multiply float32 matrices in lower precision, but the tests compare to float32 rounding.
    jax.config.update("jax_default_matmul_precision", "highest")
else:
    replicax.simulate_devices(8)

#: Files for the type checker only; nothing runs them.
collect_ignore = ["typed_calls.py"]


def pytest_ignore_collect(collection_path):
    """Ignores the files of tests that cannot run on the devices of this machine."""
    return True if REAL and collection_path.name in real_devices.files_left_out() else None


def pytest_report_header():
    """Shows which package is under test (the sources, or an installed wheel), and on which devices."""
    where = [f"replicax {replicax.__version__}: {replicax.__path__[0]}"]
    if REAL:
        where += [f"devices: {jax.devices()}", f"left out: {', '.join(real_devices.files_left_out())}"]
    return where


def pytest_addoption(parser):
    parser.addoption("--part", default="1/1", help="the part of the long cases of tables to run, such as 1/2")


def _skip(items, whole):
    """Skips the tests that cannot run on the devices of this machine."""
    for file, group in itertools.groupby(items, lambda item: item.path.name):
        tests = list(group)
        names = {name for item in tests for name in (item.name, getattr(item, "originalname", item.name))}
        if whole and (stale := real_devices.unknown(file, names)):
            raise pytest.UsageError(f"{file}: real_devices.py names {stale}, and there are no such tests.")
        for item in tests:
            why = real_devices.why_not(file, item.name, getattr(item, "originalname", item.name))
            if isinstance(item, pytest.DoctestItem) and "simulate_devices" in (item.dtest.docstring or ""):
                why = "simulates devices"
            if why:
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items, config):
    """Marks as long all cases of a test but those that ``few`` keeps: ``make test`` skips them.

    With ``--part``, drops the long cases of tables that are in the other parts.
    """
    whole = not any("::" in arg for arg in config.args)
    if REAL:
        _skip(items, whole)
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
    for _, group in itertools.groupby(items, _table):
        cases = [item for item in group if item.get_closest_marker("long") is not None]
        if len(cases) >= TABLE:
            dropped |= {item for k, item in enumerate(cases) if k % parts != part - 1}
    if dropped:
        config.hook.pytest_deselected(items=[item for item in items if item in dropped])
        items[:] = [item for item in items if item not in dropped]


#: A test with so many long cases is a table, of which ``--part`` runs a part.
TABLE = 2


def _table(item):
    """The table of a test: the test itself, or its file if all tests of the file are about one program."""
    whole = item.get_closest_marker("one_table") is not None
    return item.parent, None if whole else getattr(item, "originalname", item.name)


def named(few):
    return [name for name in few.args if isinstance(name, str)]


def kept(few, ids):
    """``few(k)`` keeps k cases, evenly spread, and ``few("8on8", "7on3")`` those with these ids."""
    if names := named(few):
        return {*names} & {*ids} or {*ids}  # none of them: others were asked for by name
    return {ids[k * len(ids) // few.args[0]] for k in range(few.args[0])}
