"""Conversations -> prompt strings, in the templates the checkpoints were trained with.

A message is a dict {"role": ..., "content": a text or a list of parts}, and may carry "images" (see
messages.py).
Source: `conversation.py` and `apply_sft_template_for_multi_turn_prompts` of the original code.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from janus_jax.checks import shorten
from janus_jax.processing import messages as forms
from janus_jax.processing.tokenizer import EOS, IMAGE

DEFAULT_SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)

Message = dict[str, Any]
Turns = list[tuple[str, str]]  # (role text, stripped content)

# sft_format -> what the roles "user" and "assistant" are called in its prompts. Released
# checkpoints state one of these two.
JANUS_ROLES = {
    "deepseek": ("<|User|>", "<|Assistant|>"),
    "deepseek_old": ("User", "Assistant"),
}
_ROLES = {
    **JANUS_ROLES,
    "llama-2": ("[INST]", "[/INST]"),
    "llava_llama2": ("[INST]", "[/INST]"),
    "plain": ("", ""),
    "alignment": ("", ""),
}
_GENERIC = ("user", "assistant")


def _deepseek(turns: Turns, system_prompt: str) -> str:
    prompt = f"{system_prompt}\n\n" if system_prompt else ""
    for i, (role, content) in enumerate(turns):
        # The separator follows the place in the conversation, not the role.
        separator = EOS if i % 2 else "\n\n"
        prompt += f"{role}: {content}{separator}" if content else f"{role}:"
    return prompt


def _llama2(turns: Turns, system_prompt: str) -> str:
    system = f"<<SYS>>\n{system_prompt}\n<</SYS>>\n\n" if system_prompt else ""
    prompt = f"[INST] {system}"
    for i, (_, content) in enumerate(turns):
        tag = "[/INST]" if i % 2 else "[INST]"
        separator = " </s><s>" if i % 2 else " "
        if not content:
            prompt += tag
        else:
            prompt += content + separator if i == 0 else f"{tag} {content}{separator}"
    return prompt


def _plain(turns: Turns, system_prompt: str) -> str:
    return "".join(content for _, content in turns)


def _alignment(turns: Turns, system_prompt: str) -> str:
    """Captioning: whatever the user says stands for the image."""
    return "".join(
        (content if i % 2 else "<image>\n") for i, (_, content) in enumerate(turns) if content
    )


_RENDER: dict[str, Callable[[Turns, str], str]] = {
    "deepseek": _deepseek,
    "deepseek_old": _deepseek,
    "llama-2": _llama2,
    "llava_llama2": _llama2,
    "plain": _plain,
    "alignment": _alignment,
}


def check_sft_format(sft_format: str) -> None:
    """Raises ValueError unless there is a template of this name."""
    if not isinstance(sft_format, str) or sft_format not in _RENDER:
        known = ", ".join(_RENDER)
        raise ValueError(f"sft_format must be one of {known}, got {shorten(sft_format)}")


def generic_role(role: Any) -> str | None:
    """ "system", "user" or "assistant", also for a role of a Janus template; None for others."""
    texts = JANUS_ROLES.values()
    names = {text: name for pair in texts for text, name in zip(pair, _GENERIC, strict=True)}
    name = names.get(role, role) if isinstance(role, str) else None
    return name if name in ("system", *_GENERIC) else None


_FIELDS = ("role", "content", "images", "image")


def _with_generic_role(message: Message, image_tag: str) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"a message must be a dict, got {type(message).__name__}")
    forms.check_fields(message, _FIELDS)
    forms.check_media(message, _FIELDS)
    content, images = forms.read_content(message, message.get("content"), image_tag)
    role = generic_role(message.get("role"))
    if role is None:
        got = shorten(message.get("role"))
        raise ValueError(f"a role must be system, user or assistant, got {got}")
    if role == "user" and not content.strip():
        raise ValueError(f"a message of the user must say something, got {shorten(content)}")
    carried = {"images": images} if images else {}
    return {"role": role, "content": content, **carried}


def generic_roles(messages: Sequence[Message], image_tag: str = IMAGE) -> list[Message]:
    """The messages with the roles "system", "user" and "assistant", ready to be answered.

    Each content becomes a text, with `image_tag` at the place of each image; a message that holds
    images has a list of them in "images".

    A role written as in either Janus template ("<|User|>", "User") is that role, so that the
    checkpoint and not the conversation decides what the prompt says: the wrong pair costs
    Janus-Pro-1B a fifth of its GenEval score. A conversation that ends with the user gets an empty
    assistant turn.

    Raises:
        ValueError: no dict, an unknown role, a missing text, an unknown part, images that do not
            fit their places, or turns that do not alternate.
    """
    if not isinstance(messages, Sequence):
        kind = type(messages).__name__
        raise ValueError(f"a conversation must be a text or a list of messages, got {kind}")
    named = [_with_generic_role(message, image_tag) for message in messages]
    forms.check_indices(message["content"] for message in messages)
    turns = named[1:] if named and named[0]["role"] == "system" else named
    for i, message in enumerate(turns):
        if message["role"] != _GENERIC[i % 2]:
            raise ValueError(
                "turns must alternate, the user first: "
                f"turn {i + 1} must be of the {_GENERIC[i % 2]}, got {message['role']}"
            )
    if not turns:
        raise ValueError("a conversation must hold at least one message of the user, got none")
    return named + ([{"role": "assistant", "content": ""}] if len(turns) % 2 else [])


def is_conversation(value: Any) -> bool:
    """Whether it is one question or one list of messages, rather than a list of these."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return True
    return len(value) > 0 and isinstance(value[0], Mapping)


def check_unanswered(messages: str | Sequence[Message]) -> None:
    """Raises ValueError unless the user has said something that is not answered yet."""
    if isinstance(messages, str):
        return
    answer = generic_roles(messages)[-1]["content"].strip()
    if answer:
        got = shorten(answer)
        raise ValueError(f"a conversation to go on with must end with the user, got {got}")


def format_conversation(
    messages: Sequence[Message], sft_format: str, system_prompt: str = ""
) -> str:
    """The prompt string of a conversation, as the reference writes it.

    Args:
        messages: contents are stripped; an empty last one leaves the prompt at its `role:`. The
            roles "user" and "assistant" are written as the template's own, any other text as it
            stands. A first message of the role "system" replaces `system_prompt`.
        sft_format: the template's name, from the checkpoint's processor_config.json.
    Raises:
        ValueError: an unknown `sft_format`.
    """
    check_sft_format(sft_format)
    if messages and messages[0]["role"] == "system":
        system_prompt, messages = messages[0]["content"], messages[1:]
    names = dict(zip(_GENERIC, _ROLES[sft_format], strict=True))
    turns = [(names.get(m["role"], m["role"]), m["content"].strip()) for m in messages]
    return _RENDER[sft_format](turns, system_prompt).strip()


def question_messages(question: str, num_images: int, image_tag: str) -> list[Message]:
    """A single question as a conversation.

    Without a placeholder in the question, one for each image is put in front of it, each on its own
    line, as the reference's demo does.
    """
    asked = [{"role": "user", "content": question}]
    asked = with_placeholders(asked, [num_images], image_tag)
    return [*asked, {"role": "assistant", "content": ""}]


def with_placeholders(
    messages: Sequence[Message], num_images: Sequence[int], image_tag: str
) -> list[Message]:
    """Puts placeholders into a conversation that has none, and leaves any other as it is.

    Args:
        num_images: how many go in front of each message, each on its own line.
    """
    if any(image_tag in message["content"] for message in messages):
        return list(messages)
    return [
        {**message, "content": f"{image_tag}\n" * number + message["content"]}
        for message, number in zip(messages, num_images, strict=True)
    ]
