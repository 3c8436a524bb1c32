"""The outputs that `python -m convert verify` compares, and the order in which they are computed.

T prompt tokens, N image features, C codes of an image, V vocabulary, S pixels a side.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np
from PIL import Image

LAST_POSITIONS = 64  # text logits are compared at this many positions at the end of the question

GUIDANCE_WEIGHT = 5.0  # of the original code (generation_inference.py)


@dataclasses.dataclass(frozen=True)
class Request:
    """The input of both implementations.

    image: RGB, for the question and for the image tokenizer.
    question: a question about the image.
    prompt: description of the image to generate.
    max_new_tokens: length limit of the answer, in tokens.
    num_image_tokens: number of image tokens to generate.
    """

    image: Image.Image
    question: str
    prompt: str
    max_new_tokens: int
    num_image_tokens: int


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A preprocessed request.

    tokens: int32[T], the question, with placeholders for the image's features.
    image_prompt: int32[P], the prompt of the image to generate.
    pixels: float32[S, S, 3], input of the understanding encoder.
    """

    tokens: np.ndarray
    image_prompt: np.ndarray
    pixels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Greedily generated tokens, int32[n], and the logits of each, float32[n, V]."""

    tokens: np.ndarray
    logits: np.ndarray


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The outputs of one implementation.

    features: SigLIP features, float32[N, W].
    aligned: the same after the aligner, float32[N, D].
    latents: of the image tokenizer, float32[y, x, c]; None if it was not run.
    indices: VQ tokens, int32[C]; None if the image tokenizer was not run.
    vq_pixels: decoded VQ tokens, float32[S, S, 3]; None if the image tokenizer was not run.
    text_logits: at the last positions of the question, float32[<= LAST_POSITIONS, V].
    image_logits: teacher-forced with the first VQ tokens of the image, float32[2, n, V]; after the
        image prompt (cond) and after the same prompt without its words (uncond).
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
    """A loaded model with its processor. Arrays have the shapes of Prepared and Outputs."""

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
    """Computes all outputs of one implementation.

    Args:
        reference: outputs of another implementation, which become the inputs of every part of the
            model, so that an error in one part does not change the rows of the others. The greedy
            outputs always start from the model's own preprocessing. None uses the model's own
            outputs everywhere.
        report: is called with the name of each step before it runs.
        with_vq: whether to run the image tokenizer; False needs a reference.
    """
    report("preprocessing")
    prepared = model.prepare(request)
    inputs = prepared if reference is None else reference.prepared
    report("SigLIP and aligner")
    features = model.siglip_features(inputs.pixels)
    aligned = model.align(features if reference is None else reference.features)
    latents = indices = vq_pixels = None
    if with_vq:
        report("image tokenizer")
        latents, indices = model.vq_latents(request.image), model.vq_indices(request.image)
        vq_pixels = model.vq_decode(indices if reference is None else reference.indices)
    report("logits")
    codes = indices if reference is None else reference.indices
    aligned_input = aligned if reference is None else reference.aligned
    text_logits = model.text_logits(inputs.tokens, aligned_input, LAST_POSITIONS)
    image_logits = model.image_logits(inputs.image_prompt, codes[: request.num_image_tokens - 1])
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
