"""Finds and checks checkpoint folders, local or on the hub; suggests what to pass instead."""

import difflib
import os
import re
from pathlib import Path

from janus_jax.checks import shorten, shorten_text
from janus_jax.families.family import ModelConfig
from janus_jax.families.registry import sizes_of
from janus_jax.interop.files import ADAPTER_CONFIG, CONFIG, ORBAX_FILES, PARAMS
from janus_jax.interop.readers import (
    GGUF_UNSUPPORTED,
    SAFETENSORS,
    TORCH_BIN,
    WEIGHT_SUFFIXES,
)
from janus_jax.paths import read_json
from janus_jax.processing.processor import Processor
from janus_jax.processing.prompt_settings import PREPROCESSOR, PROCESSOR
from janus_jax.processing.tokenizer import TOKENIZER

REQUIRED_FILES = (
    f"{CONFIG}, tokenizer.json, tokenizer_config.json, processor_config.json and "
    "preprocessor_config.json, and weights in model.safetensors or pytorch_model.bin (or shards "
    "with an index)"
)
RELEASED = ("deepseek-ai/Janus-Pro-1B", "deepseek-ai/Janus-Pro-7B", "deepseek-ai/Janus-1.3B")
BUNDLED = "janus_tiny"  # the name of the model in assets/
BUNDLED_FOLDER = Path(__file__).parents[1] / "assets" / BUNDLED
# The files of a hub repository that a checkpoint needs, in either layout.
_HUB_FILES = ("*.json", "*.jinja", "*.safetensors", "*.bin")
_MIN_SIMILARITY = 0.8  # difflib's ratio; 1 means equal


def check_folder(path: Path | str, hub_ids: bool = False) -> Path:
    """Returns the folder if it holds a config.json.

    The name janus_tiny is the model in this package, unless there is a file or folder of that name.

    hub_ids: whether the caller accepts Hugging Face hub ids as well as folders; it changes the
      suggestions in messages.

    Raises:
      FileNotFoundError: it is not a checkpoint folder; the message says what is missing and what to
        pass instead.
      ValueError: it is a LoRA adapter.
    """
    path = Path(path)
    if str(path) == BUNDLED and not os.path.lexists(path):
        return BUNDLED_FOLDER
    name = shorten_text(str(path))
    if path.suffix.lower() == ".gguf" and not os.path.isdir(path):
        raise FileNotFoundError(
            f"{name} is not a folder; {GGUF_UNSUPPORTED}, which needs {REQUIRED_FILES}"
        )
    if os.path.isfile(path):  # Path.is_file raises if the name is too long
        kind = "a weights file" if path.suffix.lower() in WEIGHT_SUFFIXES else "a file"
        folder = path.absolute().parent
        raise FileNotFoundError(
            f"{name} is {kind}, not a folder; pass the folder ({folder}), which needs "
            f"{REQUIRED_FILES}"
        )
    if not os.path.isdir(path):
        raise FileNotFoundError(f"{name} is not a folder{suggestion(str(path), hub_ids)}")
    _check_no_adapter(path)
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(f"{name} has no {CONFIG}{_describe(path)}")
    return path


def suggestion(name: str, hub_ids: bool) -> str:
    """Returns '; did you mean ...?' for a name similar to that of a released model, or ''."""
    last = Path(name).name.lower().replace("_", "-").replace(" ", "-")
    if last == BUNDLED.replace("_", "-"):
        return f"; did you mean {BUNDLED}, the model that is part of janus_jax?"
    if "janusflow" in last:
        return "; JanusFlow is not supported"
    ids = {released.split("/")[1].lower(): released for released in RELEASED}
    similar = [each for each in ids if each.startswith(last) and last.startswith("janus")]
    similar = similar or difflib.get_close_matches(last, ids, 1, _MIN_SIMILARITY)
    suggested = [ids[each] for each in similar if not hub_ids or ids[each] != name]
    if not suggested:
        return ""
    if suggested == [name]:
        return f"; to use this hub id, download it first: hf download {name} --local-dir DIR"
    question = f"; did you mean {' or '.join(suggested)}?"
    download = f" Download it first: hf download {suggested[0]} --local-dir DIR"
    return question + ("" if hub_ids else download)


def _describe(folder: Path) -> str:
    """Explains what a folder without a config.json holds, or what it needs."""
    if any(folder.glob("*.gguf")):
        return f"; {GGUF_UNSUPPORTED}"
    if snapshots := sorted(folder.glob(f"snapshots/*/{CONFIG}")):
        return f"; pass the snapshot folder in the hub cache: {snapshots[-1].parent}"
    if (folder / "model" / CONFIG).is_file():
        return f"; pass {folder / 'model'}"
    return f"; a checkpoint folder needs {REQUIRED_FILES}"


def is_orbax(folder: Path | str) -> bool:
    """Returns whether `orbax.save` wrote the folder; it may be damaged."""
    return any(os.path.lexists(Path(folder) / PARAMS / name) for name in ORBAX_FILES)


def _check_no_adapter(folder: Path) -> None:
    """Raises ValueError if a folder that is passed as a model is a LoRA adapter."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file() or ((folder / CONFIG).is_file() and _has_weights(folder)):
        return
    base = read_json(path).get("base_model_name_or_path")
    base = f" ({shorten(base)})" if base else ""
    # The path is not shortened, because it is part of a command to copy.
    raise ValueError(
        f"{folder} is a LoRA adapter ({ADAPTER_CONFIG}), not a model; use it with the model that "
        f"it was trained on{base}: --model BASE --adapter {folder}, or merge it first: "
        f"python -m convert BASE DST --adapter {folder}"
    )


def check_unmerged_adapter(folder: Path, adapter: Path | None) -> None:
    """Raises ValueError if a model folder also holds a LoRA adapter that will not be merged.

    folder: a folder with full weights. adapter: the LoRA adapter that will be merged, or None; it
      may be in `folder` itself.
    """
    path = folder / ADAPTER_CONFIG
    # lexists is also true for a link to a missing file.
    if not os.path.lexists(path) or (adapter is not None and _same(adapter, folder)):
        return
    # The path is not shortened, because it is part of a command to copy.
    raise ValueError(
        f"{path} is in a folder with full weights: pass --adapter {folder} to sample.py or python "
        "-m convert to merge this LoRA adapter, or delete the file if it is already merged"
    )


def _same(one: Path, other: Path) -> bool:
    return one.exists() and one.samefile(other)


def _has_weights(folder: Path) -> bool:
    suffixes = ("", ".index.json")
    files = [f"{name}{suffix}" for name in (SAFETENSORS, TORCH_BIN) for suffix in suffixes]
    return any((folder / name).exists() for name in (*files, PARAMS))


def find_folder(path_or_hub_id: str | Path | None) -> Path:
    """Returns the folder of a checkpoint.

    path_or_hub_id: a folder, or a hub id, whose snapshot is downloaded unless it is a local path.
        None is the model in this package. So is "janus_tiny", unless there is a file or folder of
        that name.

    Raises:
        FileNotFoundError: if there is no such folder, and the hub cannot be reached or has no such
            repository.
        ValueError: if path_or_hub_id is an empty string.
    """
    if path_or_hub_id is None:
        return BUNDLED_FOLDER
    if path_or_hub_id == "":
        raise ValueError("expected a checkpoint folder or a Hugging Face hub id, got ''")
    folder, name = Path(path_or_hub_id), str(path_or_hub_id)
    return _fetch(name) if _is_hub_id(name) else check_folder(folder, hub_ids=True)


def find_adapter(path_or_hub_id: str | Path | None) -> Path | None:
    """Returns the folder of a LoRA adapter, or None if no adapter is given.

    path_or_hub_id: a folder, or a hub id, whose snapshot is downloaded unless it is a local path.

    Raises:
        FileNotFoundError: if a hub id does not exist or the hub cannot be reached.
        ValueError: if path_or_hub_id is an empty string.
    """
    if path_or_hub_id is None:
        return None
    if path_or_hub_id == "":
        raise ValueError("adapter must be a folder or a Hugging Face hub id, got ''")
    name = str(path_or_hub_id)
    return _fetch(name) if _is_hub_id(name) else Path(path_or_hub_id)


def _is_hub_id(name: str) -> bool:
    """Returns whether a name has the form OWNER/NAME and is not a local path."""
    return not os.path.exists(name) and bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name))


def _fetch(name: str) -> Path:
    """Downloads the snapshot of a hub repository; raises FileNotFoundError if that fails."""
    import huggingface_hub  # slow to import, and used only here

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # offline, unknown, gated: the library has many classes
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise FileNotFoundError(
            f"{name} is not a local folder and cannot be downloaded from the Hugging Face hub: "
            f"{reason.rstrip('.')}" + suggestion(name, hub_ids=True)
        ) from error


def check_processor(folder: str | Path, processor: Processor, cfg: ModelConfig) -> None:
    """Raises ValueError if the processor files of a folder do not fit its model.

    Token ids must be in the vocabulary, and image size and tokens per image must be those of cfg.
    """
    folder, largest, sizes = Path(folder), processor.tokenizer.largest_id, sizes_of(cfg)
    if largest >= sizes.vocab_size:
        raise ValueError(
            f"{folder / TOKENIZER} has token ids up to {largest}, but the vocabulary size in "
            f"config.json is {sizes.vocab_size}"
        )
    size, tokens = processor.image_config.image_size, processor.num_image_tokens
    if (size, tokens) != (sizes.image_size, sizes.input_image_tokens):
        raise ValueError(
            f"{folder}: {PREPROCESSOR} and {PROCESSOR} set an image size of {size} pixels and "
            f"{tokens} tokens per image, but config.json expects {sizes.image_size} pixels and "
            f"{sizes.input_image_tokens} tokens"
        )
