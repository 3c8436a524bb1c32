"""Tests of the tables that README.md gets from the records of the benchmarks."""

import pytest
from fake_records import parity_record, speed_record, write_record
from one_line import assert_one_line

from benchmarks import readme_table
from benchmarks.records import spread


def test_the_tables_of_the_readme_are_those_of_the_records():
    readme = readme_table.README.read_text("utf-8")
    assert readme_table.replaced(readme, readme_table.tables(readme_table.RESULTS)) == readme


@pytest.mark.parametrize(
    ("folder", "device", "model", "dtype", "lines"),
    [
        (
            "on_gpu",
            "X",
            "janus_pro_7b",
            "bfloat16",
            [
                "Measured by `benchmarks/on_gpu.sh` on one X with jax 1.2:",
                "| Janus-Pro-7B, one image | 0.125 | 0.700 | 4.00 x | 2.00 x |",
                "| Janus-Pro-7B, 16 images at once | not measured | not measured |",
            ],
        ),
        (
            "on_cpu",
            "cpu",
            "janus_pro_1b",
            "float32",
            [
                "| Janus-Pro-1B, one image | not measured | not measured | not measured |",
                "Measured on 2 cores (Y) with jax 1.2:",
                "| Janus-Pro-1B, one image, float32 | 0.125 | eager 4.00 x, compiled 2.00 x |",
            ],
        ),
    ],
)
def test_a_record_fills_the_tables_of_the_readme(tmp_path, folder, device, model, dtype, lines):
    record = speed_record(dict(janus_jax=8.0, torch_eager=2.0, torch_compiled=4.0))
    record |= dict(hardware=dict(device=device, cpu="Y", cores=2), versions=dict(jax="1.2"))
    for row in record["rows"]:
        rate = row["figures"].pop("rate")
        row["case"] |= dict(model=model, dtype=dtype)
        row["figures"] = dict(images_per_s=rate, image_s=spread([1 / rate]), bandwidth_share=0.7)
    write_record(tmp_path / folder, "draw", record)
    text = readme_table.tables(tmp_path)
    assert [line for line in lines if line not in text] == []


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ((dict(device="cpu", cpu="Y"),), ("on_gpu", "cpu", "another folder")),
        ((dict(device="H100", cpu="Y"), dict(device="H200", cpu="Y")), ("H100", "H200")),
        (("{",), ("a0.json", "invalid JSON")),
        (("[]",), ("a0.json", "hardware", "rows")),
    ],
)
def test_the_readme_has_records_of_one_gpu(tmp_path, monkeypatch, capsys, records, words):
    for number, content in enumerate(records):
        if isinstance(content, dict):
            content = speed_record(dict(janus_jax=1.0)) | dict(hardware=content)
        write_record(tmp_path / "on_gpu", f"a{number}", content)
    monkeypatch.setattr(readme_table, "RESULTS", tmp_path)
    before = readme_table.README.read_bytes()
    with pytest.raises(SystemExit, match="2"):
        readme_table.main([])
    assert_one_line(capsys.readouterr().err, "readme_table", *words)
    assert readme_table.README.read_bytes() == before


@pytest.mark.parametrize("answer", ["yes", "no", "not measured"])
def test_the_readme_says_whether_the_checks_passed(tmp_path, answer):
    record = parity_record(pixels=answer != "no")
    if answer == "not measured":
        record["rows"].pop()
    write_record(tmp_path / "on_gpu", "parity", record)
    assert f"for a seed in all batch sizes | {answer} |" in readme_table.tables(tmp_path)
