"""Programs ahead of time: traced, lowered and compiled for arguments that need not be there yet."""

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
from replicax.errors import AheadOfTimeError


@dataclass(frozen=True)
class Plan:
    """What one program is for, shared by its stages.

    Attributes:
        dispatcher: Knows the options.
        executable: The program.
        call: The call that it was made for, with its static arguments.
        signature: The types of that call's other arguments.
    """

    dispatcher: Dispatcher
    executable: Executable
    call: Call
    signature: Signature

    @property
    def in_avals(self) -> PyTree:
        """The types of the arguments, as ``(positional arguments, keyword arguments)``, static ones left out."""
        return self.signature.tree.unflatten([_jax.typeof(leaf.aval) for leaf in self.signature.leaves])

    @property
    def args_info(self) -> PyTree:
        """The same, and whether each is donated."""
        donated = [i in self.executable.spec.inputs.donated for i in range(len(self.signature.leaves))]
        avals = jax.tree.leaves(self.in_avals)
        return self.signature.tree.unflatten(list(map(jax.stages.ArgInfo, avals, donated)))

    def own(self, values: PyTree) -> PyTree:
        """Of something that JAX knows of every array the program takes: that of the user's arguments."""
        flat, _ = values
        return self.signature.tree.unflatten(flat[: len(self.signature.leaves)])

    @_jax.api_boundary
    def leaves(self, args: Args, kwargs: Kwargs) -> list[ArrayLike]:
        """The arguments of a call of the compiled program, checked.

        Raises:
            AheadOfTimeError: the program was compiled for others.
        """
        call = self._call(args, kwargs)
        leaves, tree = jax.tree.flatten((call.dynamic, call.kwargs))
        if tree != self.signature.tree:
            raise AheadOfTimeError(
                report(
                    "Function compiled with input pytree does not match the input pytree it was called with. "
                    f"{self.call.name} was compiled for arguments of another structure:",
                    structure_differences(tree, self.signature.tree, self.signature.roots),
                    "Pass arguments that nest as those that it was lowered for, or call the map itself.",
                )
            )
        self._check_types(leaves)
        return leaves

    def _check_types(self, leaves: Sequence[ArrayLike]) -> None:
        faults, traced = [], []
        for leaf, x in zip(self.signature.leaves, leaves, strict=True):
            if isinstance(x, jax.core.Tracer):
                traced.append(f"{leaf.name} is a value of that transformation")
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
                    f"{self.call.name} is compiled, and was called inside a transformation such as jit, grad or "
                    f"vmap, which needs the program itself:",
                    traced,
                    "Call the map there, instead of what its lower(...).compile() returned.",
                )
            )
        if faults:
            raise AheadOfTimeError(
                report(
                    "Argument types differ from the types for which this computation was compiled. The mismatches are:",
                    faults,
                    "Convert the arguments, or call the map itself, which compiles for new types.",
                )
            )

    def _call(self, args: Args, kwargs: Kwargs) -> Call:
        """The arguments, which may come with the static ones, as in a call of the map, or without, as in JAX."""
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
                    "Leave them out, pass those that it was lowered with, or call the map itself.",
                )
            )
        return call


@_jax.api_boundary
def trace(dispatcher: Dispatcher, fun: Function, args: Args, kwargs: Kwargs) -> Traced:
    """Traces a map for arguments, or types of arguments.

    Raises:
        AheadOfTimeError: the program is part of an enclosing transformation.
    """
    with _jax.own_mesh():
        program, call, signature = dispatcher.describe(fun, args, kwargs)
        closed = program.closed if isinstance(program, Recorded) else program.spec.closed
        held = [x for x in closed if isinstance(x, jax.core.Tracer)]
        if isinstance(program, Recorded) or held:
            raise AheadOfTimeError(
                f"{call.name} cannot be compiled ahead of time here: it "
                + ("closes over a value of an enclosing jit, grad or vmap" if held else "is inside another map")
                + ". Lower it outside, with all that it needs among its arguments, or call it."
            )
        traced = program.traced
    return Traced(traced, Plan(dispatcher, program, call, signature))


class Traced:
    """A map traced for the types of its arguments: what ``mapped.trace(...)`` returns.

    It has what ``jax.stages.Traced`` has. The program is the one that the devices run together: where they do not
    divide the replicas evenly, its mapped arguments have a row for each padding lane.

    Attributes:
        jaxpr: The program.
        fun_name: The name of the mapped function.
        args_info: The type of each argument, and whether it is donated.
        in_avals: The type of each argument.
        in_tree: How they nest: ``(positional arguments, keyword arguments)``, static ones left out.
        out_info: The result: a tree of ``jax.ShapeDtypeStruct`` that say how it lies over the devices.
        out_tree: How it nests.
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
        self.out_info = jax.tree.unflatten(self.out_tree, traced.out_info)

    @property
    def donate_argnums(self) -> tuple[int, ...]:
        """The positions of the donated arrays among all that the arguments hold."""
        return self._plan.executable.spec.inputs.donated

    def lower(self, *, lowering_platforms: tuple[str, ...] | None = None) -> Lowered:
        """Lowers it to StableHLO.

        Args:
            lowering_platforms: The platforms to lower for; that of the devices by default.

        Returns:
            The lowered program, not compiled yet.
        """
        with _jax.own_mesh():
            return Lowered(self._traced.lower(lowering_platforms=lowering_platforms), self._plan)


class Lowered(jax.stages.Lowered):  # type: ignore[misc]  # JAX's is untyped here
    """A map lowered for the types of its arguments: what ``mapped.lower(...)`` returns.

    It is a ``jax.stages.Lowered``: ``as_text()``, ``compiler_ir()``, ``cost_analysis()``, ``args_info``, ``in_tree``,
    ``out_info``. Its :meth:`compile` gives a program that is called like the map itself.
    """

    def __init__(self, lowered: jax.stages.Lowered, plan: Plan) -> None:
        super().__init__(_jax.stage_parts(lowered), plan.args_info, plan.executable.spec.out_tree)
        self._lowered = lowered
        self._plan = plan

    @property
    def in_avals(self) -> PyTree:
        """The type of each argument."""
        return self._plan.in_avals

    def compile(
        self,
        compiler_options: dict[str, str | bool] | None = None,
        *,
        device_assignment: tuple[jax.Device, ...] | None = None,
    ) -> Compiled:
        """Compiles the program for the map's devices.

        Args:
            compiler_options: Options of XLA's, by name.
            device_assignment: As for ``jax.stages.Lowered.compile``; the map's devices by default.

        Returns:
            The program, called like the map itself.
        """
        with _jax.own_mesh():
            compiled = self._lowered.compile(compiler_options, device_assignment=device_assignment)
        return Compiled(compiled, self._plan)


class Compiled(jax.stages.Compiled):  # type: ignore[misc]
    """A map compiled for the types of its arguments: what ``mapped.lower(...).compile()`` returns.

    It is called like the map itself: the arguments may lie anywhere and are moved, padded and donated as there, and
    the result has the same structure. Static arguments may be passed, and have to be what the map was lowered with,
    or left out. It is also a ``jax.stages.Compiled``: ``as_text()``, ``cost_analysis()``, ``memory_analysis()``,
    ``input_shardings``, ``output_shardings``, ``runtime_executable()``.
    """

    def __init__(self, compiled: jax.stages.Compiled, plan: Plan) -> None:
        executable, constants = _jax.executable_parts(compiled)
        super().__init__(executable, constants, plan.args_info, plan.executable.spec.out_tree)
        self._compiled = compiled
        self._plan = plan
        may_hang = cpu_threads.may_hang(plan.executable.spec.layout.mesh)
        self._run_on: Function = cpu_threads.bounded(compiled) if may_hang else compiled

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """Runs the program.

        Raises:
            AheadOfTimeError: the arguments are not of the structure, types and static values that it was compiled
                for, or belong to a transformation.
            DeletedArrayError: an array was donated before, or is donated and passed twice.
        """
        plan = self._plan
        leaves = plan.leaves(args, kwargs)
        if _jax.eager():
            return self._run(leaves)
        with jax.ensure_compile_time_eval():  # a transformation goes on around it, and is not concerned
            return self._run(leaves)

    def _run(self, leaves: Sequence[ArrayLike]) -> PyTree:
        plan = self._plan
        with _jax.own_mesh():
            names = [leaf.name for leaf in plan.signature.leaves]
            results, _ = run(plan.executable, leaves, lambda: names, self._run_on)
        return jax.tree.unflatten(plan.executable.spec.out_tree, results)

    @property
    def in_avals(self) -> PyTree:
        """The type of each argument."""
        return self._plan.in_avals

    @property
    def input_shardings(self) -> PyTree:
        """Where the program wants each argument, as ``(positional arguments, keyword arguments)``."""
        return self._plan.own(self._compiled.input_shardings)

    @property
    def input_formats(self) -> PyTree:
        """Where it wants them, and in which layout in memory."""
        return self._plan.own(self._compiled.input_formats)
