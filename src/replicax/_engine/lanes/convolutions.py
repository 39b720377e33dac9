"""Convolutions in loops over lanes, on CPUs.

XLA has fast kernels for one order of dimensions. It transposes the operands of other convolutions, but outside of
loops only (its pass ``ConvCanonicalization``), so gradients of a small convolutional net took five times as long in a
loop. Here all convolutions of a lane get that order.
"""

from __future__ import annotations

from collections.abc import Sequence

from jax import lax

from replicax import _jax
from replicax._jax import Equation
from replicax._typing import Array, ArrayLike


def bind(eqn: Equation, args: Sequence[ArrayLike]) -> list[Array]:
    """Binds an equation, with its convolutions in the order of dimensions for which XLA has fast kernels."""
    return _jax.replace(eqn, args, {"conv_general_dilated": _in_order})


def _in_order(eqn: Equation, args: Sequence[ArrayLike]) -> list[Array]:
    """Runs a convolution with features last: inputs and results "NHWC", kernels "HWIO"."""
    numbers, rank = eqn.params["dimension_numbers"], eqn.invars[0].aval.ndim
    batch_first = (0, rank - 1, *range(1, rank - 1))  # where the batch, the features, and the others are
    in_order = lax.ConvDimensionNumbers(batch_first, (rank - 1, rank - 2, *range(rank - 2)), batch_first)
    if numbers == in_order or eqn.params["batch_group_count"] != 1:
        return _jax.bind(eqn, args)
    batch, features, *others = numbers.lhs_spec
    inputs = lax.transpose(args[0], (batch, *others, features))
    out, into, *others = numbers.rhs_spec
    kernel = lax.transpose(args[1], (*others, into, out))
    (y,) = _jax.bind_with(eqn, [inputs, kernel], eqn.params | {"dimension_numbers": in_order})
    batch, features, *others = numbers.out_spec
    where = (batch, *others, features)
    return [lax.transpose(y, [where.index(k) for k in range(rank)])]
