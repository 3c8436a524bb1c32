"""A run resumes from its folder, or stops with a one-line error that names a damaged file."""

import json
import random
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from stage_configs import small_config, train_stage

from janus_jax.training.parameters import Parameters
from janus_jax.training.program import Program
from janus_jax.training.run import Loop

pytestmark = pytest.mark.usefixtures("quick_compiles")

SETTINGS = dict(trained=r"gen_head\.", steps=4, save_every=1, keep=2)


def tree(folder: Path) -> list[Path]:
    """Returns the files in a folder without libraries.log, which earlier tests may still write."""
    return sorted(path for path in folder.rglob("*") if path.name != "libraries.log")


def data_file(checkpoint: Path) -> Path:
    """Returns the file of a checkpoint with the arrays."""
    files = (checkpoint / "state").rglob("d/*")
    return max(files, key=lambda path: path.stat().st_size)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished run with the checkpoints of steps 3 and 4."""
    output = tmp_path_factory.mktemp("run")
    train_stage(small_config(output, **SETTINGS))
    skipped = dict(source="text", record="a:1", reason="malformed", detail="")
    (output / "skipped-000.jsonl").write_text(json.dumps(skipped) + "\n")
    return output


@pytest.fixture
def output(whole, tmp_path) -> Path:
    """A copy of the finished run without the model."""
    copy = tmp_path / "run"
    shutil.copytree(whole, copy, ignore=shutil.ignore_patterns("model"))
    return copy


@pytest.fixture
def resumed(monkeypatch):
    """A function that resumes the run in a folder without training a step.

    It returns the step, the arrays of the state, the state of the rows and the lines of
    metrics.jsonl.
    """
    programs, found = {}, []

    def run(loop, state, rows, *_):
        found.append((state, rows.get_state()))
        return state

    def resume(output: Path) -> tuple:
        train_stage(small_config(output, **SETTINGS | dict(steps=9)))
        state, rows = found.pop()
        arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
        return int(state.step), arrays, rows, (output / "metrics.jsonl").read_text()

    def program_of(settings, *options):
        if settings.trained not in programs:
            programs[settings.trained] = made(settings, *options)
        return programs[settings.trained]

    made = Program.from_settings
    monkeypatch.setattr(Program, "from_settings", program_of)
    monkeypatch.setattr(Program, "step", None)
    monkeypatch.setattr(Parameters, "load_frozen", lambda parameters: {})
    monkeypatch.setattr(Loop, "run", run)
    return resume


def assert_same(found: tuple, expected: tuple) -> None:
    assert found[0] == expected[0] and found[2:] == expected[2:]
    for one, other in zip(found[1], expected[1], strict=True):
        np.testing.assert_array_equal(one, other)


def halved(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "empty": lambda newest: (shutil.rmtree(newest), newest.mkdir()),
    r"\bstate .*missing": lambda newest: shutil.rmtree(newest / "state"),
    "manifest.ocdbt .*missing": lambda newest: (newest / "state/manifest.ocdbt").unlink(),
    "data/metadata .*changed": lambda newest: halved(newest / "data/metadata"),
    "/d/": lambda newest: halved(data_file(newest)),
    "state/.*changed": lambda newest: flipped(data_file(newest)),
    "SHA256SUMS .*complete": lambda newest: halved(newest / "SHA256SUMS"),
}


def test_a_damaged_checkpoint_is_passed_over(output, resumed, caplog):
    """The checkpoint is renamed, so that its step can be saved again."""
    expected = resumed(output)
    checkpoints = output / "checkpoints"
    shutil.copytree(checkpoints, output / "copy")
    shutil.rmtree(checkpoints / "4")
    at_3 = resumed(output)
    assert (expected[0], at_3[0]) == (4, 3)
    for number, (reason, damage) in enumerate(DAMAGE.items(), 1):
        shutil.copytree(output / "copy" / "4", checkpoints / "4")
        damage(checkpoints / "4")
        files = sorted(path.name for path in (checkpoints / "4").rglob("*"))
        caplog.clear()
        assert_same(resumed(output), at_3)
        (text,) = [line.getMessage() for line in caplog.records if line.levelname == "WARNING"]
        name = "4.damaged" + (str(number) if number > 1 else "")
        assert re.search(f"{checkpoints / '4'} .*damaged: .*{reason}", text), text
        assert re.search(rf"\b{name}\b.*\bstep 3$", text), text
        assert sorted(path.name for path in (checkpoints / name).rglob("*")) == files
    assert resumed(output)[0] == 3  # without a warning


def test_a_run_with_a_damaged_checkpoint_ends_with_the_same_weights(whole, output):
    halved(data_file(output / "checkpoints" / "4"))
    train_stage(small_config(output, **SETTINGS))
    model = Path("model") / "model.safetensors"
    assert (output / model).read_bytes() == (whole / model).read_bytes()
    names = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert names == ["3", "4", "4.damaged"]  # `keep` is 2 and does not count 4.damaged


def test_a_checkpoint_without_sums_is_judged_by_reading_it(output, resumed, caplog):
    newest = output / "checkpoints" / "4"
    (newest / "SHA256SUMS").unlink()
    assert resumed(output)[0] == 4
    halved(data_file(newest))
    assert resumed(output)[0] == 3
    assert "renamed it to 4.damaged, resuming from step 3" in caplog.text


def test_all_checkpoints_are_damaged(output, resumed):
    halved(data_file(output / "checkpoints" / "3"))
    shutil.rmtree(output / "checkpoints" / "4" / "state")
    before = tree(output)
    message = rf"{output}/checkpoints.* 4 \(state.*missing\), 3 \(state/"
    with pytest.raises(ValueError, match=message):
        resumed(output)
    assert tree(output) == before


RANDOM = random.Random(0)
MUTATIONS = {
    "halved": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "list": lambda data: b"[]\n",
    "text": lambda data: b'"x"\n',
    "object": lambda data: b"{}\n",
    "null": lambda data: b"null\n",
    "deep": lambda data: b"[" * 100_000 + b"\n",
    "numbers": lambda data: json.dumps({"step": 1.5, "init": 3, "settings": []}).encode() + b"\n",
    "random": lambda data: RANDOM.randbytes(len(data)),
    "flipped": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:] if data[8:] else b"\0",
}


def outcome(resumed, output: Path, path: Path) -> tuple | str:
    """Returns what was resumed, or the error message, which must name the file."""
    try:
        return resumed(output)
    except (ValueError, OSError) as error:
        message = str(error)
        assert str(output) in message and path.name in message, message
        assert len(message) < 600 and "\n" not in message, message
        return message


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "skipped-000.jsonl"])
def test_a_file_with_other_content_is_resumed_from_or_named(name, output, resumed, capfd):
    expected, path = resumed(output), output / name
    data = path.read_bytes()
    refused = set()
    for mutation in ("halved", "list", "deep", "numbers", "random"):
        path.write_bytes(MUTATIONS[mutation](data))
        found = outcome(resumed, output, path)
        path.write_bytes(data)
        if isinstance(found, str):
            refused.add(mutation)
        elif name != "metrics.jsonl":
            assert_same(found, expected)
        else:
            assert_same(found[:3], expected[:3])
    assert refused >= {"list", "deep", "numbers", "random"}
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_every_file_of_a_run_folder(output, resumed, capfd, tmp_path):
    """Tests ten mutations of each of 40 files; each takes at most a second."""
    expected, good = {4: resumed(output)}, tmp_path / "good"
    shutil.copytree(output, good)
    shutil.rmtree(output / "checkpoints" / "4")
    expected[3] = resumed(output)
    names = [path.relative_to(good) for path in sorted(good.rglob("*")) if path.is_file()]
    for name in names:
        for change in MUTATIONS.values():
            shutil.rmtree(output)
            shutil.copytree(good, output)
            data = (good / name).read_bytes()
            (output / name).write_bytes(change(data))
            found = outcome(resumed, output, output / name)
            if not isinstance(found, str):
                assert_same(found[:3], expected[found[0]][:3])
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("text", ["[]", "{"])
def test_notes_of_orbax_that_it_cannot_read_are_set_aside(text, output, resumed, caplog):
    expected = resumed(output)
    for step in ("3", "4"):
        (output / "checkpoints" / step / "_CHECKPOINT_METADATA").write_text(text)
    assert_same(resumed(output), expected)
    assert caplog.text.count("_CHECKPOINT_METADATA") == caplog.text.count("renamed the file") == 2


def test_warnings_of_libraries_go_to_a_file(output, resumed, capfd):
    (output / "checkpoints" / "4" / "SHA256SUMS").unlink()
    (output / "checkpoints" / "4" / "_CHECKPOINT_METADATA").unlink()
    assert resumed(output)[0] == 4
    assert "_CHECKPOINT_METADATA" in (output / "libraries.log").read_text()
    assert "orbax" not in capfd.readouterr().err
