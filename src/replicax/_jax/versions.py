"""Every branch on JAX's version, with its reason: what to look through when an old version goes or a new one comes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core as extend_core
from jaxlib import version as jaxlib_version

from replicax._jax.aliases import Array, Equation, Jaxpr, PyTree

VERSION: str = jax.__version__

#: Before jaxlib 0.12 XLA hangs where its pool has few threads for its CPU devices: see ``_runtime.cpu_threads``. This
#: goes by jaxlib, which may be older than JAX. Workaround: few_cpu_threads.
FEW_CPU_THREADS_HANG = tuple(map(int, jaxlib_version.__version__.split(".")[:2])) < (0, 12)

#: Before JAX 0.11.2 XLA ends the process where a program gets an array that was donated: see ``_runtime.taken``.
#: Workaround: taken_arrays.
TAKEN_ARRAYS_CRASH = jax.__version_info__ < (0, 11, 2)

#: JAX 0.10 has one class for jaxprs with constants and one for those without; from 0.11 on one class is for both.
Closed: Any = vars(extend_core)["ClosedJaxpr"]  # from 0.11 on not typed as exported
Open: Any = extend_core.Jaxpr


def is_jaxpr(x: object) -> bool:
    """Whether ``x`` is a jaxpr of either class."""
    return isinstance(x, Closed | Open)


def body(jaxpr: Jaxpr) -> Any:
    """The open jaxpr: its ``eqns``, ``invars``, ``constvars`` and ``outvars``."""
    return jaxpr.jaxpr if isinstance(jaxpr, Closed) else jaxpr


def constants(jaxpr: Jaxpr) -> Sequence[Array]:
    """The values of the jaxpr's ``constvars`` (none for an open jaxpr of JAX 0.10)."""
    return getattr(jaxpr, "consts", ())


def close(jaxpr: Jaxpr, consts: Sequence[Array]) -> Jaxpr:
    """An open jaxpr with its constants."""
    return Closed(jaxpr, consts) if Closed is not Open else jaxpr.with_consts(consts)


def loop_counts(eqn: Equation) -> tuple[int, int]:
    """How many constants and how many carried values a ``scan`` has."""
    if "num_carry" in eqn.params:  # JAX 0.10
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def wrapped_primitive(eqn: Equation) -> Any:
    """What an equation wraps in JAX's one general primitive, as 0.12 has some functions of its own; None for others."""
    return eqn.params.get("_prim")


def add_cotangent(returned: PyTree, cotangent: object) -> PyTree:
    """What a reverse rule of a ``custom_vjp`` function returns to JAX, with one cotangent more."""
    if isinstance(returned, tuple):  # from JAX 0.12 on, with what the rule logs
        return [*returned[0], cotangent], *returned[1:]
    return [*returned, cotangent]
