"""Hashes of the bits of arrays, computed on the devices that hold them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import keystr

from replicax import _jax
from replicax._arrays import check_arrays, check_deleted, fetch
from replicax._messages import as_int, report
from replicax._typing import Array, ArrayLike, HostArray, PyTree, Shape
from replicax.errors import MappedSizeError


class LeafBits(TypedDict):
    """The bits of one array.

    Attributes:
        type: The dtype and shape, such as ``float32[3,4]``; with a replica axis, the shape of one replica.
        bits: The hash of the array: 16 hexadecimal digits.
        replicas: With a replica axis, instead of ``bits``: the hash of each replica.
    """

    type: str
    bits: NotRequired[str]
    replicas: NotRequired[list[str]]


#: The bits of the arrays of a pytree, by path, such as ``"['params']['w']"``.
Fingerprint = dict[str, LeafBits]


def fingerprint(tree: PyTree, axis: int | None = 0) -> Fingerprint:
    """Hashes the bits of every array, with one hash for each replica.

    Equal bits have equal hashes, on any number of devices and with any sharding. The hash of a replica does not depend
    on its index or on the number of replicas. NaNs with different payloads have different bits, and so have 0.0 and
    -0.0. The devices compute the hashes with integer arithmetic; only the hashes are copied to the host. A hash has 64
    bits. It is not cryptographic.

    With several processes, own rows are hashed without the other processes: each process gets the hashes of its own
    replicas. If an array is global, all processes must call ``fingerprint`` together, and each gets all hashes.

    Args:
        tree: A pytree of arrays of any dtype, ``(replicas, ...)`` for ``axis=0``, such as a training state. A Python
            scalar is hashed as the array that JAX converts it to.
        axis: The axis of the replicas. None for arrays without a replica axis, such as the parameters of a program
            under ``jax.jit``: then each array has one hash.

    Returns:
        A dict from the path of each array, such as ``"['params']['w']"``, to a dict with its ``"type"`` and its hashes:
        a list under ``"replicas"``, or one hash under ``"bits"`` for ``axis=None``. Compare it with ``==``, write it
        with ``json.dumps``, and compare two recorded runs with :func:`first_divergence`.

    Raises:
        NotAnArrayError: lists every leaf that is not an array.
        DeletedArrayError: lists every array that was donated or deleted.
        OptionTypeError: ``axis`` is not an int or None.
        MappedSizeError: an array has no such axis, or the arrays differ in the number of replicas.

    Example:
        >>> import numpy as np, replicax.testing
        >>> replicax.testing.fingerprint({"w": np.float32([[1, 2], [1, 2], [0.0, -0.0]])})
        {"['w']": {'type': 'float32[2]', 'replicas': ['c51487a98bee260e', 'c51487a98bee260e', '532b587be14a39bc']}}
    """
    check_arrays("fingerprint", tree)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    check_deleted("fingerprint", tree, [x for _, x in leaves])
    if axis is not None:
        axis = as_int("axis", axis)
        _check_axis([(f"tree{keystr(path)}", np.shape(x)) for path, x in leaves], axis)
    with _jax.own_mesh():
        hashes: list[Any] = fetch([_hash_leaf(x, axis) for _, x in leaves])
    return {keystr(path): _described(x, axis, found) for (path, x), found in zip(leaves, hashes, strict=True)}


def _check_axis(shapes: Sequence[tuple[str, Shape]], axis: int) -> None:
    """Checks that all arrays have the same number of replicas.

    Raises:
        MappedSizeError: lists every array.
    """
    sizes = {shape[axis] if -len(shape) <= axis < len(shape) else None for _, shape in shapes}
    if None in sizes or len(sizes) > 1:
        raise MappedSizeError(
            report(
                f"fingerprint hashes each replica along axis {axis}, but the arrays do not have the same number of "
                f"replicas there:",
                [f"{name} of shape {shape}" for name, shape in shapes],
                "Pass axis=None for arrays without a replica axis. If only some have one, call fingerprint twice.",
            )
        )


def _described(x: ArrayLike, axis: int | None, hashes: HostArray) -> LeafBits:
    shape = list(np.shape(x))
    if axis is not None:
        del shape[axis]
    dtype = x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
    kind = f"{'float0' if dtype == jax.dtypes.float0 else dtype}{shape}".replace(" ", "")
    texts = [f"{first:08x}{second:08x}" for first, second in hashes.reshape(-1, 2).tolist()]
    return {"type": kind, "bits": texts[0]} if axis is None else {"type": kind, "replicas": texts}


def _hash_leaf(x: ArrayLike, axis: int | None) -> Array:
    """The hashes of an array as uint32, ``(replicas, 2)``, or ``(2,)`` without a replica axis."""
    axis = None if axis is None else axis % np.ndim(x)
    if isinstance(x, np.ndarray | np.generic) and x.dtype.itemsize >= 8 and x.dtype.kind in "iufc":
        # Without jax_enable_x64, JAX rounds to 32 bits.
        words = np.ascontiguousarray(x).reshape(*np.shape(x), 1).view(np.uint32)
        return _hash_words(jnp.asarray(words), axis, True)
    x = jnp.asarray(np.zeros(np.shape(x), np.bool_) if jnp.result_type(x) == jax.dtypes.float0 else x)
    return _hash_words(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, axis, False)


@functools.partial(_jax.always_jit, static_argnums=(1, 2))
def _hash_words(x: Array, axis: int | None, is_split: bool) -> Array:
    """Adds up, modulo 2**32, a hash of each 32-bit word and its position, for two different hash functions.

    Integer sums do not depend on the order, so neither on the sharding. A word is mixed with the finalizer of
    MurmurHash3, a bijection in which every bit of the input changes half of the bits of the output
    (https://github.com/aappleby/smhasher/wiki/MurmurHash3): a change of one word always changes both sums.
    """
    words = [x[..., k] for k in range(x.shape[-1])] if is_split else _words(x)
    shape = words[0].shape
    others = [k for k in range(len(shape)) if k != axis]
    element, stride = jnp.zeros((), jnp.uint32), 1
    for k in reversed(others):
        element += lax.broadcasted_iota(jnp.uint32, shape, k) * np.uint32(stride % 2**32)
        stride *= shape[k]
    sums = []
    for factor, start in _KEYS:
        total = jnp.zeros((), jnp.uint32)
        for k, word in enumerate(words):
            position = element * np.uint32(len(words)) + np.uint32(k)
            total += jnp.sum(_mix(_mix(position * factor + start) ^ word), others, dtype=jnp.uint32)
        sums.append(total)
    return jnp.stack(sums, -1)


#: The factor and the offset that make a key of a position, for each of the two hashes. A factor is odd, so no two
#: positions of an array of less than 2**32 words have the same key. These are constants of MurmurHash3.
_KEYS = (
    (np.uint32(0xCC9E2D51), np.uint32(0xE6546B64)),
    (np.uint32(0x1B873593), np.uint32(0x38B34AE5)),
)


def _mix(x: Array) -> Array:
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _words(x: Array) -> list[Array]:
    """The bits of an array as arrays of uint32 of its shape: several for dtypes of more than 32 bits."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return [*_words(lax.real(x)), *_words(lax.imag(x))]
    if x.dtype == jnp.bool_:
        return [x.astype(jnp.uint32)]
    if (bits := jax.dtypes.itemsize_bits(x.dtype)) > 32:
        split = lax.bitcast_convert_type(x, jnp.uint32)
        return [split[..., k] for k in range(bits // 32)]
    return [lax.bitcast_convert_type(x, f"uint{bits}").astype(jnp.uint32)]
