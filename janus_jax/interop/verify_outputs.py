"""The outputs that `python -m convert verify` compares, and the order in which they are computed.

T prompt tokens, N image features, C codes of an image, V vocabulary, S pixels a side.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np
from PIL import Image

# The positions of the prompt at whose end text logits are compared.
LAST_POSITIONS = 64

GUIDANCE_WEIGHT = 5.0  # of the original code (generation_inference.py)


@dataclasses.dataclass(frozen=True)
class Request:
    """What both implementations compute.

    image: RGB, input of the question and of the image tokenizer.
    question: about the image.
    prompt: description of the image to generate.
    max_new_tokens: at most this many tokens of the answer.
    num_image_tokens: this many tokens of the generated image.
    """

    image: Image.Image
    question: str
    prompt: str
    max_new_tokens: int
    num_image_tokens: int


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A request after preprocessing.

    tokens: int32[T], the question with the image's placeholders.
    image_prompt: int32[P], the prompt that image tokens follow.
    pixels: float32[S, S, 3], for the understanding encoder.
    """

    tokens: np.ndarray
    image_prompt: np.ndarray
    pixels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Tokens generated greedily, int32[n], and the logits of each, float32[n, V]."""

    tokens: np.ndarray
    logits: np.ndarray


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What an implementation computed; None where the image tokenizer was not run.

    features: SigLIP features, float32[N, W]; aligned: after the aligner, float32[N, D].
    latents: of the image tokenizer, float32[y, x, c]; indices: int32[C]; vq_pixels: decoded from
        the indices, float32[S, S, 3].
    text_logits: at the last positions of the question, float32[<= LAST_POSITIONS, V].
    image_logits: after the prompt and each of the image's first tokens, with the prompt and without
        its words, float32[2, n, V].
    """

    prepared: Prepared
    features: np.ndarray
    aligned: np.ndarray
    latents: np.ndarray | None
    indices: np.ndarray | None
    vq_pixels: np.ndarray | None
    text_logits: np.ndarray
    image_logits: np.ndarray
    answer: Greedy
    image: Greedy


class Implementation(Protocol):
    """A loaded model and its processor. Arrays are those of Outputs."""

    def prepare(self, request: Request) -> Prepared: ...

    def siglip_features(self, pixels: np.ndarray) -> np.ndarray: ...

    def align(self, features: np.ndarray) -> np.ndarray: ...

    def vq_latents(self, image: Image.Image) -> np.ndarray: ...

    def vq_indices(self, image: Image.Image) -> np.ndarray: ...

    def vq_decode(self, indices: np.ndarray) -> np.ndarray: ...

    def text_logits(self, tokens: np.ndarray, aligned: np.ndarray, last: int) -> np.ndarray: ...

    def image_logits(self, image_prompt: np.ndarray, indices: np.ndarray) -> np.ndarray: ...

    def greedy_answer(self, prepared: Prepared, max_new_tokens: int) -> Greedy: ...

    def greedy_image(self, prepared: Prepared, num_tokens: int) -> Greedy: ...


def compute_outputs(
    model: Implementation,
    request: Request,
    reference: Outputs | None,
    report: Callable[[str], None],
    with_vq: bool = True,
) -> Outputs:
    """Runs one implementation.

    reference: outputs that the parts of the model get as their inputs, so that an error in one
        part changes no other row. None uses the model's own outputs. The greedy rows always use the
        model's own inputs.
    report: called with the name of each step before it runs.
    with_vq: whether to run the image tokenizer; without it, there must be a reference.
    """
    report("preprocessing")
    prepared = model.prepare(request)
    given = prepared if reference is None else reference.prepared
    report("SigLIP and aligner")
    features = model.siglip_features(given.pixels)
    aligned = model.align(features if reference is None else reference.features)
    latents = indices = vq_pixels = None
    if with_vq:
        report("image tokenizer")
        latents, indices = model.vq_latents(request.image), model.vq_indices(request.image)
        vq_pixels = model.vq_decode(indices if reference is None else reference.indices)
    report("logits")
    codes = indices if reference is None else reference.indices
    aligned_input = aligned if reference is None else reference.aligned
    text_logits = model.text_logits(given.tokens, aligned_input, LAST_POSITIONS)
    image_logits = model.image_logits(given.image_prompt, codes[: request.num_image_tokens - 1])
    report("greedy answer")
    answer = model.greedy_answer(prepared, request.max_new_tokens)
    report("greedy image tokens")
    image = model.greedy_image(prepared, request.num_image_tokens)
    return Outputs(
        prepared,
        features,
        aligned,
        latents,
        indices,
        vq_pixels,
        text_logits,
        image_logits,
        answer,
        image,
    )
