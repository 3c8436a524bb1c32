"""Tests of the benchmarks: records, tables, time limits, and the script that runs all of them."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from fake_benchmark import CASES
from fake_records import parity_record, speed_record, write_record
from one_line import assert_one_line

from benchmarks import (
    draw,
    jax_side,
    load,
    models,
    on_gpu,
    packed_rows,
    parity,
    suite,
    tables,
    timing,
    train,
)
from benchmarks.records import Record, ratios, spread
from janus_jax.data.packing import row_fields
from janus_jax.families.registry import sizes_of
from janus_jax.models.layers import REMAT_CHOICES

ROOT = Path(__file__).parents[1]


# imports what draws and answers, without packages that only training needs
WITHOUT_TRAINING = """
import sys
sys.modules.update(dict.fromkeys(("grain", "array_record", "ml_collections")))
import benchmarks.parity_jax, benchmarks.draw_jax, benchmarks.answer_jax
"""


def measurement(limits: dict | None = None, **settings) -> suite.Measurement:
    return suite.Measurement(
        "pair", "fake_benchmark", settings, CASES, uses_jax=False, **(limits or {})
    )


@pytest.fixture
def path(monkeypatch, tmp_path) -> Path:
    """Returns the path of a record, and lets the processes of the suite import the fake."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'tests'}{os.pathsep}{os.environ['PYTHONPATH']}")
    return tmp_path / "pair.json"


def results(path: Path) -> list:
    """Returns the figures, or else the reason, of each row."""
    rows = json.loads(path.read_text())["rows"]
    return [row["figures"] if "figures" in row else row["not_measured"] for row in rows]


def test_a_measurement_writes_its_record(path):
    suite.run(measurement(), path)
    assert results(path) == [
        dict(value=1.0),
        dict(value=dict(median=3.0, min=2.0, max=4.0, runs=3)),
    ]
    record = json.loads(path.read_text())
    assert record["hardware"]["device"] == "cpu" and record["hardware"]["cores"] >= 1
    assert record["versions"].keys() == {"python", "numpy"}


def test_what_was_measured_before_the_end_counts(path):
    log, start = path.with_name("log.txt"), time.monotonic()
    suite.run(measurement(dict(seconds=6.0), sleep=300), path, log=log)
    assert time.monotonic() - start < 60
    assert results(path) == [dict(value=1.0), "stopped after 6 s"]
    suite.run(measurement(error="no second case", note="For simplicity, ..."), path, log=log)
    assert results(path) == [dict(value=1.0), "ValueError: no second case"]
    assert "no second case" in log.read_text()


def test_what_cannot_be_measured_has_a_reason(path):
    suite.run(measurement(dict(least=50.0)), path, suite.Deadline(20.0))
    assert results(path) == ["20 s were left, at least 50 s are needed"] * 2
    suite.run(measurement(dict(needs=("json", "no_such_package"))), path)
    assert results(path) == ["not installed: no_such_package"] * 2
    Record(path, "pair").add(CASES[0], dict(value=2.0))
    suite.skip(measurement(), path, "later")
    assert results(path) == [dict(value=2.0), "later"]  # a result is never replaced by a reason


def test_a_record_is_of_one_benchmark_and_machine(tmp_path):
    record = Record(tmp_path / "a.json", "pair")
    record.describe("cpu")
    with pytest.raises(ValueError, match="record of pair; choose another"):
        Record(tmp_path / "a.json", "other")
    with pytest.raises(ValueError, match="measured on another machine"):
        Record(tmp_path / "a.json", "pair").describe("a TPU")
    record.content["versions"]["jax"] = "0.1"
    record.describe("cpu")  # nothing was measured yet
    record.content["versions"]["jax"] = "0.1"
    record.add(dict(model="tiny"), dict(value=1.0))
    with pytest.raises(ValueError, match=r"measured with jax 0\.1, this is"):
        record.describe("cpu")


def test_ratios_compare_the_same_work():
    record = speed_record(dict(janus_jax=6.0, torch_eager=2.0, torch_compiled="too slow"))
    other = speed_record(dict(janus_jax=1.0))["rows"][0]
    other["case"]["num_images"] = 16
    record["rows"].append(other)
    (found,) = ratios(record, "rate")
    assert found["ratio"] == 3.0 and found["case"]["implementation"] == "torch_eager"


def test_tables_show_results_and_reasons():
    record = speed_record(dict(janus_jax=1234.5, torch_eager=0.25, torch_compiled="too slow"))
    record["rows"][0]["figures"]["step_ms"] = spread([0.5, 1.5, 2.5])
    lines = tables.record_table(record).splitlines()
    assert lines[0] == "| model | num_images | implementation | remat | rate | step_ms |"
    assert lines[2] == "| tiny | 1 | janus_jax | dots | 1,234 | 1.50 (0.500 to 2.50, 3 runs) |"
    assert lines[3] == "| tiny | 1 | torch_eager |  | 0.250 |  |"
    assert lines[4] == "| tiny | 1 | torch_compiled |  | not measured: too slow |  |"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.5e-6, "1.5e-06"),
        (0.01234, "0.0123"),
        (9.998, "10.0"),
        (1234.5, "1,234"),
        (0.0, "0"),
        (12345, "12,345"),
        (True, "True"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert tables.number(value) == text


def test_a_failed_check_ends_the_script_with_status_1(tmp_path, monkeypatch, capsys):
    skipped = [parity.measurement(least=1e9)]
    monkeypatch.setattr(on_gpu, "tiny_plan", lambda profiles: skipped)
    on_gpu.main([str(tmp_path), "--tiny"])
    write_record(tmp_path, "parity", parity_record(pixels=False))
    with pytest.raises(SystemExit, match="1"):
        on_gpu.main([str(tmp_path), "--tiny"])
    assert_one_line(capsys.readouterr().err, "on_gpu", "check failed", "float32", "pixels")


@pytest.mark.parametrize(
    ("benchmark", "flags", "words"),
    [
        (draw, ("--num_images", "0"), ("num_images", "at least 1", "'0'")),
        (draw, ("--runs", "0"), ("runs", "at least 1")),
        (train, ("--remat", "foo"), ("remat", "foo", "dots")),
        (load, ("--runs", "x"), ("runs", "'x'")),
        (parity, ("--model", "foo"), ("model", "foo")),
        (draw, ("--output", "no_such_folder/x.json"), ("no_such_folder", "create")),
        (draw, ("--output", "other.json"), ("other.json", "record of parity")),
    ],
)
def test_wrong_flags_end_a_benchmark_in_one_line(
    tmp_path, monkeypatch, capsys, benchmark, flags, words
):
    monkeypatch.chdir(tmp_path)
    write_record(tmp_path, "other", parity_record())
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["--output", "x.json", *flags])
    assert_one_line(capsys.readouterr().err, benchmark.__name__.rpartition(".")[2], *words)
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


def test_a_case_without_figures_gives_status_1(path, capsys):
    suite.run_all([measurement()], path, None)
    with pytest.raises(SystemExit, match="1"):
        suite.run_all([measurement(dict(needs=("no_such_package",)))], path, None)
    assert_one_line(capsys.readouterr().err, "pair", "not measured", "no_such_package")


def test_the_choices_of_remat_are_those_of_the_models():
    assert train.REMAT_CHOICES == REMAT_CHOICES


def test_the_bytes_of_a_step_are_those_of_the_weights_and_the_cache():
    cfg = models.config("tiny")
    decoder = cfg.language_model
    width, hidden, layers = (
        decoder.hidden_size,
        decoder.intermediate_size,
        decoder.num_hidden_layers,
    )
    weights = layers * (4 * width**2 + 3 * width * hidden + 2 * width)
    weights += width + width * decoder.vocab_size
    slots = 2 * 10.5 * 2 * layers * width
    assert models.step_bytes(cfg, "answer", rows=2, filled=10.5) == 2 * (weights + slots)


def test_repeated_runs_stop_at_their_budget():
    assert len(timing.repeated(lambda: None, 4)) == 4
    assert len(timing.repeated(lambda: time.sleep(0.2), 50, budget=0.3)) == 2
    assert timing.rate_between([(1, 10.0), (3, 11.0), (11, 15.0)]) == 0.5
    with pytest.raises(ValueError, match="at least two marks"):
        timing.rate_between([(1, 10.0)])


def test_random_rows_are_packed_rows():
    sizes = sizes_of(models.config("tiny"))
    fields = row_fields(300, 3, 3, sizes.image_size, sizes.generated_image_tokens)
    ratio = dict(understanding=2, text=0.1, generation=5)
    rows = packed_rows.random_rows(fields, sizes, 4, ratio)
    assert {name: (v.shape[1:], v.dtype) for name, v in rows.items()} == {
        name: (field.shape, np.dtype(field.dtype)) for name, field in fields.items()
    }
    padding = rows["segment_ids"] == 0
    assert 0 < padding.mean() < 0.7 and rows["segment_ids"].max() > 1
    for name, number in (("image_mask", 16), ("gen_mask", 16)):
        counts = rows[name].sum(axis=1)
        assert (counts % number == 0).all() and 0 < counts.max() <= 3 * number
        assert not rows[name][padding].any()
    starts = np.diff(rows["segment_ids"], axis=1, prepend=0) > 0
    assert (rows["positions"][starts] == 0).all()
    inside = (np.diff(rows["segment_ids"], axis=1) == 0) & ~padding[:, 1:]
    assert (np.diff(rows["positions"], axis=1)[inside] == 1).all()
    assert set(np.unique(rows["kind"][~padding])) <= {0, 1, 2}
    fields = row_fields(8, 1, 1, sizes.image_size, sizes.generated_image_tokens)
    with pytest.raises(ValueError, match="got 8; 1500 fits every"):
        packed_rows.random_rows(fields, sizes, 4, ratio)


def test_the_plans_fit_the_time_and_have_the_same_parts():
    plan, tiny = on_gpu.plan(Path("profiles")), on_gpu.tiny_plan(Path("profiles"))
    assert {entry.module for entry in plan} == {entry.module for entry in tiny}
    assert {entry.benchmark for entry in plan} == on_gpu.RATES.keys()
    assert all(0 < entry.least < entry.seconds < on_gpu.SECONDS for entry in plan)
    names = [entry.benchmark for entry in plan[:7]]
    assert names == ["parity", "draw", "draw", "draw", "answer", "train", "load"]
    # these get their time in any case
    assert sum(entry.seconds for entry in plan[:7]) == on_gpu.SECONDS
    assert on_gpu.SECONDS + 2 * suite.GRACE < 540


def test_without_a_gpu_nothing_is_called_measured(tmp_path):
    done = subprocess.run(
        [ROOT / "benchmarks" / "on_gpu.sh", tmp_path, "draw"],
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHON=sys.executable, JAX_PLATFORMS="cpu"),
    )
    assert done.returncode == 1 and "JAX found no GPU" in done.stderr
    assert set(results(tmp_path / "draw.json")) == {"JAX found no GPU"}
    assert not (tmp_path / "train.json").exists()
    assert (tmp_path / on_gpu.SUMMARY).read_text().splitlines()[:3:2] == [
        "## draw",
        "| model | dtype | num_images | implementation | figures |",
    ]


def test_a_driver_that_hangs_counts_as_no_gpu(monkeypatch):
    monkeypatch.setattr(on_gpu, "BACKEND", "import time; time.sleep(300)")
    start = time.monotonic()
    assert not on_gpu.has_gpu(0.5)
    assert time.monotonic() - start < 60
    monkeypatch.setattr(on_gpu, "BACKEND", "print('cuda')")
    assert on_gpu.has_gpu()


def test_an_interrupted_script_ends_and_writes_its_summary(tmp_path):
    command = [ROOT / "benchmarks" / "on_gpu.sh", tmp_path, "--tiny", "parity"]
    env = os.environ | dict(PYTHON=sys.executable)
    script = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    start = time.monotonic()
    while not (tmp_path / "parity.json").exists():  # written before the measurement starts
        assert time.monotonic() - start < 60 and script.poll() is None
        time.sleep(0.1)
    script.terminate()
    script.communicate(timeout=30)
    assert script.returncode == 128 + signal.SIGTERM
    assert f"not measured: {suite.CUT_OFF}" in (tmp_path / on_gpu.SUMMARY).read_text()


PROFILE = """
planes { name: "/host:CPU" lines { name: "Stream" events { metadata_id: 1 duration_ps: 9000000 } }
  event_metadata { key: 1 value { id: 1 name: "Python" } } }
planes { name: "/device:GPU:0"
  lines { name: "XLA Ops" events { metadata_id: 1 duration_ps: 7000000 } }
  lines { name: "Stream #1(Compute)"
    events { metadata_id: 1 duration_ps: 2000000 } events { metadata_id: 2 duration_ps: 3000000 } }
  lines { name: "Stream #2(MemcpyD2D)" events { metadata_id: 2 duration_ps: 5000000 } }
  event_metadata { key: 1 value { id: 1 name: "gemm" } }
  event_metadata { key: 2 value { id: 2 name: "fusion" } } }
"""


def test_a_profile_is_summed_up_over_the_streams_of_the_gpu(tmp_path):
    data = jax.profiler.ProfileData.text_proto_to_serialized_xspace(PROFILE)
    (tmp_path / "a.xplane.pb").write_bytes(data)
    found = jax_side.kernels(tmp_path, steps=2)
    assert found["top"] == [["fusion", 0.004, 1.0], ["gemm", 0.001, 0.5]]
    assert (found["busy_ms"], found["kernels"]) == (0.005, 1.5)
    record = speed_record(dict(janus_jax=6.0))
    record["rows"][0]["profile"] = found | dict(wall_ms=0.01)
    assert "1.5 kernels, 0.00500 ms of 0.0100 ms a step" in tables.summary(record, "rate")


@pytest.mark.slow
def test_the_script_runs_to_its_end_on_a_cpu(tmp_path, monkeypatch):
    """Every row must be measured, also those of PyTorch, which the processes may import here."""
    monkeypatch.delenv("PYTHONPATH")
    done = subprocess.run(
        [ROOT / "benchmarks" / "on_gpu.sh", tmp_path, "--tiny", "--seconds", "3000"],
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHON=sys.executable),
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"{name}.json" for name in on_gpu.RATES),
        *(on_gpu.SUMMARY, on_gpu.LOG, on_gpu.PROFILES),
    }
    for name in on_gpu.RATES:
        found = results(tmp_path / f"{name}.json")
        assert found and all(isinstance(figures, dict) for figures in found), found
    rows = json.loads((tmp_path / "parity.json").read_text())["rows"]
    assert all(row["figures"].get("ok", True) for row in rows)
    for name in ("draw", "answer", "train", "load"):
        assert ratios(json.loads((tmp_path / f"{name}.json").read_text()), on_gpu.RATES[name])
    with tarfile.open(tmp_path / on_gpu.PROFILES) as archive:
        assert len(archive.getnames()) == 3
    assert "not measured" not in (tmp_path / on_gpu.SUMMARY).read_text()


def test_drawing_and_answering_need_no_packages_of_training():
    """A machine with a GPU may lack them."""
    subprocess.run([sys.executable, "-c", WITHOUT_TRAINING], cwd=ROOT, check=True)
