"""Prompts and images -> the arrays a model takes, as a checkpoint's processor files say.

Axes: B batch, T tokens, S the side of a prepared image. Source: `VLChatProcessor` of the
original code.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from janus_jax.checks import shorten, shorten_text
from janus_jax.paths import value_errors_of
from janus_jax.processing import chat
from janus_jax.processing.image_sources import open_image
from janus_jax.processing.images import ImageConfig, ImageSource, preprocess
from janus_jax.processing.json_files import read_json, read_json_if_any
from janus_jax.processing.prompt_settings import PREPROCESSOR, PROCESSOR, PromptSettings
from janus_jax.processing.tokenizer import IMAGE, IMAGE_START, Tokenizer

# The longest sequence any Janus was trained on, though max_position_embeddings says 16384.
TRAINED_CONTEXT = 4096

Example = tuple[list[int], np.ndarray]  # tokens and pixels float32[n, S, S, 3] of one prompt


@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts of unequal length, padded on the left.

    Attributes:
        tokens: int32[B, T].
        token_mask: bool[B, T], True where a token is real.
        image_mask: bool[B, T], True where an image feature goes.
        pixels: float32[B, n, S, S, 3], n the most images of any row (0 when no row has one);
            a row's own images come first and the rest is zeros.
    """

    tokens: np.ndarray
    token_mask: np.ndarray
    image_mask: np.ndarray
    pixels: np.ndarray


def image_config(folder: Path) -> ImageConfig:
    """From preprocessor_config.json, or from where transformers 5 keeps the same keys.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: it is broken, or states what cannot be followed.
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


def _num_image_tokens(folder: Path, image_size: int) -> int:
    """As processor_config.json states, or the patches of an image by config.json."""
    path = folder / PROCESSOR
    number = read_json_if_any(path).get("num_image_tokens")
    if number is None:
        path = folder / "config.json"
        vision = read_json(path).get("vision_config", {})
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
    """The messages with a placeholder for each image, and all images in that order."""
    own = [image for message in messages for image in message.get("images", [])]
    if not own:
        first = next(i for i, message in enumerate(messages) if message["role"] == "user")
        numbers = [len(images) if i == first else 0 for i in range(len(messages))]
        return chat.with_placeholders(messages, numbers, tag), list(images)
    if len(images):
        raise ValueError(
            "images come in the messages or beside them, not both: "
            f"got {len(own)} in the messages and {len(images)} beside them"
        )
    for i, message in enumerate(messages, 1):
        number = len(message.get("images", []))
        _check_numbers(number, message["content"].count(tag), tag, f" in message {i}")
    return list(messages), own


def _check_numbers(num_images: int, placeholders: int, tag: str, where: str = "") -> None:
    if placeholders != num_images:
        tag = shorten_text(tag)
        raise ValueError(
            f"each {tag} needs one image and each image one {tag}, "
            f"got {num_images} images for {placeholders} placeholders{where}"
        )


@dataclasses.dataclass(frozen=True)
class Processor:
    """Everything between a person's words and images and a model's arrays.

    Attributes:
        sft_format: name of the template (see chat.py).
        num_image_tokens: placeholders, and so features, that stand for one image.
        image_tag: the text that stands for one image in a conversation.
        system_prompt: put before a conversation that brings none; never before a prompt for images.
        trained_context: the most tokens a sequence may have (a Pipeline lowers it to the
            max_position_embeddings of its model).
    """

    tokenizer: Tokenizer
    image_config: ImageConfig
    sft_format: str
    num_image_tokens: int
    image_tag: str = IMAGE
    system_prompt: str = chat.DEFAULT_SYSTEM_PROMPT
    trained_context: int = TRAINED_CONTEXT

    @classmethod
    def from_dir(cls, folder: str | Path) -> "Processor":
        """From the small files of a checkpoint folder, in DeepSeek's or transformers' layout.

        The template, the system prompt and the placeholder are those of `PromptSettings`. Where
        processor_config.json does not state `num_image_tokens`, config.json's patches are counted.

        Raises:
            FileNotFoundError: no tokenizer.json, or no image settings.
            ValueError: a file is broken, or states what cannot be followed. The text names it.
        """
        folder = Path(folder)
        prompts, images = PromptSettings.from_dir(folder), image_config(folder)
        return cls(
            tokenizer=Tokenizer.from_dir(folder, prompts.image_tag),
            image_config=images,
            sft_format=prompts.sft_format,
            num_image_tokens=_num_image_tokens(folder, images.image_size),
            image_tag=prompts.image_tag,
            system_prompt=prompts.system_prompt,
        )

    def image_prompt(self, prompt: str) -> list[int]:
        """The tokens after which the image tokens of a described image follow.

        Raises:
            ValueError: the prompt holds the text of an image placeholder.
        """
        messages = chat.question_messages(prompt, 0, self.image_tag)
        text = chat.format_conversation(messages, self.sft_format)
        tokens = self.tokenizer.encode(text + IMAGE_START)
        self._check_images(tokens, 0)
        return tokens

    def unconditional(self, tokens: Sequence[int]) -> list[int]:
        """An image prompt without its words: all but the first and last token become pad."""
        return [tokens[0], *[self.tokenizer.pad_id] * (len(tokens) - 2), tokens[-1]]

    def conversation(
        self,
        messages: str | Sequence[chat.Message],
        images: Sequence[ImageSource] = (),
        allow_urls: bool = False,
    ) -> Example:
        """The tokens of a conversation, each placeholder expanded, and its prepared images.

        Args:
            messages: a question, or messages with roles "user" and "assistant" (and at first
                "system"); one that ends with the user is made ready to be answered. A content is a
                text or a list of parts (see messages.py).
            images: in the order of the placeholders (`image_tag`), one for each; where there are
                none, the images come before the first text of the user. Or each message carries
                its own in "images", for the placeholders in its text, or before a text without; or
                in the parts of its content.
            allow_urls: whether remote images are fetched.
        Returns:
            tokens, and pixels float32[n, S, S, 3].
        Raises:
            ValueError: the numbers of images and placeholders differ, a role or a part is unknown,
                or turns do not alternate; see also `open_image`.
        """
        if isinstance(messages, str):
            messages = chat.question_messages(messages, len(images), self.image_tag)
        messages = chat.generic_roles(messages, self.image_tag)
        messages, images = _place_images(messages, images, self.image_tag)
        self.check_text(chat.format_conversation(messages, self.sft_format, self.system_prompt))
        return self.tokens(messages, len(images)), self.pixels(images, allow_urls)

    def tokens(self, messages: Sequence[chat.Message], num_images: int) -> list[int]:
        """The tokens of a conversation of generic roles that has its placeholders, each expanded.

        Raises:
            ValueError: the numbers of images and placeholders differ.
        """
        text = chat.format_conversation(messages, self.sft_format, self.system_prompt)
        tokens = self.tokenizer.encode(text)
        self._check_images(tokens, num_images)
        return self._expand(tokens)

    def pixels(self, images: Sequence[ImageSource], allow_urls: bool = False) -> np.ndarray:
        """Images prepared for the understanding encoder: float32[n, S, S, 3]."""
        cfg = self.image_config
        prepared = [preprocess(open_image(image, allow_urls), cfg) for image in images]
        empty = np.zeros((0, cfg.image_size, cfg.image_size, 3), np.float32)
        return np.stack(prepared) if prepared else empty

    def batch(self, examples: Sequence[Example], pad_to: int | None = None) -> Batch:
        """Conversations of unequal length and number of images as one batch.

        Args:
            examples: what `conversation` gave.
            pad_to: the length T; by default that of the longest example.
        Raises:
            ValueError: an example is longer than `pad_to`.
        """
        longest = max(len(tokens) for tokens, _ in examples)
        length = longest if pad_to is None else pad_to
        if longest > length:
            raise ValueError(f"pad_to must hold the longest prompt, got {pad_to=} {longest=}")
        size = self.image_config.image_size
        most = max(len(pixels) for _, pixels in examples)
        tokens = np.full((len(examples), length), self.tokenizer.pad_id, np.int32)
        token_mask = np.zeros(tokens.shape, bool)
        pixels = np.zeros((len(examples), most, size, size, 3), np.float32)
        for row, (row_tokens, row_pixels) in enumerate(examples):
            start = length - len(row_tokens)
            tokens[row, start:] = row_tokens
            token_mask[row, start:] = True
            pixels[row, : len(row_pixels)] = row_pixels
        image_mask = token_mask & (tokens == self.tokenizer.image_id)
        return Batch(tokens, token_mask, image_mask, pixels)

    def check_text(self, text: str) -> None:
        """Raises ValueError for a text that is too long for the trained context.

        Does not tokenize all of a long text; check_length compares the exact number.
        """
        if self.tokenizer.is_longer(text, self.trained_context):
            raise ValueError(
                f"prompt and new tokens must fit the trained context of {self.trained_context} "
                f"tokens, got a text of {len(text)} characters"
            )

    def check_length(self, num_prompt: int, num_new: int) -> None:
        """Raises ValueError if prompt and new tokens would pass the trained context."""
        if num_prompt + num_new > self.trained_context:
            raise ValueError(
                f"prompt and new tokens must fit the trained context of {self.trained_context} "
                f"tokens, got {num_prompt} + {num_new} = {num_prompt + num_new}"
            )

    def _check_images(self, tokens: list[int], num_images: int) -> None:
        _check_numbers(num_images, tokens.count(self.tokenizer.image_id), self.image_tag)

    def _expand(self, tokens: Sequence[int]) -> list[int]:
        """Each placeholder as begin of image, its feature slots, end of image."""
        tok = self.tokenizer
        block = [tok.image_start_id, *[tok.image_id] * self.num_image_tokens, tok.image_end_id]
        expanded = []
        for token in tokens:
            expanded.extend(block if token == tok.image_id else [token])
        return expanded
