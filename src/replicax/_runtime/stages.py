"""Ahead-of-time stages: a map traced, lowered and compiled for abstract arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax

from replicax import _jax
from replicax._engine.nested import Recorded
from replicax._engine.replica import describe_type
from replicax._layout.axes import parameter_names
from replicax._messages import report
from replicax._runtime import cpu_threads
from replicax._runtime.arguments import Call, partition
from replicax._runtime.dispatch import Dispatcher
from replicax._runtime.executable import Executable
from replicax._runtime.run import run
from replicax._runtime.signature import Signature, structure_differences, type_name
from replicax._typing import Args, ArrayLike, Function, Kwargs, PyTree
from replicax.errors import AheadOfTimeError, UnsupportedTransformationError


@dataclass(frozen=True)
class Plan:
    """The data that the stages of one program share.

    Attributes:
        dispatcher: The dispatcher of the map, which has its options.
        executable: The program.
        call: The call that the program was built for, with its static arguments.
        signature: The signature of that call.
    """

    dispatcher: Dispatcher
    executable: Executable
    call: Call
    signature: Signature

    @property
    def in_avals(self) -> PyTree:
        """The avals of the arguments, as ``(positional arguments, keyword arguments)`` without static arguments."""
        return self.signature.tree.unflatten([_jax.typeof(leaf.aval) for leaf in self.signature.leaves])

    @property
    def args_info(self) -> PyTree:
        """Like :attr:`in_avals`, with a ``jax.stages.ArgInfo`` per leaf, which also tells whether it is donated."""
        donated = [i in self.executable.spec.inputs.donated for i in range(len(self.signature.leaves))]
        avals = jax.tree.leaves(self.in_avals)
        return self.signature.tree.unflatten(list(map(jax.stages.ArgInfo, avals, donated)))

    def own(self, values: PyTree) -> PyTree:
        """Selects the values for the user's arguments from JAX's values for all inputs of the program."""
        flat, _ = values
        return self.signature.tree.unflatten(flat[: len(self.signature.leaves)])

    @_jax.api_boundary
    def leaves(self, args: Args, kwargs: Kwargs) -> list[ArrayLike]:
        """The validated argument leaves of a call of the compiled program.

        Raises:
            AheadOfTimeError: the program was compiled for other arguments.
        """
        call = self._call(args, kwargs)
        leaves, tree = jax.tree.flatten((call.dynamic, call.kwargs))
        if tree != self.signature.tree:
            raise AheadOfTimeError(
                report(
                    "Function compiled with input pytree does not match the input pytree it was called with. "
                    f"{self.call.name} was compiled for arguments of another pytree structure:",
                    structure_differences(tree, self.signature.tree, self.signature.roots),
                    "Pass arguments with the structure that it was lowered for, or call the map instead, which "
                    "compiles again.",
                )
            )
        self._check_types(leaves)
        return leaves

    def _check_types(self, leaves: Sequence[ArrayLike]) -> None:
        faults, traced = [], []
        for leaf, x in zip(self.signature.leaves, leaves, strict=True):
            if isinstance(x, jax.core.Tracer):
                traced.append(f"{leaf.name} is a tracer")
                continue
            try:
                aval = _jax.typeof(x)
            except (TypeError, ValueError):
                faults.append(f"Argument {leaf.name!r} compiled with {type_name(leaf.aval)}: it {describe_type(x)}")
                continue
            if (aval.shape, aval.dtype) != (leaf.aval.shape, leaf.aval.dtype):
                was, now = type_name(leaf.aval), type_name(aval)
                faults.append(f"Argument {leaf.name!r} compiled with {was} and called with {now}")
        if traced:
            raise AheadOfTimeError(
                report(
                    f"{self.call.name} is a compiled program and cannot be called inside a transformation such as "
                    f"jit, grad or vmap:",
                    traced,
                    "Call the map there, instead of the result of lower(...).compile().",
                )
            )
        if faults:
            raise AheadOfTimeError(
                report(
                    "Argument types differ from the types for which this computation was compiled. The mismatches are:",
                    faults,
                    "Convert the arguments, or call the map instead, which compiles again for new types.",
                )
            )

    def _call(self, args: Args, kwargs: Kwargs) -> Call:
        """The arguments of a call. Static arguments may be passed, as to the map, or left out, as in JAX."""
        chosen = self.dispatcher.options.static
        if len(args) > len(self.call.positions):
            call = partition(self.call.fun, chosen, args, kwargs)
        else:
            given = [(name, type(kwargs[name]), kwargs[name]) for name in chosen.names if name in kwargs]
            rest = {name: value for name, value in kwargs.items() if name not in chosen.names}
            call = Call(self.call.fun, args, self.call.positions, rest, tuple(given))
        expected = {where: value for where, _, value in self.call.static}
        expected |= {name: expected[i] for i, name in chosen.aliases if i in expected}
        expected |= {i: expected[name] for i, name in chosen.aliases if name in expected}
        names = parameter_names(self.call.fun, range(len(args)))
        faults = [
            f"{names[where] if isinstance(where, int) else where} is {value!r:.60}, and "
            + (f"was {expected[where]!r:.60}" if where in expected else "was not passed")
            for where, kind, value in call.static
            if where not in expected or type(expected[where]) is not kind or expected[where] != value
        ]
        if faults:
            raise AheadOfTimeError(
                report(
                    f"{self.call.name} was compiled for other values of its static arguments:",
                    faults,
                    "Leave them out, pass the values that it was lowered with, or call the map instead, which compiles "
                    "again.",
                )
            )
        return call


@_jax.api_boundary
def trace(dispatcher: Dispatcher, fun: Function, args: Args, kwargs: Kwargs) -> Traced:
    """Traces a map for concrete or abstract arguments.

    Raises:
        AheadOfTimeError: the map is inside another map, or closes over a tracer.
    """
    with _jax.own_mesh():
        program, call, signature = dispatcher.describe(fun, args, kwargs)
        closed = program.closed if isinstance(program, Recorded) else program.spec.closed
        held = [x for x in closed if isinstance(x, jax.core.Tracer)]
        if isinstance(program, Recorded) or held:
            raise AheadOfTimeError(
                f"{call.name} cannot be compiled ahead of time here: it "
                + ("closes over a tracer of an enclosing jit, grad or vmap" if held else "is inside another map")
                + ". Lower it outside, with every array that it needs as an argument, or call it."
            )
        traced = program.traced
    return Traced(traced, Plan(dispatcher, program, call, signature))


class Traced:
    """A traced map: the result of ``mapped.trace(...)``.

    It has the attributes of ``jax.stages.Traced``. The jaxpr is the program for all devices. If the devices do not
    divide the replicas evenly, the mapped inputs of the jaxpr have one extra row per padding lane.

    Attributes:
        jaxpr: The program.
        fun_name: The name of the mapped function.
        args_info: The aval of each argument, and whether it is donated.
        in_avals: The aval of each argument.
        in_tree: The pytree structure of ``(positional arguments, keyword arguments)`` without static arguments.
        out_info: The result: a pytree of ``jax.ShapeDtypeStruct`` with shardings.
        out_tree: The pytree structure of the result.
        lanes: How a device runs its replicas: the number of its ``lanes``, and how many run ``at_once``. If these are
            fewer: the number of ``segments``; the number of collectives at which the program is ``cut``; the names of
            the equations that could not be cut, because they have collectives or callbacks inside (``uncut``); and the
            number of collectives ``inside`` of these.
    """

    def __init__(self, traced: jax.stages.Traced, plan: Plan) -> None:
        self._traced = traced
        self._plan = plan
        self.jaxpr = traced.jaxpr
        self.fun_name = plan.call.name
        self.args_info = plan.args_info
        self.in_avals = plan.in_avals
        self.in_tree = plan.signature.tree
        self.out_tree = plan.executable.spec.out_tree
        self.out_info = jax.tree.unflatten(self.out_tree, plan.executable.out_info)
        self.lanes = plan.executable.spec.lanes

    @property
    def donate_argnums(self) -> tuple[int, ...]:
        """The indices of the donated arrays among the leaves of the arguments."""
        return self._plan.executable.spec.inputs.donated

    def lower(
        self, *, lowering_platforms: tuple[str, ...] | None = None, _private_parameters: object = None
    ) -> Lowered:
        """Lowers the program to StableHLO.

        Args:
            lowering_platforms: The platforms to lower for; the platform of the devices by default.

        Returns:
            The lowered program.

        Raises:
            UnsupportedTransformationError: ``jax.export.export``, which passes ``_private_parameters``, got the map
                itself.
        """
        if _private_parameters is not None:
            name = self._plan.executable.spec.name
            raise UnsupportedTransformationError(
                f"{name} is a map, and jax.export.export takes functions of jax.jit: pass jax.jit({name})."
            )
        with _jax.own_mesh():
            return Lowered(self._traced.lower(lowering_platforms=lowering_platforms), self._plan)


class Lowered(jax.stages.Lowered):  # type: ignore[misc]  # JAX's is untyped here
    """A lowered map: the result of ``mapped.lower(...)``.

    It is a ``jax.stages.Lowered`` with ``as_text()``, ``compiler_ir()``, ``cost_analysis()``, ``args_info``,
    ``in_tree`` and ``out_info``. :meth:`compile` returns a program that is called like the map.
    """

    def __init__(self, lowered: jax.stages.Lowered, plan: Plan) -> None:
        super().__init__(_jax.stage_parts(lowered), plan.args_info, plan.executable.spec.out_tree)
        self._lowered = lowered
        self._plan = plan

    @property
    def in_avals(self) -> PyTree:
        """The aval of each argument."""
        return self._plan.in_avals

    def compile(
        self,
        compiler_options: dict[str, str | bool] | None = None,
        *,
        device_assignment: tuple[jax.Device, ...] | None = None,
    ) -> Compiled:
        """Compiles the program for the devices of the map.

        Args:
            compiler_options: XLA options, by name.
            device_assignment: As in ``jax.stages.Lowered.compile``; the devices of the map by default.

        Returns:
            The compiled program, which is called like the map.

        Raises:
            jax.errors.JaxRuntimeError: XLA cannot compile the program, or does not know an option.
        """
        with _jax.own_mesh():
            compiled = self._lowered.compile(compiler_options, device_assignment=device_assignment)
        return Compiled(compiled, self._plan)


class Compiled(jax.stages.Compiled):  # type: ignore[misc]
    """A compiled map: the result of ``mapped.lower(...).compile()``.

    It is called like the map. Arguments may be on any devices; they are moved, padded and donated as in a call of the
    map, and the result has the same structure. Static arguments may be left out. If they are passed, they must equal
    the values that the map was lowered with. It is a ``jax.stages.Compiled`` with ``as_text()``, ``cost_analysis()``,
    ``memory_analysis()``, ``input_shardings``, ``output_shardings`` and ``runtime_executable()``.
    """

    def __init__(self, compiled: jax.stages.Compiled, plan: Plan) -> None:
        executable, constants = _jax.executable_parts(compiled)
        super().__init__(executable, constants, plan.args_info, plan.executable.spec.out_tree)
        self._compiled = compiled
        self._plan = plan
        may_hang = cpu_threads.may_hang(plan.executable.spec.layout.mesh)
        runner = plan.executable.runner(compiled)
        self._run_on: Function = cpu_threads.bounded(runner) if may_hang else runner

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """Runs the program.

        Args:
            args: Positional arguments: arrays of the shapes and dtypes that the map was lowered for.
            kwargs: Keyword arguments, likewise.

        Returns:
            The result of the map.

        Raises:
            AheadOfTimeError: the structure, types or static values of the arguments differ from those that the
                program was compiled for, or an argument is a tracer.
            DeletedArrayError: an array was donated to an earlier call or deleted, or is donated and passed twice.
        """
        plan = self._plan
        leaves = plan.leaves(args, kwargs)
        if _jax.eager():
            return self._run(leaves)
        with jax.ensure_compile_time_eval():  # no argument is a tracer, so run now, even inside a transformation
            return self._run(leaves)

    @_jax.api_boundary
    def _run(self, leaves: Sequence[ArrayLike]) -> PyTree:
        plan = self._plan
        with _jax.own_mesh():
            names = [leaf.name for leaf in plan.signature.leaves]
            results, _ = run(plan.executable, leaves, lambda: names, self._run_on)
        return jax.tree.unflatten(plan.executable.spec.out_tree, results)

    @property
    def in_avals(self) -> PyTree:
        """The aval of each argument."""
        return self._plan.in_avals

    @property
    def input_shardings(self) -> PyTree:
        """The sharding that the program needs for each argument, as ``(positional arguments, keyword arguments)``."""
        return self._plan.own(self._compiled.input_shardings)

    @property
    def input_formats(self) -> PyTree:
        """Like :attr:`input_shardings`, with the layout in memory."""
        return self._plan.own(self._compiled.input_formats)
