"""Callbacks into Python in a mapped function: if a callback raises in one replica, the call fails on every device.

Before a program is rewritten, each callback becomes a :func:`callback_primitives.guarded` callback. The number of the
first failure is a value of the program: an extra carry of each loop and an extra result of each branch. The module
:mod:`replicax._engine.failures` explains why a callback must not raise at once, and raises the exception at the end.

Forward rules of ``custom_jvp`` and ``custom_vjp`` run only under differentiation. If a map is differentiated from
outside, its program is already lowered. So the forward rules are traced first, to find their callbacks. A reverse rule
cannot return a failure number.

After a failure, callbacks return zeros, so a predicate may differ from that of the other replicas. So if replicas
communicate in a loop or branch, all of them leave the loop or take the first branch after a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from replicax import _jax
from replicax._engine import primitives
from replicax._engine.blocks import lane_position
from replicax._engine.collectives import is_replica
from replicax._engine.failures import NONE, Guarded, raise_failure
from replicax._engine.primitives import callbacks as callback_primitives
from replicax._engine.varying import Varying
from replicax._jax import Equation, Jaxpr
from replicax._layout.layout import LogicalAxis, Scope
from replicax._typing import Array, ArrayLike, Atom, ShapeAndDtype
from replicax.errors import OrderedCallbackError


def refuse_ordered(jaxpr: Jaxpr, name: str) -> None:
    """Refuses callbacks with ``ordered=True``.

    Raises:
        OrderedCallbackError: The program contains an ordered callback.
    """
    found = _find(jaxpr, callback_primitives.is_ordered)
    if found is not None:
        what = {"io_callback": "jax.experimental.io_callback", "debug_print": "jax.debug.print"}
        raise OrderedCallbackError(
            f"{name} calls {what.get(found.primitive.name, 'jax.debug.callback')} with ordered=True, but replicas run "
            f"in parallel, without an order between their callbacks. Leave ordered out. To sort the calls, pass "
            f"jax.lax.axis_index(axis_name) to the callback."
        )


class GuardedProgram(NamedTuple):
    """The program of one replica with guarded callbacks.

    Attributes:
        jaxpr: The program.
        consts: The values of its constants. The constants of the original program come last.
        in_rules: The names of the primitives in the forward rules.
    """

    jaxpr: Jaxpr
    consts: Sequence[ArrayLike]
    in_rules: set[str]


def guard(jaxpr: Jaxpr, consts: Sequence[ArrayLike], axis: LogicalAxis, name: str) -> GuardedProgram | None:
    """Replaces all callbacks in the program of one replica by guarded callbacks. Returns None if there are none.

    Args:
        jaxpr: The program.
        consts: The values of its constants.
        axis: The mapped axis.
        name: The name of the user's function, for error messages.

    Returns:
        A program with one extra result: the number of the first failure in any replica, int32.
    """
    search = _Search({axis.name: axis.size}, rules=not _jax.eager(), in_rules=set())
    if not search.calls_back(jaxpr):
        return None
    guarding = _Guarding(search, name)

    def guarded(*flat: Array) -> list[Array]:
        results, failed = guarding.run(jaxpr, flat[: len(consts)], flat[len(consts) :], jnp.int32(NONE))
        return [*results, lax.pmax(failed, axis.name)]

    body = _jax.body(jaxpr)
    new, own = _jax.trace_flat(guarded, [var.aval for var in [*body.constvars, *body.invars]], {axis.name: axis.size})
    values = [*own, *consts]
    return GuardedProgram(_jax.open_constants(new, values), values, search.in_rules)


class _Search:
    """Finds jaxprs and equations that call back into Python, and the axes over which they communicate.

    Args:
        sizes: The mapped axes in scope, with their sizes.
        rules: Whether to search forward rules, because the map may be differentiated from outside.
        in_rules: The names of the primitives in all forward rules searched so far. The search adds to this set.
    """

    def __init__(self, sizes: Mapping[Hashable, int], *, rules: bool, in_rules: set[str]) -> None:
        self.sizes, self.rules, self.in_rules = sizes, rules, in_rules
        self._calls: dict[int, tuple[Jaxpr | Equation, bool]] = {}
        self._inside: dict[Hashable, _Search] = {}
        self._named: dict[int, tuple[Jaxpr, frozenset[Hashable]]] = {}

    def calls_back(self, jaxpr: Jaxpr) -> bool:
        """Whether a jaxpr contains a callback at any depth."""
        if id(jaxpr) not in self._calls:
            self._calls[id(jaxpr)] = (jaxpr, any(map(self.equation_calls_back, _jax.body(jaxpr).eqns)))
        return self._calls[id(jaxpr)][1]

    def equation_calls_back(self, eqn: Equation) -> bool:
        """Whether an equation is a callback, or contains one at any depth."""
        if callback_primitives.is_callback(eqn):
            return True
        search = self.inside(eqn) if primitives.is_nested_map(eqn) else self
        if any(map(search.calls_back, _jax.sub_jaxprs(eqn))):
            return True
        if not self.rules or not _jax.derivative_rules(eqn):
            return False
        if id(eqn) not in self._calls:
            rule = callback_primitives.forward_rule(eqn, self.sizes)
            # Do not search the rules inside a rule. A rule often calls its own function, so the search would not end.
            itself = _Search(self.sizes, rules=False, in_rules=set())
            self._calls[id(eqn)] = (eqn, rule is not None and itself.calls_back(rule))
            self.in_rules |= _jax.primitives(rule) if rule is not None else set()
        return self._calls[id(eqn)][1]

    def inside(self, eqn: Equation) -> _Search:
        """Returns the search inside a nested map."""
        name, size = eqn.params["name"], eqn.params["size"]
        if (name, size) not in self._inside:
            sizes = {**self.sizes, name: size}
            self._inside[name, size] = _Search(sizes, rules=self.rules, in_rules=self.in_rules)
        return self._inside[name, size]

    def named(self, jaxprs: Sequence[Jaxpr]) -> frozenset[Hashable]:
        """Returns the mapped axes in scope that collectives in the jaxprs name, at any depth."""
        names: frozenset[Hashable] = frozenset()
        for jaxpr in jaxprs:
            if id(jaxpr) not in self._named:
                own: set[Hashable] = set()
                for eqn in _jax.body(jaxpr).eqns:
                    inside = self.named(list(_jax.sub_jaxprs(eqn)))
                    hidden = {eqn.params["name"]} if primitives.is_nested_map(eqn) else set()
                    own |= (inside - hidden) | {name for name in _jax.named_axes(eqn) if name in self.sizes}
                self._named[id(jaxpr)] = (jaxpr, frozenset(own))
            names |= self._named[id(jaxpr)][1]
        return names


class _Guarding:
    """Runs jaxprs with guarded callbacks.

    Args:
        search: Finds the callbacks.
        name: The name of the user's function, for error messages.
    """

    def __init__(self, search: _Search, name: str) -> None:
        self.search, self.name = search, name

    def anywhere(self, failed: Array, jaxprs: Sequence[Jaxpr]) -> Array:
        """Returns the number of the first failure among the replicas that communicate in the jaxprs."""
        names = self.search.named(jaxprs)
        return lax.pmax(failed, tuple(name for name in self.search.sizes if name in names)) if names else failed

    def run(
        self, jaxpr: Jaxpr, consts: Sequence[ArrayLike], args: Sequence[ArrayLike], failed: Array
    ) -> tuple[list[Array], Array]:
        """Runs a jaxpr on the values of one replica.

        Args:
            jaxpr: The program.
            consts: The values of its constants.
            args: The values of its arguments.
            failed: The number of an earlier failure, int32.

        Returns:
            The values of its results, and the number of the first failure so far.
        """
        body = _jax.body(jaxpr)
        env = dict(zip([*body.constvars, *body.invars], [*consts, *args], strict=True))

        def read(atom: Atom) -> ArrayLike:
            return atom.val if _jax.is_literal(atom) else env[atom]

        for eqn in body.eqns:
            with _jax.equation_context(eqn):
                results, failed = self._equation(eqn, list(map(read, eqn.invars)), failed)
            env.update(zip(eqn.outvars, results, strict=True))
        return list(map(read, body.outvars)), failed

    def _equation(self, eqn: Equation, args: list[ArrayLike], failed: Array) -> tuple[list[Array], Array]:
        if callback_primitives.is_callback(eqn):
            results, number = callback_primitives.guarded(eqn, args, failed, self.name)
            return results, jnp.maximum(failed, number)
        subs = list(_jax.sub_jaxprs(eqn))
        calls = self.search.equation_calls_back(eqn)
        kind = eqn.primitive.name
        if kind in ("while", "cond") and (calls or self.search.named(subs)):
            return {"while": self._while, "cond": self._cond}[kind](eqn, args, failed)
        if _jax.derivative_rules(eqn) and calls:
            return callback_primitives.bind_custom(eqn, args, failed, self.run)
        bind = {"jit": self._jit, "scan": self._scan, "remat2": self._checkpoint, "nested_map": self._nested}.get(kind)
        if calls and bind is not None:
            return bind(eqn, args, failed)
        return _jax.bind(eqn, args), failed

    def _jit(self, eqn: Equation, args: list[ArrayLike], failed: Array) -> tuple[list[Array], Array]:
        (inner,) = _jax.sub_jaxprs(eqn)
        return self.run(inner, _jax.constants(inner), args, failed)

    def _scan(self, eqn: Equation, args: list[ArrayLike], failed: Array) -> tuple[list[Array], Array]:
        (body,), (consts, carries) = _jax.sub_jaxprs(eqn), _jax.loop_counts(eqn)

        def step(state: tuple[list[Array], Array], xs: list[Array]) -> tuple[tuple[list[Array], Array], list[Array]]:
            carry, failed = state
            results, failed = self.run(body, _jax.constants(body), [*args[:consts], *carry, *xs], failed)
            return (_like(results[:carries], carry), failed), results[carries:]

        options = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
        carry = _arrays(args, eqn)[consts : consts + carries]
        (carry, failed), ys = lax.scan(step, (carry, failed), args[consts + carries :], **options)
        return [*carry, *ys], failed

    def _while(self, eqn: Equation, args: list[ArrayLike], failed: Array) -> tuple[list[Array], Array]:
        """Runs a loop that ends after a failure in its replica, or in any replica that it communicates with."""
        cond, body = _jax.sub_jaxprs(eqn)
        first, last = eqn.params["cond_nconsts"], eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]

        def goes_on(carry: Sequence[Array], failed: Array) -> tuple[Array, Array]:
            (on,), failed = self.run(cond, _jax.constants(cond), [*args[:first], *carry], failed)
            failed = self.anywhere(failed, (cond, body))
            return on & (failed == NONE), failed

        def step(state: tuple[Array, list[Array], Array]) -> tuple[Array, list[Array], Array]:
            _, carry, failed = state
            results, failed = self.run(body, _jax.constants(body), [*args[first:last], *carry], failed)
            on, failed = goes_on(results, failed)
            return on, _like(results, carry), failed

        carry = _arrays(args, eqn)[last:]
        on, failed = goes_on(carry, failed)
        _, carry, failed = lax.while_loop(lambda state: state[0], step, (on, carry, failed))
        return carry, failed

    def _cond(self, eqn: Equation, args: list[ArrayLike], failed: Array) -> tuple[list[Array], Array]:
        """Runs a ``cond``. If its replicas communicate, all of them take the first branch after a failure."""
        branches, (index, *operands) = list(_jax.sub_jaxprs(eqn)), args

        def branch(jaxpr: Jaxpr) -> Callable[..., tuple[list[Array], Array]]:
            def run(failed: Array, *operands: Array) -> tuple[list[Array], Array]:
                results, failed = self.run(jaxpr, _jax.constants(jaxpr), operands, failed)
                return [
                    _jax.as_type(_jax.as_array(x, var.aval), var.aval)
                    for x, var in zip(results, eqn.outvars, strict=True)
                ], failed

            return run

        if self.search.named(branches):
            failed = self.anywhere(failed, branches)
            index = lax.select(failed == NONE, index, jnp.zeros_like(index))
        return lax.switch(index, list(map(branch, branches)), failed, *operands)

    def _checkpoint(self, eqn: Equation, args: list[ArrayLike], failed: Array) -> tuple[list[Array], Array]:
        (inner,), cse = _jax.sub_jaxprs(eqn), eqn.params["prevent_cse"]
        run = jax.checkpoint(
            lambda failed, *args: self.run(inner, _jax.constants(inner), args, failed),
            prevent_cse=cse if isinstance(cse, bool) else any(cse),
            policy=eqn.params["policy"],
        )
        return run(failed, *args)

    def _nested(self, eqn: Equation, args: list[ArrayLike], failed: Array) -> tuple[list[Array], Array]:
        """Runs a nested map. All its replicas get ``failed``. The returned failure is the first in any replica."""
        (inner,), (name, size) = _jax.sub_jaxprs(eqn), (eqn.params["name"], eqn.params["size"])
        inside = _Guarding(self.search.inside(eqn), self.name)

        def guarded(failed: Array, *args: Array) -> list[Array]:
            results, failed = inside.run(inner, _jax.constants(inner), args, failed)
            return [*results, lax.pmax(failed, name)]

        avals = [_jax.typeof(failed), *(var.aval for var in _jax.body(inner).invars)]
        jaxpr, consts = _jax.trace_flat(guarded, avals, {name: size})
        *results, failed = primitives.nested_map(
            jaxpr,
            [*consts, failed, *args],
            name=name,
            size=size,
            in_axes=[*[None] * (len(consts) + 1), *eqn.params["in_axes"]],
            out_axes=[*eqn.params["out_axes"], None],
        )
        return results, failed


def _find(jaxpr: Jaxpr, wanted: Callable[[Equation], bool]) -> Equation | None:
    """Returns the first equation in a jaxpr, at any depth, for which ``wanted`` is true."""
    for eqn in _jax.body(jaxpr).eqns:
        if wanted(eqn):
            return eqn
        for sub in _jax.sub_jaxprs(eqn):
            if (found := _find(sub, wanted)) is not None:
                return found
    return None


def _arrays(args: Sequence[ArrayLike], eqn: Equation) -> list[Array]:
    """Returns the operands of a loop as arrays with the types that its equation records."""
    return [_jax.as_type(_jax.as_array(x, v.aval), v.aval) for x, v in zip(args, eqn.invars, strict=True)]


def _like(results: Sequence[ArrayLike], carry: Sequence[Array]) -> list[Array]:
    """Returns the results of a loop body with the types of the carry."""
    return [_jax.as_type(_jax.as_array(x, _jax.typeof(y)), _jax.typeof(y)) for x, y in zip(results, carry, strict=True)]


# ---------------------------------------------------------------------------------------------------------------
# On lanes and devices


def call_guarded(scope: Scope, eqn: Equation, args: Sequence[ArrayLike], varying: Varying) -> list[Array]:
    """Calls a guarded callback once for each replica; a pure one once for each device if its operands do not vary.

    A callback with a side effect runs exactly once for each replica: not in padding lanes, and on one of the devices
    that run the same replica (those for nested maps).

    Args:
        scope: The mapped axes in scope.
        eqn: The equation of the guarded callback.
        args: The number of an earlier failure, then the operands of the callback.
        varying: The mapped axes over which the operands vary.
    """
    failed, *operands = args
    name, eqn, avals = eqn.params["name"], eqn.params["eqn"], [var.aval for var in eqn.invars[1:]]
    operands = [_jax.as_array(x, aval) for x, aval in zip(operands, avals, strict=True)]
    lanes = tuple(axis.lane_axis for axis in scope.axes if axis.lane_axis is not None)
    # One failure number for all lanes: a batched operand would change how vmap batches the callback.
    failed = lax.pmax(failed, lanes) if lanes else failed
    # JAX refuses to batch such a callback. Its operands may be equal in all lanes although they depend on values that
    # are not, as in equinox.error_if, which calls back if any element of the batch is wrong.
    never_batched = eqn.primitive.name == "pure_callback" and eqn.params.get("vmap_method") is None
    function, results, has_effect = callback_primitives.callback_of(eqn)
    places, widths = [], []
    for axis in scope.axes:
        each = axis.lane_axis is None or has_effect or (axis in varying and not never_batched)
        device = jnp.int32(0) if axis.device_axis is None else lax.axis_index(axis.device_axis)
        places.append(lane_position(axis) if each else device * axis.lanes)
        widths.append(1 if each else axis.lanes)
    runs = runs_here(scope) if has_effect else []
    guarded = Guarded(function, results, tuple(map(_rank, avals)), scope.axes, tuple(widths), bool(runs), name)
    outs = callback_primitives.call(eqn, guarded, [failed, *places, *runs, *operands])
    if has_effect:
        for copy in scope.copies:  # devices that did not run the callback have zeros
            outs = [primitives.total(x, copy) for x in outs]
    elif scope.copies:
        outs[-1] = lax.pmax(outs[-1], scope.copies)  # all devices ran the callback, and must agree on whether it failed
    return outs


def _rank(aval: ShapeAndDtype) -> int:
    """The number of dimensions of an operand as a callback gets it: of a typed PRNG key, its data."""
    if not jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return len(aval.shape)
    return len(jax.eval_shape(jax.random.key_data, aval).shape)


def runs_here(scope: Scope) -> list[Array]:
    """Returns whether this lane on this device runs the side effects of its replica, as a list of one bool scalar.

    The list is empty if all lanes on all devices run them.
    """
    conditions = [is_replica(axis) for axis in scope.axes if axis.padding]
    conditions += [lax.axis_index(name) == 0 for name in scope.copies]
    for condition in conditions[1:]:
        conditions[0] = conditions[0] & condition
    return conditions[:1]


def raise_after(results: Sequence[Array], failed: Array) -> None:
    """Raises a failure on every device, after the last collective.

    Args:
        results: The device's blocks of all results. The callback that raises takes them as operands, so it runs last.
        failed: The number of the failure, equal on all devices.
    """
    waits = [_first(x) for x in results if x.size]
    lax.cond(
        jnp.max(failed) != NONE,
        lambda: callback_primitives.effect(raise_failure, failed, *waits),
        lambda: None,
    )
    if jax.config.jax_disable_jit:
        jax.effects_barrier()  # without jit, the results are computed apart from the callback that raises


def _first(x: Array) -> Array:
    """Returns the first element of an array as float32, a dtype that every callback accepts."""
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    first = lax.slice_in_dim(lax.stop_gradient(x).reshape(-1), 0, 1)
    return (first.real if jnp.iscomplexobj(first) else first).astype(jnp.float32)


def called_once(scope: Scope, eqn: Equation, args: Sequence[ArrayLike]) -> list[Array]:
    """Binds a callback with a side effect so that it runs once for each replica."""
    (runs,) = runs_here(scope)
    results = _jax.bind_callback_where(eqn, args, runs)
    for name in scope.copies:  # devices that did not run the callback have zeros
        results = [primitives.total(x, name) for x in results]
    return results
