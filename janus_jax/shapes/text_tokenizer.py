"""Builds the text tokenizer and the processor files of janus_tiny, in DeepSeek's formats.

The vocabulary consists of the 256 bytes and of merges that turn every word of the captions,
questions and answers into one token. Any other text can be encoded too; it takes more tokens.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from janus_jax.paths import write_json
from janus_jax.processing.chat import JANUS_ROLES
from janus_jax.processing.tokenizer import BOS, EOS, IMAGE, IMAGE_END, IMAGE_START, PAD
from janus_jax.shapes import questions, scenes

PATCH = "<patch_placeholder>"  # part of the released tokenizers; never used
SPECIAL = (BOS, EOS, PAD, IMAGE, PATCH, IMAGE_START, IMAGE_END)
NUM_IMAGE_TOKENS = (scenes.IMAGE_SIZE // 16) ** 2
MAX_VOCABULARY = 4096  # far more than needed: training stops when every word is one token
QUESTION_SCENES = 4000  # enough for every question template and answer to occur many times
# File name -> content, for all files except tokenizer.json.
JSON_FILES = {
    "tokenizer_config.json": {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "LlamaTokenizerFast",
    },
    "special_tokens_map.json": {
        "additional_special_tokens": [IMAGE, PATCH],
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
    },
    "preprocessor_config.json": {
        "background_color": [127, 127, 127],
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "VLMImageProcessor",
        "image_size": scenes.IMAGE_SIZE,
        "image_std": [0.5, 0.5, 0.5],
        "min_size": 14,
        "processor_class": "VLChatProcessor",
        "rescale_factor": 1 / 255,
    },
    "processor_config.json": {
        "add_special_token": False,
        "ignore_id": -100,
        "image_tag": IMAGE,
        "mask_prompt": True,
        "num_image_tokens": NUM_IMAGE_TOKENS,
        "processor_class": "VLChatProcessor",
        "sft_format": "deepseek",
        "system_prompt": "",
    },
    # A guidance weight of 5, as in the original, breaks the images of this small model
    # (benchmarks/results/janus_tiny.json).
    "generation_config.json": {"guidance_scale": 1.5, "temperature": 0.8},
}
FILES = ("tokenizer.json", *JSON_FILES)


def build(folder: str | Path) -> None:
    """Writes tokenizer.json and the files in JSON_FILES to `folder`; the output is deterministic.

    The formats are those of the files of a released checkpoint. tokenizer.json does not add a BOS
    token; the loader does. The key `system_prompt` of processor_config.json is specific to this
    project. It is empty because this model answers questions without a system prompt.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(train_tokenizer().to_str(pretty=True), encoding="utf-8")
    for name, content in JSON_FILES.items():
        write_json(folder / name, content)


def train_tokenizer() -> Tokenizer:
    """Trains a byte-level BPE on the output of `words`, with the pre-tokenizer of DeepSeek-LLM."""
    tokenizer = Tokenizer(models.BPE())
    splits = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"\s+$")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splits),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(sorted(words()), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    roles = JANUS_ROLES["deepseek"]
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in roles])
    return tokenizer


def words() -> set[str]:
    """Returns every word of captions, questions and answers with a leading space, except numbers.

    The first word of each question is also returned without the space, because it follows a line
    break if the image tag precedes the question.
    """
    dialogue = list(_questions_and_answers())
    captions = [p.text for split in scenes.SPLITS for k in scenes.CAPTION_KINDS
                for p in scenes.prompts(split, k)]
    spaced = {f" {word.strip('?,.')}" for text in dialogue + captions for word in text.split()}
    first_words = {text.split()[0] for text in dialogue if text.endswith(("?", "."))}
    return {word for word in spaced if not word.strip().isdigit()} | first_words


def _questions_and_answers() -> Iterator[str]:
    rng = np.random.default_rng(0)
    for _ in range(QUESTION_SCENES):
        yield from questions.sample_question(rng, scenes.sample_mixed(rng))
