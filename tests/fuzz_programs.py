"""Random programs of one replica, and scripts that compare each of them with an oracle.

A program is data: a tree of lines and local functions, which is printed as Python code and then executed. So a failing
program is a complete script: paste it into a file and run it.

No branch or loop depends on rounding. 32-bit floating-point values stay bounded and never decide a branch; 16-bit
values are small integers, whose sums are exact. Hypothesis makes all random choices, including the number of replicas,
and shrinks failing programs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict, TypeVar, Unpack

import numpy as np
from hypothesis import strategies as st

AXIS = '"i"'
SMOOTH = ("float32", "complex64")
EXACT = ("int32", "bool", "bfloat16", "uint8", "float16", "int8")
SHAPES = ((3,), (), (2,), (2, 3), (3, 2), (4,), (2, 1, 3))
LARGEST = 400  # elements of one value in one replica

#: Helper functions that a program may call, by name.
PRELUDE = {
    "values": '''
def values(seed, dtype, shape):
    """Bounded numbers, small and whole where sums have to be exact."""
    rng = np.random.default_rng(seed)
    if dtype in ("float32", "complex64"):
        real, imaginary = rng.uniform(0.2, 1.2, (2, *shape))
        return (real + 1j * imaginary if dtype == "complex64" else real).astype(dtype)
    return rng.integers(0, 2 if dtype == "bool" else 7, shape).astype(jnp.dtype(dtype))
''',
    "rows": '''
def rows(x, n, axis):
    """n arrays like x, no two the same, along a new axis."""
    k = np.arange(n).reshape([n if d == axis else 1 for d in range(x.ndim + 1)])
    x = jnp.expand_dims(x, axis)
    if x.dtype == bool:
        return x ^ (k % 3 == 1)
    return x * np.cos(k).astype("float32") if x.dtype in ("float32", "complex64") else (x + k.astype(x.dtype)) % 7
''',
    "ragged": '''
def ragged(x, n):
    """Each replica sends every other one a number of rows of x, none to two, that depends on both."""
    me, sizes = lax.axis_index("i"), (np.arange(n)[:, None] + 2 * np.arange(n)) % 3
    starts = lambda s: (np.cumsum(s, 1) - s).astype("int32")
    of_mine = lambda table: jnp.asarray(table, "int32")[me]
    x, out = jnp.resize(x, (2 * n, 2)), jnp.zeros((2 * n, 2), x.dtype)
    offsets = of_mine(starts(sizes)), of_mine(sizes), of_mine(starts(sizes.T).T), of_mine(sizes.T)
    return lax.ragged_all_to_all(x, out, *offsets, axis_name="i")
''',
}


# ---------------------------------------------------------------------------------------------------------------
# Programs as data


@dataclass(frozen=True)
class Line:
    """One statement."""

    text: str

    def lines(self) -> list[str]:
        return [self.text]


@dataclass(frozen=True)
class Function:
    """A local function: its signature, its statements, and the expression that it returns."""

    name: str
    parameters: str
    body: tuple[Line | Function, ...]
    returns: str
    decorator: str = ""

    def lines(self) -> list[str]:
        inner = [line for statement in self.body for line in statement.lines()]
        head = [f"@{self.decorator}"] if self.decorator else []
        inner.append(f"return {self.returns}")
        return [*head, f"def {self.name}({self.parameters}):", *(f"    {line}" for line in inner)]


@dataclass(frozen=True)
class Argument:
    """An argument: its type in one replica, and its mapped axis (None: all replicas get the same array)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    axis: int | None

    def text(self, number: int, replicas: int) -> str:
        shape = list(self.shape)
        if self.axis is not None:
            shape.insert(self.axis if self.axis >= 0 else len(shape) + 1 + self.axis, replicas)
        return f'values({number}, "{self.dtype}", {tuple(shape)})'


@dataclass(frozen=True)
class Program:
    """The program of one replica, and the layout and options with which it is mapped.

    Attributes:
        replicas: The number of replicas.
        devices: The number of devices.
        arguments: The arguments.
        in_dict: Whether the first two arguments are passed in one dict.
        keyword: Whether the last argument is passed by keyword.
        body: The statements.
        results: The name and ``out_axes`` entry of each result.
        axis_size: Whether to pass ``axis_size`` even if an argument is mapped.
        under_jit: Whether the map is called under ``jax.jit``.
        derivatives: Whether to compare ``jax.grad`` of the map.
        beside_pmap: Whether to also compare with ``jax.pmap``, if it can run the program.
        facts: The features of the program, such as its collectives.
    """

    replicas: int
    devices: int
    arguments: tuple[Argument, ...]
    in_dict: bool
    keyword: bool
    body: tuple[Line | Function, ...]
    results: tuple[tuple[str, int | None], ...]
    axis_size: bool
    under_jit: bool
    derivatives: bool
    beside_pmap: bool
    facts: frozenset[str]

    def __str__(self) -> str:
        return self.function.strip()

    __repr__ = __str__

    @functools.cached_property
    def function(self) -> str:
        """The program of one replica, as Python code."""
        names = [a.name for a in self.arguments]
        unpack = [Line(f'{names[0]}, {names[1]} = p["a"], p["b"]')] if self.in_dict else []
        # In 16-bit types, derivatives accumulate too much rounding.
        small = [a.name for a in self.arguments if a.dtype in ("bfloat16", "float16") and self.derivatives]
        unpack += [Line(f"{name} = lax.stop_gradient({name})") for name in small]
        parameters = ", ".join(["p", *names[2:]] if self.in_dict else names)
        returns = "{" + ", ".join(f'"{name}": {name}' for name, _ in self.results) + "}"
        text = "\n".join(Function("program", parameters, (*unpack, *self.body), returns).lines())
        helpers = [code.strip() for name, code in PRELUDE.items() if f"{name}(" in text or name == "values"]
        return "\n\n\n".join([*helpers, text]) + "\n"

    @functools.cached_property
    def call(self) -> dict[str, str]:
        """The arguments and the options of the map, as Python code."""
        arrays = [a.text(k, self.replicas) for k, a in enumerate(self.arguments)]
        axes = [str(a.axis) for a in self.arguments]
        kwargs = {}
        if self.keyword:
            kwargs = {self.arguments[-1].name: arrays.pop()}
            axes.pop()
        if self.in_dict:
            arrays[:2] = [f'{{"a": {arrays[0]}, "b": {arrays[1]}}}']
            axes[:2] = [axes[0] if axes[0] == axes[1] else f'{{"a": {axes[0]}, "b": {axes[1]}}}']
        out_axes = dict(self.results)
        same = len({*out_axes.values()}) == 1
        return {
            "args": "(" + "".join(f"{x}, " for x in arrays) + ")",
            "kwargs": "{" + ", ".join(f'"{name}": {text}' for name, text in kwargs.items()) + "}",
            "in_axes": axes[0]
            if {*axes} == {axes[0]} and "{" not in axes[0]
            else "(" + "".join(f"{x}, " for x in axes) + ")",
            "out_axes": str(next(iter(out_axes.values())) if same else out_axes),
            "axis_size": str(self.replicas if self.needs_size else None),
        }

    @property
    def needs_size(self) -> bool:
        """Whether the map must get ``axis_size``."""
        return self.axis_size or all(a.axis is None for a in self.arguments)

    def script(self, reference: str, derivatives: bool) -> str:
        """The program as a complete script that compares it with a reference."""
        options = "".join(f", {k}={v}" for k, v in self.call.items() if k not in ("args", "kwargs"))
        mapped = "jax.jit(replicax.pmap(...)), here without jit" if self.under_jit else "replicax.pmap(...)"
        return (
            "import jax, jax.numpy as jnp, numpy as np\nfrom jax import lax\nimport replicax.testing\n\n"
            f"replicax.simulate_devices(8)\ninner = replicax.pmap  # or jax.vmap\n\n\n{self.function}\n\n"
            f"# {self.replicas} replicas on {self.devices} devices: {mapped}\n"
            f"replicax.testing.check(program, *{self.call['args']}, kwargs={self.call['kwargs']}, axis_name={AXIS}, "
            f"devices=jax.devices()[:{self.devices}], reference={reference}, derivatives={derivatives}, rtol=1e-3"
            f"{options})\n"
        )


# ---------------------------------------------------------------------------------------------------------------
# Properties of a value, known while a program is written


@dataclass(frozen=True)
class Value:
    """A variable of the program. ``varies``: whether its value differs between replicas; None if unknown."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    varies: bool | None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def either(*varies: bool | None) -> bool | None:
    """Whether a result varies, from whether its operands vary: True, False, or None if unknown."""
    return True if True in varies else (None if None in varies else False)


@dataclass
class Scope:
    """The statements of one function so far, and the variables that the next statement can use."""

    values: list[Value]
    statements: list[Line | Function] = field(default_factory=list)
    depth: int = 0
    smooth: bool = False  # it is differentiated in reverse mode
    together: bool = True  # all replicas run it at the same time
    forward: bool = False  # it is differentiated in forward mode
    batched: bool = False  # it runs under a vmap
    rows: bool = False  # it runs under a vmap with the axis name "j"


#: Binary expressions by dtype, with bounded or exact results.
BINARY = {
    "float32": ("jnp.sin({a} + {b})", "{a} * {b}", "jnp.cos({a} - {b})", "(2 * {a} - {b}) / 3"),
    "complex64": ("({a} + 1j * {b}) / 2", "{a} * {b} / 2", "jnp.conj({a}) - {b} / 4"),
    "int32": ("({a} + {b}) % 7", "{a} * {b} % 5", "{a} - {b}"),
    "uint8": ("{a} + {b}", "{a} ^ {b}"),
    "int8": ("{a} - {b}", "{a} & {b}"),
    "bool": ("{a} ^ {b}", "{a} & {b}", "~{a} | {b}"),
    "bfloat16": ("({a} + {b}) % 7", "{a} * {b} % 5", "jnp.maximum({a}, {b})"),
    "float16": ("({a} + {b}) % 7", "{a} * {b} % 5", "jnp.minimum({a}, {b})"),
}


def bounded(expression: str, dtype: str, by: int = 5) -> str:
    """Scales a sum down to the magnitude of its summands."""
    if dtype in SMOOTH:
        return f"{expression} / {by}"
    return expression if dtype in ("uint8", "int8", "bool") else f"{expression} % 7"


def converted(value: Value, dtype: str) -> str | None:
    """Converts a value to another dtype; None if rounding could change the result."""
    a, of = value.name, value.dtype
    if of == dtype:
        return a
    if of == "float32" and dtype == "complex64":
        return f"lax.complex({a}, jnp.cos({a}))"
    if of == "complex64" and dtype == "float32":
        return f"{a}.real"
    if of in SMOOTH:
        return None
    if dtype in SMOOTH:
        return f'jnp.cos({a}.astype("float32"))' + (" * (1 - 1j)" if dtype == "complex64" else "")
    if dtype == "bool":
        return f"{a} % 2 == 1"
    return f'{a}.astype("{dtype}")' if of == "bool" else f'({a} % 7).astype("{dtype}")'


# ---------------------------------------------------------------------------------------------------------------
# Writing programs


T = TypeVar("T")
Table = Mapping[str, Callable[["Writer", Scope], None]]


class Flags(TypedDict, total=False):
    """The attributes of a scope that a function may set."""

    smooth: bool
    together: bool
    forward: bool
    batched: bool
    rows: bool


class Writer:
    """Writes one random program, statement by statement.

    Args:
        draw: Hypothesis's function for random choices.
        replicas: The number of replicas.
        collectives: Functions that write a collective, by name.
        control: Functions that write control flow, by name.
        plain: Whether to use only operations for which ``jax.vmap`` has correct rules.
    """

    def __init__(
        self, draw: Callable[[Any], Any], replicas: int, collectives: Table, control: Table, *, plain: bool
    ) -> None:
        self.draw = draw
        self.n = replicas
        self.collectives = list(collectives.values())
        self.structures = list(control.values())
        self.plain = plain
        self.facts: set[str] = set()
        self.names = 0
        self.communications = 0

    # Choices ------------------------------------------------------------------------------------------------

    def one_of(self, options: Sequence[T]) -> T:
        return options[self.draw(st.integers(0, len(options) - 1))] if len(options) > 1 else options[0]

    def one_in(self, k: int) -> bool:
        return self.draw(st.integers(0, k - 1)) == k - 1

    def any_value(self, scope: Scope) -> Value:
        return self.one_of(scope.values)

    def value(self, scope: Scope, suits: Callable[[Value], object]) -> Value | None:
        options = [v for v in scope.values if suits(v)]
        return self.one_of(options) if options else None

    def note(self, *facts: str) -> None:
        self.facts.update(facts)

    def beyond_vmap(self) -> bool:
        """Whether the program may use an operation without a correct ``jax.vmap`` rule. If so, notes the use."""
        if not self.plain:
            self.note("lockstep")
        return not self.plain

    def name(self, letter: str) -> str:
        self.names += 1
        return f"{letter}{self.names}"

    # Statements ---------------------------------------------------------------------------------------------

    def assign(self, scope: Scope, text: str, dtype: str, shape: Sequence[int], varies: bool | None) -> None:
        """Appends an assignment, unless its result is too large."""
        if math.prod(shape) <= LARGEST:
            result = Value(self.name("v"), dtype, tuple(shape), varies)
            scope.statements.append(Line(f"{result.name} = {text}"))
            scope.values.append(result)

    def statements(self, scope: Scope, least: int, most: int) -> None:
        kinds = [self.communicate, self.elementwise, self.reshape, self.communicate, self.convert]
        if scope.depth < 3:
            kinds += [self.control, self.control] if scope.depth < 2 else [self.control]
        for k in range(most):
            if not self.draw(_one_more(k < least, lambda: self.one_of(kinds)(scope))):
                break

    def communicate(self, scope: Scope) -> None:
        self.one_of(self.collectives)(self, scope)

    def control(self, scope: Scope) -> None:
        self.one_of(self.structures)(self, scope)

    def elementwise(self, scope: Scope) -> None:
        a = self.any_value(scope)
        b = self.one_of([v for v in scope.values if v.dtype == a.dtype and _fit_together(v.shape, a.shape)])
        text = self.one_of(BINARY[a.dtype]).format(a=a.name, b=b.name)
        self.note(a.dtype)
        self.assign(scope, text, a.dtype, np.broadcast_shapes(a.shape, b.shape), either(a.varies, b.varies))

    def convert(self, scope: Scope) -> None:
        a = self.any_value(scope)
        others = [(d, text) for d in (*SMOOTH, *EXACT) if d != a.dtype and (text := converted(a, d))]
        dtype, text = self.one_of(others)
        self.note(dtype)
        self.assign(scope, text, dtype, a.shape, a.varies)

    def reshape(self, scope: Scope) -> None:
        """A statement that moves elements or reduces a dimension."""
        a = self.value(scope, lambda v: v.shape)
        if a is None:
            a = self.any_value(scope)
            return self.assign(scope, f"jnp.stack([{a.name}, {a.name}])", a.dtype, (2, *a.shape), a.varies)
        first, *rest = a.shape
        mine = f'lax.axis_index("i") % {first}'
        forms: list[tuple[str, Sequence[int], bool | None]] = [
            (f"{a.name}.T", a.shape[::-1], a.varies),
            (f"{a.name}.reshape(-1)", (a.size,), a.varies),
            (f"{a.name}[::-1]", a.shape, a.varies),
            (f"{a.name}[..., -1]", a.shape[:-1], a.varies),
            (f"{a.name}[:{max(first - 1, 1)}]", (max(first - 1, 1), *rest), a.varies),
            (f"{a.name}[:, None]", (first, 1, *rest), a.varies),
            (f"jnp.concatenate([{a.name}, {a.name}[:1]])", (first + 1, *rest), a.varies),
            (f"{a.name}[{mine}]", rest, True),
            (f"lax.dynamic_update_index_in_dim({a.name}, {a.name}[0], {mine}, 0)", a.shape, True),
        ]
        if a.dtype not in ("bool", "uint8", "int8"):
            forms.append((bounded(f"jnp.sum({a.name}, 0, dtype={a.name}.dtype)", a.dtype, first), rest, a.varies))
        if a.dtype in SMOOTH and len(a.shape) == 2:
            forms.append((f"{a.name} @ {a.name}.T / {rest[0]}", (first, first), a.varies))
        text, shape, varies = self.one_of(forms)
        return self.assign(scope, text, a.dtype, shape, varies)

    # Functions ----------------------------------------------------------------------------------------------

    def function(
        self,
        scope: Scope,
        parameters: Sequence[Value],
        results: Sequence[Value | None],
        returns: Callable[[list[str]], str] = ", ".join,
        *,
        closed: bool = False,
        decorator: str = "",
        signature: str = "",
        unpack: Sequence[Line] = (),
        **flags: Unpack[Flags],
    ) -> tuple[str, list[Value]]:
        """Appends a local function with random statements. Returns its name and its results.

        Args:
            scope: The enclosing scope.
            parameters: The parameters.
            results: A value with the required type of each result; None for any type.
            returns: Builds the returned expression from the names of the results.
            closed: Whether the function must not use variables of the enclosing scope.
            decorator: The decorator, as Python code.
            signature: The signature, as Python code, if it differs from the parameters.
            unpack: The statements that unpack the signature into the parameters.
            flags: Attributes of the inner scope that differ from those of the enclosing scope.
        """
        values = [*parameters, *([] if closed else scope.values)]
        inner = replace(scope, values=values, statements=[], depth=scope.depth + 1, **flags)
        before = len(inner.values)
        self.statements(inner, 1, 3 if inner.depth < 2 else 2)
        latest = inner.values[before:][::-1] or list(parameters) or inner.values
        outs = [self.result(latest, list(parameters), like) for like in results]
        text = returns([out.name for out in outs])
        name = self.name("f")
        signature = signature or ", ".join(p.name for p in parameters)
        scope.statements.append(Function(name, signature, (*unpack, *inner.statements), text, decorator))
        return name, outs

    def result(self, latest: Sequence[Value], parameters: Sequence[Value], like: Value | None) -> Value:
        """One of the latest values, converted to the type of ``like``."""
        if like is None:
            return self.one_of(latest[:3])
        options = [(v, text) for v in latest if (text := converted(v, like.dtype))][:3]
        options = options or [(v, text) for v in parameters if (text := converted(v, like.dtype))]
        if not options:
            return Value(f'jnp.zeros({like.shape}, "{like.dtype}")', like.dtype, like.shape, False)
        value, text = self.one_of(options)
        if value.shape != like.shape:
            text = f"jnp.resize({text}, {like.shape})"
        return Value(text, like.dtype, like.shape, value.varies)

    def parameter(self, of: Value, shape: Sequence[int] | None = None, varies: bool | None = None) -> Value:
        """A parameter of a function to which a value, or a part of it, is passed."""
        return Value(self.name("a"), of.dtype, of.shape if shape is None else tuple(shape), varies)

    def number(self, scope: Scope, below: int) -> tuple[str, bool | None]:
        """An integer in [0, below) that does not depend on rounding, and whether it varies."""
        value = self.value(scope, lambda v: v.dtype in EXACT)
        options: list[tuple[str, bool | None]] = [
            (f"jnp.int32({below - 1})", False),
            (f'lax.axis_index("i") % {below}', True),
            (f'lax.psum(lax.axis_index("i"), "i") % {below}', False),
        ]
        if value is not None:
            total = f'jnp.sum({value.name}.astype("int32"))'
            options += [(f"{total} % {below}", value.varies), (f'lax.pmax({total}, "i") % {below}', False)]
        return self.one_of(options)


@st.composite
def _one_more(draw: Callable[[Any], Any], needed: bool, write: Callable[[], None]) -> bool:
    """Writes one statement or none, in a single draw, so that Hypothesis can remove the whole statement."""
    if not needed and draw(st.integers(0, 5)) == 0:
        return False
    write()
    return True


def _fit_together(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(x == y or 1 in (x, y) for x, y in zip(a[::-1], b[::-1], strict=False))
