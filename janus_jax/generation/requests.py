"""Requests: prompts, and how the tokens that follow them are chosen.

B requests, R decoder rows of a request (the prompt and, with guidance, the unconditional prompt),
P prompt length (a bucket length), n images of a prompt, S image size in pixels, D model width.
"""

import dataclasses

import jax
import numpy as np

from janus_jax.generation import samplers
from janus_jax.generation.samplers import Sampling
from janus_jax.models.janus import Janus, merge_features


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
    """How each of B requests chooses its tokens. Requests of one batch may differ in every field.

    Values are traced: a new value needs no new compilation. A field that no request of the batch
    uses is None, and the compiled program does not contain it.

    seed: uint32[B, 2], one result of samplers.seed_words per request.
    index: uint32[B]. The noise of a request depends on its seed, its index and the step only.
    sampling: temperature, top_k and top_p of each request.
    guidance_weight: float32[B], w in uncond + w (cond - uncond). None disables guidance (R = 1).
    eos_id: int32[B], the token that ends the request. None: it ends only at its limit.
    """

    seed: jax.Array
    index: jax.Array
    sampling: Sampling
    guidance_weight: jax.Array | None = None
    eos_id: jax.Array | None = None

    @property
    def rows(self) -> int:
        """R, the number of decoder rows of a request."""
        return 1 if self.guidance_weight is None else 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Requests:
    """A batch of prompts to continue with image tokens or text tokens.

    tokens: int32[B, R, P], padded on the right. The pad tokens that replace the words of an
        unconditional prompt are not padding: they are attended to, as in the original code.
    lengths: int32[B], number of tokens without the padding, the same for all rows of a request.
    image_mask: bool[B, R, P], True where an image feature goes. With guidance, the unconditional
        prompt holds the images, too, or none of them.
    pixels: float32[B, n, S, S, 3], the images of a request, first those that exist, then zeros.
    choice: how the new tokens are chosen.
    limit: int32[B], maximum number of new tokens. None: as many as the cache has room for.
    """

    tokens: jax.Array
    lengths: jax.Array
    image_mask: jax.Array
    pixels: jax.Array
    choice: Choice
    limit: jax.Array | None = None

    def select(self, numbers: np.ndarray) -> "Requests":
        """Returns the requests with the given numbers; the fields are NumPy arrays."""
        return jax.tree.map(lambda field: field[numbers], self)


def make_choice(
    index: np.ndarray,
    seed: int,
    sampling: Sampling,
    guidance_weight: float | None = None,
    eos_id: int | None = None,
) -> Choice:
    """Returns the choice of requests that only differ in `index`, uint32[B], as NumPy arrays.

    sampling: the settings of one request, as samplers.make_sampling returns them.
    """
    number = len(index)

    def repeat(value, dtype) -> np.ndarray | None:
        return None if value is None else np.full(number, value, dtype)

    return Choice(
        seed=np.tile(samplers.seed_words(seed), (number, 1)),
        index=index,
        sampling=jax.tree.map(lambda value: np.repeat(value, number), sampling),
        guidance_weight=repeat(guidance_weight, np.float32),
        eos_id=repeat(eos_id, np.int32),
    )


def embed_prompts(model: Janus, requests: Requests) -> jax.Array:
    """Embeds the prompts, with image features in the places of the images: float[B * R, P, D]."""
    embeds = model.language_model.embed(requests.tokens)
    batch, images = requests.pixels.shape[:2]
    if images:
        features = model.encode_images(requests.pixels.reshape(-1, *requests.pixels.shape[2:]))
        features = features.reshape(batch, -1, features.shape[-1])
        merge = jax.vmap(merge_features, in_axes=(1, 1, None), out_axes=1)  # over the R rows
        embeds = merge(embeds, requests.image_mask, features)
    return embeds.reshape(-1, *embeds.shape[2:])
