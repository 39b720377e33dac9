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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks all but k cases of a test with ``few(k)`` as long: ``make test`` skips them."""
    for _, group in itertools.groupby(items, lambda item: (item.parent, getattr(item, "originalname", item.name))):
        cases = [item for item in group if item.get_closest_marker("long") is None]
        if (few := cases[0].get_closest_marker("few") if cases else None) is not None:
            kept = {k * len(cases) // few.args[0] for k in range(few.args[0])}
            for k, item in enumerate(cases):
                if k not in kept:
                    item.add_marker("long")
