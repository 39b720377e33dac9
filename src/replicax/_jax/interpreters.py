"""JAX's modules that are needed to register primitives."""

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
