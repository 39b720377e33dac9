"""Pins the public API, and checks the layers of the code on its syntax trees."""

import ast
import functools
import graphlib
import pathlib
import sys

import pytest

import replicax
import replicax.compat
import replicax.testing
import replicax_cli

SOURCE = pathlib.Path(replicax.__file__).parent

PUBLIC = {
    "MappedFunction", "fetch", "local_replicas", "pmap", "replicate", "shard", "show_replicas", "simulate_devices",
    "to_global", "to_local", "tune", "unreplicate",
}  # fmt: skip

MODULES = {"compat", "distributed", "errors", "testing"}

#: The layers from the top down, as folders and modules. A module imports only from its own layer or a lower one.
ROOMS = [
    "compat", "testing", "distributed", "_report", "_tune", "_arrays", "_global_arrays", "_devices", "_pmap",
    "_runtime", "_engine", "_engine.primitives", "_layout", "_jax", "_messages", "_typing", "_version", "errors",
]  # fmt: skip

#: The layers that may import non-public JAX.
DOORS = {"_jax"}


def test_the_public_names():
    assert {name for name in vars(replicax) if not name.startswith("_") and name not in MODULES} == PUBLIC
    assert {name for name in vars(replicax.testing) if not name.startswith("_")} == {
        "Divergence",
        "MismatchError",
        "Processes",
        "check",
        "fingerprint",
        "first_divergence",
        "lockstep",
        "processes",
    }
    assert {name for name in vars(replicax.distributed) if not name.startswith("_")} == {
        "heartbeat", "initialize", "pad_rows", "replicas",
    }  # fmt: skip
    assert {name for name in vars(replicax.compat) if not name.startswith("_")} == {
        "device_put_replicated", "device_put_sharded", "install", "installed", "pmap", "uninstall",
    }  # fmt: skip


def test_star_imports_take_the_public_names():
    assert set(replicax.__all__) == PUBLIC | MODULES
    for module in (replicax, replicax.compat, replicax.distributed, replicax.testing):
        public = {name for name in vars(module) if not name.startswith("_")}
        assert set(module.__all__) == public - (set() if module is replicax else MODULES)


def test_the_exceptions_are_found_where_they_were():
    for name, kind in vars(replicax.errors).items():
        if isinstance(kind, type):
            assert getattr(replicax, name) is kind
            assert issubclass(kind, replicax.errors.ReplicaxError)
    with pytest.raises(AttributeError, match="module 'replicax' has no attribute 'nothing'"):
        replicax.nothing  # noqa: B018


def test_every_public_name_is_documented():
    for module in (replicax, replicax.errors, replicax.testing, replicax.compat, replicax.distributed):
        for name in vars(module):
            thing = getattr(module, name)
            if not name.startswith("_") and name not in MODULES:
                assert thing.__doc__, name


@functools.cache
def modules():
    """The name and the syntax tree of each module of the package."""
    paths = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")
    names = [".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in paths]
    return [(name, ast.parse(path.read_text())) for name, path in zip(names, paths, strict=True)]


def room(module):
    """The layer of a module: the longest entry of ``ROOMS`` that is a prefix of its name."""
    found = [r for r in ROOMS if module == r or module.startswith(f"{r}.")]
    assert found, f"{module} is in no room"
    return max(found, key=len)


def imported(tree):
    """Yields the modules of the package that a module imports."""
    names = {name for name, _ in modules()}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "replicax":
            base = node.module.removeprefix("replicax").lstrip(".")
            for alias in node.names:
                inside = f"{base}.{alias.name}".lstrip(".")
                if inside in names or base:
                    yield inside if inside in names else base
                elif f"{alias.name}.__init__" in names:
                    yield alias.name


def test_imports_go_down_the_rooms():
    for name, tree in modules():
        for other in imported(tree):
            assert ROOMS.index(room(other)) >= ROOMS.index(room(name)), f"{name} imports {other}"


def test_imports_have_no_cycle():
    graph = {name: set(imported(tree)) for name, tree in modules()}
    graphlib.TopologicalSorter(graph).prepare()


def test_no_import_hides_in_a_function():
    for name, tree in modules():
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                hidden = [n for n in ast.walk(function) if isinstance(n, ast.Import | ast.ImportFrom)]
                assert not hidden, f"{name}.{function.name}"


def test_the_command_imports_only_the_standard_library():
    """Its start would take a second more otherwise."""
    for path in pathlib.Path(replicax_cli.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names | {"replicax_cli"}, path.name


def test_one_door_to_jax_from_within():
    for name, tree in modules():
        for node in ast.walk(tree):
            imported = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            private = [m for m in imported if m.startswith(("jax._src", "jax.extend", "jax.interpreters"))]
            assert not private or room(name) in DOORS, f"{name} imports {private}"


def test_one_file_asks_for_the_version_of_jax():
    for name, tree in modules():
        asked = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert name == "_jax.versions" or not asked & {"__version__", "__version_info__"}, name


def test_the_reference_matches_axes_by_itself():
    tree = dict(modules())["testing._lockstep"]
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"replicax._layout.axes", "replicax._layout.vmappable", "replicax._layout.layout"}


def test_init_modules_only_re_export():
    for path in SOURCE.rglob("__init__.py"):
        for node in ast.parse(path.read_text()).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            target = node.targets[0] if isinstance(node, ast.Assign) else None
            version = isinstance(target, ast.Name) and target.id in ("__version__", "__all__")
            earlier = isinstance(node, ast.FunctionDef) and node.name == "__getattr__"
            assert isinstance(node, ast.ImportFrom) or docstring or version or earlier
