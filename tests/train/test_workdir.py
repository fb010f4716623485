"""Which runs may go on in a folder."""

import json

import pytest

from moe_jax import config_json
from moe_jax.errors import UserError
from moe_jax.train import workdir


@pytest.fixture
def folder(tmp_path, tiny):
    workdir.claim(str(tmp_path / "run"), tiny)
    return str(tmp_path / "run")


def refusal(folder, config):
    with pytest.raises(UserError) as error:
        workdir.check_resume(folder, config)
    return str(error.value)


def test_claim_saves_the_config(folder, tiny):
    assert workdir.read_config(folder) == tiny
    assert workdir.check_resume(folder, tiny) == []


def test_another_model_is_refused(folder, tiny):
    tiny.model.feed_forward.num_experts = 8
    tiny.model.qk_norm = "none"
    message = refusal(folder, tiny)
    assert f"--workdir={folder} holds another model" in message
    assert "config.model.feed_forward.num_experts: 4 -> 8" in message
    block = "segment_0/block_0"
    assert f"{block}/moe/experts/w_up: (2, 4, 32, 32) -> (2, 8, 32, 32)" in message
    assert f"{block}/attention/q_norm/scale: (2, 8) -> absent" in message
    assert "config.optimizer" not in message


def test_many_differences_are_cut(folder, tiny):
    tiny.model.d_model = 64
    message = refusal(folder, tiny)
    shapes = message.partition("Parameters:\n")[2].splitlines()
    assert len(shapes) == 13 and "more" in shapes[-1]


@pytest.mark.parametrize(
    "change, line",
    [
        (lambda c: setattr(c, "seed", 3), "config.seed: 0 -> 3"),
        (
            lambda c: setattr(c.train, "batch_size", 16),
            "config.train.batch_size: 8 -> 16",
        ),
        (
            lambda c: setattr(c.data, "sequence_length", 64),
            "config.data.sequence_length: 32 -> 64",
        ),
        (
            lambda c: setattr(c.data.source, "path", "other"),
            "config.data.source.path: 'text.txt' -> 'other'",
        ),
        (
            lambda c: setattr(c.data, "validation_fraction", 0.5),
            "config.data.validation_fraction: 0.05 -> 0.5",
        ),
    ],
)
def test_another_order_of_examples_is_refused(folder, tiny, change, line):
    change(tiny)
    message = refusal(folder, tiny)
    assert "saw its examples in another order" in message
    assert line in message.splitlines()[1]
    assert f"--config.train.warm_start={folder}" in message


def test_what_does_no_harm_is_noted(folder, tiny):
    tiny.optimizer.learning_rate = 0.5
    tiny.mesh.expert = 2
    tiny.train.steps = 61
    assert sorted(workdir.check_resume(folder, tiny)) == [
        "config.mesh.expert: 1 -> 2",
        "config.optimizer.learning_rate: 0.01 -> 0.5",
        "config.train.steps: 60 -> 61",
    ]


def test_unwritable_folder(tmp_path, tiny):
    (tmp_path / "file").write_text("")
    folder = str(tmp_path / "file" / "run")
    with pytest.raises(UserError, match=f"--workdir={folder} cannot be written"):
        workdir.claim(folder, tiny)


def test_no_config(tmp_path):
    with pytest.raises(UserError, match=r"no config.json there, so no run of moe-jax"):
        workdir.read_config(str(tmp_path))


def broken(change):
    def text(config):
        data = config_json.to_dict(config)
        change(data)
        return json.dumps(data)

    return text


@pytest.mark.parametrize(
    "text, message",
    [
        (lambda c: config_json.to_json(c)[:100], "not a saved config"),
        (lambda c: "", "not a saved config"),
        (lambda c: "[1, 2]", "no Config"),
        (lambda c: "\udcff", "utf-8"),
        (broken(lambda d: d.update(trian=1)), "no field 'trian'; did you mean 'train'"),
        (broken(lambda d: d["model"].pop("class")), "without 'class'"),
        (broken(lambda d: d["model"].update({"class": 3})), "config class 3"),
        (
            broken(lambda d: d["model"].update({"class": "os.system"})),
            "only classes of moe_jax",
        ),
    ],
)
def test_broken_config(folder, tiny, text, message):
    path = f"{folder}/config.json"
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text(tiny))
    with pytest.raises(UserError) as error:
        workdir.read_config(folder)
    assert message in str(error.value)
    assert path in str(error.value), "the message names the file"
