"""python -m convert: its output, the files it leaves, and one-line errors for wrong input."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from one_line import assert_one_line

from convert.__main__ import main
from janus_jax.checks import shorten_text
from janus_jax.interop import files, new_folder

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(capsys):
    """Runs a command in this process; returns (status, stdout, stderr)."""

    def call(*args):
        status = 0
        try:
            main([str(arg) for arg in args])
        except SystemExit as stopped:
            status = stopped.code
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def refused(run, tmp_path):
    """Runs a command that must fail and leave no files; returns its one line."""

    def call(*args):
        before = sorted(tmp_path.rglob("*"))
        status, out, err = run(*args)
        assert (status, out) == (2, "")
        assert_one_line(err, "convert")
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return call


def test_import_inspect_export(golden, run, tmp_path):
    status, out, err = run(golden / "janus", tmp_path / "orbax")
    assert (status, err) == (0, "")
    assert "421 parameter arrays with 1,109,891 values; kept 14 unused tensors in" in out
    names = {path.name for path in (golden / "janus").glob("*.json")}
    found = {path.name for path in (tmp_path / "orbax").iterdir()}
    assert found == names | {"params", "unused.safetensors"}
    for folder in (golden / "janus", tmp_path / "orbax"):
        status, out, err = run("inspect", folder)
        assert (status, err) == (0, "")
        assert "gen_vq" in out and "941,195  bfloat16" in out and "1,109,891" in out
        assert "not used: gen_vision_model.quantize.codebook_used (64 values): a train" in out
        assert all(f"vision_tower.attn_pool.{name}" in out for name in ("latent", "mlp.fc2.bias"))
    status, out, err = run("export", tmp_path / "orbax", tmp_path / "d", "--layout", "deepseek")
    assert (status, err) == (0, "") and "427 tensors" in out and "zeros" not in out
    status, out, err = run("export", tmp_path / "d", tmp_path / "hf", "--layout", "transformers")
    assert (status, err) == (0, "") and "skipped 14 unused tensors" in out
    status, out, err = run("export", tmp_path / "hf", tmp_path / "z", "--layout", "deepseek")
    assert (status, err) == (0, "") and "wrote zeros for 14 unused tensors" in out
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_as_a_program(golden, tmp_path):
    def program(*args):
        command = [sys.executable, "-m", "convert", *map(str, args)]
        env = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    status, out, err = program("--help")
    assert status == 0 and "python -m convert SRC DST" in out and "inspect SRC" in out
    status, out, err = program(tmp_path / "absent", tmp_path / "o")
    assert (status, out) == (2, "")
    assert_one_line(err, "convert", shorten_text(str(tmp_path / "absent")))


def test_help_and_bad_arguments(run):
    for command in ("export", "inspect"):
        status, out, err = run(command, "--help")
        assert status == 0 and f"python -m convert {command}" in out
    for args in ((), ("export", "a", "b", "--layout", "gguf"), ("a", "b", "--force")):
        status, out, err = run(*args)
        assert (status, out) == (2, "")
        assert_one_line(err, "convert")
    assert "--force" in err
    assert_one_line(run("inspect", "")[2], "convert", "SRC", "''")


def test_dst_that_exists(golden, refused, run, tmp_path):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mine.txt").write_text("keep")
    for flags in ((), ("--overwrite",)):
        said = refused(golden / "janus", tmp_path / "o", *flags)
        assert f"{tmp_path / 'o'} exists" in said and "--overwrite" not in said
    assert "local path, got gs:/" in refused(golden / "janus", "gs://bucket/o")
    (tmp_path / "o" / "config.json").write_text("{}")  # as many a project has
    refused(golden / "janus", tmp_path / "o", "--overwrite")
    (tmp_path / "o" / "model.safetensors").touch()
    assert "--overwrite" in refused(golden / "janus", tmp_path / "o")
    assert run(golden / "janus", tmp_path / "o", "--overwrite")[0] == 0
    assert not (tmp_path / "o" / "mine.txt").exists() and (tmp_path / "o" / "params").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


def test_dst_that_holds_src(golden, refused, tmp_path):
    source = checkpoints.make_single(golden, tmp_path / "a" / "b")
    (tmp_path / "a" / "config.json").write_text("{}")
    (tmp_path / "a" / "model.safetensors").touch()
    for target in (source, tmp_path / "a"):
        said = refused("export", source, target, "--layout", "deepseek", "--overwrite")
        assert "inside DST" in said
    assert len(list(source.iterdir())) > 5


def test_truncated_safetensors(golden, refused, tmp_path):
    source = checkpoints.make_single(golden, tmp_path / "s")
    file = source / "model.safetensors"
    data = file.read_bytes()
    for size in (len(data) - 1, 5000, 4, 0):
        file.write_bytes(data[:size])
        said = refused(source, tmp_path / "o")
        assert "model.safetensors" in said
        assert "truncated" in said


def test_pointers_of_git_lfs_are_named(golden, refused, tmp_path):
    source = checkpoints.make_single(golden, tmp_path / "s")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (source / "model.safetensors").write_text(pointer)
    assert "model.safetensors is a Git LFS pointer" in refused("inspect", source)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    assert "pytorch_model.bin is a Git LFS pointer" in refused("inspect", source)


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, float("inf")]},
        {"dtype": "F8", "shape": [2], "data_offsets": [0, 2]},
        {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        [],
    ],
)
def test_damaged_headers(golden, refused, tmp_path, fields):
    source = checkpoints.make_single(golden, tmp_path / "s")
    header = json.dumps({"a": fields}).encode()
    contents = len(header).to_bytes(8, "little") + header + bytes(8)
    (source / "model.safetensors").write_bytes(contents)
    said = refused("inspect", source)
    assert "model.safetensors" in said and " a" in said


@pytest.mark.parametrize(
    ("offsets", "size", "said"),
    [
        (((0, 8), (0, 8)), 8, r"\bb .*\b{8}\b.*\b{0}$"),
        (((8, 16), (0, 8)), 24, r"end of the file.*\b{16}\b.*\b{24}$"),
        (((0, 8), (12, 20)), 20, r"\bb .*\b{8}\b.*\b{12}$"),
    ],
)
def test_tensors_must_fill_the_file(golden, refused, tmp_path, offsets, size, said):
    """The safetensors library requires it too: a wrong offset would load other weights."""
    source = checkpoints.make_single(golden, tmp_path / "s")
    fields = {"dtype": "F32", "shape": [2]}
    header = {name: fields | {"data_offsets": o} for name, o in zip("ab", offsets, strict=True)}
    raw = json.dumps(header).encode()
    contents = len(raw).to_bytes(8, "little") + raw + bytes(size)
    (source / "model.safetensors").write_bytes(contents)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.numpy.load(contents)
    begin = len(contents) - size
    said = re.sub(r"{(\d+)}", lambda match: str(begin + int(match[1])), said)
    assert re.search(said, refused("inspect", source))


def test_the_host_is_enough(run, golden, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert run("inspect", golden / "janus")[0] == 0
    assert os.environ["JAX_PLATFORMS"] == "cpu"


def test_an_index_names_files_beside_it(golden, refused, tmp_path):
    source = checkpoints.make_sharded(golden, tmp_path / "s")
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002", "../s/model-00002"))
    assert "'../s/model-00002-of-" in refused("inspect", source)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_index_that_names_a_missing_shard(golden, refused, tmp_path, kind):
    source = checkpoints.make_sharded(golden, tmp_path / "s", kind)
    shard = next(source.glob(f"*-00002-of-00002.{kind}"))
    shard.unlink()
    said = refused(source, tmp_path / "o")
    assert re.search(rf"\b1 of the 2 shards.*{shard.name}", said)


def test_index_and_shards_that_disagree(golden, refused, tmp_path):
    source = checkpoints.make_sharded(golden, tmp_path / "s")
    index = source / "model.safetensors.index.json"
    shards = sorted(source.glob("model-*"))
    first, second = (safetensors.torch.load_file(path) for path in shards)
    names = list(first)
    second[names[0]] = first[names[0]]
    del first[names[1]]
    second["stray"] = torch.zeros(2)
    for path, state in zip(shards, (first, second), strict=True):
        safetensors.torch.save_file(state, path)
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map}))
    said = refused(source, tmp_path / "o")
    assert f"1 stored twice: {names[0]}" in said
    assert re.search(rf"\b1 missing in the shard.*{names[1]}", said)
    assert "1 stored but not in the index: stray" in said and "1 unknown: stray" in said


def test_wrong_missing_and_unknown_tensors_are_listed_at_once(golden, refused, tmp_path):
    state = checkpoints.tensors(golden)
    del state["language_model.model.norm.weight"], state["gen_embed.weight"]
    state["aligner.layers.0.weight"] = torch.zeros(48, 25)
    state["lora.a"] = state["language_model.model.layers.3.input_layernorm.weight"] = torch.ones(1)
    state["lora.a"] = torch.ones(2)
    said = refused(checkpoints.make_single(golden, tmp_path / "s", state), tmp_path / "o")
    assert "2 missing: gen_embed.weight, language_model.model.norm.weight" in said
    assert "lora.a" in said and "layers.3.input_layernorm" in said and "2 unknown" in said
    assert "aligner.layers.0.weight is (48, 25), expected (48, 24)" in said


def test_a_name_stored_twice_in_one_file(golden, refused, tmp_path):
    source = checkpoints.make_single(golden, tmp_path / "s")
    file = source / "model.safetensors"
    data = file.read_bytes()
    old, new = b'"aligner.layers.0.bias"', b'"aligner.layers.2.bias"'
    file.write_bytes(data.replace(old, new))
    said = refused(source, tmp_path / "o")
    assert "1 stored twice: aligner.layers.2.bias" in said
    assert "1 missing: aligner.layers.0.bias" in said


def test_a_malicious_pickle_is_not_executed(golden, refused, tmp_path):
    source = checkpoints.make_bin(golden, tmp_path / "s")
    state = checkpoints.tensors(golden) | {"trap": checkpoints.Trap(tmp_path / "executed")}
    torch.save(state, source / "pytorch_model.bin")
    assert "mkdir" in refused(source, tmp_path / "o")
    assert not (tmp_path / "executed").exists()


def test_folders_without_weights_or_config(golden, refused, tmp_path):
    checkpoints.copy_small_files(golden, tmp_path / "s")
    said = refused(tmp_path / "s", tmp_path / "o")
    assert re.search("no weights.*model.safetensors", said)
    (tmp_path / "s" / "config.json").unlink()
    assert "no config.json" in refused(tmp_path / "s", tmp_path / "o")
    (tmp_path / "s" / "config.json").write_text("{")
    assert "JSON" in refused(tmp_path / "s", tmp_path / "o")


def test_a_janusflow_folder_is_named(refused, tmp_path):
    (tmp_path / "s").mkdir()
    config = {"model_type": "multi_modality", "vision_gen_enc_config": {}, "language_config": {}}
    (tmp_path / "s" / "config.json").write_text(json.dumps(config))
    said = refused(tmp_path / "s", tmp_path / "o")
    assert re.search("JanusFlow.*vision_gen_enc_config", said)
    assert "JanusFlow" in refused("inspect", tmp_path / "s")


def test_transformers_needs_the_tokenizer(golden, refused, tmp_path):
    source = checkpoints.make_bin(golden, tmp_path / "s")
    (source / "tokenizer.json").unlink()
    said = refused("export", source, tmp_path / "o", "--layout", "transformers")
    assert "tokenizer.json" in said and str(source) in said
    (source / "tokenizer.json").write_text('{"added_tokens": [{}], "model": {"vocab": {}}}')
    refused("export", source, tmp_path / "o", "--layout", "transformers")


def test_an_interrupted_deletion_is_finished(tmp_path, monkeypatch):
    delete, calls = shutil.rmtree, []

    def interrupted(folder, **how):
        calls.append(folder)
        if len(calls) == 1:
            raise KeyboardInterrupt
        delete(folder, **how)

    (tmp_path / "o").mkdir()
    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), new_folder.new_folder(tmp_path / "o", True) as beside:
        (beside / "new.txt").touch()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["o", "o/new.txt"]


@pytest.mark.parametrize("name", ["tokenizer.json", "processor_config.json"])
@pytest.mark.parametrize("contents", [b"", b"\xff", b"[]"])
def test_damaged_files_beside_the_weights(golden, refused, tmp_path, name, contents):
    source = checkpoints.make_single(golden, tmp_path / "s")
    (source / name).write_bytes(contents)
    for command in (("inspect", source), (source, tmp_path / "o")):
        assert f"{source / name} " in refused(*command)


def test_what_came_meanwhile_is_not_replaced(tmp_path):
    for overwrite in (False, True):
        with pytest.raises(ValueError), new_folder.new_folder(tmp_path / "o", overwrite):
            (tmp_path / "o").mkdir(exist_ok=True)
            (tmp_path / "o" / "mine.txt").write_text("keep")
        assert (tmp_path / "o" / "mine.txt").read_text() == "keep"
        assert [path.name for path in tmp_path.iterdir()] == ["o"]
        (tmp_path / "o" / "mine.txt").unlink()
        (tmp_path / "o").rmdir()
    with pytest.raises(FileExistsError), new_folder.new_folder(tmp_path / "o", overwrite=False):
        (tmp_path / "o").mkdir()
        for name in ("config.json", "model.safetensors"):
            (tmp_path / "o" / name).write_text("keep")
    assert (tmp_path / "o" / "config.json").read_text() == "keep"


def test_a_full_disk_leaves_nothing(golden, refused, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.np, "ascontiguousarray", full)  # as a tensor is written
    for args in ((), ("--layout", "deepseek")):
        command = ("export",) if args else ()
        said = refused(*command, golden / "janus", tmp_path / "new" / "newer" / "o", *args)
        assert "No space left on device" in said


def test_a_disk_without_room_is_seen_before_writing(golden, refused, tmp_path, monkeypatch):
    usage = new_folder.shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(new_folder.shutil, "disk_usage", lambda path: usage)
    folders = (golden / "janus", tmp_path / "new" / "newer" / "o")
    for command in (folders, ("export", *folders, "--layout", "deepseek")):
        assert "disk space" in refused(*command)


def test_a_damaged_orbax_folder(golden, refused, run, tmp_path):
    assert run(golden / "janus", tmp_path / "o")[0] == 0
    for path in (tmp_path / "o" / "params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    command = ("export", tmp_path / "o", tmp_path / "d", "--layout", "deepseek")
    assert "params is damaged" in refused(*command)
    (tmp_path / "o" / "params" / "_METADATA").write_text("{")
    assert "params is damaged" in refused(*command)


def test_an_orbax_folder_without_the_unused_tensors_is_as_good(golden, run, tmp_path):
    assert run(golden / "janus", tmp_path / "o")[0] == 0
    (tmp_path / "o" / "unused.safetensors").unlink()
    assert "not used" not in run("inspect", tmp_path / "o")[1]
    command = ("export", tmp_path / "o", tmp_path / "d", "--layout", "deepseek")
    assert "wrote zeros for" in run(*command)[1]


def test_an_interruption_leaves_nothing(golden, run, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.np, "ascontiguousarray", interrupt)  # as a tensor is written
    command = ("export", golden / "janus", tmp_path / "o", "--layout", "deepseek")
    assert run(*command) == (130, "", "convert: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_keeps_what_was_there(golden, refused, run, tmp_path, monkeypatch):
    assert run("export", golden / "janus", tmp_path / "o", "--layout", "deepseek")[0] == 0
    data = (tmp_path / "o" / "model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.np, "ascontiguousarray", full)
    refused("export", golden / "janus", tmp_path / "o", "--layout", "deepseek", "--overwrite")
    assert (tmp_path / "o" / "model.safetensors").read_bytes() == data
