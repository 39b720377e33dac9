"""A workaround for JAX before 0.11.2. Delete it when the oldest supported version is newer.

Workaround: taken_arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from replicax import _jax
from replicax._jax import cpp


class TakenArrays:
    """Arrays that were donated.

    Before JAX 0.11.2, XLA aborts the process if a program on several devices, also one of ``jax.jit``, gets an array
    that was donated before. It raises an error instead if ``delete()`` was called on the array::

        f = jax.jit(lambda x: 2 * x, donate_argnums=0)
        x = jax.device_put(np.ones(8), NamedSharding(jax.make_mesh((8,), ("i",)), PartitionSpec("i")))
        f(x), f(x)
    """

    @staticmethod
    def delete(leaves: Sequence[Any]) -> None:
        """Calls ``delete()`` on the donated arguments, so that the next call with them raises an error."""
        if _jax.TAKEN_ARRAYS_CRASH:
            for x in leaves:
                if type(x) is cpp.ArrayImpl and x.is_deleted():
                    x.delete()
