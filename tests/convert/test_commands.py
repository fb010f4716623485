"""`moe-jax convert` on hand-made files, and what it refuses; no torch."""

import importlib
import json

import hand_made
import jax
import ml_dtypes
import numpy as np
import pytest

from moe_jax.cli import common
from moe_jax.cli.main import module_of
from moe_jax.config import Config, MeshConfig
from moe_jax.convert import tensor_file, to_hf
from moe_jax.data.tokenizers import Bytes, HuggingFaceTokenizer
from moe_jax.errors import UserError
from moe_jax.infer import load
from moe_jax.train import workdir

GATE = "model.layers.1.block_sparse_moe.gate.weight"
# The tests run on eight devices.
MESH = "--mesh=expert=4,data=2"

CONFIG = """
from moe_jax.config import *
from moe_jax.data.sources import Instructions
from moe_jax.data.tokenizers import Bytes
from moe_jax.models.decoder import Decoder
from moe_jax.moe.balance import Balance
from moe_jax.moe.dispatch.dense import DenseDispatch
from moe_jax.moe.layer import MoE
from moe_jax.objectives.next_token import NextToken
from moe_jax.train.optimizers import AdamW
from moe_jax.train.schedules import Constant


def get_config():
    return Config(
        model=Decoder(
            d_model=64,
            dtype="float32",
            remat="none",
            feed_forward=MoE(
                dispatch=DenseDispatch(),
                balance=Balance(load_balance_weight=0.5, z_weight=0.0),
            ),
        ),
        objective=NextToken(),
        data=DataConfig(
            source=Instructions(path={text!r}, user="{{}}=", assistant="{{}}"),
            tokenizer=Bytes(), sequence_length=16,
            folder={cache!r}, workers=1, validation_fraction=0.2,
        ),
        optimizer=AdamW(learning_rate=0.01),
        schedule=Constant(warmup_steps=1),
        train=TrainConfig(steps=12, batch_size=8, compilation_cache=""),
        eval=EvalConfig(every=4),
        log=LogConfig(every=4, tensorboard=False),
        mesh=MeshConfig(data=2, expert=4),
    )
"""


@pytest.fixture
def run(capsys):
    """Runs a command; returns its status and what it printed."""

    def go(name, *argv):
        module = importlib.import_module(module_of(name))
        argv = [str(a) for a in argv]
        status = common.execute(module.main, module.define_flags, argv, name)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, err + out

    return go


@pytest.fixture
def good(run):
    """As `run`, for what must go well; returns what was printed."""

    def go(*argv):
        status, said = run(*argv)
        assert status == 0, said
        return said

    return go


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "hub"
    hand_made.write(folder, hand_made.tensors())
    return folder


def params_of(folder):
    config = workdir.read_config(str(folder))
    config.train.compilation_cache = ""
    return load.load(str(folder), config).state


def test_leaves_hold_the_tensors(hub, tmp_path, good):
    good("convert from-hf", f"--checkpoint={hub}", f"--workdir={tmp_path}/run", MESH)
    params, tensors = params_of(tmp_path / "run").params, hand_made.tensors()
    block = params["segment_0"]["block_0"]
    at = "model.layers.1."
    w_k = tensors[f"{at}self_attn.k_proj.weight"]
    w_o = tensors[f"{at}self_attn.o_proj.weight"]
    w2 = tensors[f"{at}block_sparse_moe.experts.3.w2.weight"]
    attention, experts = block["attention"], block["moe"]["experts"]
    assert attention["w_k"].shape == (2, 16, 2, 4)
    assert attention["w_k"][1, 5, 1, 2] == w_k[1 * 4 + 2, 5]
    assert attention["w_o"][1, 3, 2, 9] == w_o[9, 3 * 4 + 2]
    assert experts["w_down"][1, 3, 7, 4] == w2[4, 7]
    for ours, theirs in (("w_gate", "w1"), ("w_up", "w3")):
        w = tensors[f"{at}block_sparse_moe.experts.2.{theirs}.weight"]
        np.testing.assert_array_equal(experts[ours][1, 2], w.T)
    np.testing.assert_array_equal(params["output"], tensors["lm_head.weight"].T)
    np.testing.assert_array_equal(block["moe"]["scorer"]["w"][1], tensors[GATE].T)
    # Its manifest lists the experts, as that of a training run does.
    made = tmp_path / "run" / "checkpoints" / "0" / "manifest" / "data.json"
    listed = json.loads(made.read_text())["experts"]["leaves"]
    assert {entry["count"] for entry in listed.values()} == {experts["w_up"].shape[1]}
    assert "params/segment_0/block_0/moe/experts/w_up" in listed


def test_round_trip_in_several_files(tmp_path, good):
    tensors = hand_made.tensors(ml_dtypes.bfloat16)
    tensors[GATE] = tensors[GATE].astype(np.float32) + 1e-4  # One of another type.
    hub, out = tmp_path / "hub", tmp_path / "out"
    hand_made.write(hub, tensors, files=3, torch_dtype="bfloat16", made_up=3)
    (hub / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    (hub / "chat_template.jinja").write_text("hello")
    (hub / "pytorch_model.bin").write_text("not read, not carried")
    said = good(
        "convert from-hf", f"--checkpoint={hub}", f"--workdir={tmp_path}/run", MESH
    )
    assert "made_up=3 is not used" in said
    config = workdir.read_config(str(tmp_path / "run"))
    assert (config.model.param_dtype, config.model.dtype) == ("float32", "bfloat16")
    assert config.mesh == MeshConfig(expert=4, data=2)
    said = good(
        "convert to-hf", f"--workdir={tmp_path}/run", f"--out={out}",
        "--max_shard_gb=1e-5",
    )  # fmt: skip
    assert "MixtralForCausalLM: 65 tensors" in said
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2 and {f.name for f in files} == {*index["weight_map"].values()}
    found = {}
    for file in files:
        assert file.stat().st_size < 20_000
        header = tensor_file.read_header(str(file))
        assert all(index["weight_map"][name] == file.name for name in header)
        found |= header
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].array().tobytes() == tensor.tobytes(), name
    assert (out / "chat_template.jinja").read_text() == "hello"
    assert not (out / "pytorch_model.bin").exists()
    written = json.loads((out / "config.json").read_text())
    assert written["dtype"] == "bfloat16" and "torch_dtype" not in written
    kept = hand_made.CONFIG | {"made_up": 3}
    assert {k: written[k] for k in kept if k != "torch_dtype"} == {
        k: v for k, v in kept.items() if k != "torch_dtype"
    }
    status = good("convert to-hf", f"--workdir={tmp_path}/run", f"--out={tmp_path}/f32",
                  "--dtype=float32")  # fmt: skip
    assert "1 files" in status
    again = hand_made.read(tmp_path / "f32")
    assert {a.dtype.name for a in again.values()} == {"float32"}
    np.testing.assert_array_equal(again[GATE], tensors[GATE])


def test_parameters_in_bfloat16(hub, tmp_path, good):
    good("convert from-hf", f"--checkpoint={hub}", f"--workdir={tmp_path}/run", MESH,
         "--dtype=bfloat16")  # fmt: skip
    params = params_of(tmp_path / "run").params
    expected = hand_made.tensors()["model.embed_tokens.weight"]
    assert params["embedding"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(
        params["embedding"], expected.astype(ml_dtypes.bfloat16)
    )


@pytest.mark.slow
def test_fine_tuning(hub, tmp_path, good):
    """Import with a config, score, train and write with nothing but the workdir.

    The loss is that of answers; questions are all different.
    """
    text = tmp_path / "examples.jsonl"
    example = lambda i: json.dumps({"prompt": f"{i * 7919 % 1000}", "answer": "all"})
    text.write_text("\n".join(map(example, range(100))))
    recipe = tmp_path / "tune.py"
    recipe.write_text(CONFIG.format(text=str(text), cache=str(tmp_path / "cache")))
    run = tmp_path / "run"
    good("convert from-hf", f"--checkpoint={hub}", f"--workdir={run}",
         f"--config={recipe}", "--config.optimizer.weight_decay=0.0")  # fmt: skip
    config = workdir.read_config(str(run))
    assert config.optimizer.weight_decay == 0
    assert type(config.model.feed_forward.dispatch).__name__ == "DenseDispatch"
    assert config.model.feed_forward.balance.load_balance_weight == 0.5
    assert (config.model.d_model, config.model.rope.theta) == (16, 1e6)
    before = json.loads(good("eval", f"--workdir={run}").splitlines()[-1])
    assert before["step"] == 0
    good("train", f"--workdir={run}")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["step"] == 12
    assert summary["held_out"]["loss"] < before["loss"] - 0.5
    assert "all" in good("generate", f"--workdir={run}", "--prompt=all", "--tokens=3")
    out = tmp_path / "out"
    good("convert to-hf", f"--workdir={run}", f"--out={out}")
    trained = hand_made.read(out)
    assert trained.keys() == hand_made.shapes().keys()
    state = params_of(run)
    np.testing.assert_array_equal(
        trained["lm_head.weight"], np.asarray(state.params["output"]).T
    )
    assert not np.array_equal(trained[GATE], hand_made.tensors()[GATE])
    # A run of its own may begin at it, and then has another text.
    other = tmp_path / "other"
    text.write_text("\n".join(map(example, range(50, 150))))
    good("train", f"--config={run}/config.json", f"--workdir={other}",
         f"--config.train.warm_start={run}", "--config.train.steps=1")  # fmt: skip


def test_one_process_exports(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"one process writes .*, but 2 were started"):
        to_hf.convert("run", str(tmp_path / "out"), Config())


def truncate(hub):
    path = hub / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def index_names_another(hub):
    hand_made.write(hub, hand_made.tensors(), files=2)
    (hub / "model.safetensors").unlink()
    (hub / "model-00002-of-00002.safetensors").unlink()


def differs_from_index(hub):
    index_names_another(hub)
    hand_made.write(hub, hand_made.tensors(), files=2)
    path = hub / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["extra.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))


def outside(hub):
    differs_from_index(hub)
    path = hub / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))


def tensors(change):
    def damage(hub):
        found = hand_made.tensors()
        change(found)
        hand_made.write(hub, found)

    return damage


def config(**changes):
    return lambda hub: hand_made.write(hub, hand_made.tensors(), **changes)


def no_safetensors(hub):
    (hub / "model.safetensors").rename(hub / "pytorch_model.bin")


def last(value):
    def change(found):
        found[GATE][2, 3] = value

    return change


DAMAGE = {
    "missing file": (index_names_another, "00002-of-00002.safetensors is missing"),
    "cut file": (truncate, "model.safetensors is cut short"),
    "shape": (
        tensors(lambda t: t.update({GATE: np.zeros((5, 16), np.float32)})),
        f"{GATE} has the shape [5, 16], but config.json asks for [8, 16]",
    ),
    "extra": (
        tensors(lambda t: t.update({"model.layers.2.x": np.zeros(3, np.float32)})),
        "tensor model.layers.2.x has no place in this model",
    ),
    "missing": (
        tensors(lambda t: t.pop(GATE)),
        f"tensor {GATE} is missing in the checkpoint",
    ),
    "architecture": (
        config(model_type="mixtrel"),
        "model_type='mixtrel' is not known; did you mean 'mixtral'? (families: llama,",
    ),
    "infinite": (tensors(last(np.inf)), f"tensor {GATE} has a value that is not fini"),
    "nan": (tensors(last(np.nan)), f"tensor {GATE} has a value that is not finite"),
    "integers": (
        tensors(lambda t: t.update({GATE: np.zeros((8, 16), np.int32)})),
        f"{GATE} is of type I32, which is no floating point type",
    ),
    "more layers": (
        config(num_hidden_layers=1),
        "model.layers.1.block_sparse_moe.experts.0.w1.weight has no place in this",
    ),
    "index": (differs_from_index, "extra.weight is not there"),
    "path": (outside, "x is in '../model.safetensors', which is no file name"),
    "no config": (lambda hub: (hub / "config.json").unlink(), "config.json cannot be"),
    "pickle": (no_safetensors, "weights in other formats (.bin, .pt) are not read"),
    "no rule": (config(num_experts_per_tok=9), "top_k=9 is more than config"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_and_nothing_written(name, hub, tmp_path, run):
    damage, message = DAMAGE[name]
    damage(hub)
    target = tmp_path / "run"
    status, said = run(
        "convert from-hf", f"--checkpoint={hub}", f"--workdir={target}", MESH
    )
    assert status == 2 and said.count("error: ") == 1, said
    assert message in said
    assert {path.name for path in tmp_path.iterdir()} == {"hub"}


def test_targets_that_hold_something_are_refused(hub, tmp_path, run, good):
    (tmp_path / "run").mkdir()
    arguments = ["convert from-hf", f"--checkpoint={hub}", f"--workdir={tmp_path}/run"]
    good(*arguments, MESH)  # An empty folder will do.
    status, said = run(*arguments, MESH)
    assert status == 2 and "run exists and is not empty; name another" in said
    before = sorted(tmp_path.rglob("*"))
    status, said = run("convert to-hf", f"--workdir={tmp_path}/run", f"--out={hub}")
    assert status == 2 and "hub exists and is not empty" in said
    assert sorted(tmp_path.rglob("*")) == before
    for missing in ("checkpoint", "workdir"):
        given = [a for a in arguments if not a.startswith(f"--{missing}")]
        status, said = run(*given)
        assert status == 2 and f"--{missing} is missing" in said
    status, said = run("convert to-hf", f"--workdir={tmp_path}/run")
    assert status == 2 and "--out is missing" in said


def test_tied_embeddings_may_be_stored_twice(tmp_path, run, good):
    found = hand_made.tensors()
    found["lm_head.weight"] = found["model.embed_tokens.weight"]
    hand_made.write(tmp_path / "same", found, tie_word_embeddings=True)
    said = good("convert from-hf", f"--checkpoint={tmp_path}/same",
                f"--workdir={tmp_path}/run", MESH)  # fmt: skip
    assert "left out: lm_head.weight, the embedding once more" in said
    assert "output" not in params_of(tmp_path / "run").params
    hand_made.write(tmp_path / "other", hand_made.tensors(), tie_word_embeddings=True)
    status, said = run("convert from-hf", f"--checkpoint={tmp_path}/other",
                       f"--workdir={tmp_path}/more", MESH)  # fmt: skip
    assert status == 2 and "lm_head.weight differs from" in said


def test_the_tokenizer_comes_along(hub, tmp_path, good):
    (hub / "tokenizer.json").write_text('{"post_processor": {"pieces": ["<s>", "A"]}}')
    (hub / "tokenizer_config.json").write_text(
        '{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}'
    )
    good("convert from-hf", f"--checkpoint={hub}", f"--workdir={tmp_path}/run", MESH)
    config = workdir.read_config(str(tmp_path / "run"))
    path = str(tmp_path / "run" / "hugging_face" / "tokenizer.json")
    assert config.data.tokenizer == HuggingFaceTokenizer(
        path=path, bos="<s>", eos="</s>"
    )
    assert config.data.sequence_length == 64
    with open(path) as file:
        assert "post_processor" in file.read()


def test_a_begin_that_the_tokenizer_does_not_add_is_none(hub, tmp_path, good):
    (hub / "tokenizer.json").write_text("{}")
    (hub / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    good("convert from-hf", f"--checkpoint={hub}", f"--workdir={tmp_path}/run", MESH)
    config = workdir.read_config(str(tmp_path / "run"))
    assert (config.data.tokenizer.bos, config.data.tokenizer.eos) == ("", "")


def test_without_a_tokenizer_it_is_bytes(hub, tmp_path, good):
    good("convert from-hf", f"--checkpoint={hub}", f"--workdir={tmp_path}/run", MESH)
    assert workdir.read_config(str(tmp_path / "run")).data.tokenizer == Bytes()
