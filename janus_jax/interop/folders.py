"""Whether a path is a checkpoint folder; if not, what to give in its place."""

import difflib
import os
from pathlib import Path

from janus_jax.checks import shorten_text
from janus_jax.interop.adapter_config import check_no_adapter
from janus_jax.interop.files import CONFIG
from janus_jax.interop.quantised import GGUF
from janus_jax.interop.readers import WEIGHT_SUFFIXES

FILES = (
    f"{CONFIG}, tokenizer.json, tokenizer_config.json, processor_config.json and "
    "preprocessor_config.json beside model.safetensors or pytorch_model.bin (or shards with an "
    "index)"
)
KNOWN = ("deepseek-ai/Janus-Pro-1B", "deepseek-ai/Janus-Pro-7B", "deepseek-ai/Janus-1.3B")
SHIPPED = "janus_tiny"
SHIPPED_FOLDER = Path(__file__).parents[1] / "assets" / SHIPPED
_CLOSE = 0.8  # of difflib's ratio, in which 1 is the same


def check_folder(path: Path | str, fetches: bool = False) -> Path:
    """The folder, if it is one with a config.json.

    The name janus_tiny is the shipped model, unless there is a file or folder of that name.

    fetches: whether the caller takes ids of the Hugging Face hub in place of a folder.

    Raises:
      FileNotFoundError: it is none; the message says what is missing and what to give.
      ValueError: it is a LoRA adapter.
    """
    path = Path(path)
    if str(path) == SHIPPED and not os.path.lexists(path):
        return SHIPPED_FOLDER
    shown = shorten_text(str(path))
    if path.suffix.lower() == ".gguf" and not os.path.isdir(path):
        raise FileNotFoundError(f"{shown} is not a folder; {GGUF}, which needs {FILES}")
    if os.path.isfile(path):  # Path.is_file raises if the name is too long
        kind = "a weights file" if path.suffix.lower() in WEIGHT_SUFFIXES else "a file"
        folder = path.absolute().parent
        raise FileNotFoundError(
            f"{shown} is {kind}, not a folder; give the folder ({folder}), which needs {FILES}"
        )
    if not os.path.isdir(path):
        raise FileNotFoundError(f"{shown} is not a folder{suggestion(str(path), fetches)}")
    check_no_adapter(path)
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(f"{shown} holds no {CONFIG}{_inside(path)}")
    return path


def suggestion(name: str, fetches: bool) -> str:
    """'; did you mean ...' for a name like that of a released model, or ''."""
    last = Path(name).name.lower().replace("_", "-").replace(" ", "-")
    if last == SHIPPED.replace("_", "-"):
        return f"; did you mean {SHIPPED}, the model that ships with janus_jax?"
    if "janusflow" in last:
        return "; JanusFlow is not supported"
    ids = {known.split("/")[1].lower(): known for known in KNOWN}
    close = [each for each in ids if each.startswith(last) and last.startswith("janus")]
    close = close or difflib.get_close_matches(last, ids, 1, _CLOSE)
    found = [ids[each] for each in close if not fetches or ids[each] != name]
    if not found:
        return ""
    means = f"; did you mean {' or '.join(found)}?"
    download = f" Download it first: hf download {found[0]} --local-dir DIR"
    return means + ("" if fetches else download)


def _inside(folder: Path) -> str:
    """What is known of a folder without a config.json."""
    if any(folder.glob("*.gguf")):
        return f"; {GGUF}"
    if snapshots := sorted(folder.glob(f"snapshots/*/{CONFIG}")):
        return f"; give the folder in its hub cache: {snapshots[-1].parent}"
    if (folder / "model" / CONFIG).is_file():
        return f"; give {folder / 'model'}"
    return f"; a checkpoint folder needs {FILES}"
