"""Runs the commands and the Python code of the README and of pages in docs/, on small checkpoints.

The installation commands are run by .ci/run. test_train_cli.py runs the training command of the
README with fewer steps.
"""

import configparser
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from configs import janus_tiny_stage1, janus_tiny_stage2
from janus_jax.shapes import scenes

pytestmark = pytest.mark.usefixtures("quick_compiles")  # as in the commands, see `run`

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, page: str = "README.md") -> list[str]:
    """Returns the contents of the code blocks of a language on a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(start: str) -> list[str]:
    """Returns the shell commands of the README that start with a text."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    return [line for line in lines if line.startswith(start)]


@pytest.fixture(scope="module")
def home(golden, tmp_path_factory) -> Path:
    """Returns a folder like a user's: a clone, a released checkpoint and a file of prompts."""
    home = tmp_path_factory.mktemp("clone")
    for name in ("sample.py", "train.py", "convert", "configs", "janus_jax", "docs", "README.md"):
        (home / name).symlink_to(ROOT / name)
    (home / "Janus-Pro-1B").symlink_to(golden / "janus")
    (home / "prompts.txt").write_text("a red circle\n\ntwo blue squares\n")
    return home


def run(home: Path, command: str) -> subprocess.CompletedProcess:
    """Runs a README command with this Python, without the environment variables of the tests."""
    words = shlex.split(command)
    assert words[0] == "python"
    settings = ("XLA_", "JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE", "JANUS_JAX")
    env = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
    env["XDG_CACHE_HOME"] = str(home / "cache")
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiling is most of the time
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=home, env=env, input="What shape is it?\n/quit\n",
        capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_the_readme_is_short_and_its_files_exist():
    assert len(README.splitlines()) < 200
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_command_is_known_here():
    python = ("python sample.py", "python -m convert", "python train.py")
    known = ("python3 -m venv", ". .venv/bin/activate", *python)
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    assert [line for line in lines if not line.startswith(known)] == []


def test_the_extras_exist():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    named = set(re.findall(r"\.\[(\w+)\]", README))
    assert named and named <= set(config["options.extras_require"])


@pytest.mark.parametrize("command", commands("python sample.py --"))
def test_sample(home, command):
    written = run(home, command).stdout
    if "--prompt" not in command:
        expected = "blue" if "What color" in command else written.strip()
        assert written.strip() == expected != ""
        return
    paths = [home / line for line in written.splitlines()]
    assert paths and all(path.is_file() for path in paths)
    for path in paths:
        if path.suffix == ".png":
            assert Image.open(path).text["software"] == "janus_jax"


def test_the_first_line_generates(home):
    (line,) = commands("python3 -m venv")
    paths = run(home, line.rsplit("&& ", 1)[1]).stdout.splitlines()
    assert Image.open(home / paths[0]).text["prompt"] == "a red circle left of a blue square"
    assert any((home / "cache" / "janus_jax" / "xla").iterdir())  # speeds up the next run


def test_convert(home):
    for command in commands("python -m convert"):
        assert run(home, command).stdout.strip()


def test_the_training_line_is_one_of_the_page():
    (line,) = commands("python train.py")
    assert line in blocks("bash", "docs/training.md")[0].splitlines()  # test_the_page_on_training


def test_each_config_of_janus_tiny_continues_from_one_before():
    (block,) = [b for b in blocks("bash", "docs/janus_tiny.md") if "train.py" in b]
    lines = [line for line in block.splitlines() if line.startswith("python train.py")]
    written = {""}
    for line in lines:
        name, _, before = line.removeprefix("python train.py --config=configs/").partition(":")
        module = importlib.import_module(f"configs.{name.removesuffix('.py')}")
        cfg = module.get_config(before) if before else module.get_config()
        assert cfg.init in written
        written |= {cfg.output, f"{cfg.output}/model"}
    assert len(lines) == 7 and "--model runs/janus_tiny_stage3_refined/model" in block
    assert "runs/janus_tiny_stage3_refined/model" in written
    kinds = re.search(r"for kind in (.*); do", block)[1].split()
    assert kinds == list(scenes.CAPTION_KINDS)
    assert "jsonl:data/janus_tiny/$kind" in block
    for stage in (janus_tiny_stage1, janus_tiny_stage2):
        sources = stage.get_config().mixture.generation
        assert [sources[kind].path for kind in kinds] == [f"data/janus_tiny/{k}" for k in kinds]


@pytest.mark.slow
def test_the_page_on_training(home, monkeypatch):
    """Runs the Python code, whose files the commands read, and then the commands in two threads."""
    monkeypatch.chdir(home)
    names = {"__name__": "training"}  # shared by all code blocks of the page
    for code in blocks("python", "docs/training.md"):
        exec(compile(code, "docs/training.md", "exec"), names)
    (mine,) = [code for code in blocks("python", "docs/training.md") if "get_config" in code]
    (home / "mine.py").write_text(mine)
    lines = [line for block in blocks("bash", "docs/training.md") for line in block.splitlines()]
    chains = [[line for line in lines if ("tiny_stage3" in line) is own] for own in (True, False)]
    with ThreadPoolExecutor(2) as pool:  # the two chains do not depend on each other
        list(pool.map(lambda chain: [run(home, line) for line in chain], chains))
    assert len(list((home / "data" / "stage2" / "real").glob("*.array_record"))) == 3
    runs = home / "runs"
    stages = ("try_stage1", "try_stage2", "janus_tiny_stage3")
    for name in (*stages, "finetune_lora", "finetune_full", "mine"):
        assert (runs / name / "model" / "model.safetensors").is_file()
        assert any((runs / name / "tensorboard").iterdir())
    steps = {int(folder.name) for folder in (runs / stages[2] / "checkpoints").iterdir()}
    assert steps == {20, 30}  # this run was resumed
    for name in ("finetune_lora", "finetune_full"):  # unchanged configs apart from sizes
        logged = [json.loads(line) for line in (runs / name / "metrics.jsonl").open()]
        losses = [line["loss"] for line in logged if "loss" in line]
        assert losses[-1] < losses[0] - 0.1  # after a dozen steps
    assert "eval/understanding" in (runs / "mine" / "metrics.jsonl").read_text()
    assert (home / "runs" / "for_torch" / "model.safetensors").is_file()


@pytest.mark.parametrize("page", ["README.md", "docs/sampling.md"])
def test_python(page):
    for code in blocks("python", page):
        exec(compile(code, page, "exec"), {"__name__": "readme"})
