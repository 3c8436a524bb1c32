"""The wheel in a virtual environment: its commands work outside of a clone."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from one_line import assert_one_line
from PIL import Image
from safetensors.numpy import load_file

import janus_jax

ROOT = Path(__file__).parents[1]
SOURCES = ("janus_jax", "configs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def call(*command, cwd: Path) -> subprocess.CompletedProcess:
    """Runs a command that finds no clone: the only PYTHONPATH is that of conftest.py."""
    words = [str(word) for word in command]
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiling is most of the time
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Builds the wheel of a copy of the sources, and installs it into a virtual environment.

    In the copy, the symbolic link janus_jax/configs is a plain file, as pip leaves it when it
    unpacks a zip archive.
    The dependencies come from this interpreter's environment, which the new one has on its path.
    Returns the folder of the commands.
    """
    home = tmp_path_factory.mktemp("installed")
    (home / "source").mkdir()  # a build writes into the folder of its sources
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        options = dict(symlinks=True) if copy is shutil.copytree else {}
        copy(ROOT / name, home / "source" / name, **options)
    link = home / "source" / "janus_jax" / "configs"
    link.unlink()
    link.write_text("../configs")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    wheels = home / "wheels"
    build = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, home / "source")
    done = call(*pip, *build, cwd=home)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(home / "source")
    (wheel,) = wheels.iterdir()

    environment = home / "environment"
    venv.create(environment, symlinks=True)
    paths = sysconfig.get_paths("venv", vars=dict(base=environment, platbase=environment))
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (Path(paths["purelib"]) / "dependencies.pth").write_text("\n".join(packages))
    python = Path(paths["scripts"]) / "python"
    done = call(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=home)
    assert done.returncode == 0, done.stderr
    return python.parent


def packages(folder: Path) -> set[str]:
    """Returns the names of the packages in a folder, which setup.cfg must list."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if is_package(path)}


def is_package(path: Path) -> bool:
    return (path / "__init__.py").is_file()


def test_only_the_package_is_installed(installed, tmp_path):
    code = (
        "import importlib.util, janus_jax; print(janus_jax.__file__); "
        "print([importlib.util.find_spec(n) for n in ('configs', 'convert', 'train', 'sample')])"
    )
    done = call(installed / "python", "-c", code, cwd=tmp_path)
    file, others = done.stdout.splitlines()
    assert Path(file).is_relative_to(installed.parent)
    assert others == "[None, None, None, None]"
    package = Path(file).parent
    assert packages(package) == packages(ROOT / "janus_jax")


def test_janus_sample(installed, tmp_path):
    done = call(installed / "janus-sample", "--prompt", "a red circle", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    paths = [tmp_path / line for line in done.stdout.splitlines()]
    assert len(paths) == 5  # four images and the contact sheet
    image = Image.open(paths[0])
    assert (image.size, image.mode) == ((96, 96), "RGB")
    assert image.text["prompt"] == "a red circle" and image.text["model"] == "janus_tiny"
    assert max(high - low for low, high in image.getextrema()) > 100
    done = call(installed / "janus-sample", "--prompt", "", cwd=tmp_path)
    assert done.returncode == 2
    assert_one_line(done.stderr, "janus-sample", "--prompt")


def test_janus_convert(installed, tmp_path, golden):
    done = call(installed / "janus-convert", "inspect", golden / "janus", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "gen_vq" in done.stdout and "1,109,891" in done.stdout
    done = call(installed / "janus-convert", "nowhere", "there", cwd=tmp_path)
    assert done.returncode == 2
    assert_one_line(done.stderr, "janus-convert", "nowhere")


@pytest.mark.slow
def test_janus_train(installed, tmp_path):
    settings = dict(steps=2, warmup_steps=0, log_every=1, batch_size=2, streams=1)
    settings["trained"] = r"gen_head\."  # compiles faster
    changes = [f"--config.{name}={value}" for name, value in settings.items()]
    train = installed / "janus-train"
    done = call(train, "--config=janus_tiny_stage3", *changes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    output = tmp_path / "runs" / "janus_tiny_stage3"
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["2"]
    logged = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    losses = [line["loss"] for line in logged if "loss" in line]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    assert json.loads((output / "run.json").read_text())["init"] == "janus_tiny"
    before = load_file(Path(janus_jax.__file__).parent / "assets/janus_tiny/model.safetensors")
    after = load_file(output / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    done = call(train, "--config=nothing", cwd=tmp_path)
    assert done.returncode == 2
    names = "finetune_full, finetune_lora, janus_1_3b_stage1"
    assert_one_line(done.stderr, "janus-train", "nothing", names)


def test_configs_import_each_other(installed, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from janus_jax.configs import finetune_lora\n\n\n"
        "def get_config(output):\n"
        "    config = finetune_lora.get_config()\n"
        "    config.output = output\n"
        "    return config\n"
    )
    code = (
        "from janus_jax.commands import config_flag, train\n"
        "for value in [*config_flag.config_names(), 'janus_tiny_stage3:stage2', 'mine.py:there']:\n"
        "    config = train.parse(['--config', value]).config\n"
        "    print(value, config.output, config.steps)\n"
    )
    done = call(installed / "python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert len(lines) == len(list((ROOT / "configs").glob("[!_]*.py"))) + 2
    assert lines["mine.py:there"] == "there 1000"
    assert lines["janus_tiny_stage3:stage2"] == "runs/janus_tiny_stage3_after_stage2 6000"


def test_the_image_of_the_package_is_that_of_the_docs():
    image = Path(janus_jax.__file__).parent / "assets" / "scene.png"
    assert image.read_bytes() == (ROOT / "docs" / "scene.png").read_bytes()
