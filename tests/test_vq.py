"""VQ-16 against `transformers` (random weights) and against recordings of the original."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_reference import (
    assert_close,
    call,
    channels_first,
    channels_last,
    golden_janus,
    rebuilt,
    tiny_pair,
    uniform,
)

from janus_jax.models.vq import VQ, VQConfig, l2_normalize

encode, decode, latents, nearest, lookup = (
    jax.jit(f) for f in (VQ.encode, VQ.decode, VQ.latents, VQ.nearest, VQ.lookup)
)


@pytest.fixture(scope="module")
def recording(golden):
    return np.load(golden / "janus_vq.npz")


@pytest.fixture(scope="module")
def pair():
    theirs, ours = tiny_pair()
    return theirs.model.vqmodel, ours.gen_vq


@pytest.fixture(scope="module")
def pixels():
    return uniform(2, 16, 16, 3)


def torch_nearest(x: torch.Tensor, codebook: torch.Tensor) -> np.ndarray:
    """The rule of the original code: the nearest normalised code (not so in transformers)."""
    x, codebook = (torch.nn.functional.normalize(v.double(), dim=-1) for v in (x, codebook))
    return torch.cdist(x, codebook).argmin(-1).numpy()


def test_blocks_equal_torch(pair):
    """A projected and a plain residual block, attention, down- and upsampling, one by one."""
    theirs, ours = pair
    down, up = theirs.encoder.down, theirs.decoder.up
    levels, up_levels = ours.encoder.levels, ours.decoder.levels
    blocks = {
        "VQ residual block": (down[0].block[0], levels[0].res[0], 32),
        "VQ residual block, projected": (down[1].block[0], levels[1].res[0], 32),
        "VQ attention": (down[2].attn[0], levels[2].attn[0], 64),
        "VQ downsampling": (down[0].downsample, levels[0].downsample, 32),
        "VQ upsampling convolution": (up[0].upsample.conv, up_levels[0].upsample, 64),
    }
    for name, (torch_block, block, channels) in blocks.items():
        x = uniform(2, 4, 4, channels)
        expected = channels_last(torch_block(channels_first(x)))
        assert_close(name, call(block, x), expected, 1e-5)


def test_encoder_equals_torch(pair, pixels):
    theirs, ours = pair
    hidden = theirs.encoder(channels_first(pixels))
    assert_close("VQ encoder", call(ours.encoder, pixels), channels_last(hidden), 1e-4)
    expected = channels_last(theirs.quant_conv(hidden))
    assert_close("VQ latents", jax.jit(VQ.latents)(ours, pixels), expected, 1e-4)


def test_quantiser_equals_torch(pair):
    theirs, ours = pair
    x = uniform(50, 8, seed=5)
    expected = torch_nearest(torch.tensor(x), theirs.quantize.embedding.weight)
    got = nearest(ours, x)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, expected)
    assert len(set(expected.tolist())) > 10  # not one code for all


def test_encode_equals_torch(pair, pixels):
    theirs, ours = pair
    x = theirs.quant_conv(theirs.encoder(channels_first(pixels))).permute(0, 2, 3, 1)
    expected = torch_nearest(x, theirs.quantize.embedding.weight).reshape(2, -1)
    np.testing.assert_array_equal(encode(ours, pixels), expected)


def test_lookup_and_decoder_equal_torch(pair):
    theirs, ours = pair
    indices = np.random.default_rng(6).integers(0, 40, (2, 16))
    codes = theirs.quantize.get_codebook_entry(torch.tensor(indices))
    got = lookup(ours, indices.reshape(2, 4, 4))
    assert_close("VQ code lookup", got, channels_last(codes), 1e-5)
    hidden = theirs.post_quant_conv(codes)
    expected = channels_last(theirs.decoder(hidden))
    assert_close("VQ decoder", call(ours.decoder, channels_last(hidden)), expected, 1e-4)
    pixels = decode(ours, indices)
    assert pixels.dtype == jnp.float32
    assert_close("VQ decode", pixels, channels_last(theirs.decode(torch.tensor(indices))), 1e-4)


def test_encoder_and_indices_equal_the_recording(recording):
    vq, pixels = golden_janus().gen_vq, channels_last(recording["pixel_values"])
    encoded = call(vq.encoder, pixels)
    assert_close("VQ golden encoder", encoded, channels_last(recording["encoder_out"]), 1e-4)
    x = call(vq.quant_conv, encoded)
    assert_close("VQ golden latents", x, channels_last(recording["latents"]), 1e-4)
    indices = nearest(vq, x)
    np.testing.assert_array_equal(indices.reshape(2, -1), recording["indices"])
    quantised = channels_last(recording["quantised"])
    assert_close("VQ golden quantised", lookup(vq, indices), quantised, 1e-5)


def test_decoded_pixels_equal_the_recording(recording):
    vq, codes = golden_janus().gen_vq, recording["codes"]
    entries = channels_last(recording["codebook_entry"])
    assert_close("VQ golden lookup", lookup(vq, codes.reshape(-1, 4, 4)), entries, 1e-5)
    post = channels_last(recording["post_quant"])
    assert_close("VQ golden post_quant_conv", call(vq.post_quant_conv, entries), post, 1e-5)
    decoded = channels_last(recording["decoded"])
    assert_close("VQ golden decoder", decode(vq, codes), decoded, 1e-4)


def test_reconstruction_equals_the_recording(recording):
    vq, pixels = golden_janus().gen_vq, channels_last(recording["pixel_values"])
    both = jax.jit(lambda vq, x: vq.decode(vq.encode(x)))
    reconstruction = channels_last(recording["reconstruction"])
    assert_close("VQ golden reconstruction", both(vq, pixels), reconstruction, 1e-4)


def test_lengths_of_codes_and_latents_do_not_matter(pair):
    _, ours = pair
    x = uniform(50, 8, seed=5)
    scaled = rebuilt(ours, ours.cfg)
    scale = np.random.default_rng(7).uniform(0.1, 10, (40, 1)).astype(np.float32)
    scaled.codebook[...] = ours.codebook[...] * scale
    np.testing.assert_array_equal(nearest(scaled, 7 * x), nearest(ours, x))
    indices = np.arange(40)
    assert_close("scaled codebook", lookup(scaled, indices), lookup(ours, indices), 1e-6)


def test_normalising_zero_gives_zero():
    np.testing.assert_array_equal(l2_normalize(jnp.zeros((2, 3))), np.zeros((2, 3)))


def test_released_size():
    cfg = VQConfig.vq_16()
    assert (cfg.downsample, cfg.codebook_size, cfg.codebook_dim) == (16, 16384, 8)
