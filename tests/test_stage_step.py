"""The step of a stage: meshes, gradient accumulation, rematerialization, frozen parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from stage_configs import make_program, small_config

from janus_jax.aot.hlo_facts import collective_ops
from janus_jax.aot.hlo_text import parse
from janus_jax.training.program import put_rows
from janus_jax.training.step import default_promotion, make_optimizer

pytestmark = pytest.mark.usefixtures("quick_compiles")

ROWS = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return lambda **changed: small_config(
        tmp_path_factory.getbasetemp() / "step", **dict(batch_size=ROWS, max_bad=0.9) | changed
    )


@pytest.fixture(scope="module")
def batch(config, tmp_path_factory):
    """Rows with targets of every kind, and tokens of the images to generate."""
    program = make_program(config())
    rows, _ = program.inputs.open_rows(tmp_path_factory.mktemp("rows"))
    found = next(iter(rows))
    assert set(found["kind"][found["segment_ids"] > 0].tolist()) == {0, 1, 2}
    return jax.device_get(program.put_rows(program.parameters.load_frozen(), found))


def gradients(cfg, batch):
    """Returns gradients by path and losses of a config on one batch, on the host."""
    program = make_program(cfg)
    trained, frozen = program.parameters.load_trained(), program.parameters.load_frozen()
    rows = put_rows(batch, program.inputs.mesh)
    with default_promotion():  # as make_step has it
        found = jax.jit(program.objective.gradients)(trained, frozen, rows)
    return jax.device_get(found)


@pytest.fixture(scope="module")
def plain(config, batch):
    return gradients(config(), batch)


def norm_of(grads) -> float:
    """Returns the global norm of gradients on the host."""
    return float(np.sqrt(sum(np.vdot(grad, grad) for grad in grads.values())))


def num_products(program) -> int:
    """Returns the number of matrix products in the text of the step."""
    return dict(program.lowerings())["step"]().as_text().count("stablehlo.dot_general")


def assert_close(found, plain):
    """Compares up to the rounding of float32 sums in a different order."""
    (grads, losses), (want_grads, want_losses) = found, plain
    for kind, (total, count) in want_losses.items():
        np.testing.assert_allclose(losses[kind][0], total, rtol=1e-5)
        assert losses[kind][1] == count > 0
    assert grads.keys() == want_grads.keys()
    scale = norm_of(want_grads)
    for path, grad in want_grads.items():
        error = np.linalg.norm(grads[path] - grad) / (np.linalg.norm(grad) + 1e-3 * scale)
        assert error < 1e-4, (path, error)


def test_a_step_is_one_of_the_optimizer_and_takes_the_state_over(config, batch, plain):
    cfg = config(max_grad_norm=0.1, weight_decay=0.1, warmup_steps=1, end_learning_rate=1e-4)
    program = make_program(cfg)
    trained, frozen = program.parameters.load_trained(), program.parameters.load_frozen()
    grads, _ = plain
    optimizer = make_optimizer(cfg)

    @jax.jit
    @default_promotion()
    def update(params, opt_state):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    norm = norm_of(grads)
    assert norm > 1.5 * cfg.max_grad_norm
    params, opt_state = dict(trained), jax.jit(optimizer.init)(trained)
    state, step = program.first_state(program.parameters.load_trained()), program.step
    for number in range(2):  # the first has learning rate 0, the start of the warm-up
        params, opt_state = update(params, opt_state)
        before = state
        state, metrics = step(state, frozen, put_rows(batch, program.inputs.mesh))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
        assert float(metrics["learning_rate"]) == pytest.approx(number * cfg.learning_rate)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    assert int(state.step) == 2
    assert float(metrics["tokens"]) == (batch["segment_ids"] > 0).sum()
    assert float(metrics["positions"]) == batch["segment_ids"].size
    for path, want in params.items():
        np.testing.assert_allclose(state.params[path], want, rtol=1e-4, atol=2e-5, err_msg=path)
        assert not np.array_equal(state.params[path], trained[path])


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "data=2,fsdp=2,tensor=2", "fsdp=2,tensor=4"])
def test_loss_and_gradients_are_those_of_one_device(config, batch, plain, mesh):
    assert_close(gradients(config(mesh=mesh), batch), plain)


@pytest.mark.parametrize(("mesh", "accumulate"), [("data=1", 4), ("data=2,fsdp=2", 2)])
def test_gradients_added_up_over_parts_are_those_of_all_rows(
    config, batch, plain, mesh, accumulate
):
    assert_close(gradients(config(mesh=mesh, accumulate=accumulate), batch), plain)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_what_is_computed_again_gives_the_same_gradients(config, batch, plain, remat):
    assert_close(gradients(config(remat=remat), batch), plain)


@pytest.mark.parametrize("changed", [{}, dict(remat="full", mesh="fsdp=2,tensor=2")])
def test_layers_in_a_loop_give_the_same_gradients(config, batch, plain, changed):
    scanned, unrolled = config(scan="on", **changed), config(**changed)
    assert num_products(make_program(scanned)) < 0.8 * num_products(make_program(unrolled))
    assert_close(gradients(scanned, batch), plain)


@pytest.mark.parametrize(
    "trained",
    [
        dict(trained=r"language_model\.layers\.\d+\.mlp"),
        dict(lora_rank=2, lora_targets=r"language_model\.layers\.\d+\.mlp\.up_proj"),
    ],
)
def test_frozen_layers_in_a_loop_give_the_same_gradients(config, batch, trained):
    """Their parameters are stacked when they are loaded."""
    scanned = config(scan="on", **trained)
    assert any(".*." in path for path in make_program(scanned).parameters.loaded_frozen)
    assert_close(gradients(scanned, batch), gradients(config(**trained), batch))


@pytest.mark.parametrize(
    ("trained", "looped"),
    [
        (dict(trained=r"language_model\.layers\.\d+\.mlp"), True),
        (dict(trained=r"language_model\.layers\.1\."), False),
        (dict(lora_rank=2, lora_targets=r"language_model\.layers\.\d+\.mlp\.up_proj"), True),
        (dict(lora_rank=2, lora_targets=r"language_model\.layers\.0\.mlp\.up_proj"), False),
    ],
)
def test_layers_with_different_trainable_parameters_do_not_run_in_a_loop(config, trained, looped):
    on, off = (num_products(make_program(config(scan=scan, **trained))) for scan in ("on", "off"))
    assert (on < off) == looped and (on == off) != looped


def test_what_is_computed_again_is_not_kept(config, batch):
    def kept(remat):
        """Returns the bytes kept from the forward pass for the backward pass."""
        program = make_program(config(remat=remat))
        objective = program.objective

        def backward(trained, frozen):
            def loss(trained):
                return objective.mean(objective.terms(trained, frozen, batch))

            return jax.vjp(loss, trained)[1]

        shapes = jax.eval_shape(backward, program.parameters.trained, program.parameters.frozen)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))

    assert kept("full") < 0.7 * kept("dots") < 0.7 * 0.9 * kept("none")


def test_layers_cast_their_matrices_unless_they_run_in_a_loop(config):
    layer, paths = "language_model.layers.0", {}
    for scan in ("off", "on"):
        paths[scan] = make_program(config(scan=scan, dtype="bfloat16")).parameters.cast_by_model()
    assert f"{layer}.mlp.up_proj.kernel" in paths["off"] - paths["on"]
    assert f"{layer}.input_layernorm.scale" not in paths["off"] | paths["on"]
    # their gradients are sums over many tokens, or over chunks
    always = {"language_model.embed_tokens.embedding", "language_model.lm_head.kernel"}
    assert always <= paths["off"] & paths["on"]
    assert not any(".layers." in path for path in paths["on"])


def test_the_objective_is_the_weighted_mean_over_all_targets(config, batch, plain):
    weights = dict(understanding=3.0, text=0.0, generation=0.5)
    program = make_program(config(loss_weights=weights, accumulate=2))
    objective, (_, losses) = program.objective, plain
    total = 3 * losses["understanding"][0] + 0.5 * losses["generation"][0]
    number = 3 * losses["understanding"][1] + 0.5 * losses["generation"][1]
    np.testing.assert_allclose(objective.mean(losses), total / number, rtol=1e-6)
    trained, frozen = program.parameters.load_trained(), program.parameters.load_frozen()

    def mean(trained, frozen, batch):
        found = objective.terms(trained, frozen, batch)
        summed = sum(weights[kind] * total for kind, (total, _) in found.items())
        return summed / number, found

    want = jax.jit(jax.grad(mean, has_aux=True))(trained, frozen, batch)
    assert_close(gradients(program.inputs.settings, batch), jax.device_get(want))


def test_gradients_in_bfloat16_are_near_those_in_float32(config, batch, plain):
    """Gradients of embeddings and heads, sums over tokens, are as accurate as those of kernels."""
    grads, _ = gradients(config(dtype="bfloat16"), batch)
    scale = norm_of(plain[0])
    for path, want in plain[0].items():
        assert grads[path].dtype == np.float32
        if np.linalg.norm(want) > 1e-3 * scale:
            error = np.linalg.norm(grads[path] - want) / np.linalg.norm(want)
            assert error < 0.1, (path, error)


def test_what_is_frozen_has_no_gradient_no_optimizer_state_and_no_float32_copy(config, batch):
    program = make_program(config(trained=r"(und|gen)_aligner\.", dtype="bfloat16"))
    trained, frozen = program.parameters.trained, program.parameters.frozen
    assert {path.split(".")[0] for path in trained} == {"und_aligner", "gen_aligner"}
    assert {leaf.dtype for leaf in trained.values()} == {jnp.dtype(jnp.float32)}
    for path, leaf in frozen.items():
        assert leaf.dtype == (jnp.float32 if path.startswith("gen_vq.") else jnp.bfloat16), path
    numbers = sum(leaf.size for leaf in trained.values())
    state = program.abstract_state
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) == 2 * numbers + 2
    # no matrix product computes the gradient of a frozen kernel

    kernels, whole = sum(path.endswith("_proj.kernel") for path in frozen), config(dtype="bfloat16")
    assert num_products(make_program(whole)) - num_products(program) >= kernels > 10


def collectives_of(cfg):
    """Returns the collectives of the compiled step, and its program."""
    program = make_program(cfg)
    text = dict(program.lowerings())["step"]().compile().as_text()
    return collective_ops(parse(text)), program


def test_no_loop_over_chunks_sends_parameters_or_gradients(config):
    """Heads are gathered before the loop over chunks, and their gradients added up behind it."""
    heads = r"(language_model\.lm_head|gen_head)\."  # the backward pass of the layers is not needed
    found, program = collectives_of(config(mesh="fsdp=4", chunk=8, trained=heads))
    kernel = program.parameters.trained["language_model.lm_head.kernel"]
    assert any(one.bytes == 4 * kernel.size for one in found)
    assert not any("while" in one.op_name for one in found)


def test_a_loop_over_layers_gathers_one_layer_at_a_time(config):
    layers = r"language_model\.layers\."
    found, program = collectives_of(config(mesh="fsdp=4", scan="on", trained=layers))
    layers = program.inputs.model_cfg.language_model.num_hidden_layers
    kernels = [
        leaf.size for path, leaf in program.parameters.trained.items() if ".layers.0.mlp" in path
    ]
    # the scales of the norms are small; XLA may gather those of all layers before the loop
    gathered = [
        one
        for one in found
        if one.kind == "all-gather" and "while" in one.op_name and one.bytes > min(kernels) // 4
    ]
    assert gathered and {one.times for one in gathered} == {layers}
    assert max(one.bytes for one in gathered) <= 4 * max(kernels)


def test_each_device_takes_its_shard_of_a_gradient_before_the_optimizer_waits_for_all(config):
    """A barrier for each gradient; without it, XLA for TPU keeps the gradients of all layers."""
    barriers, trained = {}, r"language_model\.layers\."
    for mesh in ("data=1", "fsdp=4"):
        program = make_program(config(mesh=mesh, trained=trained))
        text = dict(program.lowerings())["step"]().as_text()
        barriers[mesh] = text.count("stablehlo.optimization_barrier")
    assert barriers["fsdp=4"] - barriers["data=1"] == len(program.parameters.trained)


def test_no_step_reads_the_tokenizer_where_images_come_as_indices(config):
    parameters = make_program(config(tokenized=True)).parameters
    paths = parameters.trained | parameters.frozen
    assert not any(path.startswith("gen_vq.") for path in paths)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(init="no/folder"), "init.*no/folder"),
        (dict(batch_size=6, accumulate=4), r"batch_size.*multiple.*\b6\b"),
        (dict(trained="nothing"), "trained='nothing'"),
        (dict(reinit="nothing"), "reinit='nothing'"),
        (dict(remat="some"), "remat.*none, dots, full.*'some'"),
        (dict(dtype="float16"), "dtype.*float32, bfloat16.*'float16'"),
        (dict(ema_decay=1.0), r"ema_decay.* 1\.0\b"),
        (dict(accumulate=0), r"accumulate.* 0\b"),
        (dict(trained=".*"), r"trained.*gen_vq.*'\.\*'"),
        (dict(eval_batches=0), r"eval_batches.* 0\b"),
        (dict(max_grad_norm=0.0), r"max_grad_norm.* 0\.0\b"),
        (dict(learning_rate=float("nan")), "^learning_rate.* nan"),
        (dict(end_learning_rate=-3.0), r"end_learning_rate.* -3\.0\b"),
        (dict(weight_decay=-1.0), r"weight_decay.* -1\.0\b"),
        (dict(seed=2**32), r"seed.*2\*\*32.* 4294967296\b"),
        (dict(warmup_steps=10**6), "warmup_steps.*steps.*warmup_steps=1000000"),
        (dict(learning_rate=1e-4), "end_learning_rate.*learning_rate.*both"),
        (dict(sample_every=5, prompts=()), "sample_every=5 .*prompts.*questions"),
        (
            dict(trained=r"gen_head\.out", reinit=r"gen_head\."),
            r"reinit.*frozen.*'gen_head\\\\\.'.* gen_head\.",
        ),
        (dict(eval_every=5), "eval_every=5 .*eval_mixture"),
        (dict(loss_weights=dict(understanding=1.0, text=1.0, generation=float("inf"))), "loss_w"),
        (dict(lora_rank=4, trained="gen_head"), "trained.*lora_rank"),
        (dict(trained="("), r"trained.*'\('"),
        (dict(lora_rank=4, lora_targets="x"), "targets.*'x'"),
    ],
)
def test_settings_that_cannot_be_trained_with_are_refused(config, changed, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        make_program(config(**changed))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("loss_weights", ConfigDict(dict(text=1.0)), "loss_weights.*understanding, text"),
        ("output", "", "output.*''"),
        ("output", "gs://bucket/run", "output.*local.* gs:/"),
        ("questions", ("a.png", "What?"), "questions.*pairs"),
        ("stepz", 3, "settings.*: stepz"),
        ("output", __file__, f"output.*{__file__}"),
    ],
)
def test_settings_that_a_config_may_lack_are_refused(config, name, value, message):
    cfg = config()
    cfg[name] = value
    with pytest.raises(ValueError, match=message):
        make_program(cfg)


def test_only_parameters_of_reinit_are_initialised(config):
    cfg = config(reinit=r"gen_head\.", trained=r"(gen_head|und_aligner)\.")
    before, after = (
        make_program(one).parameters.load_trained() for one in (config(trained=cfg.trained), cfg)
    )
    same = {path.split(".")[0] for path in before if np.array_equal(before[path], after[path])}
    assert same == {"und_aligner"}
    assert 0.01 < float(jnp.std(after["gen_head.out.kernel"])) < 1
