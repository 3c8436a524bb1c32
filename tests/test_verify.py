"""python -m convert verify: a correct model passes, and a wrong one fails in the row it belongs to.

The wrong model is on the side of `transformers` (--reference), because both sides read the same
folder otherwise.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from one_line import assert_one_line
from PIL import Image

from convert.__main__ import main
from janus_jax.interop.convert import export_folder, import_folder
from janus_jax.verify import run as verify
from janus_jax.verify import table
from janus_jax.verify.outputs import Greedy

ROOT = Path(__file__).parent.parent
QUICK = ("--max_new_tokens", "4")  # the same everywhere, so that programs are compiled once
PREPROCESSING = ("question tokens", "image prompt tokens", "pixel values")
PARTS = (
    "SigLIP features",
    "aligned features",
    "VQ latents",
    "VQ tokens",
    "VQ pixels",
    "text logits",
    "image-token logits",
    "greedy answer",
    "greedy image tokens",
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are so small that torch's threads take longer to wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(capsys, tmp_path):
    """Runs a command that prints a table: its exit status, the JSON file, stdout and stderr."""

    def call(*args):
        path = tmp_path / "table.json"
        with pytest.raises(SystemExit) as stopped:
            main(["verify", *map(str, args), "--json", str(path)])
        out, err = capsys.readouterr()
        return stopped.value.code, json.loads(path.read_text()), out, err

    return call


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail before it prints a table; returns its one-line error."""

    def call(*args):
        with pytest.raises(SystemExit) as stopped:
            main(["verify", *map(str, args)])
        out, err = capsys.readouterr()
        *steps, error = err.splitlines()
        assert stopped.value.code == 2 and "result" not in out and error.startswith("convert: ")
        assert all(" s  " in step for step in steps)  # progress reports
        return error

    return call


@pytest.fixture(scope="module")
def exported(golden, tmp_path_factory):
    """janus_small in the layout of transformers."""
    folder = tmp_path_factory.mktemp("exported") / "janus_small"
    export_folder(golden / "janus_small", folder, "transformers", overwrite=False)
    return folder


def failed(table):
    return {(row["section"], row["name"]) for row in table["rows"] if not row["passed"]}


@pytest.mark.slow
def test_both_dtypes_pass(golden, run):
    """In DeepSeek's layout, which is exported first."""
    status, table, out, err = run(golden / "janus_small", *QUICK)
    assert status == 0 and table["passed"]
    names = [(row["section"], row["name"]) for row in table["rows"]]
    expected = [("preprocessing", name) for name in PREPROCESSING]
    expected += [(dtype, name) for dtype in ("float32", "bfloat16") for name in PARTS]
    assert names == expected
    assert f"exporting {golden / 'janus_small'} (deepseek layout) to the layout of tr" in err
    assert "host memory: needs about 3.1 MB for 771,435 parameters in float32" in out
    assert out.endswith("all 21 rows are within their limits\n")
    for row in table["rows"]:
        assert row["name"] in out and row["relative"] <= row["limit"]
        if row["section"] == "float32":
            assert row["relative"] < 1e-5 and row["torch_bfloat16"] is None
        if row["section"] == "bfloat16" and not row["name"].startswith("VQ"):
            assert 1e-3 < row["relative"] <= 1.1 * row["torch_bfloat16"]
    notes = [row["note"] for row in table["rows"] if row["name"] == "greedy image tokens"]
    assert notes[0] == "all 16 equal"  # of 32 requested: an image has no more


def test_the_layout_of_transformers_is_read_as_it_is(exported, run):
    status, table, _, err = run(exported, "--dtype", "float32", *QUICK)
    assert status == 0 and not failed(table)
    assert "exporting" not in err
    assert {row["section"] for row in table["rows"]} == {"preprocessing", "float32"}


@pytest.mark.slow
def test_an_orbax_folder_with_an_image_and_texts(golden, exported, run, tmp_path):
    import_folder(golden / "janus_small", tmp_path / "orbax", overwrite=False)
    noise = np.random.default_rng(0).integers(0, 256, (50, 120, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "i.png")
    # as many tokens as the default texts, so that no program is compiled again
    question, prompt = "What is in that image?", "a blue square left of a red circle"
    texts = ("--question", question, "--prompt", prompt, "--image", tmp_path / "i.png")
    orbax = tmp_path / "orbax"
    status, table, _, err = run(orbax, *texts, "--dtype", "float32", *QUICK)
    assert status == 0 and table["question"] == question
    assert "(Orbax weights) to the layout of" in err and "cropping the image to" in err


WRONG = {
    "model.vision_model.encoder.layers.0.self_attn.v_proj.weight": "SigLIP features",
    "model.aligner.fc1.bias": "aligned features",
    "model.vqmodel.quantize.embedding.weight": "VQ pixels",
    "model.language_model.layers.1.mlp.down_proj.weight": "text logits",
    "model.generation_embeddings.weight": "image-token logits",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_tensor_fails_in_the_row_of_its_part(golden, exported, run, tmp_path, name):
    """1 % off in float32; the rows before it still pass."""
    reference = perturbed(exported, tmp_path / "wrong", name, 0.01)
    command = (golden / "janus_small", "--reference", reference, *QUICK)
    status, table, out, _ = run(*command, "--dtype", "float32")
    rows = [row["name"] for row in table["rows"]]
    first = next(row["name"] for row in table["rows"] if not row["passed"])
    assert status == 1 and not table["passed"] and first == WRONG[name], out
    assert out.splitlines()[-1].startswith(f"{len(failed(table))} of 12 rows exceed their limits: ")
    isolated = set(rows) - {"VQ tokens", "greedy answer", "greedy image tokens"}
    if name.startswith(("model.vision_model", "model.aligner")):
        assert {row for _, row in failed(table)} & isolated == {first}


@pytest.mark.slow
def test_a_wrong_tensor_fails_in_bfloat16(golden, exported, run, tmp_path):
    """10 % off: rounding to bfloat16 hides what is much smaller."""
    name = "model.language_model.layers.0.self_attn.o_proj.weight"
    reference = perturbed(exported, tmp_path / "wrong", name, 0.1)
    command = (golden / "janus_small", "--reference", reference, "--dtype", "bfloat16", *QUICK)
    status, table, *_ = run(*command)
    assert status == 1 and ("bfloat16", "text logits") in failed(table)


def perturbed(source, target, name, size):
    """A copy of a folder with noise added to a tensor, of `size` times its own magnitude."""
    shutil.copytree(source, target)
    state = safetensors.torch.load_file(target / "model.safetensors")
    noise = torch.randn(state[name].shape, generator=torch.Generator().manual_seed(0))
    changed = {key: value.float() for key, value in state.items()}  # bfloat16 would round it away
    changed[name] += size * changed[name].std() * noise
    safetensors.torch.save_file(changed, target / "model.safetensors", {"format": "pt"})
    return target


def test_a_wrong_normalization_fails_in_the_pixel_values(golden, exported, run, tmp_path):
    wrong = shutil.copytree(exported, tmp_path / "wrong")
    stated = json.loads((wrong / "preprocessor_config.json").read_text())
    (wrong / "preprocessor_config.json").write_text(
        json.dumps(stated | {"image_mean": [0.5, 0.5, 0.51]})
    )
    command = (golden / "janus_small", "--reference", wrong, "--dtype", "float32", *QUICK)
    status, table, *_ = run(*command)
    assert status == 1 and ("preprocessing", "pixel values") in failed(table)
    assert {row for _, row in failed(table)} <= {"pixel values", "greedy answer"}


def test_another_prompt_template_fails_in_the_tokens(golden, exported, run, tmp_path):
    ours = shutil.copytree(golden / "janus_small", tmp_path / "ours")
    stated = json.loads((ours / "processor_config.json").read_text())
    other = "deepseek_old" if stated["sft_format"] == "deepseek" else "deepseek"
    (ours / "processor_config.json").write_text(json.dumps(stated | {"sft_format": other}))
    status, table, *_ = run(ours, "--reference", exported, "--dtype", "float32", *QUICK)
    assert status == 1
    tokens = {("preprocessing", "question tokens"), ("preprocessing", "image prompt tokens")}
    assert tokens <= failed(table) and ("float32", "text logits") not in failed(table)


def test_without_torch(golden):
    """conftest.py puts a module that cannot be imported in its place."""
    command = [sys.executable, "-m", "convert", "verify", str(golden / "janus_small")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, "convert", "torch", "transformers", "pip install")


def test_what_is_refused(golden, refused, tmp_path):
    assert str(tmp_path / "absent")[-30:] in refused(tmp_path / "absent")
    wrong = refused(golden / "janus_small", "--reference", golden / "janus_small")
    assert re.search("layout of transformers.*layout of deepseek.*convert export", wrong)
    wrong = refused(golden / "janus_small", "--num_image_tokens", "0")
    assert_one_line(wrong, "convert", "--num_image_tokens", 1, 0)
    no_image = "--image", tmp_path / "i.png"
    assert "image file" in refused(golden / "janus_small", *no_image)
    wrong = refused(golden / "janus_small", "--json", tmp_path)
    assert_one_line(wrong, "convert", "--json", "folder")
    assert "--json: " in refused(golden / "janus_small", "--json", tmp_path / "absent" / "t.json")
    assert "norm_num_groups" in refused(ROOT / "janus_jax" / "assets" / "janus_tiny")
    assert "'float16'" in refused(golden / "janus_small", "--dtype", "float16")


def test_weights_that_transformers_lacks_are_named(golden, exported, refused, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "partial")
    state = safetensors.torch.load_file(folder / "model.safetensors")
    del state["lm_head.weight"]
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    said = refused(golden / "janus_small", "--reference", folder)
    assert re.search(r"\b1 of .*: lm_head.weight", said)


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["verify", "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and "python -m convert verify" in said
    assert "--reference FOLDER" in said and "default: 32" in said and "--num_image_tokens N" in said


def test_the_page_lists_all_rows():
    page = (ROOT / "docs" / "verify.md").read_text()
    assert all(name in page for name in (*PREPROCESSING, *PARTS))


def test_differences():
    a = np.array([3.0, 4.0], np.float32)
    assert table.difference(a, a) == (0, 0)
    assert table.difference(a + np.float32([0, 0.5]), a) == (0.5, 0.1)
    assert table.difference(a, a[:1]) == (np.inf, np.inf)
    nan = table.difference(np.float32([np.nan, 4]), a)
    assert not table._make_row("float32", "x", nan).passed
    tokens = np.array([1, 2, 3])
    for other, position, note in (
        ([1, 2, 3], None, "all 3 equal"),
        ([1, 5, 3], 1, "67% equal, first difference at token 2 of 3"),
        ([1, 2], 2, "67% equal, first difference at token 3 of 3"),
    ):
        assert table.first_difference(np.array(other), tokens) == position
        assert table._tokens_note(np.array(other), tokens) == note


def test_greedy_logits_are_compared_up_to_the_first_difference():
    logits = np.array([[1, 0, 0], [0, 1, 0.999], [5, 0, 0]], np.float32)
    other = logits.copy()
    other[1, 2] = 1.001  # changes the token, so that the next logits are not comparable
    other[2] = -7
    pair = (Greedy(array.argmax(-1), array) for array in (other, logits))
    assert table.greedy_difference(*pair)[0] == pytest.approx(0.002, rel=1e-3)


def test_images_that_the_implementations_would_resize_differently_are_cropped():
    image = verify.builtin_image()
    assert verify.fit_image(image, 384) is image
    assert verify.fit_image(Image.new("RGB", (50, 120)), 64).size == (50, 50)
