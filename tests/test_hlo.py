"""Facts from the text of compiled programs (janus_jax/aot/hlo_*.py).

The texts are excerpts of what `compiled.as_text()` returns for v5e, H100 and CPU, with short names.
"""

import pytest

from janus_jax.aot import hlo_facts
from janus_jax.aot.hlo_facts import attention_kernels, collective_ops, kernels, loop_kernels
from janus_jax.aot.hlo_loops import in_scope, token_loop, walk
from janus_jax.aot.hlo_text import Array, num_bytes, parse, parse_shape

STEP = 'metadata={op_name="jit(f)/while/body/decode_step/add"}'


def test_shapes_and_their_bytes():
    shape = parse_shape("(s32[], (bf16[2,8]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/u8[0]{0}), token[])")
    count, (matrix, nothing), token = shape
    assert matrix == Array("bf16", (2, 8), "1,0:T(8,128)(2,1)S(1)")
    assert matrix.memory_space == 1 and count.memory_space == 0
    assert [count.bytes, matrix.bytes, nothing.bytes, token.bytes] == [4, 32, 0, 0]
    assert num_bytes(shape) == 36
    assert Array("f32", (3, 1, 2)).matrix_dims == (2, 3)


def test_elements_of_less_than_a_byte_are_packed_if_the_layout_says_so():
    texts = ["s4[3,5]{1,0:E(4)}", "s4[3,5]{1,0}", "pred[7]{0}", "f8e4m3fn[7]", "c64[2]", "s32[<=5]"]
    assert [num_bytes(parse_shape(text)) for text in texts] == [8, 15, 7, 7, 16, 20]


GPU = f"""HloModule jit_f, is_scheduled=true, num_partitions=1

%fused (p: f32[4]) -> f32[4] {{
  %p = f32[4]{{0}} parameter(0)
  %exp = f32[4]{{0}} exponential(%p)
  ROOT %neg = f32[4]{{0}} negate(%exp)
}}

%small (p.1: f32[4]) -> f32[4] {{
  ROOT %p.1 = f32[4]{{0}} parameter(0)
}}

%large (p.2: f32[4]) -> f32[4] {{
  %p.2 = f32[4]{{0}} parameter(0)
  %c.2 = f32[4]{{0}} copy(%p.2)
  ROOT %f.2 = f32[4]{{0}} fusion(%c.2), kind=kLoop, calls=%fused
}}

%command_buffer (p.3: f32[4]) -> f32[4] {{
  %p.3 = f32[4]{{0}} parameter(0)
  %gemm = f32[4]{{0}} fusion(%p.3), kind=kCustom, calls=%fused, \
backend_config={{"fusion_backend_config":{{"kind":"__triton_nested_gemm_fusion"}}}}
  %blas = (f32[4]{{0}}, s8[64]{{0}}) custom-call(%gemm), custom_call_target="__cublas$gemm"
  ROOT %gte.3 = f32[4]{{0}} get-tuple-element(%blas), index=0
}}

%inner_condition (p.4: (s32[], f32[4])) -> pred[] {{
  %p.4 = (s32[], f32[4]{{0}}) parameter(0)
  %i.4 = s32[] get-tuple-element(%p.4), index=0
  %end = s32[] constant(3)
  ROOT %less = pred[] compare(%i.4, %end), direction=LT
}}

%inner_body (p.5: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %p.5 = (s32[], f32[4]{{0}}) parameter(0)
  %i.5 = s32[] get-tuple-element(%p.5), index=0
  %x.5 = f32[4]{{0}} get-tuple-element(%p.5), index=1
  %f.5 = f32[4]{{0}} fusion(%x.5), kind=kInput, calls=%fused
  ROOT %t.5 = (s32[], f32[4]{{0}}) tuple(%i.5, %f.5)
}}

%condition (p.6: (s32[], f32[4])) -> pred[] {{
  %p.6 = (s32[], f32[4]{{0}}) parameter(0)
  %x.6 = f32[4]{{0}} get-tuple-element(%p.6), index=1
  ROOT %any = pred[] fusion(%x.6), kind=kInput, calls=%fused
}}

%body (p.7: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %p.7 = (s32[], f32[4]{{0}}) parameter(0)
  %i.7 = s32[] get-tuple-element(%p.7), index=0
  %x.7 = f32[4]{{0}} get-tuple-element(%p.7), index=1
  %call.7 = f32[4]{{0}} call(%x.7), to_apply=%command_buffer, {STEP}
  %t.7 = (s32[], f32[4]{{0}}) tuple(%i.7, %call.7)
  %while.7 = (s32[], f32[4]{{0}}) while(%t.7), condition=%inner_condition, body=%inner_body, \
metadata={{op_name="jit(f)/while/body/decode_step/while"}}, \
backend_config={{"known_trip_count":{{"n":"3"}},"known_init_step":{{"init":"0","step":"1"}}}}
  %y.7 = f32[4]{{0}} get-tuple-element(%while.7), index=1
  %if.7 = f32[4]{{0}} conditional(%i.7, %y.7, %y.7), branch_computations={{%small, %large}}
  %unknown.7 = some syntax of the future
  ROOT %t.8 = (s32[], f32[4]{{0}}) tuple(%i.7, %if.7)
}}

ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4]{{0}} parameter(0), metadata={{op_name="x"}}
  %zero = s32[] constant(0)
  %t = (s32[], f32[4]{{0}}) tuple(%zero, %x)
  %while = (s32[], f32[4]{{0}}) while(%t), condition=%condition, body=%body, \
metadata={{op_name="jit(f)/while"}}
  ROOT %out = f32[4]{{0}} get-tuple-element(%while), index=1
}}

"""


def test_instructions_of_a_text():
    module = parse(GPU)
    body = module.computations["body"]
    loop, call = body.instructions["while.7"], body.instructions["call.7"]
    assert module.entry.name == "main" and module.entry.root.name == "out"
    assert loop.opcode == "while" and loop.operands == ("t.7",)
    assert loop.called == {"condition": ("inner_condition",), "body": ("inner_body",)}
    assert call.op_name == "jit(f)/while/body/decode_step/add"
    assert [x.name for x in module.called(body.instructions["if.7"])] == ["small", "large"]
    assert module.computations["command_buffer"].instructions["blas"].target == "__cublas$gemm"
    assert body.instructions["y.7"].attribute("index") == "1"
    assert num_bytes(body.instructions["while.7"].shape) == 20


def test_an_instruction_of_an_unknown_form_is_opaque():
    unknown = parse(GPU).computations["body"].instructions["unknown.7"]
    assert unknown.opcode == "opaque" and unknown.shape == () and unknown.operands == ()


def test_a_text_without_entry_or_a_computation_is_an_error():
    with pytest.raises(ValueError, match="with ENTRY, got 'module @jit_f"):
        parse("module @jit_f { func.func public @main() }")
    with pytest.raises(ValueError, match=r"lacks the computations \['fused'\]"):
        parse(GPU.replace("%fused (p", "%other (p"))


def test_the_token_loop_is_the_loop_around_the_decode_step():
    module = parse(GPU)
    loop = token_loop(module)
    assert loop.instruction.name == "while" and loop.body.name == "body"
    assert loop.trip_count is None  # its condition depends on data
    assert token_loop(module, scope="prefill") is None


def test_kernels_of_a_decode_step():
    module = parse(GPU)
    loop = token_loop(module)
    # one of the library, one matmul, three in the inner loop, two in the larger branch
    expected = {"cuBLAS": 1, "Triton matmul": 1, "fusion": 3 + 1, "copy": 1}
    # what cannot be read counts: it may be a kernel
    assert kernels(module, loop.body) == expected | {"opaque": 1}
    assert loop_kernels(module, loop)["fusion"] == 5  # and the condition


def test_walk_visits_each_place_with_its_loops():
    module = parse(GPU)
    loop = token_loop(module)
    visits = {visit.computation.name: visit for visit in walk(module)}
    assert {"main", "condition", "body", "inner_body", "command_buffer"} <= visits.keys()
    inner = visits["inner_body"]
    assert inner.times() == inner.times(loop) == 3 and inner.is_inside(loop)
    assert visits["main"].times() == 1 and not visits["main"].is_inside(loop)


def test_scopes_in_names_of_operations():
    paths = ("f/attention/dot", "transpose(jvp(attention))/dot", "attention", "(dot:attention/add)")
    assert all(in_scope(name, "attention") for name in paths)
    assert not in_scope("f/self_attention/attention_mask/dot", "attention")


TPU = """HloModule jit_g, is_scheduled=true

%add.clone (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%async_fused (p: bf16[4,8]) -> bf16[4,8] {
  %p = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-reduce.1 = bf16[4,8]{1,0:T(8,128)(2,1)} all-reduce(%p), \
replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}, to_apply=%add.clone, \
metadata={op_name="jit(g)/while/body/decode_step/mlp/dot_general"}
}

%scatter (q: f32[16]) -> f32[4] {
  %q = f32[16]{0} parameter(0)
  ROOT %reduce-scatter.1 = f32[4]{0} reduce-scatter(%q), replica_groups={{0,1,2,3}}, dimensions={0}
}

%condition (p.1: (s32[], bf16[4,8], s32[])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, bf16[4,8]{1,0}, s32[]) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %end = s32[]{:T(128)} constant(576)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %end), direction=LT
}

%body (p.2: (s32[], bf16[4,8], s32[])) -> (s32[], bf16[4,8], s32[]) {
  %p.2 = (s32[]{:T(128)}, bf16[4,8]{1,0}, s32[]) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  %one = s32[]{:T(128)} get-tuple-element(%p.2), index=2
  %x.2 = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%p.2), index=1
  %next = s32[]{:T(128)} add(%i.2, %one)
  %fusion.2 = bf16[4,8]{1,0:T(8,128)(2,1)} fusion(%x.2), kind=kCustom, calls=%async_fused
  ROOT %t.2 = (s32[]{:T(128)}, bf16[4,8]{1,0}, s32[]) tuple(%next, %fusion.2, %one)
}

ENTRY %main (x: bf16[1,8], y: f32[16]) -> (bf16[4,8], f32[4]) {
  %x = bf16[1,8]{1,0:T(8,128)(2,1)} parameter(0)
  %y = f32[16]{0} parameter(1)
  %first = s32[]{:T(128)} constant(1)
  %first.copy = s32[]{:T(128)} copy(%first)
  %gather = (bf16[1,8]{1,0}, bf16[4,8]{1,0}) all-gather-start(%x), \
replica_groups=[2,4]<=[8], dimensions={0}, metadata={op_name="jit(g)/dot_general"}
  %gathered = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather-done(%gather)
  %scattered = ((f32[16]{0}), f32[4]{0}, u32[]) async-start(%y), calls=%scatter
  %scatter.done = f32[4]{0} async-done(%scattered), calls=%scatter
  %t = (s32[]{:T(128)}, bf16[4,8]{1,0}, s32[]) tuple(%first.copy, %gathered, %first)
  %while = (s32[]{:T(128)}, bf16[4,8]{1,0}, s32[]) while(%t), condition=%condition, body=%body, \
metadata={op_name="jit(g)/while"}
  %out = bf16[4,8]{1,0} get-tuple-element(%while), index=1
  ROOT %result = (bf16[4,8]{1,0}, f32[4]{0}) tuple(%out, %scatter.done)
}
"""


def test_the_trip_count_of_a_loop_from_one_constant_to_another():
    loop = token_loop(parse(TPU))
    assert loop.trip_count == 575
    # the constant that is added is passed in; from 2 to 575 in steps of 2
    by_two = TPU.replace("constant(1)", "constant(2)").replace("(576)", "(575)")
    changing = TPU.replace("%fusion.2, %one)", "%fusion.2, %next)")
    assert token_loop(parse(by_two)).trip_count == 287
    assert token_loop(parse(changing)).trip_count is None


def test_an_all_reduce_of_which_a_slice_is_kept_is_a_reduce_scatter():
    sliced = """  %all = f32[16]{0} all-reduce(%q), replica_groups={{0,1,2,3}}, to_apply=%add.clone
  %id = u32[] partition-id()
  ROOT %slice = f32[4]{0} dynamic-slice(%all, %id), dynamic_slice_sizes={4}"""
    scatter = next(line for line in TPU.splitlines() if "%reduce-scatter.1" in line)
    fused = TPU.replace(scatter, sliced).replace(
        "((f32[16]{0}), f32[4]{0}, u32[]) async-start(%y)", "f32[4]{0} fusion(%y), kind=kCustom"
    )
    module = parse(fused.replace("async-done(%scattered), calls=%scatter", "bitcast(%scattered)"))
    found = [(c.kind, c.bytes, c.devices) for c in collective_ops(module)]
    assert ("reduce-scatter", 64, 4) in found and len(found) == 3


CHAIN = """HloModule jit_h

%started (p: bf16[1,8]) -> (bf16[1,8], bf16[4,8], u32[]) {
  %p = bf16[1,8]{1,0} parameter(0)
  %all-gather.1 = bf16[4,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], \
frontend_attributes={chain_id="0"}
  ROOT %start = (bf16[1,8]{1,0}, bf16[4,8]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%beside (p.2: bf16[1,8], q.2: bf16[8,8]) -> (bf16[8,8], bf16[4,8]) {
  %p.2 = bf16[1,8]{1,0} parameter(0)
  %q.2 = bf16[8,8]{1,0} parameter(1)
  %dot = bf16[8,8]{1,0} convolution(%q.2, %q.2)
  %all-gather.2 = bf16[4,8]{1,0} all-gather(%p.2), channel_id=7, replica_groups=[1,4]<=[4], \
frontend_attributes={chain_id="0"}
  ROOT %t.2 = (bf16[8,8]{1,0}, bf16[4,8]{1,0}) tuple(%dot, %all-gather.2)
}

ENTRY %main (x: bf16[1,8], y: bf16[8,8]) -> bf16[8,8] {
  %x = bf16[1,8]{1,0} parameter(0)
  %y = bf16[8,8]{1,0} parameter(1)
  %async-collective-start = (bf16[1,8]{1,0}, bf16[4,8]{1,0}, u32[]{:S(2)}) fusion(%x), \
kind=kCustom, calls=%started
  %fusion = (bf16[8,8]{1,0}, bf16[4,8]{1,0}) fusion(%x, %y), kind=kOutput, calls=%beside
  ROOT %out = bf16[8,8]{1,0} get-tuple-element(%fusion), index=0
}
"""


def test_a_collective_that_several_fusions_continue_counts_once():
    (gather,) = collective_ops(parse(CHAIN))
    assert (gather.kind, gather.bytes, gather.devices, gather.times) == ("all-gather", 64, 4, 1)


def test_collectives_inside_and_outside_the_token_loop():
    module = parse(TPU)
    found = collective_ops(module, token_loop(module))
    rows = [(c.kind, c.bytes, c.devices, c.times, c.in_token_loop) for c in found]
    assert sorted(rows) == [
        ("all-gather", 64, 4, 1, False),  # its result
        ("all-reduce", 64, 4, 1, True),  # in a fusion, once in a step
        ("reduce-scatter", 64, 4, 1, False),  # its operand
    ]
    outside = [c for c in found if not c.in_token_loop]
    assert hlo_facts.summarize(outside) == {"all-gather": (1, 64), "reduce-scatter": (1, 64)}
    (reduced,) = (c for c in collective_ops(module) if c.kind == "all-reduce")
    assert reduced.times == 575 and not reduced.in_token_loop
    assert hlo_facts.summarize([reduced]) == {"all-reduce": (575, 575 * 64)}


ATTENTION = """HloModule jit_h

ENTRY %main (q: bf16[2,4,512,128]) -> bf16[2,4,512,128] {
  %q = bf16[2,4,512,128]{3,2,1,0} parameter(0)
  %splash_mha_fwd_residuals.1 = bf16[2,4,512,128]{3,2,1,0} custom-call(%q, %q, %q), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128, \\"use_fused_bwd_kernel\\": false}"
}}, metadata={op_name="jit(h)/jvp()/attention/jit(_splash_attention)/pallas_call" stack_frame_id=5}
  %di = f32[2,4,512]{2,1,0} fusion(%q), kind=kLoop, \
metadata={op_name="jit(h)/transpose(jvp())/attention/jit(_splash_attention)/dot_general"}
  %splash_mha_dq.1 = bf16[2,4,512,128]{3,2,1,0} custom-call(%q, %di), \
custom_call_target="tpu_custom_call", \
metadata={op_name="jit(h)/transpose(jvp())/attention/jit(_splash_attention)/pallas_call"}
  %fwd.5 = (bf16[2,4,512,128]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(h)/prefill/attention/fwd"}
  %flash.2 = bf16[2,4,512,128]{3,2,1,0} custom-call(%q), \
custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(h)/decode_step/attention/call"}
  %norm.2 = bf16[2,4,512,128]{3,2,1,0} custom-call(%q), \
custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(h)/decode_step/norm/call"}
  %dot.7 = bf16[2,4,512,128]{3,2,1,0} dot(%q, %q), \
metadata={op_name="jit(h)/und_encoder/attention/BNTS,BSNH->BTNH/dot_general"}
  ROOT %dot.8 = bf16[2,4,512,128]{3,2,1,0} dot(%q, %q), metadata={op_name="jit(h)/mlp/dot_general"}
}
"""


def test_attention_kernels_of_each_part():
    assert attention_kernels(parse(ATTENTION)) == {
        "decode_step": ("Triton flash.2",),
        "decoder": ("splash attention",),
        "decoder backward": ("splash attention",),
        "prefill": ("cuDNN",),
        "und_encoder": ("XLA",),
    }
