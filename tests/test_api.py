"""The public surface, pinned; and the layers of the code, read off its syntax trees."""

import ast
import pathlib

import replicax
import replicax.compat
import replicax.testing

SOURCE = pathlib.Path(replicax.__file__).parent

PUBLIC = {
    "AheadOfTimeError", "ArgumentNameError", "AxisSpecError", "AxisSpecTypeError", "CallbackError",
    "CollectiveArgumentError",
    "DeletedArrayError", "DevicesError", "DivergentOutputError", "MappedFunction", "MappedSizeError", "MismatchError",
    "NestedMapError", "NotAFunctionError", "NotAnArrayError", "NumberTooLargeError", "OptionTypeError",
    "OrderedCallbackError", "ReplicasError", "ReplicaxError", "ShardsError", "SimulationError", "StaticArgumentError",
    "UnboundAxisError", "UnconvertedArrayError", "UnknownBackendError", "UnsupportedCallbackError",
    "UnsupportedCollectiveError", "UnsupportedDtypeError",
    "UnsupportedTransformationError", "fetch", "local_replicas",
    "pmap", "replicate", "shard", "show_replicas", "simulate_devices", "unreplicate",
}  # fmt: skip

MODULES = {"compat", "testing"}

#: From the top down: a module imports only from layers below its own, or nothing of its own layer but in order.
LAYERS = [
    "compat.__main__", "compat._install", "compat._helpers", "compat._bootstrap", "compat._functions",
    "compat._virtual",
    "testing._check", "testing._lockstep", "_report", "_replicas", "_devices", "_pmap", "_stages", "_dispatch",
    "_call_path", "_build", "_packing", "_run", "_taken", "_transfer", "_executable", "_lowering", "_options", "_spec",
    "_arguments", "_replica", "_references", "_shard_maps", "_rewrite", "_callbacks", "_sums",
    "_varying",
    "_engine.collectives", "_engine.collectives.transposes", "_engine.collectives.gathers",
    "_engine.collectives.permutations", "_engine.collectives.reductions", "_engine.collectives.index",
    "_engine.collectives.replicas", "_engine.collectives.arguments", "_engine.collectives.definitions",
    "_engine.collectives.wire", "_engine.collectives.registry", "_engine",
    "_reductions", "_levels", "_blocks", "_exchange", "_signature", "_axes", "_vmappable", "_failures",
    "_layout", "_cpu_threads", "_cpp", "_callback_primitives", "_primitives", "_placement", "_jax", "_errors",
]  # fmt: skip


def test_the_public_names():
    assert {name for name in vars(replicax) if not name.startswith("_") and name not in MODULES} == PUBLIC
    assert {name for name in vars(replicax.testing) if not name.startswith("_")} == {
        "MismatchError",
        "check",
        "lockstep",
    }
    assert {name for name in vars(replicax.compat) if not name.startswith("_")} == {
        "device_put_replicated", "device_put_sharded", "install", "installed", "pmap", "uninstall",
    }  # fmt: skip


def test_star_imports_take_the_public_names():
    assert set(replicax.__all__) == PUBLIC | MODULES
    for module in (replicax, replicax.compat, replicax.testing):
        public = {name for name in vars(module) if not name.startswith("_")}
        assert set(module.__all__) == public - (set() if module is replicax else MODULES)


def test_every_public_name_is_documented():
    for module in (replicax, replicax.testing, replicax.compat):
        for name in vars(module):
            thing = getattr(module, name)
            if not name.startswith("_") and name not in MODULES:
                assert thing.__doc__, name


def modules():
    """All modules; of packages, those of the engine, by their own names."""
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        if path.name != "__init__.py" or parts[0] == "_engine":
            yield ".".join(part for part in parts if part != "__init__"), ast.parse(path.read_text())


def test_imports_go_down_the_layers():
    seen = set()
    for name, tree in modules():
        seen.add(name)
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("replicax"):
                continue
            bases = (
                [node.module.removeprefix("replicax").lstrip(".")]
                if node.module != "replicax"
                else [alias.name for alias in node.names]
            )
            for base in bases:
                assert LAYERS.index(base) > LAYERS.index(name), f"{name} imports {base}"
    assert seen == set(LAYERS)


def test_no_import_hides_in_a_function():
    for name, tree in modules():
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                hidden = [n for n in ast.walk(function) if isinstance(n, ast.Import | ast.ImportFrom)]
                assert not hidden, f"{name}.{function.name}"


def test_one_door_to_jax_from_within():
    for name, tree in modules():
        for node in ast.walk(tree):
            imported = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            private = [m for m in imported if m.startswith(("jax._src", "jax.extend", "jax.interpreters"))]
            assert not private or name in ("_cpp", "_jax", "_callback_primitives", "_primitives"), (
                f"{name} imports {private}"
            )


def test_the_reference_matches_axes_by_itself():
    tree = dict(modules())["testing._lockstep"]
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"replicax._axes", "replicax._vmappable", "replicax._layout"}


def test_init_modules_only_re_export():
    for path in SOURCE.rglob("__init__.py"):
        for node in ast.parse(path.read_text()).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            version = isinstance(node, ast.Assign) and node.targets[0].id in ("__version__", "__all__")
            assert isinstance(node, ast.ImportFrom) or docstring or version
