"""Every branch on JAX's version, with its reason. Review this file when a JAX version is added or dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core as extend_core
from jaxlib import version as jaxlib_version

from replicax._jax.aliases import Equation, Jaxpr
from replicax._typing import Array, PyTree

VERSION: str = jax.__version__
_JAXLIB = tuple(map(int, jaxlib_version.__version__.split(".")[:2]))

#: Before jaxlib 0.12, XLA hangs if its thread pool is small for the number of CPU devices: see
#: ``_runtime.cpu_threads``. The check is on jaxlib, which may be older than JAX. Workaround: few_cpu_threads.
FEW_CPU_THREADS_HANG = _JAXLIB < (0, 12)

#: Before jaxlib 0.12, XLA gains little from several lanes in a loop on small arrays on CPUs: see ``_engine.lanes``.
SMALL_LANES_GAIN = _JAXLIB >= (0, 12)

#: Before JAX 0.11.2, XLA crashes the process if a program gets a donated array: see ``_runtime.taken``.
#: Workaround: taken_arrays.
TAKEN_ARRAYS_CRASH = jax.__version_info__ < (0, 11, 2)

#: JAX 0.10 has one class for jaxprs with constants and one for jaxprs without; JAX 0.11 has one class for both.
Closed: Any = vars(extend_core)["ClosedJaxpr"]  # not typed as exported from 0.11 on
Open: Any = extend_core.Jaxpr


def is_jaxpr(x: object) -> bool:
    """Whether ``x`` is a jaxpr of either class."""
    return isinstance(x, Closed | Open)


def body(jaxpr: Jaxpr) -> Any:
    """Returns the open jaxpr, with ``eqns``, ``invars``, ``constvars`` and ``outvars``."""
    return jaxpr.jaxpr if isinstance(jaxpr, Closed) else jaxpr


def constants(jaxpr: Jaxpr) -> Sequence[Array]:
    """Returns the values of the jaxpr's ``constvars`` (empty for an open jaxpr of JAX 0.10)."""
    return getattr(jaxpr, "consts", ())


def close(jaxpr: Jaxpr, consts: Sequence[Array]) -> Jaxpr:
    """Closes an open jaxpr over its constants."""
    return Closed(jaxpr, consts) if Closed is not Open else jaxpr.with_consts(consts)


def loop_counts(eqn: Equation) -> tuple[int, int]:
    """Returns the number of constants and the number of carried values of a ``scan``."""
    if "num_carry" in eqn.params:  # JAX 0.10
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def wrapped_primitive(eqn: Equation) -> Any:
    """Returns the ``HiPrim`` in a ``call_hi_primitive`` equation; None for other equations."""
    return eqn.params.get("_prim")


def add_cotangent(returned: PyTree, cotangent: object) -> PyTree:
    """Adds a cotangent to what a reverse rule of ``custom_vjp`` returns to JAX."""
    if isinstance(returned, tuple):  # from JAX 0.12 on, with what the rule logs
        return [*returned[0], cotangent], *returned[1:]
    return [*returned, cotangent]
