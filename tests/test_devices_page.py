"""docs/devices.md is what benchmarks/devices.py writes; a failed row does not stop the others."""

import pytest
from one_line import assert_one_line

from benchmarks import devices
from janus_jax.families.registry import sizes_of
from janus_jax.models import attention
from janus_jax.models.janus import JanusConfig
from janus_jax.training.stages import STAGES

RESULTS = devices.read_results()


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Returns the path of the page; the page and the results do not exist yet."""
    monkeypatch.setattr(devices, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(devices, "RESULTS", tmp_path / "results.jsonl")
    return tmp_path / "page.md"


def test_the_page_agrees_with_the_results(page):
    devices.write_page(RESULTS)
    assert page.read_text() == (devices.ROOT / "docs" / "devices.md").read_text()
    names = {row.name for rows in devices.TABLES.values() for row in rows}
    assert RESULTS.keys() == names


def test_numbers_of_the_page_are_those_of_the_code(page):
    assert devices.MIN_KERNEL_LENGTH == attention._MIN_KERNEL_LENGTH
    assert devices.ROW_BATCH == {number: stage.batch_size for number, stage in STAGES.items()}
    assert sizes_of(JanusConfig.janus_pro_7b()).generated_image_tokens == devices.IMAGE_TOKENS
    devices.write_page(RESULTS)
    text = page.read_text()
    assert " 0.0 GB" not in text and text.count(" jax 0.") == 1


def test_collectives_are_sorted_and_small_ones_omitted():
    sizes = {"all-reduce": 2e9, "all-to-all": 4e7, "all-gather": 3e9}
    moved = devices._moved({kind: dict(count=1, bytes=size) for kind, size in sizes.items()})
    assert moved == "all-gather 3.0 GB, all-reduce 2.0 GB"


def test_a_row_that_fails_does_not_stop_the_others(page, monkeypatch, capsys):
    def compile_row(row: devices.Row) -> dict:
        if "7b" in row.model:
            raise RuntimeError(f"{row.name}: no compiler")
        return RESULTS[row.name]

    monkeypatch.setattr(devices, "compile_row", compile_row)
    with pytest.raises(SystemExit, match="1"):
        devices.main(["--only", "(draw|answer) l4"])
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert len(lines) == 2 and len(output.out.splitlines()) == 4
    for job, line in zip(("draw", "answer"), lines, strict=True):
        assert_one_line(line, "devices", "janus_pro_7b", job, "no compiler")
    assert {name.split()[0] for name in devices.read_results()} == {"janus_pro_1b"}
    devices.main(["--page_only"])
    assert page.read_text().count("| Janus-Pro-1B") == 2


@pytest.mark.parametrize("flags", [["--only", "("], ["--only", "l4", "--page_only"]])
def test_wrong_flags_end_in_one_line(page, capsys, flags):
    with pytest.raises(SystemExit, match="2"):
        devices.main(flags)
    assert_one_line(capsys.readouterr().err, "devices", "--only")
    assert not page.exists()
