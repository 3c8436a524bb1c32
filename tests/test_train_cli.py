"""train.py as people run it: what it writes, what it refuses, and what an interrupt leaves."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from one_line import assert_one_line
from safetensors.numpy import load_file
from stage_configs import train_stage
from torch_reference import golden_janus

import janus_jax
import janus_jax.training.run
from configs import (
    janus_tiny_encoder,
    janus_tiny_stage1,
    janus_tiny_stage2,
    janus_tiny_stage3,
    janus_tiny_stage3_refine,
    janus_tiny_vq,
)
from janus_jax.commands import config_flag, tokenize_images
from janus_jax.commands import train as cli
from janus_jax.generation import loading
from janus_jax.interop import files, new_folder, save
from janus_jax.models.janus import JanusConfig
from janus_jax.shapes import scenes
from janus_jax.shapes.folders import check_replaceable
from janus_jax.shapes.train_encoder import train_encoder
from janus_jax.shapes.train_vq import train_vq

ROOT = Path(__file__).parents[1]
ENCODER, LORA = (f"--config=configs/{name}.py" for name in ("janus_tiny_encoder", "finetune_lora"))
SHORT = dict(steps=2, warmup_steps=1, log_every=1, save_every=1)


def run(*flags: str, **settings) -> subprocess.CompletedProcess:
    """train.py with these flags, and --config.NAME=VALUE of each setting."""
    flags += tuple(f"--config.{name}={value}" for name, value in settings.items())
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiling is most of the time
    command = [sys.executable, "train.py", *flags]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def tree(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder; None stands for folders."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in paths}


def shallow() -> JanusConfig:
    """janus_tiny with one layer a tower and fewer shapes, which all are compiled."""
    tiny = JanusConfig.janus_tiny()
    return dataclasses.replace(
        tiny,
        und_encoder=dataclasses.replace(tiny.und_encoder, num_layers=1),
        gen_vq=dataclasses.replace(tiny.gen_vq, ch_mult=(1, 1, 1, 1, 1)),
        language_model=dataclasses.replace(tiny.language_model, num_hidden_layers=1),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, quick_compiles) -> Path:
    """A step or two of each config, one after the other; the folder that holds all results."""
    folder, sizes = tmp_path_factory.mktemp("runs"), shallow()
    cfg = janus_tiny_vq.get_config()
    cfg.update(**SHORT, crop=32, crop_batch_size=1, output=str(folder / "vq"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JanusConfig, "janus_tiny", lambda: sizes)
        train_vq(cfg)
    small = dict(batch_size=1, init=folder / "vq", output=folder / "refined")
    done = run("--config=configs/janus_tiny_vq_refine.py", **SHORT, **small)
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stderr and "codes_used" in done.stderr
    small = dict(batch_size=2, init=folder / "refined", output=folder / "encoder")
    done = run(ENCODER, **SHORT, **small)
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stderr and "image_accuracy" in done.stderr
    source, tokens = "scenes:generation/colors", f"jsonl:{folder / 'tokens'}"
    paths = ["--model", str(folder / "encoder"), "--source", source, "--output", tokens]
    tokenize_images.main([*paths, "--count", "8"])
    before = folder / "encoder"
    for name, cfg in dict(
        stage1=janus_tiny_stage1.get_config(),
        stage2=janus_tiny_stage2.get_config(),
        stage3=janus_tiny_stage3.get_config("stage2"),
        stage3_refined=janus_tiny_stage3_refine.get_config(),
    ).items():
        cfg.update(init=str(before), output=str(folder / name), mesh="data=1", batch_size=2)
        cfg.update(steps=1, warmup_steps=0, sample_every=0)
        cfg.update(learning_rate=1e-3, end_learning_rate=1e-3)  # both parts of stage 3: one program
        for kind in scenes.CAPTION_KINDS:
            cfg.mixture.generation[kind].path = str(folder / "tokens")
        train_stage(cfg)
        before = folder / name / "model"
    return folder


@pytest.mark.slow
def test_what_was_trained_loads_and_generates(trained):
    names = ["encoder", "refined", "stage1", "stage2", "stage3", "stage3_refined"]
    assert sorted(path.name for path in trained.iterdir()) == [*names, "tokens", "vq"]
    pipeline = janus_jax.load(trained / "stage3_refined" / "model", dtype="float32")
    drawn = pipeline.generate_images("a red circle left of a blue square", temperature=0)
    assert (drawn.pixels.shape, drawn.indices.shape) == ((1, 96, 96, 3), (1, 36))
    assert drawn.pixels.std() > 0


@pytest.mark.parametrize(
    ("before", "after", "parts"),
    [
        ("encoder", "stage1/model", ["aligner", "gen_aligner", "gen_embed", "gen_head"]),
        (
            "stage1/model",
            "stage2/model",
            ["aligner", "gen_aligner", "gen_embed", "gen_head", "language_model"],
        ),
        (
            "stage2/model",
            "stage3/model",
            ["aligner", "gen_aligner", "gen_embed", "gen_head", "language_model", "vision_model"],
        ),
    ],
)
@pytest.mark.slow
def test_a_stage_trains_its_parts(trained, before, after, parts):
    before, after = (load_file(trained / name / "model.safetensors") for name in (before, after))
    changed = {name for name, value in before.items() if not np.array_equal(value, after[name])}
    assert sorted({name.split(".")[0] for name in changed}) == parts


@pytest.mark.slow
def test_the_vq_is_trained_on_alone(trained):
    names = ("vq", "refined")
    before, after = (load_file(trained / name / "model.safetensors") for name in names)
    changed = {name for name, value in before.items() if not np.array_equal(value, after[name])}
    assert changed and all(name.startswith("gen_vision_model.") for name in changed)


@pytest.mark.slow
def test_the_encoder_is_trained_alone(trained):
    names = ("refined", "encoder")
    before, after = (load_file(trained / name / "model.safetensors") for name in names)
    changed = {name for name, value in before.items() if not np.array_equal(value, after[name])}
    assert changed and all(name.startswith("vision_model.") for name in changed)


@pytest.mark.slow
def test_a_run_may_replace_an_earlier_one(trained):
    small = [path.name for path in files.small_files(trained / "vq")]
    check_replaceable(str(trained / "vq"), shallow(), small)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([ENCODER, "--config.stepz=3"], ("stepz", '"steps"')),
        ([ENCODER, "--config.steps=many"], ("--config.steps=many",)),
        ([LORA, "--config.mixture.more.path=x"], ("'more'",)),
        (["--config=configs/none.py", "--config.steps=3"], ("configs/none.py",)),
        (["--config", "finetune"], ("finetune", "finetune_full, finetune_lora, janus_1_3b_stage1")),
        ([ENCODER, "now"], ("flags", "['now']")),
        (["--dry-run"], ("--dry-run", "--dry_run?")),
        ([ENCODER, "--flagfile=x"], ("flag", "--flagfile")),
        ([ENCODER, "--config.init=/none"], ("init", "/none")),
        ([], ("--config", "--help")),
        (["--config=configs/janus_tiny_stage3.py:stage9"], ("stage2", "'stage9'")),
        (["--config=janus_tiny_stage3:stage9"], ("stage2", "'stage9'")),
        (["--config=README.md"], ("Python", "config file")),
    ],
)
def test_wrong_flags_take_one_line(flags, words, capsys, monkeypatch):
    monkeypatch.setattr(loading, "enable_compile_cache", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main(flags)
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    assert_one_line(err, "train.py", *words)


def test_the_program_itself_refuses_wrong_flags():
    done = run(ENCODER, steps=0)
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, "train.py", "steps", 0)


def test_flags_take_their_values_after_an_equals_sign_or_a_space():
    for flags in (
        "--config=janus_tiny_vq --config.steps=7 --num_processes=2 --dry_run",
        "--config.steps 7 --num_processes 2 --dry_run --config janus_tiny_vq",
    ):
        args = cli.parse(flags.split())
        assert (args.config.task, args.config.steps) == ("vq", 7)
        assert (args.num_processes, args.process_id, args.dry_run) == (2, None, True)


@pytest.mark.parametrize("command", ["python train.py", "janus-train"])
def test_help_names_the_command_the_flags_and_the_configs(command, capsys):
    for flag in ("--help", "-h"):
        with pytest.raises(SystemExit) as stopped:
            cli.parse([flag], command)
        text = capsys.readouterr().out
        assert stopped.value.code == 0
        assert text.startswith(f"usage: {command} --config=CONFIG ")
        assert all(f"\n  --{flag} " in text for flag in ("dry_run", "coordinator", "config"))
        assert all(name in text for name in config_flag.config_names())
        assert "janus_jax.training" not in text


def test_a_config_is_found_by_its_name_or_as_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__"}
    assert set(config_flag.config_names()) == names
    path = config_flag.find_config("janus_tiny_stage3:stage2")
    assert path == f"{config_flag.CONFIGS / 'janus_tiny_stage3.py'}:stage2"
    assert config_flag.find_config(path) == path
    (tmp_path / "janus_tiny_vq").write_text("")  # a file goes before a name
    assert config_flag.find_config("janus_tiny_vq:a") == "janus_tiny_vq:a"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("from janus_jax.configs import nope", ("ImportError", "'nope'")),
        ("def get_config():\n    return missing", ("NameError", "'missing'", "FILE")),
        ("steps = 3", ("get_config()",)),
        ("def get_config():\n    return dict(task='stage')", ("ConfigDict", "dict")),
        ("def get_config(", ("Python", "'(' was never closed")),
    ],
)
def test_errors_in_a_config_file_take_one_line(text, words, tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # of an earlier config file
    path = tmp_path / "mine.py"
    path.write_text(text + "\n")
    with pytest.raises(SystemExit) as stopped:
        cli.parse([f"--config={path}"])
    words = [word.replace("FILE", str(path)) for word in words]
    assert stopped.value.code == 2
    assert_one_line(capsys.readouterr().err, "train.py", *words)


def assert_refused(train_one, cfg, capsys, words: str) -> None:
    """A run ends at once with one line that contains the words."""
    with pytest.raises(SystemExit) as stopped, config_flag.settings_errors():
        train_one(cfg)
    assert stopped.value.code == 2
    assert_one_line(capsys.readouterr().err, "train.py", *words.split())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(steps=50), "warmup_steps=50 steps=50"),
        (dict(steps=0), "steps 1 0"),
        (dict(save_every=0), "save_every 1 0"),
        (dict(crop_batch_size=0), "crop_batch_size 1 0"),
        (dict(seed=-1), "seed -1"),
        (dict(crop=40), "crop 16 96 40"),
        (dict(crop=112), "crop 16 96 112"),
        (dict(output="FOLDER/file"), "output folder FOLDER/file"),
        (dict(output="gs://bucket/run"), "output local gs:/"),
        (dict(output="FOLDER/file/new"), "FOLDER/file writable"),
    ],
)
def test_the_settings_of_the_vq_are_checked_first(settings, words, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    cfg = janus_tiny_vq.get_config()
    cfg.output = str(tmp_path / "new")
    if "output" in settings:
        settings = dict(output=settings["output"].replace("FOLDER", str(tmp_path)))
    cfg.update(settings)
    assert_refused(train_vq, cfg, capsys, words.replace("FOLDER", str(tmp_path)))
    assert tree(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(init="nowhere"), "init nowhere"),
        (dict(init="golden"), "init 96 64"),
        (dict(init="empty"), "empty config.json"),
        (dict(init="golden", output="golden"), "init output different"),
        (dict(batch_size=0), "batch_size 1 0"),
    ],
)
def test_the_encoder_s_settings_are_checked_first(settings, words, tmp_path, golden, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "golden").mkdir()
    shutil.copy(golden / "janus" / "config.json", tmp_path / "golden")
    before = tree(tmp_path)
    cfg = janus_tiny_encoder.get_config()
    for name, value in (dict(init="nowhere", output="new") | settings).items():
        cfg[name] = str(tmp_path / value) if name in ("init", "output") else value
    assert_refused(train_encoder, cfg, capsys, words)
    assert tree(tmp_path) == before


def test_a_folder_of_other_things_is_not_replaced(tmp_path, golden):
    cfg, names = JanusConfig.janus_tiny(), ["tokenizer.json"]
    folder = tmp_path / "mine"
    check_replaceable(str(folder), cfg, names)
    folder.mkdir()
    check_replaceable(str(folder), cfg, names)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=f"output.*{folder}.*sizes"):
        check_replaceable(str(folder), cfg, names)
    shutil.copy(golden / "janus" / "config.json", folder)
    with pytest.raises(ValueError, match=f"output.*{folder}.*sizes"):
        check_replaceable(str(folder), cfg, names)
    files.write_json(folder / "config.json", save.write_config(cfg, None, save.DEEPSEEK))
    check_replaceable(str(folder), cfg, names)
    (folder / "holiday.jpg").write_text("")
    with pytest.raises(ValueError, match=f"{folder}.*holiday.jpg"):
        check_replaceable(str(folder), cfg, names)


def test_a_device_without_memory_takes_one_line(monkeypatch, capsys):
    def train_stage(cfg, **options):
        raise RuntimeError("RESOURCE_EXHAUSTED: 99 GB")

    monkeypatch.setattr(janus_jax.training.run, "train_stage", train_stage)
    monkeypatch.setattr(loading, "enable_compile_cache", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--config=configs/janus_tiny_stage3.py"])
    message = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2
    assert_one_line(message, "train.py", "memory", "device", "batch_size")


def test_an_interrupt_takes_one_line_and_a_bug_its_traceback(capsys):
    with pytest.raises(SystemExit) as stopped, config_flag.settings_errors():
        raise KeyboardInterrupt
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "train.py: interrupted\n"
    with pytest.raises(AttributeError), config_flag.settings_errors():
        raise AttributeError("'NoneType' object has no attribute 'shape'")


@pytest.fixture
def saved(tmp_path) -> Path:
    """A saved folder, alone in its parent."""
    save.save_deepseek(tmp_path / "model", golden_janus(), lambda folder: None)
    return tmp_path


def test_an_interrupted_save_leaves_the_folder_before(saved, monkeypatch):
    before = tree(saved)
    write = save.write_safetensors

    def interrupted(folder, kinds, read):
        write(folder, dict(list(kinds.items())[:5]), read)
        raise KeyboardInterrupt

    monkeypatch.setattr(save, "write_safetensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save.save_deepseek(saved / "model", golden_janus(), lambda folder: None)
    assert tree(saved) == before and len(before) == 3


@pytest.mark.parametrize("rename", [1, 2])
def test_an_interrupt_between_the_renames_leaves_the_folder_before(rename, saved, monkeypatch):
    before, calls, real = tree(saved), [], Path.rename

    def interrupted(path, target):
        calls.append(path)
        if len(calls) == rename:
            raise KeyboardInterrupt
        return real(path, target)

    monkeypatch.setattr(new_folder, "_exchange", lambda one, other: False)  # as on macOS
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save.save_deepseek(saved / "model", golden_janus(), lambda folder: None)
    assert tree(saved) == before
