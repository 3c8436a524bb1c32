"""Records -> what a step trains on: tokens, what goes where, and what is to be predicted.

T tokens of an example, n pictures looked at, m pictures drawn (0 or 1), S pixels a side, N tokens
of a drawn picture.
"""

import dataclasses
import functools

import numpy as np

from janus_jax.data.reading import prepared_image
from janus_jax.data.records import KINDS, PICTURE_TAG, BadRecord, Record
from janus_jax.processing.chat import with_placeholders
from janus_jax.processing.images import crop_square, error_text, resize_and_pad
from janus_jax.processing.processor import Processor

CAPTION_DROPPED = 0.1  # Janus: so that guidance has an unconditional model

Example = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ExampleMaker:
    """Makes examples as a checkpoint's processor writes prompts.

    An example is a dict of
        tokens: int32[T]; pad where a drawn picture's token goes.
        image_mask: bool[T], True where a feature of a picture that is looked at goes.
        gen_mask: bool[T], True where a token of a drawn picture goes; all are to be predicted.
        loss_mask: bool[T], True on the text that is to be predicted.
        kind: int8[T], the record's place in KINDS.
        records: str, where the record is.
        pixels: uint8[n, S, S, 3], pictures to be looked at.
        drawn: the picture to be drawn, uint8[m, S, S, 3], or its indices, int32[m, N].

    Attributes:
        image_size: S.
        num_drawn: N.
        codebook_size: indices are below it.
        max_length: the most tokens of an example.
        max_pictures, max_drawn: the most pictures looked at, and drawn, in an example.
        tokenized: whether drawn pictures come as indices.
    """

    processor: Processor
    image_size: int
    num_drawn: int
    codebook_size: int
    max_length: int
    max_pictures: int
    max_drawn: int
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
            self.processor, record.turns, len(record.pictures)
        )
        self._check_number(len(record.pictures))  # before they are decoded
        prepare = functools.partial(resize_and_pad, cfg=self.processor.image_config)
        pixels = [prepared_image(picture, prepare) for picture in record.pictures]
        return self._example(tokens, loss_mask, pixels=pixels)

    def _text(self, record: Record, rng: np.random.Generator) -> Example:
        tokenizer = self.processor.tokenizer
        tokens = [*tokenizer.encode(record.text), tokenizer.eos_id]
        if tokenizer.image_id in tokens:
            raise BadRecord("malformed", "a text must hold no image placeholder")
        return self._example(tokens, [False, *[True] * (len(tokens) - 1)])

    def _generation(self, record: Record, rng: np.random.Generator) -> Example:
        tokens = self.processor.image_prompt(record.text)
        if rng.random() < CAPTION_DROPPED:
            tokens = self.processor.unconditional(tokens)
        return self._example(tokens, [False] * len(tokens), drawn=self._drawn(record))

    def _drawn(self, record: Record) -> np.ndarray:
        """uint8[S, S, 3] or int32[N]."""
        if not self.tokenized:
            if not record.pictures:
                raise BadRecord("no picture", "it has indices, and the run wants pictures")
            crop = functools.partial(crop_square, size=self.image_size)
            return prepared_image(record.pictures[0], crop)
        if record.indices is None:
            raise BadRecord("no indices", "there is only a picture, and the run wants indices")
        if len(record.indices) != self.num_drawn:
            got = f"{len(record.indices)} for {self.num_drawn}"
            raise BadRecord("malformed", f"a picture must have the model's number of tokens, {got}")
        if not (0 <= record.indices.min() and record.indices.max() < self.codebook_size):
            got = f"got up to {record.indices.max()}"
            raise BadRecord("malformed", f"indices must be below {self.codebook_size}, {got}")
        return record.indices

    def _example(self, tokens, loss_mask, pixels=(), drawn=None) -> Example:
        side = self.image_size
        shape = (self.num_drawn,) if self.tokenized else (side, side, 3)
        drawn = [] if drawn is None else [drawn]
        slots = self.num_drawn * len(drawn)
        tokens = np.array([*tokens, *[self.processor.tokenizer.pad_id] * slots], np.int32)
        gen_mask = np.arange(len(tokens)) >= len(tokens) - slots
        return dict(
            tokens=tokens,
            image_mask=tokens == self.processor.tokenizer.image_id,
            gen_mask=gen_mask,
            loss_mask=np.pad(np.array(loss_mask, bool), (0, slots)),
            pixels=np.array(pixels, np.uint8).reshape(-1, side, side, 3),
            drawn=np.array(drawn, np.int32 if self.tokenized else np.uint8).reshape(-1, *shape),
        )

    def _check_number(self, pictures: int) -> None:
        if pictures > self.max_pictures:
            most = f"at most {self.max_pictures} fit a row"
            raise BadRecord("too many pictures", f"{pictures}, {most}")

    def _check(self, example: Example) -> None:
        length, pictures = len(example["tokens"]), len(example["pixels"])
        if length > self.max_length:
            most = f"at most {self.max_length} fit a row and the model"
            raise BadRecord("too long", f"{length} tokens, {most}")
        if len(example["drawn"]) > self.max_drawn:
            raise BadRecord("too many pictures", "rows have no place for a drawn picture")
        places = int(example["image_mask"].sum())
        if places != pictures * self.processor.num_image_tokens:
            raise BadRecord("malformed", f"{places} places for features of {pictures} pictures")


def conversation_tokens(
    processor: Processor, turns: tuple[tuple[str, str], ...], num_images: int
) -> tuple[list[int], list[bool]]:
    """Tokens of questions and answers, and for each whether it is to be predicted.

    Each question is tokenized as it is when it waits for its answer, so that training meets what
    answering meets; of each answer the words and the end of sentence are to be predicted.
    Raises BadRecord if the pictures do not match the places that the questions leave for them.
    """
    tag, tokenizer = processor.image_tag, processor.tokenizer
    messages = []
    for question, answer in turns:
        messages.append(dict(role="user", content=question.replace(PICTURE_TAG, tag)))
        messages.append(dict(role="assistant", content=answer))
    shown = [num_images, *[0] * (len(messages) - 1)]
    messages = with_placeholders(messages, shown, tag)
    tokens, loss_mask = [], []
    for turn in range(0, len(messages), 2):
        asked = [*messages[: turn + 1], dict(role="assistant", content="")]
        placed = sum(message["content"].count(tag) for message in asked)
        if placed > num_images or (turn == len(messages) - 2 and placed != num_images):
            raise BadRecord("malformed", f"{num_images} pictures for {placed} places in the text")
        prompt = processor.tokens(asked, placed)
        reply = tokenizer.encode(f" {messages[turn + 1]['content'].strip()}")[1:]
        reply = [*reply, tokenizer.eos_id]
        if prompt[: len(tokens)] != tokens:
            raise BadRecord("malformed", "what was said before reads differently once it goes on")
        loss_mask += [False] * (len(prompt) - len(loss_mask)) + [True] * len(reply)
        tokens = prompt + reply
    return tokens, loss_mask
