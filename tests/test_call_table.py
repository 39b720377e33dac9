"""If a future JAX lacks the C++ call cache, maps run without it and issue one warning."""

import types
from typing import Any

import jax
import numpy as np
import pytest

from replicax import pmap
from replicax._jax import cpp

FOUR = np.arange(4.0, dtype=np.float32)


def without(thing, *names):
    """A copy of a module without these names."""
    return types.SimpleNamespace(**{name: value for name, value in vars(thing).items() if name not in names})


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(cpp, "_said", [])


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("jaxlib", "pjit"),
        ("pxla", "JitGlobalCppCacheKeys"),
        ("pxla", "cc_shard_arg"),
        ("tree_util", "dispatch_registry"),
    ],
)
def test_one_warning_says_that_calls_are_slower(monkeypatch, module, name):
    monkeypatch.setattr(cpp, module, without(getattr(cpp, module), name))
    with pytest.warns(RuntimeWarning, match=rf"Calls of maps run in Python.*JAX {jax.__version__}.*{name}") as said:
        out = [f(FOUR) for f in (pmap(lambda x: 2 * x), pmap(lambda x: x + 1, donate_argnums=0)) for _ in range(3)]
    np.testing.assert_array_equal(np.stack(out), [2 * FOUR] * 3 + [FOUR + 1] * 3)
    assert len(said) == 1


class Compiled:
    """A compiled program of a future JAX, with other methods."""

    def __init__(self, **methods):
        self._executable, self._params = types.SimpleNamespace(**methods), None

    def __call__(self, *args):
        return [x + 1 for x in args]


@pytest.mark.parametrize("methods", [{}, {"create_cpp_call": lambda: None}, {"create_cpp_call": lambda _: sum}])
def test_a_program_that_has_no_fast_call_runs_with_a_warning(methods):
    with pytest.warns(RuntimeWarning, match="Calls of maps run in Python") as said:
        call, _ = [cpp.fast_call(Compiled(**methods)) for _ in range(2)]
    assert len(said) == 1
    args: list[Any] = [[1, 2]] if call is sum else [1, 2]
    result: Any = 3 if call is sum else [2, 3]
    assert cpp.first_run(call, args) == (result, None)


def test_a_program_that_jax_itself_runs_in_python_needs_no_warning():
    compiled = Compiled(create_cpp_call=lambda _: None)
    assert cpp.fast_call(compiled) is compiled


def test_what_the_table_cannot_remember_is_run_again():
    with pytest.warns(RuntimeWarning, match="_replace"):
        assert cpp.remember(object(), FOUR) is None  # type: ignore[arg-type]


def test_this_jax_has_the_table():
    f = pmap(lambda x: 2 * x)
    f(FOUR)
    assert not cpp._said
    assert f.__wrapped__(FOUR).shape == (4,)
