"""Random numbers under ``vmap``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from replicax._jax.aliases import Equation
from replicax._jax.jaxprs import primitives
from replicax._typing import Array


def draws_batches(eqn: Equation) -> bool:
    """Whether ``vmap`` draws the whole batch of this equation with the first key, although each row has its own key.

    The batching rule of ``lax.rng_bit_generator`` does this. ``rbg`` and ``unsafe_rbg`` draw with this primitive;
    ``unsafe_rbg`` also uses it in ``split`` and ``fold_in``: https://github.com/jax-ml/jax/issues/19085.
    Workaround: draws_of_one_key.
    """
    name = eqn.primitive.name
    if name not in _DRAWS:
        return name == "rng_bit_generator"
    dtypes: list[Any] = [atom.aval.dtype for atom in (*eqn.invars, *eqn.outvars)]
    return any(_batches(dtype._impl, _DRAWS[name]) for dtype in dtypes if hasattr(dtype, "_impl"))


#: The operation of each primitive on typed keys.
_DRAWS = {
    "random_bits": "random_bits",
    "random_split": "split",
    "random_fold_in": "fold_in",
    "random_seed": "seed",
    "random_gamma": "split",
}


def zeros(x: jax.ShapeDtypeStruct) -> Array:
    """Returns zeros of a type, which may be that of typed keys; bools for float0, as XLA has in its place."""
    if x.dtype == jax.dtypes.float0:
        return jax.numpy.zeros(x.shape, np.bool_)
    if not jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.numpy.zeros(x.shape, x.dtype)
    impl: Any = x.dtype._impl
    return jax.random.wrap_key_data(jax.numpy.zeros((*x.shape, *impl.key_shape), np.uint32), impl=impl)


class Implementation(Protocol):
    """The part of a PRNG implementation that :func:`draws_batches` uses. JAX's own class moves between modules."""

    key_shape: tuple[int, ...]
    seed: Callable[[Array], Array]
    split: Callable[[Array, tuple[int, ...]], Array]
    random_bits: Callable[[Array, int, tuple[int, ...]], Array]
    fold_in: Callable[[Array, Array], Array]


@functools.cache
def _batches(impl: Implementation, step: str) -> bool:
    key, number = jax.ShapeDtypeStruct(impl.key_shape, np.uint32), jax.ShapeDtypeStruct((), np.uint32)
    steps = {
        "random_bits": lambda: jax.make_jaxpr(lambda key: impl.random_bits(key, 32, (1,)))(key),
        "split": lambda: jax.make_jaxpr(lambda key: impl.split(key, (1,)))(key),
        "fold_in": lambda: jax.make_jaxpr(impl.fold_in)(key, number),
        "seed": lambda: jax.make_jaxpr(impl.seed)(number),
    }
    return "rng_bit_generator" in primitives(steps[step]())
