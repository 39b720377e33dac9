"""Finds each ``psum`` of matrix products, and computes it as one product over all lanes of a device.

The gradient of a matrix is often an outer product in each replica, summed over all replicas by ``psum``. One product
over all lanes of a device computes this sum without storing the gradient of each replica. XLA finds some of these sums
itself, but not if padding is masked, or if several products are added before the ``psum``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from replicax import _jax
from replicax._engine.blocks import block, is_narrow
from replicax._engine.collectives import REGISTRY, Names, where_replica
from replicax._engine.varying import Varying
from replicax._jax import Equation, Jaxpr
from replicax._layout.layout import LogicalAxes, LogicalAxis, Scope
from replicax._typing import Array, Atom, Function

Read = Callable[[Atom], Array]


@dataclass(frozen=True, eq=False)
class Sum:
    """A ``psum`` whose operand is a linear function of matrix products that no other equation uses.

    Attributes:
        eqn: The equation of the ``psum``.
        made: The equations that the sum replaces, by the variable that each defines. For these variables, only the sum
            over lanes is computed.
    """

    eqn: Equation
    made: dict[Atom, Equation]

    @property
    def needs(self) -> set[Atom]:
        """The variables that the replaced equations read, except those that they define."""
        operands = (atom for eqn in self.made.values() for atom in eqn.invars if not _jax.is_literal(atom))
        return {atom for atom in operands if atom not in self.made}

    def run(self, scope: Scope, read: Read) -> Array:
        """Returns the sum over all replicas.

        Raises:
            UnsupportedCollectiveError: The ``psum`` has a parameter of a later JAX version.
        """
        REGISTRY[self.eqn.primitive.name].known(self.eqn.params)
        of_lanes = self._of_lanes(self.eqn.invars[0], scope, read)
        with _jax.equation_context(self.eqn):
            return psum_of_devices(scope, of_lanes, axes=self.eqn.params["axes"])

    def _of_lanes(self, atom: Atom, scope: Scope, read: Read) -> Array:
        axes = self.eqn.params["axes"]
        if atom not in self.made:
            with _jax.equation_context(self.eqn):
                return psum_of_lanes(scope, read(atom), axes=axes)
        eqn = self.made[atom]
        if eqn.primitive.name == "dot_general":
            with _jax.equation_context(eqn):
                return psum_of_product(scope, *map(read, eqn.invars), axes=axes, **eqn.params)
        summands = _summands(eqn)
        args = [self._of_lanes(x, scope, read) if k in summands else read(x) for k, x in enumerate(eqn.invars)]
        with _jax.equation_context(eqn):
            return _jax.bind(eqn, args)[0]


def inline_jits_with_products(jaxpr: Jaxpr, scope: Scope) -> Jaxpr:
    """Returns the open jaxpr. If it sums over lanes, the user's ``jit`` calls that contain products are inlined."""
    inside = _jax.body(jaxpr)
    if any(_sums_lanes(eqn, scope) for eqn in inside.eqns) and any(map(_hides_products, inside.eqns)):
        return _jax.inline(inside, _hides_products)
    return inside


def _hides_products(eqn: Equation) -> bool:
    return eqn.primitive.name == "jit" and "dot_general" in _jax.primitives(eqn.params["jaxpr"])


def find_sums(jaxpr: Jaxpr, scope: Scope, where: Callable[[], dict[Atom, Varying]]) -> dict[int, Sum]:
    """Returns the sums of products in a jaxpr, by the ``id`` of their ``psum`` equation.

    Args:
        jaxpr: The open jaxpr.
        scope: The mapped axes in scope.
        where: Returns the mapped axes over which each value of the jaxpr varies.
    """
    psums = [eqn for eqn in jaxpr.eqns if _sums_lanes(eqn, scope)]
    if not psums or not any(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns):
        return {}
    uses: dict[Atom, int] = {}
    for atom in (*(atom for eqn in jaxpr.eqns for atom in eqn.invars), *jaxpr.outvars):
        if not _jax.is_literal(atom):
            uses[atom] = uses.get(atom, 0) + 1
    makers = {eqn.outvars[0]: eqn for eqn in jaxpr.eqns if len(eqn.outvars) == 1 and uses.get(eqn.outvars[0]) == 1}
    found = {}
    for eqn in psums:
        made: dict[Atom, Equation] = {}
        padded = any(scope[name].padding for name in eqn.params["axes"])
        lanes = frozenset(scope[name] for name in eqn.params["axes"] if scope[name].lane_axis is not None)
        suits = functools.partial(_suits, lanes, where, padded)
        if _finds_products(eqn.invars[0], makers, made, suits):
            found[id(eqn)] = Sum(eqn, made)
    return found


def _suits(lanes: Varying, where: Callable[[], dict[Atom, Varying]], padded: bool, eqn: Equation) -> bool:
    """Whether one product over all lanes is better than a sum of one product per lane.

    Without padding, it may not be: XLA may have to copy an operand, and a few large products may be as fast. With
    padding it is, because XLA cannot combine masked products itself.
    """
    if eqn.outvars[0].aval.dtype.kind == "c" or any(map(_jax.is_literal, eqn.invars)):
        return False
    if not all(lanes <= where()[x] for x in eqn.invars):
        return False
    numbers = eqn.params["dimension_numbers"]
    summed = math.prod(eqn.invars[0].aval.shape[d] for d in numbers[0][0])
    return padded or (sums_leading(numbers) and summed <= math.prod(axis.lanes for axis in lanes))


def _sums_lanes(eqn: Equation, scope: Scope) -> bool:
    """Whether the equation is a ``psum`` over mapped axes only, at least one of which has lanes."""
    if eqn.primitive.name not in ("psum", "psum_invariant") or eqn.params.get("axis_index_groups") is not None:
        return False
    axes = eqn.params["axes"]
    return (
        len(eqn.invars) == 1
        and not is_narrow(eqn.invars[0].aval.dtype, 4)
        and all(name in scope for name in axes)
        and any(scope[name].lane_axis is not None for name in axes)
    )


def _finds_products(
    atom: Atom, makers: dict[Atom, Equation], made: dict[Atom, Equation], suits: Callable[[Equation], bool]
) -> bool:
    """Whether a value is computed from products by linear equations. If so, adds these and the products to ``made``."""
    eqn = None if _jax.is_literal(atom) else makers.get(atom)
    if eqn is None:
        return False
    if eqn.primitive.name == "dot_general":
        found = suits(eqn)
    else:
        among = [_finds_products(eqn.invars[k], makers, made, suits) for k in _summands(eqn)]
        found = any(among)
    if found:
        made[atom] = eqn
    return found


def _summands(eqn: Equation) -> Sequence[int]:
    """Returns the positions of the operands in which an equation is jointly linear."""
    match eqn.primitive.name:
        case "transpose" | "reshape" | "squeeze" | "neg" | "copy":
            return [0]
        case "add_any" | "add" | "sub" if not any(map(_jax.is_literal, eqn.invars)):
            return [0, 1]
        case "mul" if _jax.is_literal(eqn.invars[1]):
            return [0]
        case "mul" if _jax.is_literal(eqn.invars[0]):
            return [1]
        case "div" if _jax.is_literal(eqn.invars[1]) and eqn.outvars[0].aval.dtype.kind not in "iu":
            return [0]
        case "convert_element_type" if eqn.invars[0].aval.dtype == eqn.outvars[0].aval.dtype:
            return [0]
    return []


# ---------------------------------------------------------------------------------------------------------------
# The operations


def psum_of_product(
    logical: LogicalAxes, a: Array, b: Array, *, axes: Names, dimension_numbers: lax.DotDimensionNumbers, **params: Any
) -> Array:
    """Returns ``lax.dot_general(a, b)``, summed over the lanes of a device, as one product over all lanes.

    Padding lanes are zero in both operands, so a NaN in a padding lane does not reach the sum.
    """
    ours = [logical[name] for name in axes]
    lanes = [axis for axis in ours if axis.lane_axis is not None]
    summed, first = tuple(range(len(lanes))), len(lanes)
    contracted, batched = ([tuple(d + first for d in dims) for dims in pair] for pair in dimension_numbers)
    dimensions = tuple((*summed, *dims) for dims in contracted), tuple(batched)

    def product(a: Array, b: Array) -> Array:
        if not sums_leading(dimension_numbers):
            return lax.dot_general(a, b, dimensions, **params)
        count = len(dimensions[0][0])  # merge them: XLA copies an operand if it contracts several dimensions
        a, b = (x.reshape(-1, *x.shape[count:]) for x in (a, b))
        return lax.dot_general(a, b, (((0,), (0,)), ((), ())), **params)

    def of_replicas(x: Array) -> Array:
        return functools.reduce(lambda x, axis: block(axis, x), lanes, where_replica(ours, x))

    if len(ours) == 1 and ours[0].placement.padding_is_last and 0 < 2 * ours[0].padding <= ours[0].lanes:
        return _product_beside_padding(ours[0], product, a, b)
    return product(of_replicas(a), of_replicas(b))


def _product_beside_padding(axis: LogicalAxis, product: Function, a: Array, b: Array) -> Array:
    """Returns a product over lanes, with zeros in the padding lanes of the smaller operand only.

    Used if few lanes of the last device are padding. If the larger operand is finite in the padding lanes, zeros in the
    smaller operand are enough, and the larger one need not be copied.
    """
    own, smaller, lanes = where_replica([axis], jnp.bool_(True)), a.size <= b.size, [block(axis, a), block(axis, b)]
    real = block(axis, own)

    def zeroed(x: Array) -> Array:
        return lax.select(jnp.broadcast_to(real.reshape(-1, *[1] * (x.ndim - 1)), x.shape), x, jnp.zeros_like(x))

    def with_smaller_zeroed(small: Array, large: Array) -> Array:
        return product(small, large) if smaller else product(large, small)

    def with_both_zeroed(small: Array, large: Array) -> Array:
        return with_smaller_zeroed(small, zeroed(large))

    small, large = zeroed(lanes[not smaller]), lanes[smaller]
    finite = jnp.isfinite(large[axis.lanes - axis.padding :]).all()
    return lax.cond(finite, with_smaller_zeroed, with_both_zeroed, small, large)


def sums_leading(dimension_numbers: lax.DotDimensionNumbers) -> bool:
    """Whether a product contracts the leading dimensions of both operands, in order, and has no batch dimensions."""
    contracted, (batched, _) = dimension_numbers
    return not batched and all(tuple(dims) == tuple(range(len(dims))) for dims in contracted)


def psum_of_lanes(logical: LogicalAxes, x: Array, *, axes: Names) -> Array:
    """Returns the sum of ``x`` over the lanes of this device."""
    ours = [logical[name] for name in axes]
    return lax.psum(where_replica(ours, x), tuple(axis.lane_axis for axis in ours if axis.lane_axis is not None))


def psum_of_devices(logical: LogicalAxes, x: Array, *, axes: Names) -> Array:
    """Returns the sum of ``x`` over all devices. ``x`` is a sum over lanes."""
    names = tuple(logical[name].device_axis for name in axes if logical[name].device_axis is not None)
    return lax.psum(x, names) if names else x
