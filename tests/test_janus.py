"""The whole model: released sizes, parameter counts, image features in a sequence, dtypes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch_reference import (
    IMAGE_TOKEN,
    assert_close,
    channels_first,
    golden_janus,
    read_with_images,
    rebuilt,
    tiny_pair,
    two_images_a_row,
    uniform,
)

from janus_jax.generation import image, text
from janus_jax.generation.samplers import Sampling
from janus_jax.interop.load import abstract
from janus_jax.models.janus import Janus, JanusConfig, merge_features
from janus_jax.models.vq import VQ
from janus_jax.processing.processor import Batch

GREEDY = Sampling(np.zeros(1, np.float32))
PARTS = (
    "und_encoder",
    "und_aligner",
    "gen_vq",
    "gen_embed",
    "gen_aligner",
    "gen_head",
    "language_model",
)


def parameter_counts(cfg: JanusConfig) -> dict[str, int]:
    """Number of elements of each part, extrapolated from two shallow models, which trace faster."""

    def shallow(layers: int) -> dict[str, int]:
        encoder = dataclasses.replace(cfg.und_encoder, num_layers=layers)
        decoder = dataclasses.replace(cfg.language_model, num_hidden_layers=layers)
        cut = dataclasses.replace(cfg, und_encoder=encoder, language_model=decoder)
        model = nnx.merge(*abstract(cut))
        parts = {part: jax.tree.leaves(nnx.state(getattr(model, part))) for part in PARTS}
        return {part: sum(x.size for x in leaves) for part, leaves in parts.items()}

    one, two, depths = shallow(1), shallow(2), dict.fromkeys(PARTS, 1)
    depths["und_encoder"] = cfg.und_encoder.num_layers
    depths["language_model"] = cfg.language_model.num_hidden_layers
    return {part: one[part] + (two[part] - one[part]) * (depths[part] - 1) for part in PARTS}


@pytest.mark.parametrize(
    "name, aligner, gen_aligner, gen_head, language_model",
    [
        ("janus_pro_1b", 6295552, 4214784, 37767168, 1652656128),
        ("janus_pro_7b", 20979712, 16818176, 83906560, 6910365696),
    ],
)
def test_released_parameter_counts(name, aligner, gen_aligner, gen_head, language_model):
    """The counts are those of the released files without `attn_pool` and `codebook_used`."""
    cfg = getattr(JanusConfig, name)()
    assert parameter_counts(cfg) == {
        "und_encoder": 303688704,
        "und_aligner": aligner,
        "gen_vq": 71883403,
        "gen_embed": 131072,
        "gen_aligner": gen_aligner,
        "gen_head": gen_head,
        "language_model": language_model,
    }
    assert (cfg.image_size, cfg.gen_grid, cfg.num_image_tokens) == (384, 24, 576)


def test_janus_1_3b_has_the_sizes_of_pro_1b():
    assert JanusConfig.janus_1_3b() == JanusConfig.janus_pro_1b()


def test_image_features_equal_torch():
    theirs, ours = tiny_pair()
    pixels = uniform(2, 16, 16, 3)
    expected = theirs.model.get_image_features(channels_first(pixels)).pooler_output
    got = jax.jit(Janus.encode_images)(ours, pixels)
    assert_close("SigLIP + aligner", got, expected, 1e-4)


def test_text_with_two_images_a_row_equals_torch():
    theirs, ours = tiny_pair()
    tokens, pixels = two_images_a_row()
    expected = theirs(
        input_ids=torch.tensor(tokens), pixel_values=channels_first(pixels.reshape(4, 16, 16, 3))
    ).logits
    got = read_with_images(ours, tokens, pixels)
    assert_close("Janus, text with images", got, expected, 1e-4)


def test_greedy_text_tokens_equal_torch_s():
    """Two rows with two images each; three tokens of the second are padding."""
    theirs, ours = tiny_pair()
    tokens, pixels = two_images_a_row()
    token_mask = np.arange(40) >= np.array([[0], [3]])
    batch = Batch(tokens, token_mask, tokens == IMAGE_TOKEN, pixels)
    expected = theirs.generate(
        input_ids=torch.tensor(tokens),
        attention_mask=torch.tensor(token_mask),
        pixel_values=channels_first(pixels.reshape(4, 16, 16, 3)),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    requests = text.make_requests(batch, 0, GREEDY, -1)  # an eos_id that no token equals
    got = text.generate_tokens(ours, requests, 12)
    np.testing.assert_array_equal(got, expected[:, 40:])
    assert len(np.unique(got)) > 10


def generated_by_torch(theirs, tokens: np.ndarray, guidance_weight: float) -> np.ndarray:
    """Runs the greedy loop of generation_inference.py: tokens [B, 2, P] -> indices [B, 16]."""
    embeds, indices = theirs.get_input_embeddings()(torch.tensor(tokens).flatten(0, 1)), []
    for _ in range(16):
        hidden = theirs.model.language_model(inputs_embeds=embeds).last_hidden_state[:, -1]
        cond, uncond = theirs.model.generation_head(hidden).unflatten(0, (-1, 2)).unbind(1)
        indices.append((uncond + guidance_weight * (cond - uncond)).argmax(-1))
        both_rows = indices[-1].repeat_interleave(2)[:, None]
        drawn = theirs.prepare_embeddings_for_image_generation(both_rows)
        embeds = torch.cat([embeds, drawn], dim=1)
    return torch.stack(indices, dim=1).numpy()


def test_greedy_image_tokens_equal_torch_s():
    theirs, ours = tiny_pair()
    tokens = np.random.default_rng(5).integers(0, 95, (3, 2, 10)).astype(np.int32)
    requests = image.make_requests(list(tokens), 1, 0, 3.0, GREEDY, 0)
    indices = image.generate_batch(ours, requests).indices
    np.testing.assert_array_equal(indices, generated_by_torch(theirs, tokens, 3.0))
    assert len(np.unique(indices)) > 10


def test_padded_text_with_images_equals_the_row_alone():
    """The last three tokens of the second row are padding; they must not change the others."""
    _, ours = tiny_pair()
    tokens, pixels = two_images_a_row()
    got = read_with_images(ours, tokens, pixels)
    expected = read_with_images(ours, tokens[1:, :37], pixels[1:])
    assert_close("Janus, padded", got[1:, :37], expected, 1e-5)


def test_merged_embeddings_equal_the_recording(golden):
    """Row 1 of the recording has no image; its features exist but must not be used."""
    recording = np.load(golden / "janus_processor.npz")
    janus = golden_janus()
    image_mask = recording["images_seq_mask"]
    pixels = np.moveaxis(recording["pixel_values"][:, 0], 1, -1)

    @jax.jit
    def merged(model):
        embeds = model.language_model.embed(recording["input_ids"])
        return merge_features(embeds, image_mask, model.encode_images(pixels))

    expected = np.load(golden / "janus_embeds.npz")["inputs_embeds"]
    assert_close("Janus golden inputs_embeds", merged(janus), expected, 1e-4)


def test_features_go_in_order_and_nowhere_else():
    embeds = -jnp.ones((3, 5, 1))
    features = jnp.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])[..., None]
    mask = jnp.array([[0, 1, 1, 0, 1], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0]], bool)
    expected = [[-1, 1, 2, -1, 3], [4, -1, -1, 5, -1], [-1] * 5]
    np.testing.assert_array_equal(merge_features(embeds, mask, features)[..., 0], expected)


def test_merging_passes_each_gradient_once():
    mask = jnp.array([[0, 1, 1, 0]], bool)
    gradient = jax.grad(lambda *x: merge_features(x[0], mask, x[1]).sum(), argnums=(0, 1))
    of_embeds, of_features = gradient(jnp.zeros((1, 4, 1)), jnp.zeros((1, 3, 1)))
    np.testing.assert_array_equal(of_embeds[0, :, 0], [1, 0, 0, 1])
    np.testing.assert_array_equal(of_features[0, :, 0], [1, 1, 0])


def test_with_dtype_leaves_the_vq_in_float32():
    ours = tiny_pair()[1]
    cfg = ours.cfg.with_dtype(jnp.bfloat16)
    assert cfg == ours.cfg.with_dtype(jnp.bfloat16, jnp.bfloat16) != ours.cfg
    for path, x in nnx.to_flat_state(nnx.state(rebuilt(ours, cfg))):
        expected = jnp.float32 if path[0] == "gen_vq" else jnp.bfloat16
        assert x[...].dtype == expected, path
    mixed = ours.cfg.with_dtype(jnp.bfloat16, jnp.float32)
    types = {x.dtype for x in jax.tree.leaves(nnx.state(rebuilt(ours, mixed)))}
    assert types == {jnp.dtype("float32")}
    assert dataclasses.replace(mixed.language_model, dtype=jnp.float32) == ours.cfg.language_model


@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float32])
def test_bfloat16_is_near_float32(param_dtype):
    """Within 5 % of the largest logit: a few roundings of 2**-8 in each block."""
    _, exact = tiny_pair()
    tokens, pixels = two_images_a_row()
    args = (tokens, pixels)
    rough = rebuilt(exact, exact.cfg.with_dtype(jnp.bfloat16, param_dtype))
    got, expected = read_with_images(rough, *args), read_with_images(exact, *args)
    assert got.dtype == jnp.float32
    limit = 0.05 * np.abs(expected).max()
    assert_close(f"Janus, bfloat16 on {param_dtype.__name__} weights", got, expected, limit)


def test_generation_decodes_in_float32_whatever_the_compute_type():
    _, exact = tiny_pair()
    rough = rebuilt(exact, exact.cfg.with_dtype(jnp.bfloat16))
    indices, decode = np.arange(32).reshape(2, 16), jax.jit(VQ.decode)
    np.testing.assert_array_equal(decode(rough.gen_vq, indices), decode(exact.gen_vq, indices))
