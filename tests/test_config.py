"""The config tree: saved and read back, validated as a whole, compared."""

import importlib.util
import json
import pathlib

import jax
import pytest

import moe_jax
from moe_jax import config, config_json, models
from moe_jax.data import sources, tokenizers
from moe_jax.errors import UserError, nearest
from moe_jax.models.decoder_config import Decoder
from moe_jax.moe.layer import MoE
from moe_jax.moe.selectors.top_k import TopK
from moe_jax.objectives.next_token import NextToken
from moe_jax.train.optimizers import AdamW
from moe_jax.train.schedules import Cosine

FOLDER = pathlib.Path(moe_jax.__file__).parents[1] / "configs"
FILES = sorted(FOLDER.rglob("*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def quickstart():
    return load(FOLDER / "quickstart.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_config_file_is_valid_and_describes_a_model(path):
    made = load(path)
    if path.stem == "mnist":  # It is told where its files are.
        made.data.source.images, made.data.source.labels = "images.gz", "labels.gz"
    config.validate(made)
    assert config_json.from_json(config_json.to_json(made)) == made
    model = models.build(made.model)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) > 1000


def test_a_config_survives_json():
    made = quickstart()
    made.model.rope.theta = 0.1 + 0.2
    made.model.feed_forward.selector = TopK(top_k=3, softmax="after", scale=2.5)
    made.mesh.fsdp = 2
    text = config_json.to_json(made)
    found = config_json.from_json(text)
    assert found == made and found is not made
    assert type(found.model.feed_forward.selector) is TopK
    assert found.model.rope.theta == 0.1 + 0.2
    assert config_json.to_json(found) == text
    saved = json.loads(text)
    assert saved["class"] == "moe_jax.config.Config"
    assert saved["model"]["feed_forward"]["selector"]["top_k"] == 3


def test_parts_that_are_not_set_survive_too():
    assert (
        config_json.from_json(config_json.to_json(config.Config())) == config.Config()
    )


def edited(**fields):
    data = config_json.to_dict(quickstart())
    data["train"].update(fields)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (edited(step=3), "has no field 'step'; did you mean 'steps'?"),
        (edited(qqqq=3), "has no field 'qqqq'"),
        (edited(**{"class": "os.path.join"}), "only classes of moe_jax"),
        (edited(**{"class": "moe_jaxed.config.Config"}), "only classes of moe_jax"),
        (edited(**{"class": "Config"}), "only classes of moe_jax"),
        (edited(**{"class": "moe_jax.config.Nothing"}), "is not known here"),
        (edited(**{"class": "moe_jax.nothing.Nothing"}), "is not known here"),
        (edited(**{"class": "moe_jax.config.validate"}), "is not a config class"),
        (edited(**{"class": "moe_jax.errors.UserError"}), "is not a config class"),
        (edited(**{"class": 5}), "5"),
        (json.dumps({"seed": 0}), "without 'class'"),
        (json.dumps(config_json.to_dict(TopK())), "the outermost object is no Config"),
        ("[]", "the outermost object is no Config"),
        ("{", "not a saved config"),
    ],
)
def test_what_is_not_a_config_is_refused(text, words):
    with pytest.raises(UserError) as caught:
        config_json.from_json(text)
    assert words in str(caught.value)


def test_no_suggestion_where_nothing_is_near():
    assert nearest("qqqq", ["steps", "batch_size"]) == ""
    assert nearest("stepz", ["steps", "batch_size"]) == "; did you mean 'steps'?"


def test_a_field_that_is_misspelt_in_a_file_is_an_error():
    with pytest.raises(AttributeError):
        config.Config().sed = 1
    with pytest.raises(TypeError):
        config.TrainConfig(step=1)


def test_validate_lists_every_problem_with_its_path():
    made = quickstart()
    made.seed = -1
    made.train.batch_size = 10
    made.train.accumulation = 3
    made.eval.every = -2
    made.checkpoint.keep_every = 3
    made.log.every = 0
    made.data.sequence_length = 1
    made.model.num_heads = 3
    made.model.feed_forward.selector = TopK(top_k=0)
    made.model.feed_forward.balance.z_weight = -1.0
    made.mesh.tensor = 0
    with pytest.raises(UserError) as caught:
        config.validate(made)
    head, *lines = str(caught.value).splitlines()
    starts = [
        "config.seed=-1",
        "config.train.batch_size=10 is not divisible by config.train.accumulation=3",
        "config.eval.every=-2",
        "config.checkpoint.keep_every=3 is not a multiple",
        "config.log.every=0",
        "config.data.sequence_length=1",
        "config.model.d_model=128 is not divisible by config.model.num_heads=3",
        "config.model.feed_forward.selector.top_k=0",
        "config.model.feed_forward.balance.z_weight=-1.0",
        "config.mesh.tensor=0",
    ]
    for start in starts:
        assert any(line.startswith(f"  --{start}") for line in lines), start
    assert head == f"{len(lines)} problems in the config:"


def test_one_problem_is_one_problem():
    made = quickstart()
    made.train.max_skipped = 0
    with pytest.raises(UserError, match=r"^1 problem in the config:\n  --config\.tr"):
        config.validate(made)


def test_options_of_xla_are_pairs():
    made = quickstart()
    made.train.xla_options = "xla_a=1 xla_b"
    with pytest.raises(UserError, match="'xla_b' is not an option; write xla_NAME="):
        config.validate(made)


def test_what_is_not_set_is_named():
    found = list(config.all_problems(config.Config(), "config", config.Config()))
    for name in ("model", "objective", "optimizer", "schedule"):
        assert f"config.{name} is not set" in found
    assert any(p.startswith("config.data.source is not set") for p in found)
    assert any(p.startswith("config.data.tokenizer is not set") for p in found)


@pytest.mark.parametrize(
    ("mesh", "batch", "length", "words"),
    [
        (dict(expert=2), 32, 128, ""),
        (dict(data=3, expert=2), 32, 128, "set batch_size to a multiple of 6"),
        (dict(fsdp=2, expert=2), 6, 128, "divisible by data * fsdp * expert = 4"),
        (dict(context=3), 32, 128, "not divisible by config.mesh.context=3"),
        (dict(context=4), 32, 128, ""),
    ],
)
def test_the_batch_must_split_over_the_mesh(mesh, batch, length, words):
    made = quickstart()
    made.mesh = config.MeshConfig(**mesh)
    made.train.batch_size, made.data.sequence_length = batch, length
    made.model.vocab_size, made.model.d_model = 264, 144
    made.model.num_heads, made.model.head_dim = 6, 24
    made.model.num_kv_heads = 0
    found = [p for p in config.all_problems(made, "config", made) if "divisible" in p]
    assert bool(found) == bool(words)
    assert not words or any(words in problem for problem in found), found


def test_differences_name_each_leaf():
    old, new = quickstart(), quickstart()
    assert config_json.differences(old, new) == []
    old.train.steps, new.train.steps = 3, 5
    old.model.feed_forward.num_experts, new.model.feed_forward.num_experts = 8, 16
    assert config_json.differences(old, new) == [
        "config.model.feed_forward.num_experts: 8 -> 16",
        "config.train.steps: 3 -> 5",
    ]
    old, new = quickstart(), quickstart()
    new.schedule = None
    (line,) = config_json.differences(old, new)
    assert line.startswith("config.schedule: Cosine(") and line.endswith("-> None")


def test_sizes_of_the_mesh():
    mesh = config.MeshConfig(fsdp=2, expert=2)
    assert mesh.sizes(8)["data"] == 2 and mesh.sizes(2)["data"] == 1
    assert mesh.fixed_devices() == 4
    assert config.MeshConfig(data=3, tensor=2).fixed_devices() == 6


def test_divisors():
    assert config.divisors(12) == [1, 2, 3, 4, 6, 12]
    assert config.divisors(2**20, most=3) == [1, 2, 4]


@config.node
class Pair(config.Node):
    parts: tuple = ()

    def problems(self, path, root):
        yield f"{path}: a pair"


def test_sub_configs_in_tuples_are_found():
    pair = Pair(parts=(TopK(top_k=0), 3, TopK(top_k=1)))
    paths = [path for path, _ in config.children(pair, "config")]
    assert paths == ["config.parts[0]", "config.parts[2]"]
    found = list(config.all_problems(pair, "config", config.Config()))
    assert [problem.split("=")[0] for problem in found] == [
        "config: a pair",
        "config.parts[0].top_k",
        "config.parts[2].top_k",
    ]
    data = config_json.to_dict(MoE())
    assert config_json.from_dict([data, 3]) == (MoE(), 3)


def test_classes_used_above_are_the_ones_of_the_package():
    made = config.Config(
        model=Decoder(),
        objective=NextToken(),
        optimizer=AdamW(),
        schedule=Cosine(),
        data=config.DataConfig(
            source=sources.PythonSource(), tokenizer=tokenizers.Bytes()
        ),
    )
    assert config_json.from_json(config_json.to_json(config.validate(made))) == made
