"""Config overrides and saved configs: right, or one clear message."""

import copy
import pathlib

import hypothesis
import mutations
import pytest
from hypothesis import strategies as st

from moe_jax import config_json
from moe_jax.cli import common, config_file
from moe_jax.config import Node, children

TINY = pathlib.Path(__file__).parents[1] / "end_to_end" / "tiny.py"
CONFIG = config_file.load(str(TINY))
ROOT = TINY.parents[2]
DIGITS = config_file.load(str(ROOT / "configs" / "dit" / "digits.py"))
DTR = config_file.load(f"{ROOT / 'configs' / 'bench' / 'image_routers.py'}:dtr")


def _paths(value: Node, path: str) -> list[str]:
    found = [f"{path}.{name}" for name in value.__dataclass_fields__]
    for child_path, child in children(value, path):
        found += _paths(child, child_path)
    return found


PATHS = _paths(CONFIG, "config")
SAID = st.one_of(
    mutations.VALUES.map(str),
    st.sampled_from(["0x10", "1,2", "(1, 2)", "[1]", "{'a': 1}", "None", "1_000"]),
).filter(lambda text: "\ud800" not in text)


# Each alone in each field; those of another type are told by their type.
ODD = [0, -1, 7, 2**31, 2**64, -0.5, 1e308, float("nan"), float("inf"), None, "x", []]


def _nodes(value: Node):
    yield value
    for _, child in children(value, ""):
        yield from _nodes(child)


ENDS = [".x", "[0]", "[-1]", "[", "..", ".__class__"]


@st.composite
def overrides(draw):
    argv = []
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(PATHS))
        kind = draw(st.integers(0, 9))
        if kind == 0:
            path = path[: draw(st.integers(0, len(path)))]
        elif kind == 1:
            path += draw(st.sampled_from(ENDS))
        elif kind == 2:
            path = "config." + draw(st.sampled_from(mutations.TEXTS[:6]))
        dashes = draw(st.sampled_from(["--", "--", "--", "-", "--no"]))
        equals = draw(st.sampled_from(["=", "=", "=", "=", ""]))
        argv.append(dashes + path + equals + draw(SAID) * bool(equals))
    return argv


@mutations.settings(60)
@hypothesis.given(argv=overrides())
def test_overrides(argv, command):
    hypothesis.assume(not any(a in ("-", "--") or "\0" in a for a in argv))
    config = []

    def main():
        config.append(common.load_config())

    if command(main, common.define_config, [f"--config={TINY}", *argv]) == 0 and config:
        text = config_json.to_json(config[0])
        assert repr(config_json.from_json(text)) == repr(config[0])


@pytest.mark.parametrize("given", [CONFIG, DIGITS, DTR], ids=["text", "images", "mask"])
def test_odd_values(given, clear):
    config = copy.deepcopy(given)
    for node in list(_nodes(config)):
        for name in node.__dataclass_fields__:
            kept = getattr(node, name)
            for odd in ODD:
                setattr(node, name, odd)
                clear(lambda: common._validated(config))
            setattr(node, name, kept)
    assert config == given


@mutations.settings(60)
@hypothesis.given(
    text=st.sampled_from([CONFIG, DIGITS]).flatmap(
        lambda config: mutations.json_files(config_json.to_dict(config))
    )
)
def test_saved_configs(text, clear, tmp_path_factory):
    from moe_jax.train import workdir

    folder = tmp_path_factory.getbasetemp() / "saved_config"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(text)
    clear(lambda: common._validated(workdir.read_config(str(folder))))
