"""Which weights a compiled program copies or converts, from its text."""

import jax
import jax.numpy as jnp
import pytest

from janus_jax.aot.hlo_facts import loop_kernels
from janus_jax.aot.hlo_loops import token_loop
from janus_jax.aot.hlo_text import parse
from janus_jax.aot.hlo_weights import BEFORE_LOOP, ELSEWHERE, IN_LOOP, weight_copies

STEP = 'metadata={op_name="jit(f)/while/body/decode_step/add"}'


def loop_text(body: str, entry: str = "", weight: str = "bf16[64,32]{1,0}", read: str = "w") -> str:
    """A program whose loop reads one weight. body, entry: instructions there, which may read %w.

    weight: its shape. read: what the loop is given, an instruction of `entry`."""
    passed = f"(s32[], {weight})"
    return f"""HloModule jit_f

%has_dot (p.1: {weight}, p.2: bf16[1,64]) -> bf16[64,32] {{
  %p.1 = {weight} parameter(0)
  %p.2 = bf16[64,64]{{1,0}} parameter(1)
  ROOT %dot.1 = bf16[64,32]{{1,0}} dot(%p.2, %p.1)
}}

%to_float (p.3: {weight}) -> f32[64,32] {{
  %p.3 = {weight} parameter(0)
  ROOT %convert.3 = f32[64,32]{{1,0}} convert(%p.3)
}}

%condition (p.4: {passed}) -> pred[] {{
  %p.4 = {passed} parameter(0)
  ROOT %true = pred[] constant(true)
}}

%body (p.5: {passed}) -> {passed} {{
  %p.5 = {passed} parameter(0)
  %i = s32[] get-tuple-element(%p.5), index=0
  %w = {weight} get-tuple-element(%p.5), index=1
  %h = bf16[64,64]{{1,0}} constant({{...}})
  {body}
  %step = s32[] add(%i, %i), {STEP}
  ROOT %t.5 = {passed} tuple(%step, %w)
}}

ENTRY %main (w: {weight}, x: bf16[64,32]) -> s32[] {{
  %w = {weight} parameter(0), metadata={{op_name="model.layers[0].kernel.value"}}
  %x = bf16[64,32]{{1,0}} parameter(1), metadata={{op_name="requests.x"}}
  %zero = s32[] constant(0)
  {entry}
  %t = {passed} tuple(%zero, %{read})
  %while = {passed} while(%t), condition=%condition, body=%body, metadata={{op_name="jit(f)/while"}}
  ROOT %out = s32[] get-tuple-element(%while), index=0
}}
"""


def copies_of(text: str) -> list[tuple[str, str, bool, str]]:
    module = parse(text)
    found = weight_copies(module, token_loop(module))
    assert all(c.weights == ("model.layers[0].kernel.value",) and c.times == 1 for c in found)
    return [(c.name, c.array.dtype, c.is_conversion, c.place) for c in found]


@pytest.mark.parametrize(
    "instruction",
    [
        "%dot = bf16[64,32]{1,0} dot(%h, %w)",
        "%fusion = bf16[64,32]{1,0} fusion(%w, %h), kind=kCustom, calls=%has_dot",
        '%gemm = (bf16[64,32]{1,0}, s8[9]) custom-call(%h, %w), custom_call_target="__cublas$gemm"',
        "%bitcast = bf16[32,64]{0,1} bitcast(%w)",
        "%row = bf16[1,32]{1,0} dynamic-slice(%w, %i, %i), dynamic_slice_sizes={1,32}",
        "%add = bf16[64,64]{1,0} fusion(%h, %w), kind=kLoop",
        "%start = (bf16[64,32]{1,0:S(1)}, bf16[64,32]{1,0}, u32[]{:S(2)}) copy-start(%w)\n"
        "  %done = bf16[64,32]{1,0:S(1)} copy-done(%start)",
        "%slice = ((bf16[64,32]{1,0}), bf16[16,32]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%w)",
    ],
)
def test_products_and_prefetches_copy_no_weight(instruction):
    assert copies_of(loop_text(instruction)) == []


@pytest.mark.parametrize(
    ("instruction", "name", "dtype", "is_conversion"),
    [
        ("%c = f32[64,32]{1,0} convert(%w)", "c", "f32", True),
        ("%f = f32[64,32]{1,0} fusion(%w), kind=kLoop, calls=%to_float", "f", "f32", True),
        # a conversion costs time, whatever memory it writes to
        ("%f = f32[64,32]{1,0:S(1)} fusion(%w), kind=kLoop, calls=%to_float", "f", "f32", True),
        ("%c = bf16[64,32]{0,1} copy(%w)", "c", "bf16", False),
        ("%t = bf16[32,64]{1,0} transpose(%w), dimensions={1,0}", "t", "bf16", False),
        # the products of a matrix and a vector, before they are summed
        ("%m = bf16[64,32]{1,0} fusion(%w, %i), kind=kLoop", "m", "bf16", False),
        ("%s = (bf16[64,32]{1,0}, bf16[64,32]{1,0}, u32[]) copy-start(%w)", "s", "bf16", False),
    ],
)
def test_copies_and_conversions_in_the_token_loop(instruction, name, dtype, is_conversion):
    assert copies_of(loop_text(instruction)) == [(name, dtype, is_conversion, IN_LOOP)]


def test_a_layer_cut_out_of_a_stack_is_a_copy():
    stack = "bf16[24,64,32]{2,1,0}"
    cut = "%cut = bf16[1,64,32]{2,1,0} dynamic-slice(%w, %i, %i, %i), dynamic_slice_sizes={1,64,32}"
    assert copies_of(loop_text(cut, weight=stack)) == [("cut", "bf16", False, IN_LOOP)]


def test_copies_outside_of_the_token_loop():
    entry = """%relaid = bf16[64,32]{0,1} copy(%w)
  %for.prefill = f32[64,32]{1,0} convert(%w)
  %sum = bf16[64,32]{1,0} add(%w, %x)"""
    clean = "%dot = bf16[64,32]{1,0} dot(%h, %w)"
    assert copies_of(loop_text(clean, entry, read="relaid")) == [
        ("relaid", "bf16", False, BEFORE_LOOP),
        ("for.prefill", "f32", True, ELSEWHERE),
    ]


def test_a_program_compiled_for_the_cpu():
    @jax.named_scope("decode_step")
    def decode_step(weight: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ weight.astype(jnp.float32))

    def generate(model, x):
        return jax.lax.fori_loop(0, 7, lambda _, x: decode_step(model["w"], x), x)

    shapes = {"w": jax.ShapeDtypeStruct((32, 32), jnp.int8)}
    x = jax.ShapeDtypeStruct((2, 32), jnp.float32)
    module = parse(jax.jit(generate).lower(shapes, x).compile().as_text())
    assert not any(i.opcode == "opaque" for i in module.all_instructions())
    loop = token_loop(module)
    assert loop.trip_count == 7 and loop_kernels(module, loop).total() >= 1
    # XLA moves the conversion out of the loop
    (copy,) = weight_copies(module, loop)
    assert copy.is_conversion and copy.place == BEFORE_LOOP and copy.array.bytes == 32 * 32 * 4
    assert copy.weights == ("model['w']",)
