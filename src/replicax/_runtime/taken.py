"""A workaround for JAX before 0.11.2. Delete it when JAX 0.11.2 is the oldest supported version.

Workaround: taken_arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from replicax import _jax
from replicax._jax import cpp


class TakenArrays:
    """Arrays that were donated.

    If ``delete()`` was called on a donated array, JAX raises an error when the array is passed again. Otherwise, before
    JAX 0.11.2, XLA aborts the process if the program runs on several devices, as this one does::

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
