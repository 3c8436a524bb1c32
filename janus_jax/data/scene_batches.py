"""Batches of drawn scenes for training, made anew from (seed, step): no file, no epoch.

B batch, P prompt length, T sequence length, S pixels a side.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from janus_jax.data import scenes
from janus_jax.data.questions import QuestionAnswer, sample_question
from janus_jax.processing.chat import question_messages
from janus_jax.processing.processor import Processor

CAPTION_DROPPED = 0.1  # Janus: so that guidance has an unconditional model
MIXED_SCENES = 0.5  # part of the pictures that follow no caption, for the tokenizer and questions
TURNS = 3  # questions about one picture
NUM_PATCH_LABELS = 1 + len(scenes.SHAPES) * len(scenes.COLORS)


def scene_pictures(rng: np.random.Generator, batch_size: int) -> np.ndarray:
    """Pictures of training scenes, uint8[B, S, S, 3]."""
    return np.stack([scenes.draw(any_scene(rng)) for _ in range(batch_size)])


def any_scene(rng: np.random.Generator, split: str = "train") -> scenes.Scene:
    """A scene with or without a caption, as questions are asked about."""
    if rng.random() < MIXED_SCENES:
        return scenes.sample_mixed(rng, split)
    return scenes.sample_scene(rng, None, split)[0]


def captioned(
    rng: np.random.Generator, batch_size: int, weights: dict[str, float]
) -> list[tuple[scenes.Scene, scenes.Prompt, bool]]:
    """Scenes with their captions, and whether the caption is dropped; weights: of scenes.KINDS."""
    likely = np.array(list(weights.values()), float)
    kinds = rng.choice(list(weights), batch_size, p=likely / likely.sum())
    return [
        (*scenes.sample_scene(rng, str(kind)), rng.random() < CAPTION_DROPPED) for kind in kinds
    ]


def asked(
    rng: np.random.Generator, batch_size: int
) -> list[tuple[scenes.Scene, list[QuestionAnswer]]]:
    """Scenes with TURNS questions and answers about each."""
    drawn = []
    for _ in range(batch_size):
        scene = any_scene(rng)
        drawn.append((scene, [sample_question(rng, scene) for _ in range(TURNS)]))
    return drawn


def labelled_pictures(
    rng: np.random.Generator, batch_size: int, patch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8[B, S, S, 3] and what has its centre in each patch, int32[B, T], row-major.

    patch: pixels a side. Label 0 is nothing, the others below NUM_PATCH_LABELS a shape and color.
    """
    drawn = [any_scene(rng) for _ in range(batch_size)]
    grid = scenes.IMAGE_SIZE // patch
    labels = np.zeros((batch_size, grid, grid), np.int32)
    for row, scene in enumerate(drawn):
        for item in scene.objects:
            labels[row, item.y // patch, item.x // patch] = _patch_label(item)
    return np.stack([scenes.draw(scene) for scene in drawn]), labels.reshape(batch_size, -1)


def _patch_label(item: scenes.Object) -> int:
    colors = list(scenes.COLORS)
    return 1 + scenes.SHAPES.index(item.shape) * len(colors) + colors.index(item.color)


def decoder_batch(processor: Processor, cfg) -> Callable[[np.random.Generator, int], dict]:
    """The function (rng, step) -> dict(generation=..., understanding=...) of SceneBatches.

    cfg: ConfigDict of configs/janus_tiny_decoder.py.
    """
    lengths = cfg.prompt_length, cfg.conversation_length
    batches = SceneBatches(processor, *lengths, dict(cfg.caption_weights))

    def make(rng: np.random.Generator, step: int) -> dict:
        return dict(
            generation=batches.generation(rng, cfg.generation_batch_size),
            understanding=batches.understanding(rng, cfg.understanding_batch_size),
        )

    return make


def step_scenes(cfg, step: int) -> list[scenes.Scene]:
    """The scenes that one step of training shows to the encoder or the decoder.

    cfg: ConfigDict of the task "encoder" or "decoder".
    """
    rng = np.random.default_rng((cfg.seed, step))
    if cfg.task == "encoder":
        return [any_scene(rng) for _ in range(cfg.batch_size)]
    drawn = captioned(rng, cfg.generation_batch_size, dict(cfg.caption_weights))
    answered = asked(rng, cfg.understanding_batch_size)
    return [scene for scene, *_ in (*drawn, *answered)]


@dataclasses.dataclass(frozen=True)
class SceneBatches:
    """Examples as a checkpoint's processor writes them, padded on the left to fixed lengths.

    caption_weights: how often captions of each of scenes.KINDS are drawn, relative to the others.
    Raises ValueError for weights that cannot be drawn by.
    """

    processor: Processor
    prompt_length: int
    conversation_length: int
    caption_weights: dict[str, float]

    def __post_init__(self):
        weights = self.caption_weights
        known = set(weights) <= set(scenes.KINDS)
        if not known or min(weights.values(), default=0) < 0 or not any(weights.values()):
            asked = "be of the kinds of scenes.KINDS, none below 0 and one above 0"
            raise ValueError(f"caption_weights must {asked}, got {weights}")

    def generation(self, rng: np.random.Generator, batch_size: int) -> dict[str, np.ndarray]:
        """tokens int32[B, P], token_mask bool[B, P], images uint8[B, S, S, 3]."""
        rows, images = [], []
        for scene, prompt, dropped in captioned(rng, batch_size, self.caption_weights):
            tokens = self.processor.image_prompt(prompt.text)
            rows.append(self.processor.unconditional(tokens) if dropped else tokens)
            images.append(scenes.draw(scene))
        tokens, mask = self._left_padded(rows, self.prompt_length)
        return dict(tokens=tokens, token_mask=mask, images=np.stack(images))

    def understanding(self, rng: np.random.Generator, batch_size: int) -> dict[str, np.ndarray]:
        """tokens int32[B, T]; token_mask, image_mask, loss_mask bool[B, T];
        pixels float32[B, 1, S, S, 3]. One picture a row, asked about TURNS times."""
        rows, wanted, pixels = [], [], []
        for scene, questions in asked(rng, batch_size):
            tokens, loss, image = self._conversation(scene, questions)
            rows.append(tokens)
            wanted.append(loss)
            pixels.append(image)
        tokens, mask = self._left_padded(rows, self.conversation_length)
        loss_mask = np.zeros_like(mask)
        for row, loss in enumerate(wanted):
            loss_mask[row, mask.shape[1] - len(loss) :] = loss
        image_mask = tokens == self.processor.tokenizer.image_id
        return dict(
            tokens=tokens,
            token_mask=mask,
            image_mask=image_mask,
            loss_mask=loss_mask,
            pixels=np.stack(pixels),
        )

    def _conversation(self, scene: scenes.Scene, questions: list[QuestionAnswer]):
        """Tokens, a bool a token (True in answers) and pixels float32[1, S, S, 3]."""
        picture, tokenizer = scenes.draw(scene), self.processor.tokenizer
        messages, tokens, wanted = [], [], []
        for turn, (question, answer) in enumerate(questions):
            images = 1 if turn == 0 else 0
            messages += question_messages(question, images, self.processor.image_tag)
            prompt, pixels = self.processor.conversation(messages, [picture])
            reply = [*tokenizer.encode(f" {answer}")[1:], tokenizer.eos_id]
            wanted += [False] * (len(prompt) - len(wanted)) + [True] * len(reply)
            tokens = prompt + reply
            messages[-1]["content"] = answer
        return tokens, wanted, pixels

    def _left_padded(self, rows: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
        longest = max(map(len, rows))
        if longest > length:
            raise ValueError(f"examples must fit the configured length, got {longest=} {length=}")
        tokens = np.full((len(rows), length), self.processor.tokenizer.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, ids in enumerate(rows):
            tokens[row, length - len(ids) :] = ids
            mask[row, length - len(ids) :] = True
        return tokens, mask
