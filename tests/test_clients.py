"""Existing programs, unmodified: the faster ones in clients/. `make clients` runs all of them."""

import importlib
import warnings
from pathlib import Path

import pytest

from replicax import compat

CLIENTS = Path(__file__).parents[1] / "clients"


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["chex", "equinox"])
def test_client(name, monkeypatch):
    pytest.importorskip(name, reason=f"{name} is not installed: pip install '.[clients]'")
    monkeypatch.syspath_prepend(CLIENTS)
    with warnings.catch_warnings(), compat.installed():
        warnings.simplefilter("default")  # warnings of other packages are not errors here
        for case in importlib.import_module(f"on_{name}").CASES:
            case()
