"""Records -> what a step trains on: tokens, what goes where, and what is to be predicted.

T tokens of an example, n images looked at, m images generated (0 or 1), S pixels a side, N tokens
of a generated image.
"""

import dataclasses
import functools

import numpy as np

from janus_jax.checks import error_text
from janus_jax.data.reading import prepared_image
from janus_jax.data.records import IMAGE_TAG, KINDS, BadRecord, Record
from janus_jax.processing.chat import with_placeholders
from janus_jax.processing.images import crop_square, resize_and_pad
from janus_jax.processing.processor import Processor
from janus_jax.processing.tokenizer import Tokenizer

CAPTION_DROPPED = 0.1  # Janus: so that guidance has an unconditional model

Example = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ExampleMaker:
    """Makes examples as a checkpoint's processor writes prompts.

    An example is a dict of
        tokens: int32[T]; pad where a generated image's token goes.
        image_mask: bool[T], True where a feature of an image that is looked at goes.
        gen_mask: bool[T], True where a token of a generated image goes; all are to be predicted.
        loss_mask: bool[T], True on the text that is to be predicted.
        kind: int8[T], the record's place in KINDS.
        records: str, where the record is.
        pixels: uint8[n, S, S, 3], images to be looked at.
        generated: the image to be generated, uint8[m, S, S, 3], or its indices, int32[m, N].

    Attributes:
        image_size: S.
        num_generated_tokens: N.
        codebook_size: indices are below it.
        max_length: the most tokens of an example.
        max_input_images: at most this many images to understand in an example.
        max_generated_images: at most this many images to generate in an example.
        tokenized: whether generated images come as indices.
    """

    processor: Processor
    image_size: int
    num_generated_tokens: int
    codebook_size: int
    max_length: int
    max_input_images: int
    max_generated_images: int
    tokenized: bool

    def __call__(self, record: Record | BadRecord, rng: np.random.Generator) -> Example | BadRecord:
        """The example of a record, or what is wrong with it."""
        if isinstance(record, BadRecord):
            return record
        make = dict(
            understanding=self._understanding, text=self._text, generation=self._generation
        )[record.kind]
        try:
            example = make(record, rng)
            example["kind"] = np.full(len(example["tokens"]), KINDS.index(record.kind), np.int8)
            example["records"] = record.where
            self._check(example)
        except BadRecord as bad:
            return BadRecord(bad.reason, bad.detail, record.where)
        except Exception as error:  # ValueError, as the processor refuses a text, or any other
            return BadRecord("malformed", error_text(error), record.where)
        return example

    def _understanding(self, record: Record, rng: np.random.Generator) -> Example:
        tokens, loss_mask = conversation_tokens(
            self.processor, record.turns, len(record.images), self.max_length
        )
        self._check_number(len(record.images))  # before they are decoded
        prepare = functools.partial(resize_and_pad, cfg=self.processor.image_config)
        pixels = [prepared_image(image, prepare) for image in record.images]
        return self._example(tokens, loss_mask, pixels=pixels)

    def _text(self, record: Record, rng: np.random.Generator) -> Example:
        tokenizer = self.processor.tokenizer
        _check_text(tokenizer, record.text, self.max_length)
        tokens = [*tokenizer.encode(record.text), tokenizer.eos_id]
        if tokenizer.image_id in tokens:
            raise BadRecord("malformed", "a text must hold no image placeholder")
        return self._example(tokens, [False, *[True] * (len(tokens) - 1)])

    def _generation(self, record: Record, rng: np.random.Generator) -> Example:
        _check_text(self.processor.tokenizer, record.text, self.max_length)
        tokens = self.processor.image_prompt(record.text)
        if rng.random() < CAPTION_DROPPED:
            tokens = self.processor.unconditional(tokens)
        return self._example(tokens, [False] * len(tokens), generated=self._generated_image(record))

    def _generated_image(self, record: Record) -> np.ndarray:
        """uint8[S, S, 3] or int32[N]."""
        if not self.tokenized:
            if not record.images:
                raise BadRecord("no image", "it has indices, and the run wants images")
            crop = functools.partial(crop_square, size=self.image_size)
            return prepared_image(record.images[0], crop)
        if record.indices is None:
            raise BadRecord("no indices", "there is only an image, and the run wants indices")
        if len(record.indices) != self.num_generated_tokens:
            got = f"{len(record.indices)} for {self.num_generated_tokens}"
            raise BadRecord("malformed", f"an image must have the model's number of tokens, {got}")
        if not (0 <= record.indices.min() and record.indices.max() < self.codebook_size):
            got = f"got up to {record.indices.max()}"
            raise BadRecord("malformed", f"indices must be below {self.codebook_size}, {got}")
        return record.indices

    def _example(self, tokens, loss_mask, pixels=(), generated=None) -> Example:
        side = self.image_size
        shape = (self.num_generated_tokens,) if self.tokenized else (side, side, 3)
        generated = [] if generated is None else [generated]
        slots = self.num_generated_tokens * len(generated)
        tokens = np.array([*tokens, *[self.processor.tokenizer.pad_id] * slots], np.int32)
        dtype = np.int32 if self.tokenized else np.uint8
        gen_mask = np.arange(len(tokens)) >= len(tokens) - slots
        return dict(
            tokens=tokens,
            image_mask=tokens == self.processor.tokenizer.image_id,
            gen_mask=gen_mask,
            loss_mask=np.pad(np.array(loss_mask, bool), (0, slots)),
            pixels=np.array(pixels, np.uint8).reshape(-1, side, side, 3),
            generated=np.array(generated, dtype).reshape(-1, *shape),
        )

    def _check_number(self, images: int) -> None:
        if images > self.max_input_images:
            most = f"at most {self.max_input_images} fit a row"
            raise BadRecord("too many images", f"{images}, {most}")

    def _check(self, example: Example) -> None:
        length, images = len(example["tokens"]), len(example["pixels"])
        if length > self.max_length:
            raise _too_long(str(length), self.max_length)
        if len(example["generated"]) > self.max_generated_images:
            raise BadRecord("too many images", "rows have no place for a generated image")
        places = int(example["image_mask"].sum())
        if places != images * self.processor.num_image_tokens:
            raise BadRecord("malformed", f"{places} places for features of {images} images")


def _too_long(tokens: str, max_length: int) -> BadRecord:
    return BadRecord("too long", f"{tokens} tokens, at most {max_length} fit a row and the model")


def _check_text(tokenizer: Tokenizer, text: str, max_length: int) -> None:
    """Raises BadRecord for a text that is too long, before it is tokenized whole."""
    if tokenizer.is_longer(text, max_length):
        raise _too_long(f"more than {max_length}", max_length)


def conversation_tokens(
    processor: Processor, turns: tuple[tuple[str, str], ...], num_images: int, max_length: int
) -> tuple[list[int], list[bool]]:
    """Tokens of questions and answers, and for each whether it is to be predicted.

    Each question is tokenized as it is when it waits for its answer, so that training meets what
    answering meets; of each answer the words and the end of sentence are to be predicted. Turns are
    tokenized one by one, which takes linear time, and all at once to see that this is the same.
    Raises BadRecord if the images do not match the places that the questions leave for them, and
    as soon as there are more than max_length tokens.
    """
    messages = _messages(processor, turns, num_images)
    prompt = [*messages[:-1], dict(role="assistant", content="")]  # what the last answer follows
    placed = [message["content"].count(processor.image_tag) for message in prompt]
    if sum(placed) != num_images:
        raise BadRecord("malformed", f"{num_images} images for {sum(placed)} places in the text")
    tokenizer = processor.tokenizer
    later = dataclasses.replace(processor, system_prompt="")  # it stands before the first turn
    tokens, loss_mask = [], []
    for turn in range(0, len(messages), 2):
        question, answer = messages[turn : turn + 2]
        for message in (question, answer):
            _check_text(tokenizer, message["content"], max_length)
        asked = (later if turn else processor).tokens([question, prompt[-1]], placed[turn])
        tokens += asked[1:] if turn else asked
        prompt_length = len(tokens)
        tokens += [*tokenizer.encode(f" {answer['content'].strip()}")[1:], tokenizer.eos_id]
        loss_mask += [False] * (prompt_length - len(loss_mask))
        loss_mask += [True] * (len(tokens) - prompt_length)
        if len(tokens) > max_length:
            raise _too_long(f"more than {max_length}", max_length)
    if len(turns) > 1 and tokens[:prompt_length] != processor.tokens(prompt, num_images):
        raise BadRecord("malformed", "earlier turns tokenize differently once the next turn comes")
    return tokens, loss_mask


def _messages(
    processor: Processor, turns: tuple[tuple[str, str], ...], num_images: int
) -> list[dict[str, str]]:
    """Questions and answers with a placeholder for each image."""
    messages = []
    for question, answer in turns:
        asked = question.replace(IMAGE_TAG, processor.image_tag)
        messages += [dict(role="user", content=asked), dict(role="assistant", content=answer)]
    shown = [num_images, *[0] * (len(messages) - 1)]
    return with_placeholders(messages, shown, processor.image_tag)
