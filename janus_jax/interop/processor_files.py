"""Translates tokenizer and processor files from one PyTorch layout to the other.

Files that both layouts read in the same way are copied. DeepSeek's processor names its template
(`sft_format`), the processor of `transformers` stores it as a chat template. Keys of the other
layout are kept if they have no effect, so that a folder that is converted there and back keeps its
template and system prompt.
"""

import shutil
from pathlib import Path

from janus_jax.checks import shorten
from janus_jax.families.family import DEEPSEEK, ModelConfig
from janus_jax.families.registry import sizes_of
from janus_jax.interop.files import small_files
from janus_jax.paths import read_json, read_json_if_any, write_file, write_json
from janus_jax.processing.chat import DEFAULT_SYSTEM_PROMPT
from janus_jax.processing.processor import image_config
from janus_jax.processing.prompt_settings import (
    LEGACY_TEMPLATE_FILE,
    PREPROCESSOR,
    PROCESSOR,
    TEMPLATE_FILE,
    TEMPLATE_FOLDER,
    TEMPLATE_KEY,
    PromptSettings,
    janus_template,
)
from janus_jax.processing.tokenizer import (
    BOS,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    SPECIAL_TOKENS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Tokenizer,
    read_special_token,
)

GENERATION = "generation_config.json"
IMAGE_TOKENS = {"image_token": IMAGE, "boi_token": IMAGE_START, "eoi_token": IMAGE_END}
SHARED_IMAGE_KEYS = (
    "image_mean",
    "image_std",
    "min_size",
    "do_normalize",
    "rescale_factor",
    "background_color",
)


def check_files(folder: Path) -> None:
    """Raises ValueError if a tokenizer or processor file is not a JSON object or is invalid.

    Runs the same checks as loading the folder does, but accepts missing files.
    """
    for name in (PREPROCESSOR, PROCESSOR, TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS, GENERATION):
        read_json_if_any(folder / name)
    PromptSettings.from_dir(folder)
    _image_size(folder)


def _image_size(folder: Path) -> int | None:
    """Returns the image size, or None if the folder has no image settings."""
    nested = read_json_if_any(folder / PROCESSOR).get("image_processor")
    if nested is None and not (folder / PREPROCESSOR).is_file():
        return None
    return image_config(folder).image_size


def copy_files(source: Path, target: Path) -> None:
    """Copies a folder's config, tokenizer and processor files, and its chat templates."""
    for path in small_files(source):
        shutil.copyfile(path, target / path.name)
    if (source / TEMPLATE_FOLDER).is_dir():
        shutil.copytree(source / TEMPLATE_FOLDER, target / TEMPLATE_FOLDER)


def translate_files(source: Path, target: Path, layout: str, cfg: ModelConfig) -> None:
    """Copies a folder's small files and translates the processor files to another layout.

    layout: the layout of `target`. cfg: the model's sizes.

    Raises:
      ValueError: the layout cannot express the folder's template, system prompt or image
        placeholder.
    """
    prompts = PromptSettings.from_dir(source)
    if prompts.image_tag != IMAGE:
        raise ValueError(
            f"{source / PROCESSOR}: image_tag must be {IMAGE} to convert to another layout, got "
            f"{shorten(prompts.image_tag)}"
        )
    if layout == DEEPSEEK:
        _copy_without_templates(source, target)
        _to_deepseek(target, cfg, prompts)
    else:
        _check_expressible(source / PROCESSOR, prompts)
        tokenizer = Tokenizer.from_dir(source)
        _copy_without_templates(source, target)
        _to_transformers(target, cfg, prompts, tokenizer)


def _check_expressible(path: Path, prompts: PromptSettings) -> None:
    """Raises ValueError if the transformers layout cannot express these prompt settings."""
    if prompts.system_prompt not in ("", DEFAULT_SYSTEM_PROMPT):
        raise ValueError(
            f"{path}: the transformers layout only supports DeepSeek's system prompt or none, got "
            f"{shorten(prompts.system_prompt)}"
        )


def _copy_without_templates(source: Path, target: Path) -> None:
    """Copies the small files without chat templates, which the target layout stores differently."""
    copy_files(source, target)
    for name in (TEMPLATE_FILE, LEGACY_TEMPLATE_FILE):
        (target / name).unlink(missing_ok=True)
    shutil.rmtree(target / TEMPLATE_FOLDER, ignore_errors=True)
    config = read_json_if_any(target / TOKENIZER_CONFIG)
    if config.pop(TEMPLATE_KEY, None) is not None:
        write_json(target / TOKENIZER_CONFIG, config)


def _write_image_settings(folder: Path, processor: dict, settings: dict) -> None:
    """Writes preprocessor_config.json: the keys that both layouts share, and `settings`."""
    images = read_json_if_any(folder / PREPROCESSOR) or processor.get("image_processor")
    if images:
        shared = {key: images[key] for key in SHARED_IMAGE_KEYS if key in images}
        write_json(folder / PREPROCESSOR, shared | settings)


def _to_deepseek(folder: Path, cfg: ModelConfig, prompts: PromptSettings) -> None:
    processor, size = read_json_if_any(folder / PROCESSOR), _image_size(folder)
    images = {
        "image_processor_type": "VLMImageProcessor",
        "processor_class": "VLChatProcessor",
        "image_size": size,
    }
    _write_image_settings(folder, processor, images)
    settings = {
        "processor_class": "VLChatProcessor",
        "image_tag": IMAGE_TOKENS["image_token"],
        "num_image_tokens": sizes_of(cfg).input_image_tokens,
        "sft_format": prompts.sft_format,
    }
    if prompts.system_prompt != DEFAULT_SYSTEM_PROMPT:
        settings["system_prompt"] = prompts.system_prompt
    write_json(folder / PROCESSOR, _preserved_settings(processor) | settings)
    generation = read_json_if_any(folder / GENERATION)
    (folder / GENERATION).unlink(missing_ok=True)
    keys = ("guidance_scale", "temperature")
    sampling = {key: generation[key] for key in keys if key in generation}
    if sampling:  # the model's recommended sampling settings; DeepSeek's code ignores the file
        write_json(folder / GENERATION, sampling)


def _preserved_settings(processor: dict) -> dict:
    """Returns DeepSeek's settings, which `transformers` ignores, from a processor config."""
    keys = ("add_special_token", "ignore_id", "mask_prompt", "sft_format", "system_prompt")
    return {key: processor[key] for key in keys if key in processor}


def _to_transformers(
    folder: Path, cfg: ModelConfig, prompts: PromptSettings, tokenizer: Tokenizer
) -> None:
    processor, size = read_json_if_any(folder / PROCESSOR), _image_size(folder)
    images = {
        "image_processor_type": "JanusImageProcessor",
        "processor_class": "JanusProcessor",
        "do_resize": True,
        "do_rescale": True,
        "resample": 3,
        "size": {"height": size, "width": size},
    }
    _write_image_settings(folder, processor, images)
    settings = {
        "processor_class": "JanusProcessor",
        "num_image_tokens": sizes_of(cfg).input_image_tokens,
        "use_default_system_prompt": prompts.system_prompt == DEFAULT_SYSTEM_PROMPT,
    }
    write_json(folder / PROCESSOR, _preserved_settings(processor) | settings)
    _write_tokenizer(folder, tokenizer.bos_id)
    write_file(folder / TEMPLATE_FILE, janus_template(prompts.sft_format).encode())
    _write_generation_config(folder, tokenizer)


def _write_tokenizer(folder: Path, bos_id: int) -> None:
    """Names the image tokens in tokenizer_config.json, and lets tokenizer.json itself add BOS.

    In DeepSeek's layout the tokenizer class adds BOS; PreTrainedTokenizerFast, which uses
    tokenizer.json as it is, does not.
    """
    config = read_json_if_any(folder / TOKENIZER_CONFIG)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": IMAGE_TOKENS}
    write_json(folder / TOKENIZER_CONFIG, config | IMAGE_TOKENS | settings)
    bos, tokenizer = read_special_token(folder, "bos_token", BOS)[0], read_json(folder / TOKENIZER)
    steps = tokenizer.get("post_processor") or {"type": "Sequence", "processors": []}
    steps = steps["processors"] if steps["type"] == "Sequence" else [steps]
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    templates = [step for step in steps if step["type"] == "TemplateProcessing"]
    if any(first in template["single"] for template in templates):
        return
    steps = [step for step in steps if step not in templates]
    one, two = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    template = {
        "type": "TemplateProcessing",
        "single": [first, one],
        "pair": [first, one, first, two],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
    tokenizer["post_processor"] = {"type": "Sequence", "processors": [*steps, template]}
    write_json(folder / TOKENIZER, tokenizer)


def _write_generation_config(folder: Path, tokenizer: Tokenizer) -> None:
    settings = {
        "guidance_scale": 5,  # the default of transformers and of DeepSeek's code
        "temperature": 1.0,
        **read_json_if_any(folder / GENERATION),
        "generation_kwargs": {"boi_token_id": tokenizer.image_start_id},
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    write_json(folder / GENERATION, settings)
