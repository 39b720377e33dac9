"""Eight simulated devices for every test, and code that is compiled quickly rather than well."""

import itertools
import os

# LLVM's optimizations take half of the time that the suite compiles; what XLA makes of a program stays the same.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import pytest

import replicax

replicax.simulate_devices(8)

#: What a type checker reads, and nothing runs.
collect_ignore = ["typed_calls.py"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks as long the cases of a test that are not among the few of ``make test``."""
    for _, group in itertools.groupby(items, lambda item: (item.parent, getattr(item, "originalname", item.name))):
        cases = [item for item in group if item.get_closest_marker("long") is None]
        if (few := cases[0].get_closest_marker("few") if cases else None) is not None:
            kept = {k * len(cases) // few.args[0] for k in range(few.args[0])}
            for k, item in enumerate(cases):
                if k not in kept:
                    item.add_marker("long")
