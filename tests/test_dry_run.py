"""--dry_run: what is printed and written before anything is trained."""

import re

import numpy as np
from PIL import Image
from stage_configs import small_config

from janus_jax.training.dry_run import dry_run
from janus_jax.training.setup import Setup


def test_a_dry_run_tells_what_the_run_would_do_and_trains_nothing(tmp_path):
    config = small_config(tmp_path, trained=r"gen_head\.", mesh="fsdp=2")
    lines = list(dry_run(config))
    trained, frozen = Setup.from_config(config).shapes()
    number = sum(leaf.size for leaf in trained.values())
    assert lines[0] == f"trained: {number:,} parameters (gen_head {number:,})"
    assert lines[1].startswith(f"frozen: {sum(leaf.size for leaf in frozen.values()):,} param")
    held = re.match(r"held by each device: \S+ GB \(masters (\S+), optimizer (\S+),", lines[2])
    masters, optimizer = map(float, held.groups())
    assert abs(optimizer - 2 * masters) < 0.0015
    assert re.match(r"a step takes 0\.\d{3} GB more on each", lines[3])
    assert lines[4].startswith("first step: 2 rows on this host, ")
    assert [path.name for path in tmp_path.iterdir()] == ["dry_run"]
    text = (tmp_path / "dry_run" / "row-0" / "examples.txt").read_text()
    assert "[[<drawn>]]" in text + (tmp_path / "dry_run" / "row-1" / "examples.txt").read_text()
    assert re.search(r"<seen>.*<\|Assistant\|>:\[\[ .*<｜end▁of▁sentence｜>\]\]", text, re.DOTALL)
    pictures = sorted(path.name for path in (tmp_path / "dry_run" / "row-0").glob("*.png"))
    assert "seen-0.png" in pictures
    picture = np.asarray(Image.open(tmp_path / "dry_run" / "row-0" / "seen-0.png"))
    assert picture.shape == (64, 64, 3) and len(np.unique(picture)) > 2
