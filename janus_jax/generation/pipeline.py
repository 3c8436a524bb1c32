"""The public interface: loads a checkpoint, generates images and answers questions."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from janus_jax import checks, sharding
from janus_jax.generation import chunks, codec, image, loading, samplers, text
from janus_jax.generation.requests import Requests
from janus_jax.interop.files import Report
from janus_jax.interop.folders import check_processor, find_adapter, find_folder
from janus_jax.interop.load import build_model, check_dtype, load_params, open_folder
from janus_jax.models.janus import Janus
from janus_jax.processing import chat
from janus_jax.processing.images import ImageSource, image_list, split_images
from janus_jax.processing.processor import PreparedPrompt, Processor
from janus_jax.processing.tokenizer import TextStream

Conversation = str | Sequence[chat.Message]


@dataclasses.dataclass(frozen=True)
class Images:
    """N generated images, in the order of their prompts.

    Attributes:
        pixels: uint8[N, S, S, 3], RGB; S is the image size of the model in pixels.
        indices: int32[N, T], the image tokens that the pixels were decoded from, in row-major
            order.
    """

    pixels: np.ndarray
    indices: np.ndarray


class Pipeline:
    """A loaded model with its processor. Create one with `load`.

    Attributes:
        model: the Janus module.
        processor: prepares prompts, conversations and images for the model.
        name: the name of the model in the metadata of generated images.
        image_defaults: guidance_weight and temperature that generate_images uses by default.
        mesh: the devices that the model is sharded over, or None.
    """

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
        """Generates `num_images` images for each prompt.

        Image number j of a prompt depends on the prompt, the seed, j, the sampling settings and the
        weights. It does not depend on the other prompts, num_images, max_batch or the mesh, as long
        as the model computes in float32 on the same kind of machine. docs/sampling.md describes the
        limits.

        Args:
            prompts: one description or a sequence of P descriptions, as plain text without a chat
                template.
            num_images: number of images for each prompt.
            seed: random seed, an integer in [0, 2**64). No effect at temperature 0.
            guidance_weight: w of classifier-free guidance: logits are uncond + w (cond - uncond).
                1 disables guidance and halves the work. Default: `guidance_scale` in the
                checkpoint's generation_config.json, or 5 if that is not set.
            temperature: sampling temperature, at least 0; 0 is greedy. Default: `temperature` in
                the checkpoint's generation_config.json, or 1 if that is not set.
            top_k: sample only from the k most likely tokens, at most the codebook size. None
                disables this filter.
            top_p: nucleus sampling, in (0, 1]: of the tokens that top_k keeps, sample only from the
                smallest set whose probability reaches top_p. None disables this filter.
            max_batch: maximum number of images to generate at once. Default: as many as fit 4 GiB
                of key/value cache on each device.
            progress: a function that is called during generation with the number of image tokens
                generated so far and the total number.
        Returns:
            N = P * num_images images, all images of the first prompt first: pixels
            uint8[N, S, S, 3] and indices int32[N, T].
        Raises:
            ValueError: if an argument is out of range; if a prompt is empty or, together with its
                image tokens, longer than the trained context; or if logits or pixels become NaN or
                infinite.
        Source: generation_inference.py of the original code.
        """
        settings = dict(
            guidance_weight=guidance_weight, temperature=temperature, top_k=top_k, top_p=top_p
        )
        sizes = dict(num_images=num_images, max_batch=max_batch)
        parts = list(
            self.stream_images(prompts, seed=seed, progress=progress, **sizes, **settings)
        )
        return Images(
            np.concatenate([part.pixels for part in parts]),
            np.concatenate([part.indices for part in parts]),
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
        """Generates the same images as generate_images, chunk by chunk.

        The arguments are checked when the method is called. Each chunk is generated when the
        iterator is advanced. Concatenated, the chunks are what generate_images returns.

        Args:
            prompts, num_images, seed, max_batch, progress: see generate_images. With a mesh, a
                chunk has at least one image for each of the data * fsdp batch shards.
            settings: guidance_weight, temperature, top_k and top_p; see generate_images.
        Returns:
            An iterator over Images, each with one chunk of at most max_batch images.
        Raises:
            ValueError: see generate_images. NaN or infinite values are reported while iterating.
        Source: generation_inference.py of the original code, which generates one batch.
        """
        is_list = isinstance(prompts, Iterable) and not isinstance(prompts, (str, bytes, Mapping))
        prompts = list(prompts) if is_list else [prompts]
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
        parts = image.generate(self.model, requests, max_batch, self.mesh, progress)
        return (Images(pixels, indices) for indices, pixels in parts)

    def _image_settings(
        self, guidance_weight=None, temperature=None, top_k=None, top_p=None
    ) -> tuple[float, samplers.Sampling]:
        """Checks the settings and replaces None by the defaults of the checkpoint."""
        guidance_weight, temperature = self.image_defaults.resolve(guidance_weight, temperature)
        guidance_weight = checks.check_number("guidance_weight", guidance_weight)
        size = self.model.cfg.gen_vq.codebook_size
        return guidance_weight, samplers.make_sampling(temperature, top_k, top_p, size)

    def _image_prompts(self, prompts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Applies image_prompt to each prompt; with several prompts, an error names the prompt."""
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
        """Returns the tokens of a prompt and of the unconditional prompt, of equal length.

        The image tokens follow directly after them.

        Raises:
            ValueError: if the prompt is empty or, together with its image tokens, longer than the
                trained context.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            got = checks.shorten(prompt)
            raise ValueError(f"a prompt must be a non-empty string, got {got}")
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
        """Answers a question about images or text, or continues a conversation.

        A list of conversations is answered in batches. In float32 on the same kind of machine, each
        answer is the one that the conversation gets alone; docs/sampling.md describes the limits.

        Args:
            conversation: a question as a string; a list of messages
                {"role": "user" or "assistant", "content": text}, which may start with a message of
                the role "system" and must end with one of the role "user"; or a list of several
                such conversations. The content of a message may also be a list of parts, as in
                transformers and OpenAI's API, and a message may have its own images in a field
                "images" (see processing/messages.py).
            images: an image or a list of images, each a path, a file: or data: URL, bytes, a Pillow
                image or an array uint8[H, W, 3]; for a list of conversations, such a list for each
                of them. The images take the places of the image placeholders in the text, in order.
                Without placeholders, they come before the first text of the user. Do not pass
                images for messages that have their own.
            max_new_tokens: the maximum length of an answer in tokens, at least 1.
            temperature: sampling temperature, at least 0; 0 is greedy.
            top_k: sample only from the k most likely tokens, at most the vocabulary size. None
                disables this filter.
            top_p: nucleus sampling, in (0, 1]; see generate_images. None disables this filter.
            seed: random seed, an integer in [0, 2**64). No effect at temperature 0.
            max_batch: maximum number of conversations to answer at once. Default: as many as fit
                4 GiB of key/value cache on each device.
            allow_urls: download images at http: and https: URLs, each within 30 s and of at most
                64 MiB. Otherwise, such a URL raises an error.
        Returns:
            The answer as a string; for a list of conversations, a list of answers.
        Raises:
            ValueError: if an argument is out of range; if a message is malformed; if the images do
                not match the placeholders or cannot be read; if a conversation and max_new_tokens
                together are longer than the trained context; or if image features or logits become
                NaN or infinite.
            FileNotFoundError: if there is no image file at a path.
        Source: inference.py of the original code.
        """
        max_new_tokens = checks.check_count("max_new_tokens", max_new_tokens)
        max_batch = checks.check_optional_count("max_batch", max_batch)
        sampling, seed = self._text_sampling(temperature, top_k, top_p), checks.check_seed(seed)
        is_list = not chat.is_conversation(conversation)
        conversations = conversation if is_list else [conversation]
        checks.check_not_empty("conversations", conversations)
        image_lists = split_images(images, len(conversations)) if is_list else [image_list(images)]
        examples = self.examples(conversations, image_lists, max_new_tokens, allow_urls)
        answers = list(self._answers(examples, max_new_tokens, max_batch, sampling, seed))
        return answers if is_list else answers[0]

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
        """Answers one conversation like `answer`, and yields the text while it is generated.

        The arguments are checked when the method is called. Tokens are generated when the iterator
        is advanced. Concatenated, the pieces are what `answer` returns.

        Args:
            conversation: one conversation; see answer.
            images, max_new_tokens, temperature, top_k, top_p, seed, allow_urls: see answer.
        Returns:
            An iterator over non-empty strings. A piece never ends in the middle of a character.
        Raises:
            ValueError, FileNotFoundError: see answer; also ValueError for a list of conversations.
                NaN or infinite values are reported while iterating.
        Source: inference.py of the original code, which does not stream.
        """
        max_new_tokens = checks.check_count("max_new_tokens", max_new_tokens)
        sampling, seed = self._text_sampling(temperature, top_k, top_p), checks.check_seed(seed)
        if not chat.is_conversation(conversation):
            raise ValueError("stream takes one conversation, got a list; use answer for a list")
        image_lists = [image_list(images)]
        examples = self.examples([conversation], image_lists, max_new_tokens, allow_urls)
        requests = self._text_requests(examples, _prompt_length(examples), sampling, seed)
        tokens = text.stream(self.model, requests, max_new_tokens, self.mesh)
        return TextStream(self.processor.tokenizer).pieces(tokens)

    def _decode(self, tokens: np.ndarray) -> str:
        """Decodes the tokens of an answer up to the first eos_id, int32[M], to text."""
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
    ) -> list[PreparedPrompt]:
        """Converts conversations and the images of each to tokens and pixels.

        Raises:
            ValueError, FileNotFoundError: see answer.
        """
        for messages in conversations:
            chat.check_unanswered(messages)
        examples = [
            self.processor.conversation(messages, message_images, allow_urls)
            for messages, message_images in zip(conversations, images, strict=True)
        ]
        for tokens, _ in examples:
            self.processor.check_length(len(tokens), max_new_tokens)
        return examples

    def _text_requests(
        self, examples: Sequence[PreparedPrompt], length: int, sampling, seed: int
    ) -> Requests:
        batch = self.processor.batch(examples, pad_to=length)
        eos_id = self.processor.tokenizer.eos_id
        return text.make_requests(batch, seed, sampling, eos_id, self.mesh)

    def _answers(
        self, examples: list[PreparedPrompt], max_new_tokens: int, max_batch, sampling, seed: int
    ) -> Iterator[str]:
        """Yields one answer per example; generates them chunk by chunk."""
        length = _prompt_length(examples)
        slots, decoder = length + max_new_tokens - 1, self.model.cfg.language_model
        split = chunks.equal_chunks(len(examples), slots, max_batch, decoder, self.mesh)
        for numbers, kept in split:
            chunk = [examples[number] for number in numbers]
            requests = self._text_requests(chunk, length, sampling, seed)
            tokens = text.generate_tokens(self.model, requests, max_new_tokens, self.mesh)
            tokens = np.asarray(tokens)
            text.check_tokens(self.model, requests, tokens, self.mesh)
            yield from map(self._decode, tokens[:kept])

    def encode_images(self, images: Sequence[ImageSource] | ImageSource) -> np.ndarray:
        """Encodes N images to image tokens with the image tokenizer, one image at a time.

        Each image is resized so that its short side has S pixels, the image size of the model, and
        then cropped to the center S x S pixels.

        Args:
            images: an image or a list of images of any size, each a path, bytes, a Pillow image or
                an array uint8[H, W, 3]; or one array uint8[N, H, W, 3].
        Returns:
            int32[N, T], indices into the codebook, in row-major order.
        Raises:
            ValueError: if there is no image, if an image cannot be read, or if the latents become
                NaN or infinite.
            FileNotFoundError: if there is no image file at a path.
        Source: VQModel.encode of the original code; section 3.1 of the Janus report (resizing).
        """
        return codec.encode_images(self.model, images, self.mesh)

    def decode_indices(self, indices: np.ndarray) -> np.ndarray:
        """Decodes image tokens to images with the image tokenizer.

        Each device decodes one image at a time.

        Args:
            indices: int[N, T], in row-major order, as in Images.indices and as encode_images
                returns them.
        Returns:
            uint8[N, S, S, 3], RGB; values are clipped and truncated as in the original code.
        Raises:
            ValueError: if the shape or dtype is wrong, if an index is outside the codebook, or if
                the pixels become NaN or infinite.
        Source: VQModel.decode_code and generation_inference.py of the original code.
        """
        return codec.decode_indices(self.model, indices, self.mesh)


def _prompt_length(examples: Sequence[PreparedPrompt]) -> int:
    """Returns the length to which the prompts of all examples are padded."""
    return chunks.bucket_length(max(len(tokens) for tokens, _ in examples))


def load(
    path_or_hub_id: str | Path | None = None,
    dtype=None,
    mesh: Mesh | None = None,
    adapter: str | Path | None = None,
    progress: Report | None = None,
) -> Pipeline:
    """Loads a checkpoint and returns a Pipeline that generates images and answers questions.

    Also enables JAX's persistent compilation cache; set the environment variable
    JANUS_JAX_COMPILE_CACHE=0 to prevent that (see docs/sampling.md).

    Args:
        path_or_hub_id: a checkpoint folder or a Hugging Face hub id such as
            "deepseek-ai/Janus-Pro-1B". A folder may have DeepSeek's or transformers' layout, with
            safetensors or .bin weights, or be written by `python -m convert`. Default: the small
            model in this package, janus_tiny.
        dtype: the dtype of weights and computation, "float32" or "bfloat16", as a string or a type.
            Default: bfloat16 on TPU and GPU, float32 on CPU. The image tokenizer is always float32.
        mesh: the devices over which batches and parameters are sharded; see sharding.make_mesh.
            Default: one device.
        adapter: a LoRA adapter to merge into the weights, as a folder or a hub id in PEFT's format
            (adapter_config.json and weights); see docs/checkpoints.md. Default: no adapter.
        progress: a function that is called during loading with the number of bytes of weights read
            so far and the total number.
    Returns:
        The model with its processor.
    Raises:
        FileNotFoundError: if the folder or one of its files does not exist, or if a hub id cannot
            be downloaded.
        ValueError: if JAX finds no device of the requested platform; if the dtype is not supported;
            if the axis `tensor` of the mesh does not divide the numbers of attention heads; if a
            file of the checkpoint is invalid; or if the adapter does not fit the model.
    Source: the checkpoint folders of MultiModalityCausalLM (the original code) and of
    JanusForConditionalGeneration in transformers.
    """
    sharding.check_devices()
    if mesh is not None:
        mesh = sharding.with_auto_axes(mesh)
    dtype = check_dtype(dtype, mesh)
    loading.enable_compile_cache()
    folder = find_folder(path_or_hub_id)
    checkpoint = open_folder(folder, find_adapter(adapter))
    cfg = checkpoint.cfg.with_dtype(dtype)
    shardings = loading.parameter_shardings(mesh, cfg)
    processor = checkpoint.processor()
    check_processor(folder, processor, cfg)
    image_defaults = loading.ImageDefaults.from_dir(folder)
    model = build_model(cfg, load_params(checkpoint, dtype, shardings, progress=progress))
    name = loading.display_name(path_or_hub_id, adapter)
    return Pipeline(model, processor, name, image_defaults, mesh)
