"""What must not stand in the source, and what must stand in setup.py."""

import ast
import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("moe_jax", "launch", "benchmarks", "configs", ".ci")
    for path in (ROOT / folder).rglob("*.py")
)

# Calls and imports that run what a file says, and where they may stand.
ALLOWED = {
    # Workers that this process starts itself speak over pipes of its own.
    ("moe_jax/data/workers.py", "import pickle"),
    ("moe_jax/data/workers.py", "pickle.load"),
    ("moe_jax/data/workers.py", "pickle.dump"),
    # The user's config file, which is a program: exec_module of a module spec.
    ("moe_jax/cli/config_file.py", "exec_module"),
    # A benchmark loads a config of this project by its path.
    ("benchmarks/gpu_parts/step.py", "exec_module"),
    # Tensors and plain values only: `weights_only=True`, checked below.
    ("moe_jax/convert/pt_file.py", "torch.load"),
}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
NAMES = {"eval", "exec", "compile", "__import__"}
METHODS = {"exec_module", "system", "popen", "read_pickle", "unsafe_load", "full_load"}


def finds(source: str) -> list[str]:
    """What a source text does that would run code of another's choice."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"import {a.name}" for a in node.names if a.name in MODULES]
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            found.append(f"import {node.module}")
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        owner, _, method = name.rpartition(".")
        if name in NAMES or method in METHODS or owner in MODULES:
            found.append(method if method in METHODS else name)
        if name == "yaml.load" or name.endswith("torch.load"):
            found.append(name)
        if name.endswith("torch.load") and given.get("weights_only") != "True":
            found.append("torch.load without weights_only")
        if name in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
            found.append("np.load without allow_pickle=False")
        if given.get("allow_pickle") == "True" or given.get("shell") == "True":
            found.append("allow_pickle=True or shell=True")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "pickle.loads(x)",
        "eval(x)",
        "exec(x)",
        "yaml.load(x)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "np.load(x)",
        "np.load(x, allow_pickle=True)",
        "subprocess.run(x, shell=True)",
        "os.system(x)",
        "pd.read_pickle(x)",
    ],
)
def test_the_search_finds(source):
    assert finds(source)


def test_no_source_runs_what_it_reads():
    found = {
        (path.relative_to(ROOT).as_posix(), what)
        for path in SOURCES
        for what in finds(path.read_text())
    }
    assert len(SOURCES) > 200
    assert found == ALLOWED


def test_every_requirement_has_both_bounds():
    text = (ROOT / "setup.py").read_text()
    lists = text[text.index("PLAN = [") :]
    wanted = re.findall(r'"([A-Za-z][\w.-]*(?:\[\w+\])?)([<>=!~][^"]*)"', lists)
    assert len(wanted) > 25
    for name, bounds in wanted:
        assert ">=" in bounds and ",<" in bounds, name
    bare = re.findall(r'^        "([\w.-]+)",', lists, re.MULTILINE)
    assert bare == []


@pytest.fixture(scope="module")
def audit():
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package(name, *faults):
    return {"name": name, "version": "1", "vulns": list(faults)}


def fault(*versions):
    return {"id": "X-1", "fix_versions": list(versions)}


def test_what_the_audit_fails_on(audit):
    needed = {"ml-dtypes"}
    status = lambda *found: audit.report({"dependencies": found}, needed)[1]
    assert status(package("ml_dtypes"), package("other")) == 0
    assert status(package("ml_dtypes", fault("2"))) == 1
    assert status(package("ml_dtypes", fault())) == 0
    assert status(package("other", fault("2"))) == 0


def test_the_audit_says_what_it_could_not_do(audit, monkeypatch, capsys):
    unknown = {"name": "jax", "skip_reason": "not found"}
    lines, status = audit.report({"dependencies": [unknown, package("x")]}, {"jax"})
    assert status == 0 and lines[-1] == "audited: 1 packages"
    assert lines[0].startswith("NOT AUDITED: 1 of 2 packages") and "jax" in lines[0]

    class Failed:
        stdout, stderr = "", "ConnectionError: no route\n"

    monkeypatch.setattr(audit.subprocess, "run", lambda *a, **k: Failed)
    assert audit.main("moe_jax") == 0
    assert "NOT AUDITED: no connection? ConnectionError" in capsys.readouterr().out


def test_the_audit_knows_what_is_needed(audit):
    found = audit.needed("flax")
    assert {"jax", "jaxlib", "numpy"} <= found and "pytest" not in found
