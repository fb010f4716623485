"""Checkpoints of DiT and DiT-MoE: names and shapes by hand, both ways, refusals."""

import importlib

import jax
import ml_dtypes
import numpy as np
import pytest

from moe_jax.cli import common
from moe_jax.cli.main import module_of
from moe_jax.convert import tensor_file
from moe_jax.infer import load
from moe_jax.train import workdir

D, H, E, CLASSES, C, SIDE, LAYERS = 16, 4, 4, 10, 4, 8, 2
MESH = "--mesh=fsdp=2,expert=4"

CONFIG = """
from moe_jax.config import *
from moe_jax.data.images.config import ImageDataConfig
from moe_jax.data.images.sources.latents import Latents
from moe_jax.diffusion.evaluation import ImageEvalConfig
from moe_jax.diffusion.samplers.ddpm import DDPM
from moe_jax.models.dit_config import DiT, mlp
from moe_jax.moe.balance import Balance
from moe_jax.moe.dispatch.dense import DenseDispatch
from moe_jax.moe.experts.feed_forward import ExpertFeedForward
from moe_jax.moe.layer import MoE
from moe_jax.moe.scorers.mlp import MLP
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.objectives.denoising import Denoising
from moe_jax.train.optimizers import AdamW
from moe_jax.train.schedules import Constant


def get_config():
    ff = mlp(64)
    if {moe}:
        ff = MoE(
            num_experts=4, experts=ExpertFeedForward(d_ff=64), shared_d_ff=32,
            selector=TopK(top_k=2, renormalize=False), dispatch=DenseDispatch(),
            balance=Balance(load_balance_weight=0.01, z_weight=0.0),
        )
    config = Config(
        model=DiT(
            image_size=8, in_channels=4, patch_size=2, num_layers=2, d_model=16,
            num_heads=4, num_classes=10, qk_norm={qk_norm!r}, feed_forward=ff,
            dtype="float32", remat="none",
        ),
        objective=Denoising(),
        data=ImageDataConfig(source=Latents(images={images!r})),
        optimizer=AdamW(learning_rate=0.001),
        schedule=Constant(warmup_steps=1),
        train=TrainConfig(steps=1, batch_size=8, compilation_cache="", ema_decay=0.9),
        eval=ImageEvalConfig(every=1, sampler=DDPM(steps=5)),
        log=LogConfig(every=1, tensorboard=False),
        mesh=MeshConfig(),
    )
    model = config.model
    {more}
    return config
"""


def block_shapes(moe, flash):
    joined, out = ("Wqkv", "out_proj") if flash else ("qkv", "proj")
    found = {
        f"attn.{joined}.weight": (3 * D, D),
        f"attn.{joined}.bias": (3 * D,),
        f"attn.{out}.weight": (D, D),
        f"attn.{out}.bias": (D,),
        "adaLN_modulation.1.weight": (6 * D, D),
        "adaLN_modulation.1.bias": (6 * D,),
    }
    if flash:
        found |= {f"attn.{n}_norm.{w}": (4,) for n in "qk" for w in ("weight", "bias")}
    if not moe:
        return found | {
            "mlp.fc1.weight": (4 * D, D),
            "mlp.fc1.bias": (4 * D,),
            "mlp.fc2.weight": (D, 4 * D),
            "mlp.fc2.bias": (D,),
        }
    found["moe.gate.weight"] = (E, D)
    units = {f"moe.experts.{e}": 4 * D for e in range(E)}
    for name, width in (units | {"moe.shared_experts": 2 * D}).items():
        found[f"{name}.gate_proj.weight"] = (width, D)
        found[f"{name}.up_proj.weight"] = (width, D)
        found[f"{name}.down_proj.weight"] = (D, width)
    return found


def positions():
    """Column first, sines before cosines, by loops."""
    found = np.zeros((1, 16, D))
    for n in range(16):
        for half, place in enumerate((n % 4, n // 4)):
            for i in range(D // 4):
                angle = place * 10000 ** (-i / (D // 4))
                found[0, n, half * D // 2 + i] = np.sin(angle)
                found[0, n, half * D // 2 + D // 4 + i] = np.cos(angle)
    return found


def tensors(moe=True, flash=False):
    shapes = {
        "x_embedder.proj.weight": (D, C, 2, 2),
        "x_embedder.proj.bias": (D,),
        "t_embedder.mlp.0.weight": (D, 256),
        "t_embedder.mlp.0.bias": (D,),
        "t_embedder.mlp.2.weight": (D, D),
        "t_embedder.mlp.2.bias": (D,),
        "y_embedder.embedding_table.weight": (CLASSES + 1, D),
        "final_layer.linear.weight": (2 * 2 * 2 * C, D),
        "final_layer.linear.bias": (2 * 2 * 2 * C,),
        "final_layer.adaLN_modulation.1.weight": (2 * D, D),
        "final_layer.adaLN_modulation.1.bias": (2 * D,),
    }
    for i in range(LAYERS):
        named = block_shapes(moe, flash)
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in named.items()}
    rng = np.random.default_rng(3)
    drawn = {n: 0.2 * rng.normal(size=s) for n, s in shapes.items()}
    made = {n: value.astype(np.float32) for n, value in drawn.items()}
    return {"pos_embed": positions().astype(np.float32)} | made


@pytest.fixture
def run(capsys):
    def go(name, *argv):
        module = importlib.import_module(module_of(name))
        argv = [str(a) for a in argv]
        status = common.execute(module.main, module.define_flags, argv, name)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, err + out

    return go


@pytest.fixture
def config_file(tmp_path):
    def make(moe=True, flash=False, more="pass"):
        path, images = tmp_path / "config.py", tmp_path / "latents.npy"
        rng = np.random.default_rng(0)
        np.save(images, rng.normal(size=(40, SIDE, SIDE, C)).astype(np.float32))
        np.save(tmp_path / "labels.npy", np.arange(40) % CLASSES)
        qk_norm = "layer" if flash else "none"
        more = (
            f"{more}\n    config.data.source.labels = {str(tmp_path / 'labels.npy')!r}"
        )
        fields = dict(moe=moe, qk_norm=qk_norm, images=str(images), more=more)
        path.write_text(CONFIG.format(**fields))
        return path

    return make


@pytest.fixture
def imported(run, config_file, tmp_path):
    """Imports tensors; returns status, what was said, and the workdir."""

    def go(given, *argv, **fields):
        file = tmp_path / "model.safetensors"
        tensor_file.save(file, given)
        made = config_file(**fields)
        flags = f"--file={file}", f"--workdir={tmp_path}/run", f"--config={made}"
        return *run("convert from-dit", *flags, *argv), tmp_path / "run"

    return go


def params_of(folder):
    config = workdir.read_config(str(folder))
    return load.load(str(folder), config).state.eval_params


def test_leaves_hold_the_tensors(imported, run, tmp_path):
    given = tensors(flash=True)
    status, said, folder = imported(given, MESH, flash=True)
    assert status == 0, said
    params = jax.tree.map(np.asarray, params_of(folder))
    block = params["segment_0"]["block_0"]
    attention, moe = block["attention"], block["moe"]
    joined = given["blocks.1.attn.Wqkv.weight"]
    bias = given["blocks.1.attn.Wqkv.bias"]
    # Head 2 of 4, its entry 3, from input 5; 16 rows of queries come first.
    assert attention["w_q"][1, 5, 2, 3] == joined[11, 5]
    assert attention["w_k"][1, 5, 2, 3] == joined[16 + 11, 5]
    assert attention["w_v"][1, 5, 2, 3] == joined[32 + 11, 5]
    assert attention["b_k"][1, 2, 3] == bias[16 + 11]
    out = given["blocks.1.attn.out_proj.weight"]
    assert attention["w_o"][1, 2, 3, 9] == out[9, 11]
    scale = given["blocks.0.attn.k_norm.weight"]
    np.testing.assert_array_equal(attention["k_norm"]["scale"][0], scale)
    # The second of six vectors: the scale before attention.
    told = given["blocks.1.adaLN_modulation.1.weight"]
    assert block["modulation"]["linear"]["w"][1, 7, 1, 4] == told[16 + 4, 7]
    # Row 1, column 0, channel 3 of a patch.
    patch = given["x_embedder.proj.weight"]
    assert params["patches"]["w"][(1 * 2 + 0) * 4 + 3, 6] == patch[6, 3, 1, 0]
    down = given["blocks.1.moe.experts.3.down_proj.weight"]
    assert moe["experts"]["w_down"][1, 3, 60, 2] == down[2, 60]
    for ours, theirs in (("w_gate", "gate_proj"), ("w_up", "up_proj")):
        name = f"blocks.0.moe.experts.2.{theirs}.weight"
        np.testing.assert_array_equal(moe["experts"][ours][0, 2], given[name].T)
        name = f"blocks.0.moe.shared_experts.{theirs}.weight"
        np.testing.assert_array_equal(moe["shared"][ours][0], given[name].T)
    gate = given["blocks.1.moe.gate.weight"]
    np.testing.assert_array_equal(moe["scorer"]["w"][1], gate.T)
    table = given["y_embedder.embedding_table.weight"]
    np.testing.assert_array_equal(params["label"]["table"], table)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == sum(value.size for value in given.values()) - 16 * D
    goes_back(run, folder, given, tmp_path / "back.safetensors")


def goes_back(run, folder, given, back):
    status, said = run("convert to-dit", f"--workdir={folder}", f"--out={back}")
    assert status == 0, said
    found = tensor_file.read_header(str(back))
    assert found.keys() == given.keys()
    assert f"{len(given)} tensors" in said
    for name, value in given.items():
        assert found[name].type_name == "F32" and found[name].shape == value.shape
        if name == "pos_embed":
            np.testing.assert_allclose(found[name].array(), value, atol=1e-7)
        else:
            np.testing.assert_array_equal(found[name].array(), value, name)


@pytest.mark.parametrize("moe", [False, True])
def test_the_way_back_has_the_same_bytes(imported, run, tmp_path, moe):
    given = tensors(moe)
    status, said, folder = imported(given, moe=moe)
    assert status == 0, said
    assert f"{len(given) - 1} tensors, and pos_embed" in said
    back = tmp_path / "back.safetensors"
    goes_back(run, folder, given, back)
    status, said = run("convert to-dit", f"--workdir={folder}", f"--out={back}")
    assert status == 2 and "exists" in said


def test_it_trains_scores_and_takes_other_types(imported, run, tmp_path):
    status, said, folder = imported(tensors())
    assert status == 0, said
    status, said = run("train", f"--workdir={folder}")
    assert status == 0 and "step 1/1" in said, said
    back = tmp_path / "back.safetensors"
    flags = f"--workdir={folder}", f"--out={back}", "--dtype=bfloat16", "--step=1"
    status, said = run("convert to-dit", *flags, MESH)
    assert status == 0, said
    found = tensor_file.read_header(str(back))
    name = "blocks.1.moe.experts.3.up_proj.weight"
    averaged = params_of(folder)["segment_0"]["block_0"]["moe"]["experts"]["w_up"]
    want = np.asarray(averaged[1, 3]).T.astype(ml_dtypes.bfloat16)
    assert found[name].type_name == "BF16"
    np.testing.assert_array_equal(found[name].array(), want)
    # The average has moved.
    assert np.abs(np.asarray(averaged[1, 3]).T - tensors()[name]).max() > 1e-5


@pytest.mark.parametrize(
    "more, words",
    [
        (
            "model.num_layers = 3; model.num_classes = 1000; model.image_size = 16",
            [
                "model.num_layers: 2 in the file, 3 in the config",
                "num_classes (and one more where condition_dropout is above 0): 11 in "
                "the file, 1001",
                "model.image_size: 8 in the file, 16",
            ],
        ),
        ("model.d_model = 32", ["d_model: 16 in the file, 32"]),
        ("model.patch_size = 4", ["patch_size: 2 in the file, 4"]),
        ("model.in_channels = 3", ["in_channels: 4 in the file, 3"]),
        (
            "model.learned_variance = False; "
            "config.objective.process.variance = 'fixed_small'",
            ["learned_variance: True in the file, False in the config"],
        ),
        ("model.qk_norm = 'layer'", ["qk_norm: none in the file, layer"]),
        (
            "ff.num_experts = 8; ff.shared_d_ff = 16; ff.experts.d_ff = 8",
            ["num_experts: 4 in", "shared_d_ff: 32 in", "experts.d_ff: 64 in the file"],
        ),
        (
            "model.feed_forward = mlp(64)",
            ["blocks with experts: [0, 1] in the file, [] in", "num_experts: 4 in"],
        ),
        ("ff.experts.activation = 'gelu'", ["experts.activation='gelu': must be 'si"]),
        ("ff.scorer = MLP()", ["scorer=MLP: must be Linear"]),
        ("ff.shared_gate = True", ["nothing that corresponds to params/segment_0"]),
        ("model.condition_dropout = 0.0", ["is above 0): 11 in the file, 10 in"]),
    ],
)
def test_a_config_of_another_model(imported, more, words):
    more = f"ff = model.feed_forward; {more}"
    status, said, folder = imported(tensors(), more=more)
    assert status == 2 and not folder.exists()
    for word in words:
        assert word in said, said


def test_files_that_are_refused(imported, tmp_path):
    name = "blocks.1.moe.experts.2.up_proj.weight"

    def refused(words, **changed):
        given = tensors() | {key.replace("__", "."): v for key, v in changed.items()}
        given = {key: v for key, v in given.items() if v is not None}
        status, said, folder = imported(given)
        assert status == 2 and words in said, said
        assert not folder.exists()

    at = name.replace(".", "__")
    good = tensors()
    refused(f"missing in the file: {name}", **{at: None})
    refused(
        "place in the model: blocks.1.norm3.weight", blocks__1__norm3__weight=good[name]
    )
    both = {at: None, "more__bias": good[name]}
    refused("without a place in the model: more.bias", **both)
    refused(f"missing in the file: {name}", **both)
    refused(f"{name} has the shape [16, 64], but", **{at: good[name].T.copy()})
    refused(f"tensor {name} has a value that is not", **{at: good[name] * np.nan})
    refused(f"{name} is of type I32", **{at: good[name].astype(np.int32)})
    refused("pos_embed is not the table", pos_embed=good["pos_embed"] + 1e-4)
    turned = good["pos_embed"].reshape(1, 4, 4, D).swapaxes(1, 2).reshape(1, 16, D)
    refused(
        "learned positions are not supported", pos_embed=np.ascontiguousarray(turned)
    )
    refused("pos_embed is not the table", pos_embed=good["pos_embed"] * np.nan)
    refused("missing in the file: pos_embed", pos_embed=None)


def test_flags(run, config_file, tmp_path):
    status, said = run("convert from-dit", f"--workdir={tmp_path}/x")
    assert status == 2 and "--file is missing" in said
    flags = f"--workdir={tmp_path}/x", f"--config={config_file()}"
    status, said = run("convert from-dit", "--file=last.pt", *flags)
    assert status == 2 and "moe-jax convert pt-to-safetensors --file=last.pt" in said
    status, said = run("convert pt-to-safetensors", "--file=a.pt")
    assert status == 2 and "--out is missing" in said
