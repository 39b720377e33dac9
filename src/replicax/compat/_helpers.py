"""Replacements of functions of flax, chex and kfac-jax that assume one row per device.

Those functions build a mesh of all devices or read one shard. The replacements have the same signatures and work with
any number of rows per device. They are set when the module is imported, or at once if it has been imported.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

from replicax._arrays import unreplicate
from replicax._pmap import MappedFunction
from replicax._typing import Array, AxisName, Function, HostArray, PyTree
from replicax.compat._bootstrap import AfterImport
from replicax.compat._functions import device_put_replicated, pmap, put_rows
from replicax.compat._virtual import distinct, padded, program_devices

#: Creates the replacement of a function, from its module and the original function.
Replace = Callable[[ModuleType, Function], Function]


def first_replica(x: Array | HostArray) -> Array | HostArray:
    """The row of replica 0; the whole array if it has no mapped axis and is replicated over all devices."""
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer) or isinstance(x.sharding, SingleDeviceSharding):
        return x[0]
    return unreplicate(x) if _has_rows(x) else x.addressable_shards[0].data


def _has_rows(x: jax.Array) -> bool:
    """Whether the leading axis is the replica axis.

    The replica axis of a map's result is sharded over a mesh axis, which may have size 1. With padding and a callback,
    XLA loses this sharding. Then the function compares the axis size with the number of replicas.
    """
    if not isinstance(x.sharding, NamedSharding) or not x.sharding.is_fully_replicated:
        return True
    if len(program_devices()) == 1 or x.sharding.spec[:1] not in ((), (None,)):
        return True
    return padded() and x.shape[0] == len(program_devices())


# ---------------------------------------------------------------------------------------------------------------
# flax


def _flax_replicate(_: ModuleType, original: Function) -> Function:
    @functools.wraps(original)
    def replicate(
        tree: PyTree,
        devices: Sequence[jax.Device] | None = None,
        axis_name: AxisName | None = None,  # noqa: ARG001  # of the original's mesh
    ) -> PyTree:
        arrays = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x), tree)  # strongly typed
        return device_put_replicated(arrays, devices or program_devices())

    return replicate


def _flax_unreplicate(_: ModuleType, original: Function) -> Function:
    @functools.wraps(original)
    def unreplicate(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x if getattr(x, "ndim", None) == 0 else first_replica(x), tree)

    return unreplicate


def _flax_prefetch_to_device(_: ModuleType, original: Function) -> Function:
    @functools.wraps(original)
    def prefetch_to_device(
        iterator: Iterator[PyTree],
        size: int,
        devices: Sequence[jax.Device] | None = None,
        axis_name: AxisName | None = None,  # noqa: ARG001  # of the original's mesh
    ) -> Iterator[PyTree]:
        chosen = program_devices() if devices is None else devices
        batches = (jax.tree.map(lambda x: put_rows(x, chosen), tree) for tree in iterator)
        queue = deque(itertools.islice(batches, size))
        while queue:
            yield queue.popleft()
            queue.extend(itertools.islice(batches, 1))

    return prefetch_to_device


def _flax_get_metrics(module: ModuleType, original: Function) -> Function:
    @functools.wraps(original)
    def get_metrics(device_metrics: PyTree) -> PyTree:
        return module.stack_forest(jax.device_get(jax.tree.map(first_replica, device_metrics)))

    return get_metrics


# ---------------------------------------------------------------------------------------------------------------
# kfac-jax


def _kfac_get_first(module: ModuleType, original: Function) -> Function:
    @functools.wraps(original)
    def get_first(obj: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x if module.is_scalar(x) else first_replica(x), obj)

    return get_first


def _kfac_on_all_devices(place: Callable[[PyTree, Sequence[jax.Device]], PyTree]) -> Replace:
    """Replaces a function that puts a pytree on all devices by ``place(tree, devices)``."""

    def replace(_: ModuleType, original: Any) -> Function:
        @functools.wraps(original)
        def on_all_local_devices(
            obj: PyTree,
            axis_name: AxisName | None = None,  # noqa: ARG001  # of the original's mesh
        ) -> PyTree:
            return place(obj, program_devices())

        return on_all_local_devices

    return replace


def _put_rows(tree: PyTree, devices: Sequence[jax.Device]) -> PyTree:
    return jax.tree.map(lambda x: put_rows(x, devices), tree)


def _mapped(**options: Any) -> Replace:
    """Replaces a map that a module created with JAX's own ``jax.pmap``, before replicax was installed."""

    def replace(_: ModuleType, original: Any) -> Function:
        return original if isinstance(original, MappedFunction) else pmap(original.__wrapped__, **options)

    return replace


# ---------------------------------------------------------------------------------------------------------------
# chex


def _chex_with_pmap(_: ModuleType, original: Function) -> Function:
    @functools.wraps(original)
    def with_pmap(*fn: Function, **options: Any) -> Function:
        if not fn:  # the original is curried
            return functools.partial(with_pmap, **options)
        if len(fn) > 1 or not options.get("broadcast_args_to_devices", True) or options.get("in_axes", 0) != 0:
            return original(*fn, **options)
        inner = original(*fn, **options | {"broadcast_args_to_devices": False})
        static = options.get("static_argnums", ()) or options.get("static_broadcasted_argnums", ())
        kept = {static} if isinstance(static, int) else set(static)

        @functools.wraps(inner)
        def wrapper(*args: PyTree, **kwargs: PyTree) -> PyTree:
            devices = list(options.get("devices") or program_devices())[: options.get("n_devices")]
            copies = functools.partial(device_put_replicated, devices=devices)
            return inner(
                *(x if i in kept else copies(x) for i, x in enumerate(args)),
                **{name: copies(x) for name, x in kwargs.items()},
            )

        return wrapper

    return with_pmap


def _chex_assert_tree_is_sharded(_: ModuleType, original: Function) -> Function:
    @functools.wraps(original)
    def assert_tree_is_sharded(tree: PyTree, *, devices: Sequence[jax.Device]) -> None:
        real, count = distinct(devices)
        if len(real) == count:
            original(tree, devices=devices)
            return
        faults = []
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            held = tuple(dict.fromkeys(shard.device for shard in x.addressable_shards)), np.shape(x)[:1]
            if held != (real, (count,)):
                faults.append(
                    f"Tree leaf '{jax.tree_util.keystr(path)}' has shape {np.shape(x)} and is on {held[0]}, "
                    f"expected {count} rows on {real}."
                )
        if faults:
            raise AssertionError("\n".join(faults))

    return assert_tree_is_sharded


#: The replacements, by module and function name.
HELPERS: Mapping[str, Mapping[str, Replace]] = {
    "flax.jax_utils": {
        "replicate": _flax_replicate,
        "unreplicate": _flax_unreplicate,
        "prefetch_to_device": _flax_prefetch_to_device,
    },
    "flax.training.common_utils": {"get_metrics": _flax_get_metrics},
    "kfac_jax._src.utils.parallel": {
        "get_first": _kfac_get_first,
        "broadcast_all_local_devices": _kfac_on_all_devices(_put_rows),
        "replicate_all_local_devices": _kfac_on_all_devices(device_put_replicated),
        "pmap_mean": _mapped(axis_name="i"),
        "pmap_sum": _mapped(axis_name="i"),
        "_broadcast_all_local_devices_legacy": _mapped(),
        "pmap_zeros_like": _mapped(),
        "p_split": _mapped(),
        "p_split_num": _mapped(static_broadcasted_argnums=1),
        "pmap_sync_and_divide_value": _mapped(axis_name="i"),
        "_pmap_copy_obj": _mapped(),
    },
    "chex._src.variants": {"_with_pmap": _chex_with_pmap},
    "chex._src.asserts": {"assert_tree_is_sharded": _chex_assert_tree_is_sharded},
}


class Helpers:
    """Replaces the functions while replicax is installed."""

    def __init__(self) -> None:
        self._back: dict[int, tuple[Function, Function]] = {}
        self._finder: Any = AfterImport(tuple(HELPERS), self.replace)

    def install(self) -> None:
        """Replaces the functions in modules that are already imported, and in later imports."""
        sys.meta_path.insert(0, self._finder)
        self.replace()

    def replace(self) -> None:
        """Replaces the functions in modules that are already imported."""
        pairs = {}
        for name, replacements in HELPERS.items():
            module = sys.modules.get(name)
            if module is None:
                continue
            for attribute, replacement in replacements.items():
                original = getattr(module, attribute, None)
                if original is None or id(original) in self._back:
                    continue
                ours = replacement(module, original)
                if ours is not original:
                    pairs[id(original)] = original, ours
                    self._back[id(ours)] = ours, original
        _swap(pairs)

    def uninstall(self) -> None:
        """Restores the original functions."""
        sys.meta_path.remove(self._finder)
        _swap(self._back)


def _swap(pairs: Mapping[int, tuple[Function, Function]]) -> None:
    """Replaces the first of each pair by the second, in all modules and in all module-level dicts."""
    if not pairs:
        return
    for module in list(sys.modules.values()):
        names = object.__getattribute__(module, "__dict__") if isinstance(module, ModuleType) else {}
        for table in [names, *(x for x in list(names.values()) if type(x) is dict)]:
            for key, value in list(table.items()):
                pair = pairs.get(id(value))
                if pair is not None and pair[0] is value:
                    table[key] = pair[1]
