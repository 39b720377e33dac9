"""Threads and waiting for XLA's CPU client, which hangs when calls run ahead on several devices.

It hangs in two ways, under ``jax.pmap`` and ``jax.jit`` as well, and XLA aborts the process 40 s later:

1. Before jaxlib 0.12 a collective holds D threads of the client's pool until all of its devices have come. The launch
   of a call takes D more, and holds them while 32 computations of a device wait to run. The pool has as many threads
   as the machine has cores, and at least D, unless the environment variable NPROC says another number when JAX makes
   the client. It takes 2 D, and D more for each further thread that launches. With fewer this hangs::

       jax.config.update("jax_num_cpu_devices", 8)
       f = jax.pmap(lambda x: jax.lax.psum(x, "i"), "i")
       x = y = f(np.ones(8))
       for _ in range(2000): y = f(x)

2. XLA runs collectives in the order in which calls come, but where several threads call, later calls may take all of
   a device's 32 places before an earlier one that has to run first. Threads in the pool are no help: the loop above in
   four threads, with NPROC=256, hangs in about one run of twenty, and in one of ten on jaxlib 0.12.

Workaround: few_cpu_threads; the second is too rare to be shown in a test.

So before jaxlib 0.12 JAX makes its client with more threads, if this module is imported first; and where it was too
late for that, or where several threads call maps, each call waits for an earlier one, so that few are in flight.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import jax

from replicax import _jax
from replicax._jax import cpp
from replicax._typing import Function, PyTree
from replicax.errors import ReplicaxError


def threads_for(devices: int) -> int:
    """How many threads XLA's pool gets for so many CPU devices.

    Eight a device, which is one collective and seven threads that launch. Each thread costs about 0.1 MB and 0.1 ms;
    above 1,024 threads that is felt, so that more than 128 devices get down to four each.
    """
    return max(4 * devices, min(8 * devices, 1024))


def _default_threads() -> int:
    """How many threads XLA gives its pool by itself, where there are no more devices than that."""
    try:
        return max(0, int(os.environ["NPROC"]))
    except (KeyError, ValueError):
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _devices_asked_for() -> int:
    count = getattr(jax.config, "jax_num_cpu_devices", -1)
    by_flag = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return count if count >= 0 else int(by_flag[-1]) if by_flag else 1


#: The size of the pool of each client that has been made since this module was imported.
_pools: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def _make_client(make: Callable[[], object]) -> object:
    """Makes JAX's CPU client, with threads enough for the devices that are asked for, unless the user has set NPROC.

    The variable is set for as long as that takes, and not in ``os.environ``, which other threads may read and copy.
    """
    devices, threads = _devices_asked_for(), _default_threads()
    if devices > 1 and "NPROC" not in os.environ and threads < threads_for(devices):
        threads = threads_for(devices)
        os.putenv("NPROC", str(threads))
        try:
            client = make()
        finally:
            os.unsetenv("NPROC")
    else:
        client = make()
    _calls.start_again()
    _pools[client] = max(threads, devices)
    return client


class _Calls:
    """The calls in flight, for all maps and threads of this process, once it has to wait for some.

    Attributes:
        caller: The only thread so far that has called a map; None where any call has to wait.
    """

    def __init__(self) -> None:
        self.start_again()

    def start_again(self) -> None:
        """Begins with no calls."""
        self.caller: int | None = _NOBODY
        self._in_flight: deque[Any] = deque()
        self._warned = False

    def note(self, result: PyTree) -> None:
        """Takes note of a call by another thread than before, and waits for an earlier call if there are several."""
        if self.caller == _NOBODY:
            self.caller = threading.get_ident()
            return
        self.caller = None
        values = [_jax.outermost_value(x)[0] for x in jax.tree.leaves(result)]
        arrays = [x for x in values if type(x) is cpp.ArrayImpl]
        if not arrays:  # the call is recorded; or runs for its effects alone
            return
        mine = min(arrays, key=lambda x: x.size)  # which is kept alive until the next call
        self._in_flight.append(mine)
        # One call waits while one runs. More in flight are not faster, since these devices share the machine's cores.
        while len(self._in_flight) > 1:
            with contextlib.suppress(IndexError, RuntimeError):  # another thread took it; or it failed
                earlier = self._in_flight.popleft()
                (mine if earlier.is_deleted() else earlier).block_until_ready()

    def too_few_threads(self, threads: int, devices: int) -> None:
        """Has every call wait, and says so once."""
        self.caller = None
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"XLA has {threads} threads for {devices} CPU devices, where before jaxlib 0.12 programs that nobody "
                f"waits for hang with less than {2 * devices}. So each call of a map waits for an earlier one. Import "
                f"replicax before JAX makes its first array, or set NPROC={threads_for(devices)} in the environment "
                f"before Python starts.",
                RuntimeWarning,
                stacklevel=2,
            )


_NOBODY = -1
_calls = _Calls()


def may_hang(mesh: jax.sharding.Mesh) -> bool:
    """Whether calls of programs on this mesh have to be :func:`bounded`."""
    if mesh.size == 1 or (first := mesh.devices.flat[0]).platform != "cpu":
        return False
    if _jax.FEW_CPU_THREADS_HANG:
        devices = first.client.local_device_count()
        threads = _pools.get(first.client) or max(_default_threads(), devices)
        if threads < 2 * devices:
            _calls.too_few_threads(threads, devices)
    return True


def bounded(call: Function, in_python: Function | None = None) -> Function:
    """Runs calls so that few are in flight, where more might hang.

    A call that C++ refuses without the argument's name is refused again ``in_python``, which knows the name.
    """

    def bounding(*args: PyTree, **kwargs: PyTree) -> PyTree:
        try:
            result = call(*args, **kwargs)
        except ReplicaxError as error:
            if not error.nameless or in_python is None:
                raise
            result = in_python(*args, **kwargs)  # which raises it with the name
        if _calls.caller != threading.get_ident():
            _calls.note(result)
        return result

    return bounding


if _jax.FEW_CPU_THREADS_HANG:
    _jax.make_cpu_client_by(_make_client)
