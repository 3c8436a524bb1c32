"""A checkpoint folder as an object that draws images and answers questions about them."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from janus_jax import checks, sharding
from janus_jax.generation import codec, compile_cache, decoding, image, loading, samplers, text
from janus_jax.interop.load import build_model, load_params, open_folder
from janus_jax.models.janus import Janus
from janus_jax.processing import chat
from janus_jax.processing.images import ImageSource, image_list, split_images
from janus_jax.processing.processor import Example, Processor
from janus_jax.processing.tokenizer import TextStream
from janus_jax.progress import Report

Conversation = str | Sequence[chat.Message]


@dataclasses.dataclass(frozen=True)
class Images:
    """N images, prompt after prompt: S pixels a side and T tokens.

    pixels: uint8[N, S, S, 3].
    indices: int32[N, T], the tokens they were decoded from, row-major.
    """

    pixels: np.ndarray
    indices: np.ndarray


class Pipeline:
    """A loaded model with its processor; see load."""

    def __init__(
        self,
        model: Janus,
        processor: Processor,
        name: str,
        image_defaults: loading.ImageDefaults,
        mesh: Mesh | None = None,
    ):
        context = min(processor.trained_context, model.cfg.language_model.max_position_embeddings)
        self.model = model
        self.processor = dataclasses.replace(processor, trained_context=context)
        self.name = name
        self.image_defaults = image_defaults
        self.mesh = mesh

    def generate_images(
        self,
        prompts: str | Sequence[str],
        num_images: int = 1,
        seed: int = 0,
        guidance_weight: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        max_batch: int | None = None,
        progress: Report | None = None,
    ) -> Images:
        """Draws num_images images of each prompt.

        Image j of a prompt and a seed is the same whatever the other prompts, num_images,
        max_batch and the mesh, in float32 and on one kind of machine (limits: docs/sampling.md).

        Args:
            prompts: a description, or P of them, without any template.
            num_images: images of each prompt.
            seed: random seed in [0, 2**64).
            guidance_weight: w in uncond + w (cond - uncond); 1 turns guidance off. None is the
                checkpoint's own: guidance_scale in its generation_config.json, or else 5.
            temperature: 0 always takes the likeliest token; None is the checkpoint's own:
                temperature in its generation_config.json, or else 1.
            top_k, top_p: sample among the top_k likeliest, and of these the fewest whose
                probabilities reach top_p, in (0, 1]; None is all.
            max_batch: the most images drawn at once; by default as many as have their keys and
                values in 4 GiB on each device.
            progress: called with the image tokens drawn so far and in all.
        Returns:
            P * num_images images uint8[N, S, S, 3] with their tokens, prompt after prompt.
        Raises:
            ValueError: an argument out of its range, or a prompt too long for the trained context.
        Source: generation_inference.py of the original code.
        """
        settings = dict(
            guidance_weight=guidance_weight, temperature=temperature, top_k=top_k, top_p=top_p
        )
        number = dict(num_images=num_images, max_batch=max_batch)
        drawn = list(
            self.stream_images(prompts, seed=seed, progress=progress, **number, **settings)
        )
        return Images(
            np.concatenate([part.pixels for part in drawn]),
            np.concatenate([part.indices for part in drawn]),
        )

    def stream_images(
        self,
        prompts: str | Sequence[str],
        *,
        num_images: int = 1,
        seed: int = 0,
        max_batch: int | None = None,
        progress: Report | None = None,
        **settings: float | None,
    ) -> Iterator[Images]:
        """As generate_images, at most max_batch images at a time, as soon as they are drawn.

        The arguments are checked at once; the parts, joined, are what generate_images gives. On a
        mesh a part has at least one image for each group of devices that shares out the batch.

        Args:
            prompts and the rest: see generate_images.
            settings: guidance_weight, temperature, top_k and top_p.
        Returns:
            An iterator of images; it draws when asked for the next ones.
        Raises:
            ValueError: as generate_images.
        Source: generation_inference.py of the original code, which draws one batch.
        """
        several = isinstance(prompts, Iterable) and not isinstance(prompts, (str, bytes, Mapping))
        prompts = list(prompts) if several else [prompts]
        checks.check_not_empty("prompts", prompts)
        guidance_weight, sampling = self._image_settings(**settings)
        max_batch = checks.check_optional_count("max_batch", max_batch)
        requests = image.make_requests(
            self._image_prompts(prompts),
            checks.check_count("num_images", num_images),
            checks.check_seed(seed),
            guidance_weight,
            sampling,
            self.processor.tokenizer.pad_id,
        )
        drawn = image.generate(self.model, requests, max_batch, self.mesh, progress)
        return (Images(pixels, indices) for indices, pixels in drawn)

    def _image_settings(
        self, guidance_weight=None, temperature=None, top_k=None, top_p=None
    ) -> tuple[float, samplers.Sampling]:
        """Checked, and the checkpoint's own where they are None."""
        if guidance_weight is None:
            guidance_weight = self.image_defaults.guidance_weight
        guidance_weight = checks.check_number("guidance_weight", guidance_weight)
        if temperature is None:
            temperature = self.image_defaults.temperature
        size = self.model.cfg.gen_vq.codebook_size
        return guidance_weight, samplers.make_sampling(temperature, top_k, top_p, size)

    def _image_prompts(self, prompts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """image_prompt of each; an error names the one of several that is wrong."""
        tokens = []
        for number, prompt in enumerate(prompts, 1):
            try:
                tokens.append(self.image_prompt(prompt))
            except ValueError as error:
                if len(prompts) == 1:
                    raise
                start = checks.shorten(prompt)
                raise ValueError(f"prompt {number} of {len(prompts)}, {start}: {error}") from None
        return tokens

    def image_prompt(self, prompt: str) -> tuple[list[int], list[int]]:
        """The tokens of a description, and of none, that image tokens follow.

        Raises:
            ValueError: it says nothing, or is too long for the trained context.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            got = checks.shorten(prompt)
            raise ValueError(f"a prompt must be a text that is not empty, got {got}")
        self.processor.check_text(prompt)
        tokens = self.processor.image_prompt(prompt)
        self.processor.check_length(len(tokens), self.model.cfg.num_image_tokens)
        return tokens, self.processor.unconditional(tokens)

    def answer(
        self,
        conversation: Conversation | Sequence[Conversation],
        images: Sequence | ImageSource | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        max_batch: int | None = None,
        allow_urls: bool = False,
    ) -> str | list[str]:
        """Answers a question, or goes on with a conversation.

        Args:
            conversation: a question; or messages {"role": "user" or "assistant", "content": text},
                the last one of the user, a first one of the role "system" allowed. The content may
                be a list of parts as transformers and OpenAI have it (see processing/messages.py).
                Or a list of conversations: then all are answered at once, each as it would be
                alone.
            images: the images (path, file: or data: URL, bytes, Pillow image or uint8[H, W, 3]), in
                the order of the placeholders in the text; where no message has a placeholder they
                come before the first text of the user. For a list of conversations, one such list
                for each.
            max_new_tokens: the longest answer, in tokens.
            temperature: 0 always takes the likeliest token, whatever the seed.
            top_k, top_p: see generate_images.
            seed: in [0, 2**64); above temperature 0 another one gives another answer, and the same
                one the same (in float32, on one kind of machine), alone as among others.
            max_batch: the most conversations answered at once; by default as many as have their
                keys and values in 4 GiB on each device.
            allow_urls: fetch images at http: and https: URLs (at most 30 s and 64 MiB each);
                otherwise such a URL is an error.
        Returns:
            The answer; for a list of conversations, a list of answers.
        Raises:
            ValueError: an argument out of its range, images that do not fit the placeholders or
                cannot be read, or a conversation too long for the trained context.
            FileNotFoundError: there is no image at a path.
        Source: inference.py of the original code.
        """
        max_new_tokens = checks.check_count("max_new_tokens", max_new_tokens)
        max_batch = checks.check_optional_count("max_batch", max_batch)
        sampling, seed = self._text_sampling(temperature, top_k, top_p), checks.check_seed(seed)
        many = not chat.is_conversation(conversation)
        conversations = conversation if many else [conversation]
        checks.check_not_empty("conversations", conversations)
        image_lists = split_images(images, len(conversations)) if many else [image_list(images)]
        examples = self.examples(conversations, image_lists, max_new_tokens, allow_urls)
        answers = list(self._answers(examples, max_new_tokens, max_batch, sampling, seed))
        return answers if many else answers[0]

    def stream(
        self,
        conversation: Conversation,
        images: Sequence | ImageSource | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        allow_urls: bool = False,
    ) -> Iterator[str]:
        """As answer for one conversation, in pieces that never split a character.

        The arguments are checked at once; the pieces, joined, are the answer.

        Args:
            conversation, images and the rest: see answer.
        Returns:
            An iterator of texts that are not empty; it computes a token when asked for the next.
        Raises:
            ValueError, FileNotFoundError: as answer; also for a list of conversations.
        Source: inference.py of the original code, which does not stream.
        """
        max_new_tokens = checks.check_count("max_new_tokens", max_new_tokens)
        sampling, seed = self._text_sampling(temperature, top_k, top_p), checks.check_seed(seed)
        if not chat.is_conversation(conversation):
            raise ValueError("stream takes one conversation, got a list of them")
        image_lists = [image_list(images)]
        examples = self.examples([conversation], image_lists, max_new_tokens, allow_urls)
        requests = self._text_requests(examples, _prompt_length(examples), sampling, seed)
        tokens = text.stream(self.model, requests, max_new_tokens, self.mesh)
        return TextStream(self.processor.tokenizer).pieces(tokens)

    def _decode(self, tokens: np.ndarray) -> str:
        tokenizer = self.processor.tokenizer
        ends = np.flatnonzero(tokens == tokenizer.eos_id)
        return tokenizer.decode(tokens[: ends[0]] if len(ends) else tokens)

    def _text_sampling(self, temperature, top_k, top_p) -> samplers.Sampling:
        size = self.model.cfg.language_model.vocab_size
        return samplers.make_sampling(temperature, top_k, top_p, size)

    def examples(
        self,
        conversations: Sequence[Conversation],
        images: Sequence[Sequence[ImageSource]],
        max_new_tokens: int,
        allow_urls: bool = False,
    ) -> list[Example]:
        """Conversations and the images of each as tokens and pixels.

        Raises:
            ValueError, FileNotFoundError: as answer.
        """
        for messages in conversations:
            chat.check_unanswered(messages)
        examples = [
            self.processor.conversation(messages, own, allow_urls)
            for messages, own in zip(conversations, images, strict=True)
        ]
        for tokens, _ in examples:
            self.processor.check_length(len(tokens), max_new_tokens)
        return examples

    def _text_requests(
        self, examples: Sequence[Example], length: int, sampling, seed: int
    ) -> text.Requests:
        batch = self.processor.batch(examples, pad_to=length)
        eos_id = self.processor.tokenizer.eos_id
        return text.make_requests(batch, seed, sampling, eos_id, self.mesh)

    def _answers(
        self, examples: list[Example], max_new_tokens: int, max_batch, sampling, seed: int
    ) -> Iterator[str]:
        """One answer an example, a chunk at a time."""
        length = _prompt_length(examples)
        decoder, slots = self.model.cfg.language_model, length + max_new_tokens - 1
        most = max_batch or decoding.batch_within_memory(decoder, slots, self.mesh)
        size = decoding.chunk_size(len(examples), most, sharding.num_batch_shards(self.mesh))
        for start in range(0, len(examples), size):
            chunk = examples[start : start + size]
            # the last chunk is filled up with its last example, whose copies are dropped
            filled = chunk + chunk[-1:] * (size - len(chunk))
            requests = self._text_requests(filled, length, sampling, seed)
            tokens = np.asarray(text.write(self.model, requests, max_new_tokens, self.mesh))
            text.check_tokens(self.model, requests, tokens, self.mesh)
            yield from map(self._decode, tokens[: len(chunk)])

    def encode_images(self, images: Sequence[ImageSource] | ImageSource) -> np.ndarray:
        """The image tokenizer's tokens of N images, one image at a time.

        Args:
            images: paths, bytes, Pillow images or arrays uint8[H, W, 3], of any size, or one array
                uint8[N, H, W, 3]: the short side is resized to the model's S and the long one
                cropped in its centre.
        Returns:
            int32[N, T], row-major, indices into the codebook.
        Raises:
            ValueError: no image, or one that cannot be read.
            FileNotFoundError: there is no such file.
        Source: VQModel.encode of the original code; report of Janus, section 3.1 (resizing).
        """
        return codec.to_indices(self.model, images, self.mesh)

    def decode_indices(self, indices: np.ndarray) -> np.ndarray:
        """Images of image tokens, one at a time on each device.

        Args:
            indices: int[N, T], row-major, as encode_images and Images have them.
        Returns:
            uint8[N, S, S, 3], truncated to whole levels as the reference does.
        Raises:
            ValueError: another shape or type, or an index outside the codebook.
        Source: VQModel.decode_code and generation_inference.py of the original code.
        """
        return codec.to_pixels(self.model, indices, self.mesh)


def _prompt_length(examples: Sequence[Example]) -> int:
    return decoding.bucket_length(max(len(tokens) for tokens, _ in examples))


def load(
    path_or_hub_id: str | Path | None = None,
    dtype=None,
    mesh: Mesh | None = None,
    adapter: str | Path | None = None,
    progress: Report | None = None,
) -> Pipeline:
    """Loads a checkpoint folder, ready to draw and to answer.

    Also turns on JAX's persistent compilation cache (see compile_cache).

    Args:
        path_or_hub_id: a folder in DeepSeek's or transformers' layout, safetensors or .bin, or as
            `python -m convert` wrote it; or an id such as "deepseek-ai/Janus-Pro-1B". None is the
            small model that ships with the package.
        dtype: "float32" or "bfloat16"; by default bfloat16 on TPU and GPU and float32 on CPU. The
            image tokenizer is always float32.
        mesh: devices to share the work and the parameters among (see sharding.make_mesh); None is
            one device.
        adapter: a LoRA adapter in PEFT's format (adapter_config.json and its weights), as a folder
            or hub id, to merge into the model: docs/checkpoints.md. None is no adapter.
        progress: called with the bytes of weights read so far and in all.
    Returns:
        The model with its processor.
    Raises:
        FileNotFoundError: there is no such folder, or a file is missing from it.
        ValueError: no device of the requested platform, a wrong dtype, a mesh that does not divide
            the heads, a broken checkpoint, or an adapter that does not fit it.
    Source: the folders of MultiModalityCausalLM (the original code) and of transformers'
    JanusForConditionalGeneration.
    """
    sharding.check_devices()
    if mesh is not None:
        mesh = sharding.with_auto_axes(mesh)
    dtype = loading.check_dtype(dtype, mesh)
    compile_cache.enable()
    folder = loading.find_folder(path_or_hub_id)
    opened = open_folder(folder, loading.find_adapter(adapter))
    cfg = opened.cfg.with_dtype(dtype)
    place = loading.parameter_shardings(mesh, cfg)
    processor = Processor.from_dir(folder)
    loading.check_processor(folder, processor, cfg)
    image_defaults = loading.ImageDefaults.from_dir(folder)
    model = build_model(cfg, load_params(opened, cfg, place, dtype, progress=progress))
    name = loading.display_name(path_or_hub_id, adapter)
    return Pipeline(model, processor, name, image_defaults, mesh)
