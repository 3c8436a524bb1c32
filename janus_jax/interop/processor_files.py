"""Tokenizer and processor files of one PyTorch layout rewritten for the other.

What both read alike is copied. DeepSeek's processor names its template (`sft_format`); that of
`transformers` holds it as a chat template. Keys of the other side are kept where they do no harm,
so that a folder which goes there and back keeps its template and system prompt.
"""

import shutil
from pathlib import Path

from janus_jax.interop.config import DEEPSEEK
from janus_jax.interop.files import small_files, write_json
from janus_jax.models.janus import JanusConfig
from janus_jax.processing.chat import JANUS_ROLES
from janus_jax.processing.json_files import read_json

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
IMAGE_TOKENS = {
    "image_token": "<image_placeholder>",
    "boi_token": "<begin_of_image>",
    "eoi_token": "<end_of_image>",
}
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
{{ ('USER' if message['role'] == 'user' else 'ASSISTANT') + ': ' }}
{%- if message['content'] is string -%}{{ message['content'] | trim }}
{%- else -%}{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<image_placeholder>\\n' }}
{%- else -%}{{ part['text'] | trim }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{ '\\n\\n' if message['role'] == 'user' else eos_token }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


def image_token_id(folder: Path) -> int | None:
    """Id of the image placeholder in a folder's tokenizer.json; None if there is none."""
    return _token_id(folder, IMAGE_TOKENS["image_token"])


def _token_id(folder: Path, token: str) -> int | None:
    if not (folder / TOKENIZER).is_file():
        return None
    tokenizer = read_json(folder / TOKENIZER)
    added = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", [])}
    return added.get(token, tokenizer.get("model", {}).get("vocab", {}).get(token))


def copy_files(source: Path, target: Path) -> None:
    """Copies a folder's config, tokenizer and processor files."""
    for path in small_files(source):
        shutil.copyfile(path, target / path.name)


def translate_files(source: Path, target: Path, layout: str, cfg: JanusConfig) -> None:
    """Copies a folder's small files and rewrites the processor's for another layout."""
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
    write_json(folder / PROCESSOR, _kept(processor) | named)
    for name in ("chat_template.jinja", "chat_template.json", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)


def _kept(processor: dict) -> dict:
    ours = ("add_special_token", "ignore_id", "mask_prompt", "sft_format", "system_prompt")
    return {key: processor[key] for key in ours if key in processor}


def _to_transformers(folder: Path, cfg: JanusConfig) -> None:
    images, processor = _optional(folder / PREPROCESSOR), _optional(folder / PROCESSOR)
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
        "use_default_system_prompt": True,
    }
    write_json(folder / PROCESSOR, _kept(processor) | named)
    _write_tokenizer(folder)
    sft_format = processor.get("sft_format", "deepseek")
    user, assistant = JANUS_ROLES.get(sft_format, JANUS_ROLES["deepseek"])
    template = CHAT_TEMPLATE.replace("USER", user).replace("ASSISTANT", assistant)
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    _write_generation_config(folder)


def _write_tokenizer(folder: Path) -> None:
    """Names the image tokens, and makes tokenizer.json itself add BOS.

    DeepSeek's files leave BOS to the tokenizer class; the class that reads a tokenizer.json as it
    is adds none.
    """
    config = _optional(folder / TOKENIZER_CONFIG)
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": IMAGE_TOKENS}
    write_json(folder / TOKENIZER_CONFIG, config | IMAGE_TOKENS | named)
    bos, tokenizer = _bos(folder), read_json(folder / TOKENIZER)
    token_id = _token_id(folder, bos) if bos else None
    steps = tokenizer.get("post_processor") or {"type": "Sequence", "processors": []}
    if token_id is None or "TemplateProcessing" in str(steps):
        return
    steps = steps["processors"] if steps["type"] == "Sequence" else [steps]
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    one, two = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    template = {
        "type": "TemplateProcessing",
        "single": [first, one],
        "pair": [first, one, first, two],
        "special_tokens": {bos: {"id": bos, "ids": [token_id], "tokens": [bos]}},
    }
    tokenizer["post_processor"] = {"type": "Sequence", "processors": [*steps, template]}
    write_json(folder / TOKENIZER, tokenizer)


def _bos(folder: Path) -> str | None:
    bos = _optional(folder / TOKENIZER_CONFIG).get("bos_token")
    return bos["content"] if isinstance(bos, dict) else bos


def _write_generation_config(folder: Path) -> None:
    begin = _token_id(folder, IMAGE_TOKENS["boi_token"])
    settings = {"guidance_scale": 5, "temperature": 1.0}
    settings["generation_kwargs"] = {"boi_token_id": begin}
    config = _optional(folder / TOKENIZER_CONFIG)
    for name in ("bos", "eos", "pad"):
        token = config.get(f"{name}_token")
        token = token["content"] if isinstance(token, dict) else token
        token_id = _token_id(folder, token) if token else None
        if token_id is not None:
            settings[f"{name}_token_id"] = token_id
    write_json(folder / "generation_config.json", settings)
