"""Reads the prompt settings of a checkpoint folder: template, system prompt and placeholder.

DeepSeek's processor_config.json has the name of the template in `sft_format`. `transformers` stores
the template itself, in Jinja, in one of several files. These templates are recognized by their text
and never executed, because a folder may come from an untrusted source.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from janus_jax.checks import shorten
from janus_jax.paths import read_bounded, read_json_if_any, value_errors_of
from janus_jax.processing import chat
from janus_jax.processing.tokenizer import IMAGE, PROCESSOR, TOKENIZER_CONFIG

PREPROCESSOR = "preprocessor_config.json"
TEMPLATE_FILE, LEGACY_TEMPLATE_FILE = "chat_template.jinja", "chat_template.json"
TEMPLATE_FOLDER, TEMPLATE_KEY = "additional_chat_templates", "chat_template"

MAX_TEMPLATE_BYTES = 2**20

# Joins the parts of a message like the chat template of deepseek-community/Janus-Pro-1B.
_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] != 'system' -%}
{{ ('USER' if message['role'] == 'user' else 'ASSISTANT') + ': ' }}
{%- endif -%}
{%- if message['content'] is string -%}{{ message['content'] | trim }}
{%- else -%}{%- set joined = namespace(text='') -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set before, after = '' if loop.first else '\\n', '' if loop.last else '\\n' -%}
{%- set joined.text = joined.text + before + '<image_placeholder>' + after -%}
{%- else -%}
{%- set before = '' if loop.first or loop.previtem['type'] == 'image' else ' ' -%}
{%- set joined.text = joined.text + before + part['text'] -%}
{%- endif -%}
{%- endfor -%}
{{ joined.text | trim }}
{%- endif -%}
{{ eos_token if message['role'] == 'assistant' else '\\n\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


def janus_template(sft_format: str) -> str:
    """Returns the chat template for `transformers` of one of the two Janus formats."""
    user, assistant = chat.JANUS_ROLES[sft_format]
    return _TEMPLATE.replace("ASSISTANT", assistant).replace("USER", user)


def _fingerprint(template: str, user: str, assistant: str) -> str:
    """Returns the SHA-256 of a template, ignoring role names and the style of line breaks."""
    text = template.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
    text = text.replace(user, "\0user").replace(assistant, "\0assistant")
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# Templates that produce the same prompts as chat.py, with either pair of role names.
FINGERPRINTS = {
    _fingerprint(janus_template("deepseek"), *chat.JANUS_ROLES["deepseek"]),
    # earlier exports of janus_jax, which joined the parts of a message differently
    "6844fc1f6ffa910fd1a5acd5487ff4cf53ebad31389cc9e43daef375a2bf554a",
    # transformers' convert_janus_weights_to_hf.py, used for deepseek-community/Janus-Pro-1B and -7B
    "f1ec022ee62347ff806af871b48535538b552c42412a4a902418d9e3fb3f7ceb",
    # an early version of it, which accepts only lower-case role names
    "5d0d21491abff71a4be90a6ecb4db71124f2152346f66cfe13e8963c50de2f8b",
}


def template_format(template: str) -> str | None:
    """Returns the `sft_format` that a chat template implements; None if it is unknown."""
    for sft_format, roles in chat.JANUS_ROLES.items():
        if _fingerprint(template, *roles) in FINGERPRINTS:
            return sft_format
    return None


def read_chat_template(folder: Path) -> tuple[Path, str] | None:
    """Reads the chat template of a folder; returns its file or folder, and its text, or None.

    The order of precedence is that of `ProcessorMixin.get_processor_dict` in transformers, followed
    by its tokenizers.

    Raises:
        ValueError: a file is invalid, or has several templates and no default.
    """
    for path, template in _stored_templates(folder):
        if template is not None:
            return path, _default_template(path, template)
    return None


def _stored_templates(folder: Path) -> Iterator[tuple[Path, Any]]:
    for path in (folder / PROCESSOR, folder / LEGACY_TEMPLATE_FILE):
        yield path, read_json_if_any(path).get(TEMPLATE_KEY)
    single, others = folder / TEMPLATE_FILE, sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
    if os.path.lexists(single):
        yield single, _read_text(single)
    elif others:
        yield folder / TEMPLATE_FOLDER, {path.stem: _read_text(path) for path in others}
    path = folder / TOKENIZER_CONFIG
    yield path, read_json_if_any(path).get(TEMPLATE_KEY)


def _read_text(path: Path) -> str:
    data = read_bounded(path, MAX_TEMPLATE_BYTES)
    with value_errors_of(path):
        return data.decode()


def _default_template(path: Path, template: Any) -> str:
    if isinstance(template, list):  # several templates in tokenizer_config.json
        entries = [entry for entry in template if isinstance(entry, dict)]
        template = {str(entry.get("name")): entry.get("template") for entry in entries}
    if isinstance(template, dict):
        if "default" not in template:
            names = shorten(sorted(map(str, template)))
            raise ValueError(f"{path}: expected a template named 'default', got {names}")
        template = template["default"]
    if not isinstance(template, str):
        raise ValueError(f"{path}: a chat template must be a string, got {shorten(template)}")
    return template


@dataclasses.dataclass(frozen=True)
class PromptSettings:
    """The prompt settings of a checkpoint folder.

    Attributes:
        sft_format: name of the prompt template (see chat.py).
        system_prompt: default system prompt of conversations.
        image_tag: the placeholder, a string that stands for one image in a conversation.
    """

    sft_format: str
    system_prompt: str
    image_tag: str

    @classmethod
    def from_dir(cls, folder: str | Path) -> "PromptSettings":
        """Reads the settings from the processor files, in DeepSeek's or transformers' layout.

        * `sft_format` is the value in processor_config.json, or the format of the folder's chat
          template. If both are missing, it is "deepseek" in DeepSeek's layout, the default of
          `VLChatProcessor`.
        * `system_prompt` is the value of "system_prompt", a key that only janus_jax writes, or
          follows `use_default_system_prompt`. If both are missing, it is the default of the
          processor class: DeepSeek's text in DeepSeek's layout, and empty in transformers' layout.

        Raises:
            ValueError: a file is invalid; the template is unknown or, in transformers' layout,
                missing; or two settings contradict each other.
        """
        folder = Path(folder)
        path = folder / PROCESSOR
        config = read_json_if_any(path)
        image_tag = config.get("image_tag", IMAGE)
        if not _is_text(image_tag):
            raise ValueError(f"{path}: image_tag must be a string, got {shorten(image_tag)}")
        return cls(_sft_format(folder, config), _system_prompt(folder, config), image_tag)


def _is_text(value: Any) -> bool:
    """Returns whether a value is a string without lone surrogates, which UTF-8 cannot encode."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _sft_format(folder: Path, processor: dict[str, Any]) -> str:
    path = folder / PROCESSOR
    if "sft_format" in processor:
        with value_errors_of(path):
            chat.check_sft_format(processor["sft_format"])
    sft_format, template = processor.get("sft_format"), read_chat_template(folder)
    if template is None:
        if not sft_format and _is_transformers(folder, processor):  # transformers raises, too
            files = f"{TEMPLATE_FILE}, {LEGACY_TEMPLATE_FILE}, {PROCESSOR} or {TOKENIZER_CONFIG}"
            raise ValueError(f"{folder} has no chat template in {files}; {_advice(path)}")
        return sft_format or "deepseek"
    where, text = template
    recognized = template_format(text)
    if not (sft_format or recognized):
        raise ValueError(f"{where}: unknown chat template; {_advice(path)}")
    if sft_format and recognized and sft_format != recognized:
        raise ValueError(
            f"{path} has sft_format {sft_format!r}, but {where} has the chat template of "
            f"{recognized!r}; remove the wrong one"
        )
    return sft_format or recognized


def _advice(path: Path) -> str:
    choices = [f"{name!r} ({', '.join(roles)})" for name, roles in chat.JANUS_ROLES.items()]
    choices = " or ".join(choices)
    return f"set sft_format in {path} to the format the model was trained with: {choices}"


def _system_prompt(folder: Path, processor: dict[str, Any]) -> str:
    path, use_default = folder / PROCESSOR, processor.get("use_default_system_prompt")
    if use_default not in (None, True, False):
        raise ValueError(
            f"{path}: use_default_system_prompt must be true or false, got {shorten(use_default)}"
        )
    if "system_prompt" not in processor:
        if use_default is None:
            use_default = not _is_transformers(folder, processor)
        return chat.DEFAULT_SYSTEM_PROMPT if use_default else ""
    prompt = processor["system_prompt"]
    if not _is_text(prompt):
        raise ValueError(f"{path}: system_prompt must be a string, got {shorten(prompt)}")
    is_default = prompt == chat.DEFAULT_SYSTEM_PROMPT
    if (use_default and not is_default) or (use_default is False and is_default):
        raise ValueError(
            f"{path}: use_default_system_prompt is {str(use_default).lower()}, but system_prompt "
            f"is {shorten(prompt)}; remove the wrong one"
        )
    return prompt


def _is_transformers(folder: Path, processor: dict[str, Any]) -> bool:
    """Returns whether the processor files name processor classes of transformers."""
    nested = processor.get("image_processor")
    preprocessor = read_json_if_any(folder / PREPROCESSOR)
    for config in (processor, preprocessor, nested if isinstance(nested, dict) else {}):
        for key in ("processor_class", "image_processor_type"):
            if isinstance(name := config.get(key), str):
                return name.startswith("Janus")
    return read_json_if_any(folder / "config.json").get("model_type") == "janus"
