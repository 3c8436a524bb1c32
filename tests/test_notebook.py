"""The notebook runs from top to bottom, with janus_tiny in place of the hub id."""

import os
import re
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="the notebook's test needs the extra `test`")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "janus_pro_colab.ipynb"
HUB_ID = "deepseek-ai/Janus-Pro-1B"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_no_outputs_are_committed(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


def test_the_files_that_it_names_exist(notebook):
    text = " ".join(cell.source for cell in notebook.cells)
    names = re.findall(r"\b(?:benchmarks|configs|docs|janus_jax)/[\w/]+\.\w+", text)
    assert names and not [name for name in names if not (ROOT / name).exists()]


def outputs_of(notebook, part: str) -> tuple[str, list[str]]:
    """Text and base64 PNG images that the one code cell with `part` in its source has printed."""
    (cell,) = [c for c in notebook.cells if c.cell_type == "code" and part in c.source]
    text = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    data = [output.data for output in cell.outputs if output.output_type == "display_data"]
    return text, [images["image/png"] for images in data if "image/png" in images]


@pytest.mark.slow
def test_the_notebook_runs(notebook, tmp_path, monkeypatch):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [HUB_ID in cell.source for cell in code] == [True] + [False] * (len(code) - 1)
    code[0].source = code[0].source.replace(HUB_ID, "janus_tiny")
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling is most of the time
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()

    text, _ = outputs_of(notebook, "%pip install")
    assert text == ""  # the package was there
    text, _ = outputs_of(notebook, "compute_capability")
    assert "inference in float32, fine-tuning in float32" in text
    text, _ = outputs_of(notebook, "print(janus.name)")
    assert "janus_tiny" in text
    _, images = outputs_of(notebook, "generate_images(")
    assert len(images) == 2 and images[0] != images[1]
    text, _ = outputs_of(notebook, "janus.answer(\"What color")
    assert "answer: blue" in text.replace("  ", " ")
    assert re.search(r"answer:.*\n.*\w+ \w+", text)  # the description
    text, _ = outputs_of(notebook, "write_records(")
    assert '"conversations": [' in text
    text, _ = outputs_of(notebook, "train_stage(config)")
    assert "step 6/6  loss " in text and "orbax" not in text.lower()
    text, _ = outputs_of(notebook, "metrics.jsonl")
    losses = [float(loss) for loss in re.findall(r"^step +\d+: loss (\d+\.\d+)$", text, re.M)]
    assert len(losses) == 6 and all(0 < loss < 30 for loss in losses)
    text, images = outputs_of(notebook, "adapter=")
    assert len(images) == 1 and text.count("(expected: ") >= 1
    adapter = tmp_path / "runs" / "finetune_lora" / "adapter"
    assert (adapter / "adapter_model.safetensors").is_file()
