"""Converts records to training examples: token arrays, masks, and images.

Shapes: T tokens of an example, n images to understand, m images to generate (0 or 1), S pixels per
side, N tokens of a generated image.
"""

import dataclasses
import functools

import numpy as np

from janus_jax.checks import error_text
from janus_jax.data.reading import prepare_image
from janus_jax.data.records import IMAGE_TAG, KINDS, BadRecord, Example, Record
from janus_jax.processing.chat import with_placeholders
from janus_jax.processing.images import crop_square, resize_and_pad
from janus_jax.processing.processor import Processor
from janus_jax.processing.tokenizer import Tokenizer

# Probability of dropping a caption, as in Janus: classifier-free guidance needs a model that was
# also trained without captions.
CAPTION_DROPOUT = 0.1


@dataclasses.dataclass(frozen=True)
class ExampleMaker:
    """Makes training examples, with prompts as a checkpoint's processor writes them.

    An example is a dict of
        tokens: int32[T]; the padding id at each token of a generated image.
        image_mask: bool[T], True where a feature of an input image goes.
        gen_mask: bool[T], True at each token of a generated image; all of them are targets.
        loss_mask: bool[T], True at each text token that is a target.
        kind: int8[T], the index of the record's kind in KINDS.
        records: str, the location of the record.
        pixels: uint8[n, S, S, 3], images to understand.
        generated: the images to generate, uint8[m, S, S, 3], or their indices, int32[m, N].

    Attributes:
        image_size: S.
        num_generated_tokens: N.
        codebook_size: indices must be below it.
        max_length: maximum number of tokens in an example.
        max_input_images: maximum number of images to understand in an example.
        max_generated_images: maximum number of images to generate in an example.
        tokenized: whether images to generate are given as indices.
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
        """Returns the example for a record, or a BadRecord with the reason if there is none."""
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
        except Exception as error:  # ValueError if the processor rejects a text, or any other
            return BadRecord("malformed", error_text(error), record.where)
        return example

    def _understanding(self, record: Record, rng: np.random.Generator) -> Example:
        tokens, loss_mask = conversation_tokens(
            self.processor, record.turns, len(record.images), self.max_length
        )
        self._check_num_images(len(record.images))  # before decoding them
        prepare = functools.partial(resize_and_pad, config=self.processor.image_config)
        pixels = [prepare_image(image, prepare) for image in record.images]
        return self._example(tokens, loss_mask, pixels=pixels)

    def _text(self, record: Record, rng: np.random.Generator) -> Example:
        tokenizer = self.processor.tokenizer
        _check_text_length(tokenizer, record.text, self.max_length)
        tokens = [*tokenizer.encode(record.text), tokenizer.eos_id]
        if tokenizer.image_id in tokens:
            raise BadRecord("malformed", "a text record must not contain an image placeholder")
        return self._example(tokens, [False, *[True] * (len(tokens) - 1)])

    def _generation(self, record: Record, rng: np.random.Generator) -> Example:
        _check_text_length(self.processor.tokenizer, record.text, self.max_length)
        tokens = self.processor.image_prompt(record.text)
        if rng.random() < CAPTION_DROPOUT:
            tokens = self.processor.unconditional(tokens)
        return self._example(tokens, [False] * len(tokens), generated=self._generated_image(record))

    def _generated_image(self, record: Record) -> np.ndarray:
        """Returns the pixels, uint8[S, S, 3], or the indices, int32[N], of the image."""
        if not self.tokenized:
            if not record.images:
                raise BadRecord("no image", "tokenized=False requires an image, got only indices")
            crop = functools.partial(crop_square, size=self.image_size)
            return prepare_image(record.images[0], crop)
        if record.indices is None:
            raise BadRecord("no indices", "tokenized=True requires indices, got only an image")
        if len(record.indices) != self.num_generated_tokens:
            rule = f"an image must have {self.num_generated_tokens} indices for this model"
            raise BadRecord("malformed", f"{rule}, got {len(record.indices)}")
        if not (0 <= record.indices.min() and record.indices.max() < self.codebook_size):
            rule = f"indices must be in [0, {self.codebook_size})"
            got = f"got {record.indices.min()} to {record.indices.max()}"
            raise BadRecord("malformed", f"{rule}, {got}")
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

    def _check_num_images(self, num_images: int) -> None:
        if num_images > self.max_input_images:
            rule = f"a row holds at most {self.max_input_images} images to understand"
            raise BadRecord("too many images", f"{rule}, got {num_images}")

    def _check(self, example: Example) -> None:
        length, num_images = len(example["tokens"]), len(example["pixels"])
        if length > self.max_length:
            raise _too_long(str(length), self.max_length)
        num_generated = len(example["generated"])
        if num_generated > self.max_generated_images:
            rule = f"a row holds at most {self.max_generated_images} images to generate"
            raise BadRecord("too many images", f"{rule}, got {num_generated}")
        slots, expected = int(example["image_mask"].sum()), self.processor.num_image_tokens
        if slots != num_images * expected:
            rule = f"expected {expected} image placeholders for each of {num_images} images"
            raise BadRecord("malformed", f"{rule}, got {slots}")


def _too_long(num_tokens: str, max_length: int) -> BadRecord:
    rule = f"the row and the model hold at most {max_length} tokens"
    return BadRecord("too long", f"{rule}, got {num_tokens}")


def _check_text_length(tokenizer: Tokenizer, text: str, max_length: int) -> None:
    """Raises BadRecord if a text is too long, without tokenizing all of it."""
    if tokenizer.is_longer(text, max_length):
        raise _too_long(f"more than {max_length}", max_length)


def conversation_tokens(
    processor: Processor, turns: tuple[tuple[str, str], ...], num_images: int, max_length: int
) -> tuple[list[int], list[bool]]:
    """Returns the tokens of a conversation, and for each whether it is a target of the loss.

    Each question is tokenized as at inference, where it ends the prompt. The targets are the tokens
    of each answer and the end-of-sentence token after it. Turns are tokenized one by one, which
    takes linear time. The result is then compared with the tokens of the whole conversation.

    Raises:
        BadRecord: the number of images differs from the number of image placeholders in the
            questions, the tokens of the separate turns differ from those of the conversation, or
            there are more than max_length tokens (raised as soon as they are exceeded).
    """
    messages = _messages(processor, turns, num_images)
    prompt = [*messages[:-1], dict(role="assistant", content="")]  # the prompt of the last answer
    placeholders = [message["content"].count(processor.image_tag) for message in prompt]
    if sum(placeholders) != num_images:
        got = f"got {num_images} images and {sum(placeholders)} placeholders"
        raise BadRecord("malformed", f"the text needs one placeholder for each image, {got}")
    tokenizer = processor.tokenizer
    # The system prompt comes before the first turn only.
    without_system = dataclasses.replace(processor, system_prompt="")
    tokens, loss_mask = [], []
    for turn in range(0, len(messages), 2):
        question, answer = messages[turn : turn + 2]
        for message in (question, answer):
            _check_text_length(tokenizer, message["content"], max_length)
        turn_processor = without_system if turn else processor
        question_tokens = turn_processor.tokens([question, prompt[-1]], placeholders[turn])
        tokens += question_tokens[1:] if turn else question_tokens
        prompt_length = len(tokens)
        tokens += [*tokenizer.encode(f" {answer['content'].strip()}")[1:], tokenizer.eos_id]
        loss_mask += [False] * (prompt_length - len(loss_mask))
        loss_mask += [True] * (len(tokens) - prompt_length)
        if len(tokens) > max_length:
            raise _too_long(f"more than {max_length}", max_length)
    if len(turns) > 1 and tokens[:prompt_length] != processor.tokens(prompt, num_images):
        raise BadRecord("malformed", "earlier turns tokenize differently once a turn is added")
    return tokens, loss_mask


def _messages(
    processor: Processor, turns: tuple[tuple[str, str], ...], num_images: int
) -> list[dict[str, str]]:
    """Returns the questions and answers as messages, with a placeholder for each image."""
    messages = []
    for question, answer in turns:
        question = question.replace(IMAGE_TAG, processor.image_tag)
        messages += [dict(role="user", content=question), dict(role="assistant", content=answer)]
    images_per_message = [num_images, *[0] * (len(messages) - 1)]
    return with_placeholders(messages, images_per_message, processor.image_tag)
