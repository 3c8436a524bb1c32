"""Facts from programs that are compiled for a TPU and a GPU that are not there.

The facts are planted: a conversion and a gather of a weight in each step, and a clean step.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import DEVICES
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from janus_jax.aot.hlo_facts import attention_kernels, collective_ops, loop_kernels
from janus_jax.aot.hlo_loops import token_loop
from janus_jax.aot.hlo_text import parse
from janus_jax.aot.hlo_weights import IN_LOOP, weight_copies
from janus_jax.aot.topology import described_devices
from janus_jax.devices import known_devices

WIDTH, STEPS = 1024, 9
X = jax.ShapeDtypeStruct((4, WIDTH), jnp.bfloat16)


@pytest.fixture(params=DEVICES)
def devices(request):
    """Four devices to compile for."""
    return described_devices(known_devices()[request.param], 4)


def clean(weight: jax.Array, x: jax.Array, replicated: NamedSharding) -> jax.Array:
    # whole on every device, also if the weight is sharded
    return jax.lax.with_sharding_constraint(jnp.tanh(x @ weight), replicated)


def converting(weight: jax.Array, state, replicated: NamedSharding):
    # the next step reads the converted weight, so that it must be written
    x, converted = state
    scaled = weight.astype(jnp.float32) * x[0, 0].astype(jnp.float32)
    return jnp.tanh(x @ converted.astype(x.dtype)), scaled


def gathering(weight: jax.Array, x: jax.Array, replicated: NamedSharding) -> jax.Array:
    # bound to x, so that XLA does not move it out of the loop
    weight, x = jax.lax.optimization_barrier((weight, x))
    whole = jax.lax.with_sharding_constraint(weight, replicated)
    return jnp.tanh(x @ whole)


def compiled(step, devices, spec: P, state=X):
    """Compiles a loop of steps. Returns the program and the loop.

    spec: how the weight is sharded over the axis d. state: shapes of what a step maps.
    """
    mesh = Mesh(np.array(devices), "d", axis_types=(jax.sharding.AxisType.Auto,))
    replicated = NamedSharding(mesh, P())

    def generate(model, state):
        run = jax.named_scope("decode_step")(step)
        return jax.lax.fori_loop(0, STEPS, lambda _, state: run(model, state, replicated), state)

    weight = jax.ShapeDtypeStruct(
        (WIDTH, WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, spec)
    )
    state = jax.tree.map(lambda x: x.update(sharding=replicated), state)
    module = parse(jax.jit(generate).lower(weight, state).compile().as_text())
    return module, token_loop(module)


def test_a_clean_step(devices):
    module, loop = compiled(clean, devices, P())
    assert loop.trip_count == STEPS
    assert [c for c in weight_copies(module, loop) if c.place == IN_LOOP] == []
    assert collective_ops(module, loop) == []
    assert 1 <= loop_kernels(module, loop).total() <= 10


def test_a_conversion_of_the_weight_in_each_step_is_found(devices):
    converted = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
    module, loop = compiled(converting, devices, P(), (X, converted))
    copies = [c for c in weight_copies(module, loop) if c.place == IN_LOOP and c.is_conversion]
    assert copies and copies[0].array.dtype == "f32" and copies[0].weights == ("model",)
    assert copies[0].array.size == WIDTH * WIDTH and copies[0].times == 1


def test_a_gather_of_the_weight_in_each_step_is_found(devices):
    module, loop = compiled(gathering, devices, P("d"))
    (gather,) = (c for c in collective_ops(module, loop) if c.kind == "all-gather")
    assert gather.bytes == WIDTH * WIDTH * 2 and gather.devices == 4
    assert gather.in_token_loop and gather.times == 1


def test_a_product_of_a_sharded_weight_is_one_all_reduce_in_each_step(devices):
    module, loop = compiled(clean, devices, P("d"))
    (reduced,) = collective_ops(module, loop)
    assert reduced.kind == "all-reduce" and reduced.in_token_loop and reduced.devices == 4
    assert reduced.bytes in (4 * WIDTH * 2, 4 * WIDTH * 4)  # reduced in bfloat16 or float32


def test_attention_of_xla(devices):
    def attend(q):
        with jax.named_scope("prefill"), jax.named_scope("attention"):
            return jax.nn.dot_product_attention(q, q, q, implementation="xla")

    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    q = jax.ShapeDtypeStruct((1, 128, 2, 128), jnp.bfloat16, sharding=sharding)
    module = parse(jax.jit(attend).lower(q).compile().as_text())
    assert attention_kernels(module) == {"prefill": ("XLA",)}
