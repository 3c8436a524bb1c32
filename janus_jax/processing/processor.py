"""Converts prompts and images to model inputs, following a checkpoint's processor files.

Axes: B batch, T tokens, S side of a preprocessed image. Source: `VLChatProcessor` of the original
code.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from janus_jax.checks import shorten, shorten_text
from janus_jax.paths import read_json, read_json_if_any, value_errors_of
from janus_jax.processing import chat
from janus_jax.processing.image_sources import open_image
from janus_jax.processing.images import ImageConfig, ImageSource, preprocess
from janus_jax.processing.prompt_settings import PREPROCESSOR, PROCESSOR, PromptSettings
from janus_jax.processing.tokenizer import IMAGE, IMAGE_START, Tokenizer

# The longest sequence that Janus models were trained on; max_position_embeddings is 16384.
TRAINED_CONTEXT = 4096

PreparedPrompt = tuple[list[int], np.ndarray]  # tokens and pixels float32[n, S, S, 3] of one prompt


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of prompts of different lengths, padded on the left.

    Attributes:
        tokens: int32[B, T].
        token_mask: bool[B, T], True for tokens, False for padding.
        image_mask: bool[B, T], True where an image feature goes.
        pixels: float32[B, n, S, S, 3], where n is the largest number of images of a row. The images
            of a row come first; the rest is zeros.
    """

    tokens: np.ndarray
    token_mask: np.ndarray
    image_mask: np.ndarray
    pixels: np.ndarray


def image_config(folder: Path) -> ImageConfig:
    """Reads the image settings of a checkpoint folder.

    They are in preprocessor_config.json, or under "image_processor" in processor_config.json, where
    transformers 5 saves them.

    Raises:
        FileNotFoundError: neither file has image settings.
        ValueError: the file is invalid, or a setting is not supported.
    """
    path = folder / PREPROCESSOR
    nested = read_json_if_any(folder / PROCESSOR).get("image_processor")
    if nested is None or path.is_file():
        nested = read_json(path)
    else:
        path = folder / PROCESSOR
    with value_errors_of(path):
        if not isinstance(nested, dict):
            raise ValueError(f"image_processor must be an object, got {shorten(nested)}")
        return ImageConfig.from_dict(nested)


def _num_image_tokens(folder: Path, image_size: int, config: Mapping | None) -> int:
    """Reads num_image_tokens from processor_config.json, or computes it from config.json."""
    path = folder / PROCESSOR
    number = read_json_if_any(path).get("num_image_tokens")
    if number is None:
        path = folder / "config.json"
        config = read_json(path) if config is None else config
        vision = config.get("vision_config", {})
        vision = vision.get("params", vision) if isinstance(vision, dict) else vision
        patch = vision.get("patch_size", 16) if isinstance(vision, dict) else vision
        if type(patch) is not int or patch < 1:
            raise ValueError(f"{path}: patch_size must be at least 1, got {shorten(patch)}")
        number = (image_size // patch) ** 2
    if type(number) is not int or number < 1:
        raise ValueError(f"{path}: num_image_tokens must be at least 1, got {shorten(number)}")
    return number


def _place_images(
    messages: Sequence[chat.Message], images: Sequence[ImageSource], tag: str
) -> tuple[list[chat.Message], list[ImageSource]]:
    """Returns the messages with a placeholder for each image, and all images in that order."""
    in_messages = [image for message in messages for image in message.get("images", [])]
    if not in_messages:
        first = next(i for i, message in enumerate(messages) if message["role"] == "user")
        numbers = [len(images) if i == first else 0 for i in range(len(messages))]
        return chat.with_placeholders(messages, numbers, tag), list(images)
    if len(images):
        raise ValueError(
            "images must be passed either in the messages or separately, "
            f"got {len(in_messages)} in the messages and {len(images)} separately"
        )
    for i, message in enumerate(messages, 1):
        number = len(message.get("images", []))
        _check_numbers(number, message["content"].count(tag), tag, f" in message {i}")
    return list(messages), in_messages


def _check_numbers(num_images: int, placeholders: int, tag: str, where: str = "") -> None:
    if placeholders != num_images:
        tag = shorten_text(tag)
        raise ValueError(
            f"the number of images must equal the number of {tag} placeholders, "
            f"got {num_images} images for {placeholders} placeholders{where}"
        )


@dataclasses.dataclass(frozen=True)
class Processor:
    """Converts prompts, conversations and images to the inputs of a model.

    Attributes:
        tokenizer: the tokenizer of the checkpoint.
        image_config: the preprocessing of images for the understanding encoder.
        sft_format: name of the prompt template (see chat.py).
        num_image_tokens: number of placeholder tokens, and so of features, per image.
        image_tag: the placeholder, a string that stands for one image in a conversation.
        system_prompt: default system prompt of conversations. Prompts for image generation have no
            system prompt.
        trained_context: maximum number of tokens of a sequence. A Pipeline lowers it to the
            max_position_embeddings of its model.
    """

    tokenizer: Tokenizer
    image_config: ImageConfig
    sft_format: str
    num_image_tokens: int
    image_tag: str = IMAGE
    system_prompt: str = chat.DEFAULT_SYSTEM_PROMPT
    trained_context: int = TRAINED_CONTEXT

    @classmethod
    def from_dir(cls, folder: str | Path, config: Mapping | None = None) -> "Processor":
        """Loads the processor files of a checkpoint folder, in DeepSeek's or transformers' layout.

        The template, the system prompt and the placeholder come from `PromptSettings`. If
        processor_config.json has no `num_image_tokens`, it is computed from the image and patch
        sizes.

        config: contents of config.json. None reads the file if it is needed.

        Raises:
            FileNotFoundError: tokenizer.json or the image settings are missing.
            ValueError: a file is invalid, or a setting is not supported. The message has the path.
        """
        folder = Path(folder)
        prompts, images = PromptSettings.from_dir(folder), image_config(folder)
        return cls(
            tokenizer=Tokenizer.from_dir(folder, prompts.image_tag),
            image_config=images,
            sft_format=prompts.sft_format,
            num_image_tokens=_num_image_tokens(folder, images.image_size, config),
            image_tag=prompts.image_tag,
            system_prompt=prompts.system_prompt,
        )

    def image_prompt(self, prompt: str) -> list[int]:
        """Returns the tokens of a prompt for image generation; the image tokens follow them.

        Raises:
            ValueError: the prompt contains an image placeholder.
        """
        messages = chat.question_messages(prompt, 0, self.image_tag)
        text = chat.format_conversation(messages, self.sft_format)
        tokens = self.tokenizer.encode(text + IMAGE_START)
        self._check_images(tokens, 0)
        return tokens

    def unconditional(self, tokens: Sequence[int]) -> list[int]:
        """Returns the unconditional prompt: all but the first and last token become padding."""
        return [tokens[0], *[self.tokenizer.pad_id] * (len(tokens) - 2), tokens[-1]]

    def conversation(
        self,
        messages: str | Sequence[chat.Message],
        images: Sequence[ImageSource] = (),
        allow_urls: bool = False,
    ) -> PreparedPrompt:
        """Converts a conversation to tokens, with expanded placeholders, and preprocessed images.

        Args:
            messages: a question, or a list of messages with the roles "user" and "assistant". The
                first may have the role "system". If the last is from the user, the tokens end with
                the start of the answer. A content is a string or a list of parts (see messages.py).
            images: one per placeholder (`image_tag`), in order. If the messages have no
                placeholders, the images are put in front of the first user message. Alternatively,
                each message has its images in "images" or in the parts of its content; images of a
                message without placeholders are put in front of its text.
            allow_urls: whether http: and https: URLs are downloaded.
        Returns:
            tokens, and pixels float32[n, S, S, 3].
        Raises:
            ValueError: the numbers of images and placeholders differ, a role or a part is unknown,
                or user and assistant do not alternate; also as `open_image`.
        """
        if isinstance(messages, str):
            messages = chat.question_messages(messages, len(images), self.image_tag)
        messages = chat.generic_roles(messages, self.image_tag)
        messages, images = _place_images(messages, images, self.image_tag)
        self.check_text(chat.format_conversation(messages, self.sft_format, self.system_prompt))
        return self.tokens(messages, len(images)), self.pixels(images, allow_urls)

    def tokens(self, messages: Sequence[chat.Message], num_images: int) -> list[int]:
        """Tokenizes a conversation with generic roles and placeholders, and expands these.

        Raises:
            ValueError: the numbers of images and placeholders differ.
        """
        text = chat.format_conversation(messages, self.sft_format, self.system_prompt)
        tokens = self.tokenizer.encode(text)
        self._check_images(tokens, num_images)
        return self._expand(tokens)

    def pixels(self, images: Sequence[ImageSource], allow_urls: bool = False) -> np.ndarray:
        """Preprocesses images for the understanding encoder: float32[n, S, S, 3]."""
        config = self.image_config
        prepared = [preprocess(open_image(image, allow_urls), config) for image in images]
        empty = np.zeros((0, config.image_size, config.image_size, 3), np.float32)
        return np.stack(prepared) if prepared else empty

    def batch(self, examples: Sequence[PreparedPrompt], pad_to: int | None = None) -> Batch:
        """Creates a batch from conversations of different lengths and numbers of images.

        Args:
            examples: results of `conversation`.
            pad_to: the length T; by default the length of the longest example.
        Raises:
            ValueError: an example is longer than `pad_to`.
        """
        longest = max(len(tokens) for tokens, _ in examples)
        length = longest if pad_to is None else pad_to
        if longest > length:
            raise ValueError(
                f"pad_to must be at least the length of the longest prompt, {pad_to=} {longest=}"
            )
        size = self.image_config.image_size
        max_images = max(len(pixels) for _, pixels in examples)
        tokens = np.full((len(examples), length), self.tokenizer.pad_id, np.int32)
        token_mask = np.zeros(tokens.shape, bool)
        pixels = np.zeros((len(examples), max_images, size, size, 3), np.float32)
        for row, (row_tokens, row_pixels) in enumerate(examples):
            start = length - len(row_tokens)
            tokens[row, start:] = row_tokens
            token_mask[row, start:] = True
            pixels[row, : len(row_pixels)] = row_pixels
        image_mask = token_mask & (tokens == self.tokenizer.image_id)
        return Batch(tokens, token_mask, image_mask, pixels)

    def check_text(self, text: str) -> None:
        """Raises ValueError if a text is certainly too long for the trained context.

        A long text is tokenized in part only. Use check_length for the exact number of tokens.
        """
        if self.tokenizer.is_longer(text, self.trained_context):
            raise ValueError(
                f"prompt and new tokens must fit the trained context of {self.trained_context} "
                f"tokens, got a text of {len(text)} characters"
            )

    def check_length(self, num_prompt: int, num_new: int) -> None:
        """Raises ValueError if prompt and new tokens exceed the trained context."""
        if num_prompt + num_new > self.trained_context:
            raise ValueError(
                f"prompt and new tokens must fit the trained context of {self.trained_context} "
                f"tokens, got {num_prompt} + {num_new} = {num_prompt + num_new}"
            )

    def _check_images(self, tokens: list[int], num_images: int) -> None:
        _check_numbers(num_images, tokens.count(self.tokenizer.image_id), self.image_tag)

    def _expand(self, tokens: Sequence[int]) -> list[int]:
        """Replaces each placeholder by begin-of-image, num_image_tokens ids and end-of-image."""
        tok = self.tokenizer
        block = [tok.image_start_id, *[tok.image_id] * self.num_image_tokens, tok.image_end_id]
        expanded = []
        for token in tokens:
            expanded.extend(block if token == tok.image_id else [token])
        return expanded
