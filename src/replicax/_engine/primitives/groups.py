"""``all_to_all`` over groups of devices."""

from __future__ import annotations

from collections.abc import Sequence

from replicax._jax.interpreters import ad, batching, core, mlir, parallel
from replicax._typing import Array, AxisName

# ---------------------------------------------------------------------------------------------------------------
# all_to_all over groups


def grouped_all_to_all(
    x: Array, axis: AxisName, split_axis: int, concat_axis: int, device_groups: tuple[tuple[int, ...], ...]
) -> Array:
    """Calls a tiled ``lax.all_to_all`` over groups of devices. JAX's own primitive rejects groups under ``vmap``.

    Workaround: all_to_all_over_groups.
    """
    return _grouped_all_to_all_p.bind(
        x,
        axis_name=(axis,),
        split_axis=split_axis,
        concat_axis=concat_axis,
        axis_index_groups=device_groups,
        tiled=True,
    )


_grouped_all_to_all_p = core.Primitive("grouped_all_to_all")


def _grouped_all_to_all_batched(
    axis_data: batching.AxisData,
    args: Sequence[Array],
    dims: Sequence[int | None],
    *,
    split_axis: int,
    concat_axis: int,
    **params: object,
) -> tuple[Array, int | None]:
    del axis_data
    (x,), (dim,) = args, dims
    if dim is None:
        return _grouped_all_to_all_p.bind(x, split_axis=split_axis, concat_axis=concat_axis, **params), None
    split_axis, concat_axis = split_axis + (dim <= split_axis), concat_axis + (dim <= concat_axis)
    return _grouped_all_to_all_p.bind(x, split_axis=split_axis, concat_axis=concat_axis, **params), dim


def _grouped_all_to_all_transposed(
    ct: Array, x: ad.UndefinedPrimal, *, split_axis: int, concat_axis: int, **params: object
) -> list[Array]:
    del x
    return [_grouped_all_to_all_p.bind(ct, split_axis=concat_axis, concat_axis=split_axis, **params)]


_grouped_all_to_all_p.def_effectful_abstract_eval(parallel.all_to_all_p.abstract_eval)
mlir.register_lowering(_grouped_all_to_all_p, parallel._all_to_all_lowering)
ad.deflinear2(_grouped_all_to_all_p, _grouped_all_to_all_transposed)
batching.fancy_primitive_batchers[_grouped_all_to_all_p] = _grouped_all_to_all_batched
