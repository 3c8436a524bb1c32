"""Checkpoints of fewer layers, which are compiled sooner."""

import json
import re
import shutil
from pathlib import Path

from safetensors.numpy import load_file, save_file


def cut(source: Path, target: Path) -> Path:
    """A copy, in DeepSeek's layout, of which the first layer of either tower is left."""
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    config["language_config"]["num_hidden_layers"] = 1
    config["vision_config"]["params"]["layers"] = 1
    (target / "config.json").write_text(json.dumps(config))
    later = re.compile(r".*\.(model\.layers|vision_tower\.blocks)\.[1-9]\d*\.")
    weights = load_file(source / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not later.match(name)}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target
