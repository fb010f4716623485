"""Models brought in by several processes; what is for one process refuses more."""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest

CONVERT = pathlib.Path(__file__).parents[1] / "convert"
pytestmark = [pytest.mark.soak, pytest.mark.multiprocess, pytest.mark.timeout(3000)]


def of_convert(name):
    """A module of the tests of conversion: hand-made files."""
    sys.path.append(str(CONVERT))
    try:
        path = CONVERT / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"convert_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.pop()


def manifests(hosts, folders):
    """The checksums of step 0's arrays in each folder."""
    found = []
    for folder in folders:
        path = hosts.folder / folder / "checkpoints" / "0" / "manifest" / "data.json"
        found.append(json.loads(path.read_text())["leaves"])
    return found


def test_hugging_face(hosts):
    hand_made = of_convert("hand_made")
    given = hand_made.tensors()
    hand_made.write(hosts.folder / "hub", given, files=2)
    flags = ("--checkpoint=hub", "--mesh=expert=4")
    for count in (1, 2, 4):
        said = hosts.command(count, "convert from-hf", *flags, f"--workdir=hf_{count}")
        assert sum("holds a MixtralForCausalLM" in line for line in said) == 1
    one, two, four = manifests(hosts, ["hf_1", "hf_2", "hf_4"])
    assert one == two == four and len(one) > 10
    # One process writes what four have read: the files as they came.
    hosts.command(1, "convert to-hf", "--workdir=hf_4", "--out=back")
    back = hand_made.read(hosts.folder / "back")
    assert back.keys() == given.keys()
    for name, value in given.items():
        np.testing.assert_array_equal(back[name], value)


def test_dit(hosts):
    files = of_convert("test_dit_files")
    given = files.tensors()
    files.tensor_file.save(hosts.folder / "dit.safetensors", given)
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(40, files.SIDE, files.SIDE, files.C))
    np.save(hosts.folder / "latents.npy", latents.astype(np.float32))
    np.save(hosts.folder / "labels.npy", np.arange(40) % files.CLASSES)
    more = "config.data.source.labels = 'labels.npy'"
    fields = dict(moe=True, qk_norm="none", images="latents.npy", more=more)
    (hosts.folder / "dit.py").write_text(files.CONFIG.format(**fields))
    flags = ("--file=dit.safetensors", "--config=dit.py", "--mesh=expert=4")
    for count in (1, 4):
        hosts.command(count, "convert from-dit", *flags, f"--workdir=dit_{count}")
    one, four = manifests(hosts, ["dit_1", "dit_4"])
    assert one == four and len(one) > 10
    hosts.command(1, "convert to-dit", "--workdir=dit_4", "--out=back.safetensors")
    header = files.tensor_file.read_header(str(hosts.folder / "back.safetensors"))
    for name, value in given.items():
        np.testing.assert_allclose(np.array(header[name].array()), value, atol=1e-6)


@pytest.mark.parametrize(
    "name, flags",
    [
        ("convert to-hf", ["--workdir=hf_4", "--out=more"]),
        ("convert to-dit", ["--workdir=dit_4", "--out=more.safetensors"]),
        ("ledger", ["--workdir=hf_4"]),
    ],
)
def test_what_is_for_one_process(hosts, name, flags):
    module = f"moe_jax.cli.{name.replace(' ', '.').replace('-', '_')}"
    status, own, rest = hosts.start(2, ["-m", module], *flags)
    assert status == 2
    said = "this command is for one process, and 2 were started (found by flags)"
    assert any(said in line for line in [*own, *rest.splitlines()])
    assert not any((hosts.folder / f).exists() for f in ("more", "more.safetensors"))
