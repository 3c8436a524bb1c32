"""Writes the golden checkpoint in all common forms, see tests/golden/README.md.

Written with torch, safetensors and the recorded key map, not with the code under test.
"""

import json
import os
import shutil
from pathlib import Path

import safetensors.torch
import torch

TEXT = {"attention_bias": False, "head_dim": 12, "hidden_act": "silu", "mlp_bias": False}
ROPE = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
TRANSFORMERS_CONFIG = {
    "architectures": ["JanusForConditionalGeneration"],
    "dtype": "bfloat16",
    "image_token_id": 387,
    "model_type": "janus",
    "tie_word_embeddings": False,
    "text_config": TEXT
    | ROPE
    | {
        "hidden_size": 48,
        "intermediate_size": 112,
        "max_position_embeddings": 512,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "vocab_size": 448,
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 24,
        "image_size": 64,
        "mlp_ratio": 4,
        "model_type": "janus_vision_model",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_image_tokens": 16,
        "patch_size": 16,
        "projection_dim": 48,
    },
    "vq_config": {
        "base_channels": 32,
        "channel_multiplier": [2, 1, 1, 1, 1],
        "embed_dim": 8,
        "image_token_embed_dim": 48,
        "latent_channels": 16,
        "model_type": "janus_vqgan",
        "num_embeddings": 128,
        "num_hidden_layers": 2,
        "num_res_blocks": 2,
        "projection_dim": 48,
    },
}


class Trap:
    """Pickles as a call that creates a folder: if it exists, the pickle was executed."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def tensors(golden: Path) -> dict[str, torch.Tensor]:
    """The golden checkpoint's tensors in DeepSeek's layout."""
    return safetensors.torch.load_file(golden / "janus" / "model.safetensors")


def copy_small_files(golden: Path, folder: Path) -> None:
    """Config, tokenizer and processor files."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (golden / "janus").glob("*.json"):
        shutil.copyfile(path, folder / path.name)


def make_single(golden: Path, folder: Path, state: dict | None = None) -> Path:
    """One safetensors file; `state` replaces the golden tensors."""
    copy_small_files(golden, folder)
    state = tensors(golden) if state is None else state
    safetensors.torch.save_file(state, folder / "model.safetensors")
    return folder


def make_bin(golden: Path, folder: Path) -> Path:
    """One pytorch_model.bin."""
    copy_small_files(golden, folder)
    torch.save(tensors(golden), folder / "pytorch_model.bin")
    return folder


def make_sharded(golden: Path, folder: Path, kind: str = "safetensors") -> Path:
    """Two shards and an index; kind: 'safetensors' or 'bin'."""
    copy_small_files(golden, folder)
    state = tensors(golden)
    names = sorted(state)
    half, weight_map = len(names) // 2, {}
    stem = "model" if kind == "safetensors" else "pytorch_model"
    for i, part in enumerate((names[:half], names[half:]), 1):
        file = f"{stem}-{i:05d}-of-00002.{kind}"
        shard = {name: state[name] for name in part}
        if kind == "safetensors":
            safetensors.torch.save_file(shard, folder / file)
        else:
            torch.save(shard, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    return folder


def transformers_tensors(golden: Path) -> dict[str, torch.Tensor]:
    """The golden tensors with transformers' names, from the recorded key map."""
    key_map = json.loads((golden / "hf_key_map.json").read_text())
    state = {}
    for name, value in tensors(golden).items():
        targets = key_map.get(name) or []
        parts = value.chunk(3) if len(targets) == 3 else [value]
        for target, part in zip(targets, parts, strict=False):
            part = part[0] if name.endswith("pos_embed") else part
            state[target] = part.contiguous().clone()
    return state


def make_transformers(golden: Path, folder: Path) -> Path:
    """The same weights in the layout of transformers' JanusForConditionalGeneration."""
    copy_small_files(golden, folder)
    (folder / "config.json").write_text(json.dumps(TRANSFORMERS_CONFIG))
    safetensors.torch.save_file(transformers_tensors(golden), folder / "model.safetensors")
    return folder
