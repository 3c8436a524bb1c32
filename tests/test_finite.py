"""NaN or infinite weights: every request fails with an error that names the module."""

import jax
import numpy as np
import pytest
from damage import damaged

from janus_jax.commands import sample as cli
from janus_jax.commands.tokenize_images import ImageEncoder
from janus_jax.generation import codec, image, text

pytestmark = pytest.mark.usefixtures("quick_compiles")  # no comparison with recordings

IMAGE_LOGITS = "image-token logits.*NaN.*"
TEXT_LOGITS = "text logits.*NaN.*"
NORM = "language_model.norm.scale"
NEW = 12


@pytest.fixture
def photo(golden):
    return golden / "preprocess" / "img0_50x120.png"


def generate(small, **settings):
    """Generates two images in one batch."""
    return small.generate_images("a cat", num_images=2, **settings)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_damaged_norm_ends_every_path(small, value):
    weights = NORM
    with damaged(small.model, NORM, value):
        with pytest.raises(ValueError, match=IMAGE_LOGITS + weights):
            generate(small)
        with pytest.raises(ValueError, match=IMAGE_LOGITS + weights):  # in several programs
            generate(small, max_batch=1, progress=lambda *_: None)
        with pytest.raises(ValueError, match=IMAGE_LOGITS + weights):
            next(small.stream_images("a cat", num_images=2))
        with pytest.raises(ValueError, match=TEXT_LOGITS + weights):
            small.answer("Hello", max_new_tokens=NEW)
        with pytest.raises(ValueError, match=TEXT_LOGITS + weights):
            next(small.stream("Hello", max_new_tokens=NEW))


def test_one_damaged_logit_of_many_stops_generation(small):
    """The original code raises an error in the softmax."""
    with damaged(small.model, "gen_head.out.bias"):
        with pytest.raises(ValueError, match=IMAGE_LOGITS + r"gen_head\.out\.bias"):
            generate(small)
        with damaged(small.model, "gen_head.proj.bias"):
            with pytest.raises(ValueError, match=r"gen_head\.out\.bias.*\b1 more"):
                generate(small)


def test_a_damaged_token_stops_generation_where_it_is_met(small):
    """The logits of the first token are finite; those of the second are not."""
    first = generate(small).indices[0, 0]
    with damaged(small.model, "gen_embed.embedding", row=first):
        with pytest.raises(ValueError, match=IMAGE_LOGITS + r"gen_embed\.embed"):
            generate(small)


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("und_encoder.norm.scale", "SigLIP features"),
        ("und_aligner.layers.1.bias", "aligned image features"),
        (NORM, "text logits"),
    ],
)
def test_the_part_that_failed_first_is_named(small, photo, path, what):
    message = f"{what}.*{path}"
    with damaged(small.model, path):
        with pytest.raises(ValueError, match=message):
            small.answer("What is it?", photo, max_new_tokens=NEW)
        with pytest.raises(ValueError, match=message):
            next(small.stream("What is it?", photo, max_new_tokens=NEW))


def test_damage_that_an_answer_does_not_meet_changes_nothing(small):
    expected = small.answer("Hello", max_new_tokens=NEW)
    model = small.model
    with damaged(model, "und_encoder.norm.scale"), damaged(model, "gen_head.out.bias"):
        assert small.answer("Hello", max_new_tokens=NEW) == expected


def test_a_damaged_decoder_of_pixels_ends_decoding(small, photo):
    indices, path = small.encode_images(photo), "gen_vq.decoder.conv_out.bias"
    message = f"decoded pixels.*{path}"
    with damaged(small.model, path, np.inf):  # which would be clipped to white
        with pytest.raises(ValueError, match=message):
            small.decode_indices(np.repeat(indices, 2, axis=0))
        with pytest.raises(ValueError, match=message):
            generate(small)
        np.testing.assert_array_equal(small.encode_images(photo), indices)


@pytest.mark.parametrize("path", ["gen_vq.encoder.conv_in.bias", "gen_vq.codebook"])
def test_a_damaged_encoder_of_pixels_ends_encoding(small, photo, path):
    message = f"VQ encoder latents.*{path}"
    encoder = ImageEncoder(small.model.gen_vq, 64, 1)  # of tokenize_images
    encoder.add(np.zeros((64, 64, 3), np.float32))
    encoder.finish()
    with damaged(small.model, path):
        with pytest.raises(ValueError, match=message):
            small.encode_images(photo)
        encoder.add(np.zeros((64, 64, 3), np.float32))
        with pytest.raises(ValueError, match=message):
            encoder.finish()


def test_finite_weights_that_overflow_are_distinguished(small):
    message = "language_model, gen_embed.*overflow"
    with damaged(small.model, NORM, 3e38):
        with pytest.raises(ValueError, match=IMAGE_LOGITS + message + r".*guidance_weight.*\b5\b"):
            generate(small)


def test_guidance_that_overflows_stops_generation(small):
    """Otherwise many logits would be infinite, and their tokens equally likely."""
    assert generate(small, guidance_weight=1e30).indices.max() < 128
    with pytest.raises(ValueError, match=r"guidance_weight.*\b3e\+38\b"):
        generate(small, guidance_weight=3e38)


def test_the_command_ends_in_one_line(small, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("janus_jax.generation.pipeline.load", lambda *_, **__: small)
    image_flags = ("--prompt", "a cat", "--num_images", "1", "--output_dir", str(tmp_path))
    text_flags = ("--question", "Hello", "--max_new_tokens", "12")
    for flags in (image_flags, text_flags):
        with damaged(small.model, NORM), pytest.raises(SystemExit) as stopped:
            cli.main(list(flags))
        out, err = capsys.readouterr()
        assert (stopped.value.code, out) == (2, "")
        assert err.splitlines()[-1].startswith("sample.py: ") and NORM in err
    assert not list(tmp_path.iterdir())


def test_no_program_calls_back(small):
    """JAX never stores programs with callbacks in its persistent compilation cache."""
    guidance_weight, sampling = small._image_settings()
    prompt = small.image_prompt("a cat")
    image_requests = image.make_requests([prompt], 1, 0, guidance_weight, sampling, 0)
    batch = small.processor.batch(small.examples(["Hello"], [[]], NEW))
    text_requests = text.make_requests(batch, 0, sampling, 0)
    generate_tokens = text.generate_tokens.__wrapped__

    def draw(model, requests):
        _, indices = image.advance_batch(model, image.begin_batch(model, requests, None), 1, 2)
        return codec.decode_pixels(model.gen_vq, indices)

    programs = (
        jax.make_jaxpr(draw)(small.model, image_requests),
        jax.make_jaxpr(generate_tokens, static_argnums=2)(small.model, text_requests, NEW),
    )
    assert not any("callback" in str(program) for program in programs)
