"""Sums over replicas of products: found in a program before it is rewritten.

The sum over replicas of each one's gradient of a matrix is the sum of an outer product each. Summed as one product
over all lanes of a device, no replica's own ever exists. XLA finds some of these by itself, but not where padding is
masked, nor where products are added up first.
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
    """A ``psum`` whose operand is made linearly of products that nothing else takes.

    Attributes:
        eqn: Its equation.
        made: The equation of each value that is not made any more, but its sum over lanes.
    """

    eqn: Equation
    made: dict[Atom, Equation]

    @property
    def needs(self) -> set[Atom]:
        """The values that it takes."""
        operands = (atom for eqn in self.made.values() for atom in eqn.invars if not _jax.is_literal(atom))
        return {atom for atom in operands if atom not in self.made}

    def run(self, scope: Scope, read: Read) -> Array:
        """The sum over all replicas.

        Raises:
            UnsupportedCollectiveError: the ``psum`` has a parameter of a later JAX.
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


def in_sight(jaxpr: Jaxpr, scope: Scope) -> Jaxpr:
    """The jaxpr, open; if it has sums over lanes, with the products in sight that a ``jit`` of the user's hides."""
    inside = _jax.body(jaxpr)
    if any(_sums_lanes(eqn, scope) for eqn in inside.eqns) and any(map(_hides_products, inside.eqns)):
        return _jax.inline(inside, _hides_products)
    return inside


def _hides_products(eqn: Equation) -> bool:
    return eqn.primitive.name == "jit" and "dot_general" in _jax.primitives(eqn.params["jaxpr"])


def find_sums(jaxpr: Jaxpr, scope: Scope, where: Callable[[], dict[Atom, Varying]]) -> dict[int, Sum]:
    """The sums of products in a jaxpr, by the ``id`` of their equation.

    Args:
        jaxpr: The jaxpr, open.
        scope: The mapped axes in scope.
        where: Finds out where each of its values varies.
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
    """Whether one product over all lanes is better than the sum of one for each.

    XLA may have to copy an operand, or be as fast with a few large ones; but it cannot look through a mask.
    """
    if eqn.outvars[0].aval.dtype.kind == "c" or any(map(_jax.is_literal, eqn.invars)):
        return False
    if not all(lanes <= where()[x] for x in eqn.invars):
        return False
    numbers = eqn.params["dimension_numbers"]
    summed = math.prod(eqn.invars[0].aval.shape[d] for d in numbers[0][0])
    return padded or (sums_leading(numbers) and summed <= math.prod(axis.lanes for axis in lanes))


def _sums_lanes(eqn: Equation, scope: Scope) -> bool:
    """Whether it is the sum over mapped axes alone, some of which has lanes."""
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
    """Whether products are among what a value is made of; if so, ``made`` gets the equations down to them."""
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
    """In which operands, all at once, an equation is linear."""
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
# As traced operations


def psum_of_product(
    logical: LogicalAxes, a: Array, b: Array, *, axes: Names, dimension_numbers: lax.DotDimensionNumbers, **params: Any
) -> Array:
    """Over a device's lanes, the sum of each replica's ``lax.dot_general(a, b)``: one product, of all lanes.

    Padding lanes are zero in both operands, so that what they hold makes no difference, not even a NaN.
    """
    ours = [logical[name] for name in axes]
    lanes = [axis for axis in ours if axis.lane_axis is not None]
    summed, first = tuple(range(len(lanes))), len(lanes)
    contracted, batched = ([tuple(d + first for d in dims) for dims in pair] for pair in dimension_numbers)
    dimensions = tuple((*summed, *dims) for dims in contracted), tuple(batched)

    def product(a: Array, b: Array) -> Array:
        if not sums_leading(dimension_numbers):
            return lax.dot_general(a, b, dimensions, **params)
        count = len(dimensions[0][0])  # as one dimension: XLA copies an operand that is summed over several
        a, b = (x.reshape(-1, *x.shape[count:]) for x in (a, b))
        return lax.dot_general(a, b, (((0,), (0,)), ((), ())), **params)

    def of_replicas(x: Array) -> Array:
        return functools.reduce(lambda x, axis: block(axis, x), lanes, where_replica(ours, x))

    if len(ours) == 1 and ours[0].placement.padding_is_last and 0 < 2 * ours[0].padding <= ours[0].lanes:
        return _product_beside_padding(ours[0], product, a, b)
    return product(of_replicas(a), of_replicas(b))


def _product_beside_padding(axis: LogicalAxis, product: Function, a: Array, b: Array) -> Array:
    """A product of lanes of which few on the last device are padding, with zeros there in the smaller operand alone.

    That is enough if what the other one has there is finite, and saves a pass over it.
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
    """Whether a product sums over the first dimensions of both operands, in order, and has no others in common."""
    contracted, (batched, _) = dimension_numbers
    return not batched and all(tuple(dims) == tuple(range(len(dims))) for dims in contracted)


def psum_of_lanes(logical: LogicalAxes, x: Array, *, axes: Names) -> Array:
    """The sum over a device's own lanes."""
    ours = [logical[name] for name in axes]
    return lax.psum(where_replica(ours, x), tuple(axis.lane_axis for axis in ours if axis.lane_axis is not None))


def psum_of_devices(logical: LogicalAxes, x: Array, *, axes: Names) -> Array:
    """The sum over devices of what each has summed over its lanes."""
    names = tuple(logical[name].device_axis for name in axes if logical[name].device_axis is not None)
    return lax.psum(x, names) if names else x
