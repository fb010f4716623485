"""The rooms of the package import in one direction only."""

import ast
import pathlib

import pytest

import moe_jax

ROOT = pathlib.Path(moe_jax.__file__).parent

# From the ground up. Rooms of one floor do not know each other. A file may stand on
# another floor than its room: what loads a trained model stands on the trainer,
# which itself writes texts.
FLOORS = [
    {"errors", "tree"},
    {"config_bases"},
    {"config"},
    {"config_json"},
    {"parallel"},
    {"kernels"},
    {"nn"},
    {"moe"},
    {"models"},
    {"diffusion"},
    {"objectives"},
    {"data", "checkpoint", "observe"},
    {"quality"},
    {"infer"},
    {"train"},
    {"infer.load"},
    {"check", "plan", "bench", "convert"},
    {"cli"},
]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}


def module_name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in ROOT.rglob("*.py")}


def imported(source):
    """Modules of the package that a source text imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in MODULES else node.module)
    return {name for name in found if name.split(".")[0] == "moe_jax"}


IMPORTS = {name: imported(path.read_text()) for name, path in MODULES.items()}


def room(module):
    """The floor's entry of a module, `infer.load` before `infer`."""
    parts = module.split(".")[1:]
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((name for name in names if name in FLOOR), None)


def violations(imports):
    return sorted(
        f"{user} imports {used}"
        for user, all_used in imports.items()
        for used in all_used
        if room(user)
        and room(used)
        and room(user) != room(used)
        and FLOOR[room(used)] >= FLOOR[room(user)]
    )


def test_every_module_has_a_floor():
    assert [n for n in MODULES if n != "moe_jax" and room(n) is None] == []
    assert len(MODULES) > 50


def test_nobody_imports_upward():
    assert violations(IMPORTS) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("def f():\n  from moe_jax.train import setup", 1),
        ("import moe_jax.cli.main", 1),
        ("from moe_jax import config", 0),
        ("from moe_jax.infer import load", 1),
        ("from moe_jax.infer import generate", 1),
    ],
)
def test_the_check_sees_imports_in_all_their_forms(source, count):
    assert len(violations({"moe_jax.data.pipeline": imported(source)})) == count


# A TFDS builder needs a module of its own, and its source names it when it is used.
BUILDER = "moe_jax.data.sources.python_source_builder"


def test_modules_form_no_cycle():
    left = {name: used - {name} for name, used in IMPORTS.items() if name != BUILDER}
    while ready := [name for name, used in left.items() if not used & left.keys()]:
        for name in ready:
            del left[name]
    assert sorted(left) == []


def test_test_files_have_names_of_their_own():
    """Pytest imports them by their base names."""
    names = [path.name for path in pathlib.Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
