"""A workaround for JAX before 0.11.2, to be deleted with the support of these versions. Workaround: taken_arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from replicax import _jax
from replicax._jax import cpp


class TakenArrays:
    """Arrays whose buffers a donating call has taken.

    Before 0.11.2 XLA ends the process where a program on several devices is handed such an array (``jax.jit``'s as
    well), but for those that are deleted besides::

        f = jax.jit(lambda x: 2 * x, donate_argnums=0)
        x = jax.device_put(np.ones(8), NamedSharding(jax.make_mesh((8,), ("i",)), PartitionSpec("i")))
        f(x), f(x)
    """

    @staticmethod
    def delete(leaves: Sequence[Any]) -> None:
        """Deletes those among the arguments of a call, so that the next call to get them can say so."""
        if _jax.TAKEN_ARRAYS_CRASH:
            for x in leaves:
                if type(x) is cpp.ArrayImpl and x.is_deleted():
                    x.delete()
