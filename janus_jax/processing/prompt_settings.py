"""How a checkpoint folder wants its prompts written: template, system prompt, placeholder.

DeepSeek's processor_config.json names its template in `sft_format`. `transformers` stores the
template itself, a Jinja text, in one of several places. A folder's template is recognised by its
text and never executed: the folder may come from anywhere.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from janus_jax.checks import shorten
from janus_jax.paths import read_bounded, value_errors_of
from janus_jax.processing import chat
from janus_jax.processing.json_files import read_json_if_any
from janus_jax.processing.tokenizer import IMAGE, PROCESSOR, TOKENIZER_CONFIG

PREPROCESSOR = "preprocessor_config.json"
TEMPLATE_FILE, LEGACY_TEMPLATE_FILE = "chat_template.jinja", "chat_template.json"
TEMPLATE_FOLDER, TEMPLATE_KEY = "additional_chat_templates", "chat_template"

MAX_TEMPLATE_BYTES = 2**20

# Parts of a message are joined as by the chat template of deepseek-community/Janus-Pro-1B.
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
    """The chat template that writes prompts of one of the two Janus formats in `transformers`."""
    user, assistant = chat.JANUS_ROLES[sft_format]
    return _TEMPLATE.replace("ASSISTANT", assistant).replace("USER", user)


def _fingerprint(template: str, user: str, assistant: str) -> str:
    """SHA-256 of a template without its roles and without what Jinja does not read."""
    text = template.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
    text = text.replace(user, "\0user").replace(assistant, "\0assistant")
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# Templates whose prompts are those of chat.py, whichever of the two pairs of roles they have.
FINGERPRINTS = {
    _fingerprint(janus_template("deepseek"), *chat.JANUS_ROLES["deepseek"]),
    # earlier exports, which joined the parts of a message otherwise
    "6844fc1f6ffa910fd1a5acd5487ff4cf53ebad31389cc9e43daef375a2bf554a",
    # transformers' convert_janus_weights_to_hf.py, and so deepseek-community/Janus-Pro-1B and -7B
    "f1ec022ee62347ff806af871b48535538b552c42412a4a902418d9e3fb3f7ceb",
    # a draft of it, which reads only lower-case names of roles
    "5d0d21491abff71a4be90a6ecb4db71124f2152346f66cfe13e8963c50de2f8b",
}


def template_format(template: str) -> str | None:
    """The `sft_format` whose prompts a chat template writes; None if it is not a known one."""
    for sft_format, roles in chat.JANUS_ROLES.items():
        if _fingerprint(template, *roles) in FINGERPRINTS:
            return sft_format
    return None


def stated_template(folder: Path) -> tuple[Path, str] | None:
    """A folder's chat template, and the file or folder that holds it; None if there is none.

    Source: the precedence of `ProcessorMixin.get_processor_dict` in transformers, then that of its
    tokenizers.

    Raises:
        ValueError: a file is broken, or holds several templates and no default.
    """
    for path, stated in _stored_templates(folder):
        if stated is not None:
            return path, _default_template(path, stated)
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


def _default_template(path: Path, stated: Any) -> str:
    if isinstance(stated, list):  # as tokenizer_config.json holds several
        named = [entry for entry in stated if isinstance(entry, dict)]
        stated = {str(entry.get("name")): entry.get("template") for entry in named}
    if isinstance(stated, dict):
        if "default" not in stated:
            names = shorten(sorted(map(str, stated)))
            raise ValueError(f"{path}: expected a template named 'default', got {names}")
        stated = stated["default"]
    if not isinstance(stated, str):
        raise ValueError(f"{path}: a chat template must be a text, got {shorten(stated)}")
    return stated


@dataclasses.dataclass(frozen=True)
class PromptSettings:
    """What a folder's files say of prompts.

    Attributes:
        sft_format: name of the template (see chat.py).
        system_prompt: put before a conversation that brings none.
        image_tag: the text that stands for one image in a conversation.
    """

    sft_format: str
    system_prompt: str
    image_tag: str

    @classmethod
    def from_dir(cls, folder: str | Path) -> "PromptSettings":
        """From the processor's files, in DeepSeek's or transformers' layout.

        `sft_format` is the stated one, or that of the folder's chat template. Without both it is
        "deepseek" in DeepSeek's layout, the default of `VLChatProcessor`. The system prompt is the
        stated one (a key of ours, "system_prompt"), or follows `use_default_system_prompt`; without
        either it is the default of the processor class: DeepSeek's text in DeepSeek's layout, none
        in transformers'.

        Raises:
            ValueError: a file is broken, the template is unknown or, in transformers' layout,
                missing, or two statements disagree.
        """
        folder = Path(folder)
        path = folder / PROCESSOR
        config = read_json_if_any(path)
        image_tag = config.get("image_tag", IMAGE)
        if not _is_text(image_tag):
            raise ValueError(f"{path}: image_tag must be a text, got {shorten(image_tag)}")
        return cls(_sft_format(folder, config), _system_prompt(folder, config), image_tag)


def _is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can hold: JSON can also hold lone surrogates."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _sft_format(folder: Path, processor: dict[str, Any]) -> str:
    path = folder / PROCESSOR
    if "sft_format" in processor:
        with value_errors_of(path):
            chat.check_sft_format(processor["sft_format"])
    stated, template = processor.get("sft_format"), stated_template(folder)
    if template is None:
        if not stated and _is_transformers(folder, processor):  # where transformers raises, too
            files = f"{TEMPLATE_FILE}, {LEGACY_TEMPLATE_FILE}, {PROCESSOR} or {TOKENIZER_CONFIG}"
            raise ValueError(f"{folder} has no chat template in {files}; {_advice(path)}")
        return stated or "deepseek"
    where, text = template
    known = template_format(text)
    if not (stated or known):
        raise ValueError(f"{where}: unknown chat template; {_advice(path)}")
    if stated and known and stated != known:
        raise ValueError(
            f"{path} has sft_format {stated!r}, but the chat template of {known!r} is in {where}: "
            "remove the wrong one"
        )
    return stated or known


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
        raise ValueError(f"{path}: system_prompt must be a text, got {shorten(prompt)}")
    is_default = prompt == chat.DEFAULT_SYSTEM_PROMPT
    if (use_default and not is_default) or (use_default is False and is_default):
        raise ValueError(
            f"{path}: use_default_system_prompt is {str(use_default).lower()}, but system_prompt "
            f"is {shorten(prompt)}: remove the wrong one"
        )
    return prompt


def _is_transformers(folder: Path, processor: dict[str, Any]) -> bool:
    """Whether the processor's files are for transformers' classes, by the names of the classes."""
    nested = processor.get("image_processor")
    preprocessor = read_json_if_any(folder / PREPROCESSOR)
    for config in (processor, preprocessor, nested if isinstance(nested, dict) else {}):
        for key in ("processor_class", "image_processor_type"):
            if isinstance(name := config.get(key), str):
                return name.startswith("Janus")
    return read_json_if_any(folder / "config.json").get("model_type") == "janus"
