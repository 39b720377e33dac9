"""Prevents deadlocks of XLA's CPU client with several devices and asynchronous calls.

There are two deadlocks. ``jax.pmap`` and ``jax.jit`` have them, too. XLA aborts the process after 40 s:

1. Before jaxlib 0.12, a collective on D devices blocks D threads of the client's pool until all devices join. The
   launch of a call blocks D more threads while 32 computations of a device wait to run. The pool has one thread per
   core, and at least D, unless the environment variable NPROC sets another number when JAX creates the client. Calls
   need 2 D threads, and D more for each further Python thread that launches calls. With fewer, this hangs::

       jax.config.update("jax_num_cpu_devices", 8)
       f = jax.pmap(lambda x: jax.lax.psum(x, "i"), "i")
       x = y = f(np.ones(8))
       for _ in range(2000): y = f(x)

2. XLA runs collectives in the order of the calls. If several Python threads launch calls, later calls can fill the 32
   slots of a device's queue before an earlier call is queued. More threads in the pool do not help: with NPROC=256,
   the loop above in four threads hangs in about one of 20 runs, on jaxlib 0.12 in one of 10 runs.

Workaround: few_cpu_threads. The second deadlock is too rare for a test.

Before jaxlib 0.12, a client that JAX creates after the import of this module gets more threads. If the client already
exists, or if several threads call maps, each call waits for an earlier call, so that few calls are in flight.
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
    """The number of threads of XLA's pool for this many CPU devices.

    Eight per device: one for a collective, and seven for Python threads that launch calls. A thread costs about 0.1 MB
    and 0.1 ms. To limit the cost, more than 128 devices get fewer threads each, at least four.
    """
    return max(4 * devices, min(8 * devices, 1024))


def _default_threads() -> int:
    """The number of threads that XLA gives its pool by default, if there are no more devices than cores."""
    try:
        return max(0, int(os.environ["NPROC"]))
    except (KeyError, ValueError):
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _devices_asked_for() -> int:
    count = getattr(jax.config, "jax_num_cpu_devices", -1)
    by_flag = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return count if count >= 0 else int(by_flag[-1]) if by_flag else 1


#: The pool size of each client that was created since this module was imported.
_pools: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def _make_client(make: Callable[[], object]) -> object:
    """Creates JAX's CPU client with enough threads for its devices, unless the user has set NPROC.

    The variable is set only during the creation, with ``os.putenv``: other threads may read or copy ``os.environ``.
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
    """The calls in flight, of all maps and threads of this process.

    Attributes:
        caller: The id of the only thread that has called maps; None if every call must wait.
    """

    def __init__(self) -> None:
        self.start_again()

    def start_again(self) -> None:
        """Resets the state for a new client."""
        self.caller: int | None = _NOBODY
        self._in_flight: deque[Any] = deque()
        self._warned = False

    def note(self, result: PyTree) -> None:
        """Records a call, and waits for an earlier call if several are in flight."""
        if self.caller == _NOBODY:
            self.caller = threading.get_ident()
            return
        self.caller = None
        values = [_jax.outermost_value(x)[0] for x in jax.tree.leaves(result)]
        arrays = [x for x in values if type(x) is cpp.ArrayImpl]
        if not arrays:  # a staged call, or a call without results
            return
        mine = min(arrays, key=lambda x: x.size)  # the smallest, because it is kept alive until the next call
        self._in_flight.append(mine)
        # One call runs and one is queued. More are not faster, because CPU devices share the machine's cores.
        while len(self._in_flight) > 1:
            with contextlib.suppress(IndexError, RuntimeError):  # another thread popped it, or the call failed
                earlier = self._in_flight.popleft()
                (mine if earlier.is_deleted() else earlier).block_until_ready()

    def too_few_threads(self, threads: int, devices: int) -> None:
        """Makes every call wait from now on, and warns once."""
        self.caller = None
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"XLA has {threads} threads for {devices} CPU devices. Before jaxlib 0.12, asynchronous calls can hang "
                f"with fewer than {2 * devices} threads, so each call of a map now waits for an earlier call. Import "
                f"replicax before JAX creates its first array, or set NPROC={threads_for(devices)} in the environment "
                f"before Python starts.",
                RuntimeWarning,
                stacklevel=2,
            )


_NOBODY = -1
_calls = _Calls()


def may_hang(mesh: jax.sharding.Mesh) -> bool:
    """Whether calls of programs on this mesh need :func:`bounded`."""
    if mesh.size == 1 or (first := mesh.devices.flat[0]).platform != "cpu":
        return False
    if _jax.FEW_CPU_THREADS_HANG:
        devices = first.client.local_device_count()
        threads = _pools.get(first.client) or max(_default_threads(), devices)
        if threads < 2 * devices:
            _calls.too_few_threads(threads, devices)
    return True


def bounded(call: Function, in_python: Function | None = None) -> Function:
    """Wraps ``call`` so that few calls are in flight, because more could hang.

    If ``call`` raises an error without the argument's name, ``in_python`` runs and raises the error with the name.
    """

    def bounding(*args: PyTree, **kwargs: PyTree) -> PyTree:
        try:
            result = call(*args, **kwargs)
        except ReplicaxError as error:
            if not error.nameless or in_python is None:
                raise
            result = in_python(*args, **kwargs)  # raises the error with the name
        if _calls.caller != threading.get_ident():
            _calls.note(result)
        return result

    return bounding


if _jax.FEW_CPU_THREADS_HANG:
    _jax.make_cpu_client_by(_make_client)
