"""Tests python -m janus_jax.commands.tokenize_images: its output, resumption and errors."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from limits import full_disk
from PIL import Image

from convert.__main__ import main as convert
from janus_jax.commands import shards, tokenize_images
from janus_jax.data.records import Record
from janus_jax.data.sources import open_source
from janus_jax.data.writers import SUFFIXES, write_records
from janus_jax.generation import codec
from janus_jax.interop.load import load_vq, open_folder

ROOT = Path(__file__).parent.parent


def image(number: int) -> bytes:
    rng = np.random.default_rng(number)
    colors = rng.integers(0, 256, (3, 3, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(colors).resize((30 + number, 40), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def captioned(count: int) -> list[Record]:
    # In the order in which a class folder is read.
    return [
        Record("generation", text=f"image {i:02d}", images=(image(i),)) for i in range(count)
    ]


@pytest.fixture
def run(golden, capsys, tmp_path):
    """Runs the command in this process and returns (status, stdout, stderr)."""

    def call(source, output, *more, model=golden / "janus_small"):
        args = ["--model", model, "--source", source, "--output", output, "--batch_size", 2, *more]
        status = 0
        try:
            tokenize_images.main(list(map(str, args)))
        except SystemExit as stopped:
            status = stopped.code
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def refused(run):
    """Runs a command that must fail with one line on stderr, and returns the line."""

    def call(*args, **settings):
        status, out, err = run(*args, **settings)
        assert (status, out) == (2, "")
        assert err.startswith("tokenize_images: ") and err.count("\n") == 1, err
        return err

    return call


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the contents of all files below a folder, by path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("format", [*SUFFIXES, "class_folder"])
def test_images_of_every_format_become_tokens(format, run, small, tmp_path):
    records, out = captioned(5), tmp_path / "tokens"
    source = tmp_path / f"train{SUFFIXES.get(format, '')}"
    write_records(format, source, records)
    status, said, err = run(f"{format}:{source}", f"{format}:{out}", "--shard_size", 3)
    assert (status, err) == (0, "")
    assert said == f"{out}: 5 images tokenized, 0 records copied, 0 skipped\n"
    expected = small.encode_images([record.images[0] for record in records])
    found = list(open_source(format, out))
    assert [record.text for record in found] == [record.text for record in records]
    assert all(record.images == () for record in found)
    np.testing.assert_array_equal([record.indices for record in found], expected)
    if format in SUFFIXES:
        names = sorted(path.name for path in out.iterdir() if path.name.startswith("shard"))
        assert names == [f"shard-{i:05d}{SUFFIXES[format]}" for i in range(2)]


def test_other_records_are_copied_and_bad_ones_listed(run, small, tmp_path):
    indices = np.arange(4, dtype=np.int32)
    good = [
        Record("understanding", (("What?", "Noise."),), images=(image(7), image(8))),
        Record("generation", text="a", images=(image(1),)),
        Record("text", text="words"),
        Record("generation", text="b", images=(image(2),)),
        Record("generation", text="c", indices=indices),
    ]
    source, out = tmp_path / "train.jsonl", tmp_path / "tokens"
    broken = Record("generation", text="d", images=(image(3)[:50],))
    write_records("jsonl", source, [good[0], broken, *good[1:]])
    with source.open("a") as file:
        file.write('{"caption": "e", "image": "none.png"}\n{"text": ""}\n{"caption"\n{"text": "\n')
    args = f"jsonl:{source}", f"tar:{out}", "--shard_size", 4
    status, said, err = run(*args, "--max_bad", 0.5)
    assert (status, err) == (0, "")
    listed = out / ".tokenize_images" / "skipped.jsonl"
    assert said == (
        f"{out}: 2 images tokenized, 3 records copied, 5 skipped "
        f"(2 malformed, 1 unreadable image, 1 missing file, 1 empty text), listed in {listed}\n"
    )
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(line["record"], line["reason"]) for line in lines] == [
        (f"{source}:2", "unreadable image"),
        (f"{source}:7", "missing file"),
        (f"{source}:8", "empty text"),
        (f"{source}:9", "malformed"),
        (f"{source}:10", "malformed"),
    ]
    assert "none.png" in lines[1]["detail"]
    expected = iter(small.encode_images([image(1), image(2)]))
    for found, record in zip(open_source("tar", out), good, strict=True):
        assert (found.kind, found.turns, found.text) == (record.kind, record.turns, record.text)
        if record.kind == "generation":
            tokens = next(expected) if record.indices is None else record.indices
            np.testing.assert_array_equal(found.indices, tokens)
        else:
            assert found.images == record.images


def text_lines(path: Path, count: int, bad: dict[int, str]) -> Path:
    """Writes text records as JSONL. bad: replacements of lines by their number from 0."""
    path.write_text("".join(bad.get(i, '{"text": "a"}') + "\n" for i in range(count)))
    return path


def test_a_wrong_image_root_stops_the_run_and_a_right_one_restarts(run, refused, tmp_path):
    write_records("jsonl", tmp_path / "train.jsonl", captioned(7))
    out = tmp_path / "tokens"
    args = f"jsonl:{tmp_path / 'train.jsonl'}", f"jsonl:{out}", "--shard_size", 3, "--image_root"
    listed = out / ".tokenize_images" / "skipped.jsonl"
    assert refused(*args, tmp_path / "none") == (
        "tokenize_images: 3 of the 7 records of --source are bad (3 missing file), more than the "
        f"fraction max_bad=0.05 allows; they are listed in {listed}; "
        "repair them, or raise --max_bad\n"
    )
    assert len(listed.read_text().splitlines()) == 3
    assert os.listdir(out) == [".tokenize_images"]
    assert run(*args, tmp_path)[:2] == (
        0, f"{out}: 7 images tokenized, 0 records copied, 0 skipped\n"
    )
    assert not listed.exists() and len(open_source("jsonl", out)) == 7


def test_too_many_skipped_are_refused_also_when_all_shards_are_there(run, refused, tmp_path):
    bad = {2: "{", 5: '{"text": ""}', 11: "["}
    source = text_lines(tmp_path / "train.jsonl", 50, bad)
    args = f"jsonl:{source}", f"tar:{tmp_path / 'tokens'}", "--shard_size", 20
    message = "3 of the 50 records of --source are bad (2 malformed, 1 empty text), more than"
    assert message in refused(*args)
    status, said, err = run(*args, "--max_bad", 0.06)
    assert (status, err) == (0, "") and "47 records copied, 3 skipped (2 malformed" in said
    # records of finished shards are counted too
    assert message in refused(*args, "--max_bad", 0.059)
    assert run(*args, "--max_bad", 0.06)[:2] == (0, said)


def test_an_error_has_a_line_of_its_own_on_a_terminal(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    source = text_lines(tmp_path / "train.jsonl", 10, {7: "{"})
    status, _, err = run(f"jsonl:{source}", f"tar:{tmp_path / 'tokens'}", "--shard_size", 5)
    shown, blank, said = err.split("\r")[-3:]
    assert (status, blank.strip()) == (2, "") and shown.startswith("tokenizing:  50%|")
    assert said.startswith("tokenize_images: 1 of the 10 records of --source")


def test_skipped_records_are_counted_through_all_shards(run, refused, tmp_path):
    """12 bad records of 240 are allowed, although they are a tenth of the first 120."""
    bad = dict.fromkeys(range(100, 112), "{")
    source = text_lines(tmp_path / "train.jsonl", 240, bad)
    args = f"jsonl:{source}", f"tar:{tmp_path / 'tokens'}", "--shard_size", 40
    assert run(*args)[0] == 0
    assert len(open_source("tar", tmp_path / "tokens")) == 228
    text_lines(tmp_path / "train.jsonl", 240, bad | {7: "{"})
    args = *args[:1], f"tar:{tmp_path / 'more'}", *args[2:]
    assert "13 of the 240 records of --source are bad (13 malformed)" in refused(*args)


def test_the_list_is_no_source_of_records(run, tmp_path):
    source = text_lines(tmp_path / "train.jsonl", 30, {3: "{"})
    for out in (tmp_path / "tokens", tmp_path / "more"):
        assert "1 skipped (1 malformed)" in run(f"jsonl:{tmp_path}", f"jsonl:{out}")[1]
        assert len(open_source("jsonl", out)) == 29
    assert len(open_source("jsonl", tmp_path)) == 30 and source.is_file()


@pytest.mark.parametrize("format", [*SUFFIXES, "class_folder"])
def test_an_interrupted_run_resumes(format, run, tmp_path, monkeypatch):
    write_records("tar", tmp_path / "train.tar", captioned(7))
    args = f"tar:{tmp_path / 'train.tar'}", f"{format}:{tmp_path / 'tokens'}", "--shard_size", 3
    assert run(args[0], f"{format}:{tmp_path / 'whole'}", *args[2:])[0] == 0

    def interrupted(format, path, records, first):
        if first == 3:
            write_records(format, path, records[:2], first)  # class_folder has partial shards
            if format != "class_folder":
                path.rename(path.with_name(f".{path.name}.abcd"))  # left by a killed run
            raise KeyboardInterrupt
        write_records(format, path, records, first)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_records", interrupted)
        assert run(*args) == (130, "", "tokenize_images: interrupted\n")
    first = {name: data for name, data in contents(tmp_path / "tokens").items() if "0.json" in name}
    assert first
    encoded, encode = [], codec.encode_pixels
    monkeypatch.setattr(
        codec, "encode_pixels", lambda vq, pixels: encoded.append(1) or encode(vq, pixels)
    )
    status, said, err = run(*args)
    assert (status, err, said.count("7 images tokenized")) == (0, "", 1)
    assert len(encoded) == 3  # two batches of the second shard, one of the third
    found, expected = contents(tmp_path / "tokens"), contents(tmp_path / "whole")
    assert found.keys() == expected.keys()
    if format != "arrayrecord":  # its files contain a random number
        assert found == expected
    indices = [record.indices for record in open_source(format, tmp_path / "tokens")]
    whole = [record.indices for record in open_source(format, tmp_path / "whole")]
    np.testing.assert_array_equal(indices, whole)
    assert run(*args) == (0, said, "") and len(encoded) == 3


@pytest.mark.parametrize("left", [None, ".manifest.json.ab12", ".skipped.jsonl.ab12"])
def test_a_run_killed_before_it_noted_anything_restarts(left, run, refused, tmp_path):
    write_records("tar", tmp_path / "train.tar", captioned(2))
    out = tmp_path / "tokens"
    reports = out / ".tokenize_images"
    reports.mkdir(parents=True)
    if left:
        (reports / left).write_text('{"mod')
    args = f"tar:{tmp_path / 'train.tar'}", f"tar:{out}"
    (out / "other").touch()
    assert "must be a new folder or that of an interrupted run" in refused(*args)
    (out / "other").unlink()
    assert run(*args)[0] == 0
    assert sorted(contents(out)) == [
        *(".tokenize_images/00000.json", ".tokenize_images/lock", ".tokenize_images/manifest.json"),
        "shard-00000.tar",
    ]


@pytest.mark.parametrize(
    "wrong", [{}, {"copied": "x"}, {"encoded": None}, {"skipped": {"a": 1}}, {"skipped": [{}]}]
)
def test_a_report_with_other_content_is_named(wrong, run, refused, tmp_path):
    write_records("tar", tmp_path / "train.tar", captioned(3))
    args = f"tar:{tmp_path / 'train.tar'}", f"tar:{tmp_path / 'tokens'}"
    assert run(*args)[0] == 0
    report = tmp_path / "tokens/.tokenize_images/00000.json"
    report.write_text(json.dumps(wrong and json.loads(report.read_text()) | wrong))
    message = refused(*args)
    rule = "must contain the integers encoded and copied, and the list skipped; delete it to"
    assert message == f"tokenize_images: {report} {rule} write its shard again\n"
    report.unlink()
    assert "3 images tokenized" in run(*args)[1]


def test_one_run_at_a_time(run, refused, tmp_path, monkeypatch):
    write_records("tar", tmp_path / "train.tar", captioned(3))
    args = f"tar:{tmp_path / 'train.tar'}", f"tar:{tmp_path / 'tokens'}"
    errors = []

    def meanwhile(format, path, records, first):
        errors.append(refused(*args))  # must not call this function again
        write_records(format, path, records, first)

    monkeypatch.setattr(shards, "write_records", meanwhile)
    status, said, _ = run(*args)
    hint = "wait until it ends, or use another folder"
    message = f"{tmp_path / 'tokens'} is in use by another run; {hint}"
    assert errors == [f"tokenize_images: {message}\n"]
    assert status == 0 and "3 images tokenized" in said
    assert len(open_source("tar", tmp_path / "tokens")) == 3


def test_a_full_disk_is_reported_with_the_name_of_the_file(refused, tmp_path, monkeypatch):
    def without_room(*args, **settings):
        with full_disk(at=1000):
            write_records(*args, **settings)

    write_records("tar", tmp_path / "train.tar", captioned(3))
    monkeypatch.setattr(shards, "write_records", without_room)
    out = tmp_path / "tokens"
    message = refused(f"tar:{tmp_path / 'train.tar'}", f"tar:{out}")
    assert message == f"tokenize_images: [Errno 27] File too large: '{out}/shard-00000.tar'\n"
    assert sorted(contents(out)) == [".tokenize_images/lock", ".tokenize_images/manifest.json"]


def test_it_resumes_only_with_the_same(golden, run, refused, tmp_path):
    for name, count in (("train", 3), ("other", 3)):
        write_records("tar", tmp_path / f"{name}.tar", captioned(count))
    source, output = f"tar:{tmp_path / 'train.tar'}", f"tar:{tmp_path / 'tokens'}"
    assert run(source, output)[0] == 0
    before = contents(tmp_path / "tokens")
    other = f"tar:{tmp_path / 'other.tar'}"
    assert f"with source {source}, which must not change, got {other}" in refused(
        other, output
    )
    assert "with shard_size 1000, which must not change, got 5" in refused(
        source, output, "--shard_size", 5
    )
    assert "with format tar, which must not change, got jsonl" in refused(
        source, f"jsonl:{tmp_path / 'tokens'}"
    )
    model = shutil.copytree(golden / "janus_small", tmp_path / "janus_small")
    assert run(source, output, model=model)[0] == 0  # a copy has the same fingerprint
    weights = safetensors.numpy.load_file(model / "model.safetensors")
    weights["gen_vision_model.quant_conv.bias"] += 1
    safetensors.numpy.save_file(weights, model / "model.safetensors")
    assert "was started with model janus_small with the image tokenizer" in refused(
        source, output, model=model
    )
    write_records("tar", tmp_path / "train.tar", captioned(4))
    assert "with records 3, which must not change, got 4" in refused(source, output)
    assert contents(tmp_path / "tokens") == before


def test_options_of_the_source(run, refused, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(image(1))
    (tmp_path / "train.jsonl").write_text('{"caption": "a", "image": "a.png"}\n')
    args = f"jsonl:{tmp_path / 'train.jsonl'}", f"jsonl:{tmp_path / 'tokens'}"
    rooted = (*args, "--image_root", tmp_path / "images")
    assert "1 images tokenized" in run(*rooted)[1]
    assert "started with image_root" in refused(*args)
    message = refused(*rooted, "--class_names", "names.txt")
    assert "wrong options for a source of the format jsonl" in message


def test_what_is_refused_leaves_nothing(golden, refused, tmp_path):
    write_records("jsonl", tmp_path / "a.jsonl", [Record("text", text="a")])
    source, output = f"jsonl:{tmp_path / 'a.jsonl'}", f"tar:{tmp_path / 'tokens'}"
    before = contents(tmp_path)
    rule = "argument --source: must be FORMAT:PATH, with FORMAT one of jsonl, tar, arrayrecord"
    for wrong in ("csv:a", "jsonl", "jsonl:"):
        assert rule in refused(wrong, output)
    assert "found neither at" in refused("jsonl:missing.jsonl", output)
    assert "is not a folder" in refused(source, output, model="missing")
    assert "--batch_size must be an integer" in refused(source, output, "--batch_size", 0)
    for wrong in (-0.1, 1, "nan"):
        message = f"--max_bad must be at least 0 and below 1, got {float(wrong)}"
        assert message in refused(source, output, "--max_bad", wrong)
    assert "--max_bad: invalid float value: 'x'" in refused(source, output, "--max_bad", "x")
    assert "--shard_size must be an integer" in refused(source, output, "--shard_size", -1)
    assert "unrecognized arguments: --batch" in refused(source, output, "--batch", 3)
    assert "must be a local path, got s3:/" in refused(source, "tar:s3://bucket/a")
    assert "must be a folder, got the file" in refused(source, f"tar:{tmp_path / 'a.jsonl'}")
    assert "that of an interrupted run, got" in refused(source, f"tar:{tmp_path}")
    assert contents(tmp_path) == before and os.listdir(tmp_path) == ["a.jsonl"]
    message = refused(source, f"class_folder:{tmp_path / 'tokens'}")
    assert f"can only hold generation records, got text {tmp_path / 'a.jsonl'}:1" in message


def test_out_of_device_memory(refused, tmp_path, monkeypatch):
    def encode_pixels(vq, pixels):
        raise RuntimeError("RESOURCE_EXHAUSTED: 99 GB")

    monkeypatch.setattr(codec, "encode_pixels", encode_pixels)
    write_records("tar", tmp_path / "a.tar", captioned(1))
    message = refused(f"tar:{tmp_path / 'a.tar'}", f"tar:{tmp_path / 'tokens'}")
    assert "out of memory: on the device, while encoding; a smaller --batch_size" in message


def test_the_image_tokenizer_alone_is_the_models(golden, small, tmp_path, capsys):
    convert([str(golden / "janus_small"), str(tmp_path / "orbax")])
    for folder in (golden / "janus_small", tmp_path / "orbax"):
        alone, whole = load_vq(open_folder(folder)), small.model.gen_vq
        assert jax.tree.structure(alone) == jax.tree.structure(whole)
        for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(whole), strict=True):
            np.testing.assert_array_equal(one, other)


def test_help_comes_without_jax():
    code = "import sys; from janus_jax.commands.tokenize_images import main\n"
    code += "try: main(['--help'])\nfinally: assert 'jax' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--source FORMAT:PATH" in done.stdout


def test_a_platform_without_devices_takes_one_line(refused, monkeypatch, tmp_path):
    def devices():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", devices)
    err = refused(f"class_folder:{tmp_path}", f"arrayrecord:{tmp_path}/out")
    assert "was requested, but JAX found no" in err
