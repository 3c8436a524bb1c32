"""Runs Janus in this package for `python -m convert verify`.

outputs.py documents the methods and the shapes of their arrays.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from janus_jax.generation import chunks, decoding, image, samplers, text
from janus_jax.generation.pipeline import load
from janus_jax.generation.requests import Requests
from janus_jax.models.janus import Janus, merge_features
from janus_jax.processing.images import preprocess_generation
from janus_jax.verify.outputs import GUIDANCE_WEIGHT, Greedy, Prepared, Request

GREEDY = samplers.Sampling(np.zeros(1, np.float32))  # temperature 0


@jax.jit
def _siglip(model: Janus, pixels: jax.Array) -> jax.Array:
    return model.und_encoder(pixels)


@jax.jit
def _align(model: Janus, features: jax.Array) -> jax.Array:
    return model.und_aligner(features)


@jax.jit
def _latents(model: Janus, pixels: jax.Array) -> jax.Array:
    return model.gen_vq.latents(pixels)


@jax.jit
def _indices(model: Janus, pixels: jax.Array) -> jax.Array:
    return model.gen_vq.encode(pixels)


@jax.jit
def _decode(model: Janus, indices: jax.Array) -> jax.Array:
    return model.gen_vq.decode(indices)


@functools.partial(jax.jit, static_argnames="last")
def _text_logits(
    model: Janus, tokens: jax.Array, image_mask: jax.Array, features: jax.Array, last: int
) -> jax.Array:
    embeds = merge_features(model.language_model.embed(tokens), image_mask, features)
    return model.language_model.lm_head(model.language_model(embeds)[0][:, -last:])


@jax.jit
def _image_logits(model: Janus, tokens: jax.Array, indices: jax.Array) -> jax.Array:
    codes = model.embed_image_tokens(indices)
    embeds = model.language_model.embed(tokens)
    rows = jnp.concatenate([embeds, codes.astype(embeds.dtype)], axis=1)
    hidden, _ = model.language_model(rows)
    return model.gen_head(hidden[:, tokens.shape[1] - 1 :])


_prefill = jax.jit(decoding.prefill, static_argnames=("kind", "num_tokens"))
_decode_step = jax.jit(decoding.decode_step, static_argnames="kind")
_choose = jax.jit(decoding.choose)


class JaxJanus:
    """An Implementation (outputs.py) with the model and processor that `load` returns."""

    def __init__(self, folder: Path, dtype: str):
        pipeline = load(folder, dtype=dtype)
        self.model, self.processor = pipeline.model, pipeline.processor
        self.dtype = jnp.dtype(dtype)

    def prepare(self, request: Request) -> Prepared:
        tokens, pixels = self.processor.conversation(request.question, [request.image])
        image_prompt = self.processor.image_prompt(request.prompt)
        return Prepared(np.array(tokens, np.int32), np.array(image_prompt, np.int32), pixels[0])

    def siglip_features(self, pixels: np.ndarray) -> np.ndarray:
        return _first(_siglip(self.model, jnp.asarray(pixels[None])))

    def align(self, features: np.ndarray) -> np.ndarray:
        return _first(_align(self.model, jnp.asarray(features[None], self.dtype)))

    def _tokenizer_input(self, source: Image.Image) -> jax.Array:
        return jnp.asarray(preprocess_generation(source, self.model.cfg.image_size)[None])

    def vq_latents(self, image: Image.Image) -> np.ndarray:
        return _first(_latents(self.model, self._tokenizer_input(image)))

    def vq_indices(self, image: Image.Image) -> np.ndarray:
        return np.asarray(_indices(self.model, self._tokenizer_input(image))[0])

    def vq_decode(self, indices: np.ndarray) -> np.ndarray:
        return _first(_decode(self.model, jnp.asarray(indices[None])))

    def text_logits(self, tokens: np.ndarray, aligned: np.ndarray, last: int) -> np.ndarray:
        row = jnp.asarray(tokens[None])
        features = jnp.asarray(aligned[None], self.dtype)
        image_mask = row == self.processor.tokenizer.image_id
        return _first(_text_logits(self.model, row, image_mask, features, last))

    def image_logits(self, image_prompt: np.ndarray, indices: np.ndarray) -> np.ndarray:
        unconditional = self.processor.unconditional(image_prompt.tolist())
        rows = np.stack([image_prompt, np.array(unconditional, np.int32)])
        codes = np.stack([indices, indices])
        return np.asarray(_image_logits(self.model, rows, codes), np.float32)

    def greedy_answer(self, prepared: Prepared, max_new_tokens: int) -> Greedy:
        example = prepared.tokens.tolist(), prepared.pixels[None]
        batch = self.processor.batch([example], chunks.bucket_length(len(prepared.tokens)))
        requests = text.make_requests(batch, 0, GREEDY, self.processor.tokenizer.eos_id)
        return self._greedy(text.TEXT_KIND, requests, max_new_tokens)

    def greedy_image(self, prepared: Prepared, num_tokens: int) -> Greedy:
        prompt = prepared.image_prompt.tolist()
        pair = prompt, self.processor.unconditional(prompt)
        pad_id = self.processor.tokenizer.pad_id
        requests = image.make_requests([pair], 1, 0, GUIDANCE_WEIGHT, GREEDY, pad_id)
        return self._greedy(image.IMAGE_KIND, requests, num_tokens)

    def _greedy(self, kind: decoding.TokenKind, requests: Requests, num_tokens: int) -> Greedy:
        """Decodes one request until it is done; at temperature 0 the choice is greedy."""
        state, logits = _prefill(self.model, kind, requests, num_tokens)
        tokens, rows = [], []
        while not state.done[0]:
            if rows:
                state, logits = _decode_step(self.model, kind, state)
            state = _choose(state, logits)
            tokens.append(state.token)
            rows.append(logits)
        return Greedy(np.concatenate(tokens), np.concatenate(rows).astype(np.float32))


def _first(batch: jax.Array) -> np.ndarray:
    """Returns the first entry of a batch as float32."""
    return np.asarray(batch[0], np.float32)
