"""--dry_run: the printed lines and the written rows."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from stage_configs import make_program, small_config

from janus_jax.commands.dry_run import dry_run
from janus_jax.data.records import Record
from janus_jax.data.writers import write_records
from janus_jax.shapes.source import ALL_FORMATS
from janus_jax.training.program import row_shapes

pytestmark = pytest.mark.usefixtures("quick_compiles")


def files_of_a_run_before(folder: Path) -> Path:
    """Writes the files of an earlier dry run with more rows and images.

    Its list of skipped records has one that has been fixed since. Returns a file that is not from
    a dry run and must be kept.
    """
    bad = dict(source="understanding", record="x:1", reason="malformed", detail="")
    files = {"skipped-000.jsonl": json.dumps(bad) + "\n", "row-0/note.txt": "mine"}
    for name in ("row-0/input-99.png", "row-7/generated-0.png", "row-7/examples.txt"):
        files[name] = "old"
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / "row-0" / "note.txt"


def test_a_dry_run_shows_what_the_run_would_do_and_trains_nothing(tmp_path):
    config = small_config(tmp_path, trained=r"gen_head\.", mesh="fsdp=2", batch_size=4)
    del config.mixture["text"]
    kept = files_of_a_run_before(tmp_path / "dry_run" / "host-0")
    lines = list(dry_run(config, ALL_FORMATS))
    assert kept.exists() and not (tmp_path / "dry_run" / "host-0" / "row-7").exists()
    assert not any("skipped" in line for line in lines)
    parameters = make_program(config).parameters
    trained, frozen = parameters.trained, parameters.frozen
    number = sum(leaf.size for leaf in trained.values())
    assert lines[0] == f"trainable: {number:,} parameters (gen_head {number:,})"
    assert lines[1].startswith(f"frozen: {sum(leaf.size for leaf in frozen.values()):,} param")
    sizes = re.match(r"arrays on each device: \S+ GB \(params (\S+), optimizer (\S+),", lines[2])
    params, optimizer = map(float, sizes.groups())
    assert abs(optimizer - 2 * params) < 0.0015
    assert re.match(r"temporary memory of a step: 0\.\d{3} GB, as XLA plans it for cpu$", lines[3])
    assert lines[4].startswith("first batch: 4 rows on this host, ")
    assert [path.name for path in tmp_path.iterdir()] == ["dry_run"]
    folders = [tmp_path / "dry_run" / "host-0" / f"row-{row}" for row in range(4)]
    text = "".join((folder / "examples.txt").read_text() for folder in folders)
    assert "<begin_of_image>[[<generated image>]]" in text
    answer = r"<input image>.*<\|Assistant\|>:\[\[ .*<｜end▁of▁sentence｜>\]\]"
    assert re.search(answer, text, re.DOTALL)
    images = [path for folder in folders for path in sorted(folder.glob("*.png"))]
    assert {path.name.partition("-")[0] for path in images} == {"input", "generated"}
    assert len(images) == text.count("<input image>") + text.count("<generated image>")
    for path in images:
        image = np.asarray(Image.open(path))
        assert image.shape == (64, 64, 3) and len(np.unique(image)) > 2


@pytest.mark.parametrize(
    "changed",
    [
        dict(sample_every=1, questions=(("no/such.png", "What is it?"),)),
        dict(eval_every=1, eval_mixture=dict(asked=dict(format="jsonl", path="no/such.jsonl"))),
    ],
)
def test_a_dry_run_checks_prompts(tmp_path, changed):
    config = small_config(tmp_path)
    config.eval_mixture = ConfigDict(changed.pop("eval_mixture", {}))
    config.update(changed)
    with pytest.raises(FileNotFoundError, match="no/such"):
        list(dry_run(config, ALL_FORMATS))


@pytest.mark.parametrize("tokenized", [False, True])
def test_the_rows_that_are_planned_with_are_those_that_come(tmp_path, tokenized):
    config = small_config(tmp_path, tokenized=tokenized)
    if tokenized:
        record = Record("generation", text="a scene", indices=np.zeros(16, np.int32))
        write_records("jsonl", tmp_path / "records.jsonl", [record] * 9)
        config.mixture.generation = dict(format="jsonl", path=str(tmp_path / "records.jsonl"))
    program = make_program(config)
    rows, _ = program.inputs.open_rows(tmp_path)
    batch = next(iter(rows))
    assert batch.pop("records")
    shapes = row_shapes(program.inputs)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in shapes.items()
    }
