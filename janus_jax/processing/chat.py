"""Converts conversations to prompt strings, in the templates the checkpoints were trained with.

A message is a dict {"role": ..., "content": ...}. The content is a string or a list of parts, and
an optional key "images" has the images of the message (see messages.py).
Source: `conversation.py` and `apply_sft_template_for_multi_turn_prompts` of the original code.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from janus_jax.checks import shorten
from janus_jax.processing import messages as message_formats
from janus_jax.processing.tokenizer import EOS, IMAGE

DEFAULT_SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)

Message = dict[str, Any]

# sft_format -> names of the roles "user" and "assistant" in its prompts. The original code has four
# more formats (llama-2, llava_llama2, plain, alignment), which no released checkpoint uses.
JANUS_ROLES = {
    "deepseek": ("<|User|>", "<|Assistant|>"),
    "deepseek_old": ("User", "Assistant"),
}
_GENERIC = ("user", "assistant")


def check_sft_format(sft_format: str) -> None:
    """Raises ValueError if there is no template of this name."""
    if not isinstance(sft_format, str) or sft_format not in JANUS_ROLES:
        known = " or ".join(JANUS_ROLES)
        raise ValueError(f"sft_format must be {known}, got {shorten(sft_format)}")


def generic_role(role: Any) -> str | None:
    """Returns "system", "user" or "assistant" for a role of this name or of a Janus template.

    Returns None for other values.
    """
    texts = JANUS_ROLES.values()
    names = {text: name for pair in texts for text, name in zip(pair, _GENERIC, strict=True)}
    name = names.get(role, role) if isinstance(role, str) else None
    return name if name in ("system", *_GENERIC) else None


_FIELDS = ("role", "content", "images", "image")


def _with_generic_role(message: Message, image_tag: str) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"a message must be a dict, got {type(message).__name__}")
    message_formats.check_fields(message, _FIELDS)
    message_formats.check_media(message, _FIELDS)
    content, images = message_formats.read_content(message, message.get("content"), image_tag)
    role = generic_role(message.get("role"))
    if role is None:
        got = shorten(message.get("role"))
        raise ValueError(f"a role must be system, user or assistant, got {got}")
    if role == "user" and not content.strip():
        raise ValueError(f"a user message must not be empty, got {shorten(content)}")
    with_images = {"images": images} if images else {}
    return {"role": role, "content": content, **with_images}


def generic_roles(messages: Sequence[Message], image_tag: str = IMAGE) -> list[Message]:
    """Normalizes a conversation: generic roles, string contents, and an assistant message last.

    The roles become "system", "user" and "assistant". Role names of either Janus template
    ("<|User|>", "User") are mapped to these, so that the checkpoint and not the conversation
    determines the role names in the prompt: the wrong ones lower the GenEval score of Janus-Pro-1B
    by a fifth. Each content becomes a string with `image_tag` in the place of each image, and a
    message with images has them as a list in "images". If the last message is from the user, an
    empty assistant message is appended.

    Raises:
        ValueError: a message is not a dict, has an unknown role, an empty text or an unknown part,
            its images do not match its placeholders, or user and assistant do not alternate.
    """
    if not isinstance(messages, Sequence):
        got = type(messages).__name__
        raise ValueError(f"a conversation must be a string or a list of messages, got {got}")
    normalized = [_with_generic_role(message, image_tag) for message in messages]
    message_formats.check_indices(message["content"] for message in messages)
    has_system = bool(normalized) and normalized[0]["role"] == "system"
    turns = normalized[1:] if has_system else normalized
    for i, message in enumerate(turns):
        if message["role"] != _GENERIC[i % 2]:
            raise ValueError(
                "user and assistant messages must alternate, the user first: expected the role "
                f"{_GENERIC[i % 2]} for message {i + 1}, got {message['role']}"
            )
    if not turns:
        raise ValueError("a conversation must have at least one user message, got none")
    return normalized + ([{"role": "assistant", "content": ""}] if len(turns) % 2 else [])


def is_conversation(value: Any) -> bool:
    """Returns whether a value is a question or a list of messages, not a list of conversations."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return True
    return len(value) > 0 and isinstance(value[0], Mapping)


def check_unanswered(messages: str | Sequence[Message]) -> None:
    """Raises ValueError if the last message is not from the user."""
    if isinstance(messages, str):
        return
    answer = generic_roles(messages)[-1]["content"].strip()
    if answer:
        got = shorten(answer)
        raise ValueError(f"the last message must be from the user, got the answer {got}")


def format_conversation(
    messages: Sequence[Message], sft_format: str, system_prompt: str = ""
) -> str:
    """Returns the prompt string of a conversation, identical to that of the reference.

    Args:
        messages: Contents are stripped. If the last content is empty, the prompt ends with
            its `role:`. The roles "user" and "assistant" are written with the template's names,
            other role names unchanged. A first message with the role "system" replaces
            `system_prompt`.
        sft_format: name of the template, from the checkpoint's processor_config.json.
    Raises:
        ValueError: `sft_format` is unknown.
    """
    check_sft_format(sft_format)
    if messages and messages[0]["role"] == "system":
        system_prompt, messages = messages[0]["content"], messages[1:]
    names = dict(zip(_GENERIC, JANUS_ROLES[sft_format], strict=True))
    prompt = f"{system_prompt}\n\n" if system_prompt else ""
    for i, message in enumerate(messages):
        role, content = names.get(message["role"], message["role"]), message["content"].strip()
        # The separator depends on the position in the conversation, not on the role.
        separator = EOS if i % 2 else "\n\n"
        prompt += f"{role}: {content}{separator}" if content else f"{role}:"
    return prompt.strip()


def question_messages(question: str, num_images: int, image_tag: str) -> list[Message]:
    """Returns a single question as a conversation.

    If the question has no placeholder, one per image is put in front of it, each on its own line,
    as in the reference's demo.
    """
    messages = [{"role": "user", "content": question}]
    messages = with_placeholders(messages, [num_images], image_tag)
    return [*messages, {"role": "assistant", "content": ""}]


def with_placeholders(
    messages: Sequence[Message], num_images: Sequence[int], image_tag: str
) -> list[Message]:
    """Adds placeholders to a conversation that has none; returns other conversations unchanged.

    Args:
        num_images: number of placeholders to put in front of each message, each on its own line.
    """
    if any(image_tag in message["content"] for message in messages):
        return list(messages)
    return [
        {**message, "content": f"{image_tag}\n" * number + message["content"]}
        for message, number in zip(messages, num_images, strict=True)
    ]
