"""What the commands about one MoE layer share: its sizes, dispatches, devices."""

import dataclasses
import math

from absl import flags

from moe_jax.errors import UserError, nearest

FLAGS = flags.FLAGS
FAKE_DEVICES = 8


def define_flags(**sizes: int) -> None:
    """Flags of a layer.

    Args:
      **sizes: defaults: tokens, d_model, d_ff, num_experts, top_k.
    """
    integer = flags.DEFINE_integer
    flags.DEFINE_list("dispatch", None, "Names, with commas; default: all but dense.")
    flags.DEFINE_multi_string(
        "mesh", None, "As expert=4,data=2; may be repeated. Default: all on expert."
    )
    for name, help_text in (
        ("tokens", "Tokens, over all devices."),
        ("d_model", "Width of the model."),
        ("d_ff", "Width of an expert."),
        ("num_experts", "Experts."),
        ("top_k", "Experts of a token."),
    ):
        integer(name, sizes[name], help_text, 1)
    flags.DEFINE_enum(
        "dtype", "float32", ["bfloat16", "float32", "float64"], "Of the computation."
    )
    flags.DEFINE_float(
        "capacity_factor", None, "Of the dispatches; default: that of each.", 0.0
    )
    integer("repeats", 10, "Timed runs of each.", 1)
    integer("seed", 0, "Of inputs and drawn routings.", 0)


def layer():
    """The layer of the flags."""
    from moe_jax.bench.layer import Layer

    return Layer(**{f.name: FLAGS[f.name].value for f in dataclasses.fields(Layer)})


def check(one, meshes: list) -> None:
    """Raises UserError where a mesh cannot split the layer."""
    from moe_jax.bench.layer import problems

    for mesh in meshes:
        if problem := next(problems(one, mesh), None):
            raise UserError(problem)


def chosen(flag: str, kind: str, choices: dict) -> list:
    """What a list of names stands for, each once, in its order.

    Raises:
      UserError: an unknown name, or none at all.
    """
    names = [name.strip().lower() for name in FLAGS[flag].value]
    for name in names or [""]:
        if name not in choices:
            raise UserError(
                f"--{flag}: {name!r} is not a {kind}{nearest(name, choices)} "
                f"({kind}s: {', '.join(choices)})"
            )
    return [choices[name] for name in dict.fromkeys(names)]


def dispatches() -> tuple[list, list[str]]:
    """The dispatches to compare, with their options, and lines on what is left out."""
    from moe_jax.moe.dispatch import DISPATCHES
    from moe_jax.moe.dispatch.dense import DenseDispatch

    names = {
        kind.__name__.lower().removesuffix("dispatch"): kind for kind in DISPATCHES
    }
    if FLAGS.dispatch is None:
        kinds = [kind for kind in DISPATCHES if kind is not DenseDispatch]
    else:
        kinds = chosen("dispatch", "dispatch", names)
    factor, lines = FLAGS.capacity_factor, []
    if factor is None:
        return [kind() for kind in kinds], lines
    if not math.isfinite(factor):
        raise UserError(f"--capacity_factor={factor}: must be a number, 0 or more")
    without = [k for k in kinds if not hasattr(k, "capacity_factor")]
    if without:
        shown = ", ".join(kind.__name__ for kind in without)
        if FLAGS.dispatch is not None:
            raise UserError(
                f"--capacity_factor={factor}: {shown} has none; leave out one of them"
            )
        lines = [f"left out: {shown}: no capacity_factor to set"]
    kinds = [kind for kind in kinds if kind not in without]
    return [kind(capacity_factor=factor) for kind in kinds], lines


def devices(meshes: list, fake: int = FAKE_DEVICES) -> list:
    """The accelerators that are there, or as many fake CPU devices as are needed.

    Args:
      meshes: of the flags; none takes `fake` devices of a CPU.
      fake: how many.

    Raises:
      UserError: a mesh needs more than there are, or --devices says otherwise.
    """
    needed = max((mesh.fixed_devices() for mesh in meshes), default=0)
    if needed and FLAGS.devices not in (0, needed):
        raise UserError(
            f"--devices={FLAGS.devices}, but --mesh needs {needed}: leave out one of "
            "them"
        )
    import jax

    if FLAGS.devices:
        jax.config.update("jax_platforms", "cpu")
    count = FLAGS.devices or needed or fake
    if jax.config.jax_num_cpu_devices < count:
        jax.config.update("jax_num_cpu_devices", count)
    found = jax.devices()
    if len(found) < needed:
        raise UserError(
            f"--mesh needs {needed} devices, but there are {len(found)} of kind "
            f"{found[0].device_kind!r}; --devices={needed} takes fake CPU devices"
        )
    return found[:count] if found[0].platform == "cpu" else found


def default_mesh(num_devices: int):
    """As many devices as divide the experts on the axis expert, the rest on data."""
    from moe_jax.config import MeshConfig

    expert = math.gcd(num_devices, FLAGS.num_experts)
    return MeshConfig(expert=expert, data=num_devices // expert)
