"""Tokenizer and processor files of one PyTorch layout rewritten for the other.

What both read alike is copied. DeepSeek's processor names its template (`sft_format`); that of
`transformers` holds it as a chat template. Keys of the other side are kept where they do no harm,
so that a folder which goes there and back keeps its template and system prompt.
"""

import shutil
from pathlib import Path

from janus_jax.interop.config import DEEPSEEK
from janus_jax.interop.files import small_files
from janus_jax.models.janus import JanusConfig
from janus_jax.processing.chat import DEFAULT_SYSTEM_PROMPT, JANUS_ROLES, check_sft_format
from janus_jax.processing.json_files import read_json, write_json
from janus_jax.processing.tokenizer import (
    BOS,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    Tokenizer,
    stated_token,
)

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
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
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] != 'system' -%}
{{ ('USER' if message['role'] == 'user' else 'ASSISTANT') + ': ' }}
{%- endif -%}
{%- if message['content'] is string -%}{{ message['content'] | trim }}
{%- else -%}{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<image_placeholder>\\n' }}
{%- else -%}{{ part['text'] | trim }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{ eos_token if message['role'] == 'assistant' else '\\n\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


def check_files(folder: Path) -> None:
    """Raises ValueError where a tokenizer or processor file is there and no JSON object."""
    for name in (PREPROCESSOR, PROCESSOR, TOKENIZER, TOKENIZER_CONFIG, GENERATION):
        _optional(folder / name)


def copy_files(source: Path, target: Path) -> None:
    """Copies a folder's config, tokenizer and processor files."""
    for path in small_files(source):
        shutil.copyfile(path, target / path.name)


def translate_files(source: Path, target: Path, layout: str, cfg: JanusConfig) -> None:
    """Copies a folder's small files and rewrites the processor's for another layout.

    Raises:
      ValueError: the layout cannot express the folder's template, system prompt or placeholder.
    """
    if (tag := _optional(source / PROCESSOR).get("image_tag", IMAGE)) != IMAGE:
        raise ValueError(f"another layout needs the image_tag {IMAGE}, not {tag!r}")
    copy_files(source, target)
    if layout == DEEPSEEK:
        _to_deepseek(target, cfg)
    else:
        _to_transformers(target, cfg)


def _optional(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}


def _side(images: dict, cfg: JanusConfig) -> int:
    side = images.get("image_size", images.get("size"))
    return side.get("height", cfg.image_size) if isinstance(side, dict) else side or cfg.image_size


def _to_deepseek(folder: Path, cfg: JanusConfig) -> None:
    processor = _optional(folder / PROCESSOR)
    images = _optional(folder / PREPROCESSOR) or processor.pop("image_processor", {})
    if images:
        shared = {key: images[key] for key in SHARED_IMAGE_KEYS if key in images}
        named = {
            "image_processor_type": "VLMImageProcessor",
            "processor_class": "VLChatProcessor",
            "image_size": _side(images, cfg),
        }
        write_json(folder / PREPROCESSOR, shared | named)
    named = {
        "processor_class": "VLChatProcessor",
        "image_tag": IMAGE_TOKENS["image_token"],
        "num_image_tokens": cfg.und_encoder.num_tokens,
        "sft_format": processor.get("sft_format", "deepseek"),
    }
    if processor.get("use_default_system_prompt") is False:
        processor.setdefault("system_prompt", "")
    write_json(folder / PROCESSOR, _kept(processor) | named)
    own = _optional(folder / GENERATION)
    for name in ("chat_template.jinja", "chat_template.json", GENERATION):
        (folder / name).unlink(missing_ok=True)
    drawing = {name: own[name] for name in ("guidance_scale", "temperature") if name in own}
    if drawing:  # what the model draws best with; DeepSeek's code reads none
        write_json(folder / GENERATION, drawing)


def _kept(processor: dict) -> dict:
    ours = ("add_special_token", "ignore_id", "mask_prompt", "sft_format", "system_prompt")
    return {key: processor[key] for key in ours if key in processor}


def _to_transformers(folder: Path, cfg: JanusConfig) -> None:
    images, processor = _optional(folder / PREPROCESSOR), _optional(folder / PROCESSOR)
    user, assistant = _roles(processor.get("sft_format", "deepseek"))
    if images:
        side = _side(images, cfg)
        shared = {key: images[key] for key in SHARED_IMAGE_KEYS if key in images}
        named = {
            "image_processor_type": "JanusImageProcessor",
            "processor_class": "JanusProcessor",
            "do_resize": True,
            "do_rescale": True,
            "resample": 3,
            "size": {"height": side, "width": side},
        }
        write_json(folder / PREPROCESSOR, shared | named)
    named = {
        "processor_class": "JanusProcessor",
        "num_image_tokens": cfg.und_encoder.num_tokens,
        "use_default_system_prompt": _has_default_system_prompt(processor),
    }
    write_json(folder / PROCESSOR, _kept(processor) | named)
    tokenizer = Tokenizer.from_dir(folder)
    _write_tokenizer(folder, tokenizer.bos_id)
    template = CHAT_TEMPLATE.replace("USER", user).replace("ASSISTANT", assistant)
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    _write_generation_config(folder, tokenizer)


def _roles(sft_format: str) -> tuple[str, str]:
    check_sft_format(sft_format)
    if sft_format not in JANUS_ROLES:
        known = " or ".join(JANUS_ROLES)
        raise ValueError(f"the transformers layout needs sft_format {known}, not {sft_format!r}")
    return JANUS_ROLES[sft_format]


def _has_default_system_prompt(processor: dict) -> bool:
    prompt = processor.get("system_prompt", DEFAULT_SYSTEM_PROMPT)
    if prompt not in ("", DEFAULT_SYSTEM_PROMPT):
        raise ValueError(
            f"the transformers layout needs DeepSeek's system prompt or none, not {prompt!r}"
        )
    return prompt != ""


def _write_tokenizer(folder: Path, bos_id: int) -> None:
    """Names the image tokens, and makes tokenizer.json itself add BOS.

    DeepSeek's files leave BOS to the tokenizer class; the class that reads a tokenizer.json as it
    is adds none.
    """
    config = _optional(folder / TOKENIZER_CONFIG)
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": IMAGE_TOKENS}
    write_json(folder / TOKENIZER_CONFIG, config | IMAGE_TOKENS | named)
    bos, tokenizer = stated_token(folder, "bos_token", BOS)[0], read_json(folder / TOKENIZER)
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
        "guidance_scale": 5,  # transformers' default, and DeepSeek's
        "temperature": 1.0,
        **_optional(folder / GENERATION),
        "generation_kwargs": {"boi_token_id": tokenizer.image_start_id},
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    write_json(folder / GENERATION, settings)
