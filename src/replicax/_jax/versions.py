"""Every test of JAX's version."""

from __future__ import annotations

from typing import Any

import jax
from jax.extend import core as extend_core
from jaxlib import version as jaxlib_version

Jaxpr = Any

Equation = Any

#: JAX 0.10 has one class for jaxprs with constants and one for those without; 0.12 has one class for both.
_Closed: Any = vars(extend_core)["ClosedJaxpr"]

_Open: Any = extend_core.Jaxpr

VERSION: str = jax.__version__

#: Whether XLA hangs where its pool has few threads for its CPU devices: see ``_cpu_threads``. This goes by jaxlib,
#: which may be older than JAX.
FEW_CPU_THREADS_HANG = tuple(map(int, jaxlib_version.__version__.split(".")[:2])) < (0, 12)
