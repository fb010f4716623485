"""The documents' code runs as it stands."""

import pathlib
import re
import subprocess
import sys

import pytest

from moe_jax import config
from moe_jax.moe.selectors import SELECTORS

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks():
    for page in PAGES:
        code = re.findall(
            r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S
        )
        for number, text in enumerate(code):
            yield pytest.param(text, id=f"{page.name}-{number}")


@pytest.mark.slow
@pytest.mark.parametrize("code", list(blocks()))
def test_python_block_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, known = {"__name__": "documents"}, dict(SELECTORS)
    try:
        exec(compile(code, "document", "exec"), names)
    finally:  # What a page adds is not there for other tests.
        SELECTORS.clear()
        SELECTORS.update(known)
    if "get_config" in names:
        config.validate(names["get_config"]())


def test_pages_link_to_files_that_exist():
    for page in PAGES:
        for target in re.findall(
            r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")
        ):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_command_has_help_with_an_example():
    from moe_jax.cli.main import COMMANDS, module_of

    for name in COMMANDS:
        result = subprocess.run(
            [sys.executable, "-m", module_of(name), "--help"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "Example:" in result.stdout and f"moe-jax {name} --" in result.stdout
