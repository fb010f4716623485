"""Passes of loops: written by hand, and compiled from Python that says how many."""

import operator

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from moe_jax.plan import hlo, loops

STATE = "(s32[], s32[], f32[8])"
LESS = "ROOT %less = pred[] compare(%i, %n), direction=LT"
ADD = "%next = s32[] add(%j, %step)"
OUT = f"ROOT %out = {STATE} tuple(%next, %k, %x)"


@pytest.fixture
def count(written):
    """Passes of a loop over (counter, other, array), from changed lines of it."""

    def passes(
        begin=0,
        limit=10,
        step=1,
        *,
        condition=LESS,
        body=(ADD, OUT),
        state="%first, %second, %y",
        attributes="",
        before="",
    ):
        module = written(f"""
{before}
%condition (s: {STATE}) -> pred[] {{
  %s = {STATE} parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %other = s32[] get-tuple-element(%s), index=1
  %n = s32[] constant({limit})
  {condition}
}}

%body (t: {STATE}) -> {STATE} {{
  %t = {STATE} parameter(0)
  %j = s32[] get-tuple-element(%t), index=0
  %k = s32[] get-tuple-element(%t), index=1
  %x = f32[8] get-tuple-element(%t), index=2
  %step = s32[] constant({step})
  {body[0]}
  {body[1]}
}}

ENTRY %main (y: f32[8], z: s32[]) -> {STATE} {{
  %y = f32[8] parameter(0)
  %z = s32[] parameter(1)
  %first = s32[] constant({begin})
  %second = s32[] constant({limit})
  %init = {STATE} tuple({state})
  ROOT %loop = {STATE} while(%init), condition=%condition, body=%body{attributes}
}}
""")
        main = module.computations["main"]
        return loops.trip_count(module, main, main.root)

    return passes


def run(begin, limit, step, compare):
    """The loop itself."""
    passes = 0
    while compare(begin, limit):
        begin, passes = begin + step, passes + 1
    return passes


@pytest.mark.parametrize("direction", ["LT", "LE", "GT", "GE"])
@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("begin, limit", [(0, 12), (1, 12), (-7, 11), (5, 5), (6, 5)])
def test_counted_loop(count, begin, limit, step, direction):
    compare = getattr(operator, direction.lower())
    if direction in ("GT", "GE"):
        begin, limit, step = limit, begin, -step
    text = LESS.replace("LT", direction)
    expected = run(begin, limit, step, compare)
    assert count(begin, limit, step, condition=text) == expected


def test_a_loop_until_equality_or_while_equal(count):
    assert count(2, 14, 3, condition=LESS.replace("LT", "NE")) == 4
    assert count(condition=LESS.replace("LT", "EQ")) is None


def test_limit_carried_by_the_state(count):
    less = "ROOT %less = pred[] compare(%i, %other), direction=LT"
    copied = "%next = s32[] add(%j, %step)\n  %same = s32[] copy(%k)"
    out = f"ROOT %out = {STATE} tuple(%next, %same, %x)"
    assert count(limit=9, condition=less, body=(copied, out)) == 9
    grows = f"ROOT %out = {STATE} tuple(%next, %next, %x)"
    assert count(condition=less, body=(ADD, grows)) is None
    assert count(condition=less, state="%first, %z, %y") is None


def test_step_carried_by_the_state(count):
    # The second element, 10 like the limit, is added in each pass.
    added = "%next = s32[] add(%k, %j)"
    less = (
        "%far = s32[] constant(35)\n  ROOT %l = pred[] compare(%i, %far), direction=LT"
    )
    assert count(condition=less, body=(added, OUT)) == 4


FUSIONS = """
%compared (p: s32[]) -> pred[] {
  %p = s32[] parameter(0)
  %five = s32[] constant(5)
  ROOT %c = pred[] compare(%p, %five), direction=LT
}

%compared_two (q: s32[], r: s32[]) -> pred[] {
  %r = s32[] parameter(1)
  %q = s32[] parameter(0)
  ROOT %c.2 = pred[] compare(%r, %q), direction=LT
}

%added (a: s32[], b: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %sum = s32[] add(%b, %a)
}

%added_two (a.2: s32[]) -> s32[] {
  %a.2 = s32[] parameter(0)
  %by = s32[] constant(2)
  ROOT %sum.2 = s32[] add(%a.2, %by)
}
"""


def test_comparison_in_a_fusion(count):
    fused = "ROOT %l = pred[] fusion(%i), kind=kLoop, calls=%compared"
    assert count(condition=fused, before=FUSIONS) == 5
    fused = "ROOT %l = pred[] fusion(%n, %i), kind=kLoop, calls=%compared_two"
    assert count(limit=7, condition=fused, before=FUSIONS) == 7


def test_addition_in_a_fusion(count):
    fused = "%next = s32[] fusion(%step, %j), kind=kLoop, calls=%added"
    assert count(limit=10, step=3, body=(fused, OUT), before=FUSIONS) == 4
    fused = "%next = s32[] fusion(%j), kind=kLoop, calls=%added_two"
    assert count(limit=10, body=(fused, OUT), before=FUSIONS) == 5


def test_the_compiler_s_own_count_comes_first(count):
    known = ', backend_config={"known_trip_count":{"n":"37"}}'
    assert count(attributes=known) == 37
    assert count(state="%z, %second, %y", attributes=known) == 37


@pytest.mark.parametrize(
    "change",
    [
        {"state": "%z, %second, %y"},  # Begins at an argument.
        {"body": ("%next = s32[] multiply(%j, %step)", OUT)},
        {"body": ("%next = s32[] add(%j, %k)", OUT.replace("%k", "%next"))},
        {"body": ("%next = s32[] add(%k, %step)", OUT)},  # Another one's successor.
        {"step": 0},
        {"condition": "ROOT %l = pred[] and(%i, %n)"},
        {"condition": "ROOT %l = pred[] compare(%n, %n), direction=LT"},
    ],
)
def test_what_depends_on_data_has_no_count(count, change):
    assert count(**change) is None


def test_an_element_of_another_tuple_is_no_state(count):
    # The limit comes back from elsewhere at its own place in a tuple.
    less = "ROOT %less = pred[] compare(%i, %other), direction=LT"
    elsewhere = (
        f"{ADD}\n  %call = {STATE} custom-call(%t)\n"
        "  %k.2 = s32[] get-tuple-element(%call), index=1"
    )
    out = OUT.replace("%k", "%k.2")
    assert count(condition=less, body=(elsewhere, out)) is None


def scan_seven(x):
    return lax.scan(lambda c, _: (jnp.sin(c @ c), None), x, None, length=7)[0]


def count_from_three(x):
    return lax.fori_loop(3, 14, lambda i, c: c @ c + i, x)


def by_threes(x):
    return lax.while_loop(
        lambda s: s[0] <= 11, lambda s: (s[0] + 3, s[1] @ s[1]), (1, x)
    )


def downwards(x):
    return lax.while_loop(lambda s: s[0] > 2, lambda s: (s[0] - 1, s[1] @ s[1]), (9, x))


def gradient(x):
    return jax.grad(lambda x: scan_seven(x).sum())(x)


def until_large(x):
    return lax.while_loop(lambda s: jnp.max(s) < 3, lambda s: s @ s + 1, x)


@pytest.mark.parametrize("platform", ["tpu", "cpu"])
@pytest.mark.parametrize(
    "function, expected",
    [
        (scan_seven, [7]),
        (count_from_three, [11]),
        (by_threes, [4]),
        (downwards, [7]),
        (gradient, [7, 7]),
        (until_large, [None]),
    ],
)
def test_compiled_loop(request, platform, function, expected):
    if platform == "tpu":
        compile_text = request.getfixturevalue("compile_text")
        text = compile_text(function, (64, 64), dtype=jnp.float32)
    else:
        text = jax.jit(function).lower(jnp.zeros((64, 64))).compile().as_text()
    module = hlo.parse(text)
    found = [
        loops.trip_count(module, comp, instruction)
        for comp in module.computations.values()
        for instruction in comp.instructions
        if instruction.opcode == "while"
    ]
    assert found == expected
