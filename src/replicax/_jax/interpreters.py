"""JAX's machinery that primitives of our own are registered with."""

from jax._src import ad_util, callback, core, debugging, linear_util
from jax._src.interpreters import ad, batching, mlir
from jax._src.lax import parallel, slicing

__all__ = [
    "ad",
    "ad_util",
    "batching",
    "callback",
    "core",
    "debugging",
    "linear_util",
    "mlir",
    "parallel",
    "slicing",
]
