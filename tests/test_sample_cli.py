"""Tests of sample.py through its main(): files, answers, and one-line error messages."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from limits import full_disk
from one_line import assert_one_line
from PIL import Image
from png_files import GRAY, png_file

from janus_jax.commands import gallery
from janus_jax.commands import sample as cli
from janus_jax.generation import image

PROMPT = "A close-up photo of a red cat, studio light."


@pytest.fixture
def run(golden, capsys, tmp_path, monkeypatch):
    """Runs the command on the small checkpoint; returns (status, lines of stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        status = 0
        try:
            cli.main(["--model", str(golden / "janus_small"), *map(str, flags)])
        except SystemExit as stopped:
            status = stopped.code
        out, err = capsys.readouterr()
        return status, out.splitlines(), err

    return run


@pytest.fixture
def loaded(small, quick_compiles, monkeypatch):
    """Replaces loading by the small checkpoint that the test session has loaded already."""
    monkeypatch.setattr("janus_jax.generation.pipeline.load", lambda *_, **__: small)


def test_greedy_indices_are_those_of_the_original(run, golden, tmp_path):
    recorded = np.load(golden / "janus_t2i.npz")
    status, paths, err = run(
        *("--model", golden / "janus", "--prompt", PROMPT, "--num_images", 2),
        *("--temperature", 0, "--guidance_weight", 5, "--output_dir", "out/deep"),
        *("--save_indices", "out/deep/kept.npz"),
    )
    assert (status, err) == (0, "")
    stem = paths[0].removesuffix("-00.png")
    words = "a-close-up-photo-of-a-red-cat-studio-lig"
    assert re.fullmatch(rf"out/deep/{words}-seed0-[0-9a-f]{{6}}", stem)
    assert paths == [f"{stem}-00.png", f"{stem}-01.png", f"{stem}-sheet.png", "out/deep/kept.npz"]
    saved = np.load(paths[3])
    np.testing.assert_array_equal(saved["indices"], recorded["greedy_tokens"])
    assert saved["prompt"].tolist() == [PROMPT, PROMPT]
    for path, expected in zip(paths, recorded["greedy_uint8"], strict=False):
        assert np.abs(np.asarray(Image.open(path)).astype(int) - expected).max() <= 1
    assert Image.open(paths[2]).size == (2 * 64 + 12, 64 + 8)
    assert "image" not in Image.open(paths[2]).text
    assert sorted(p.name for p in tmp_path.rglob("*") if p.name.startswith(".")) == []


def test_a_png_says_how_it_was_made(run, loaded, small):
    flags = ("--num_images", 2, "--seed", 7, "--temperature", 0.5, "--top_k", 9)
    _, paths, _ = run("--prompt", "ein grünes Haus 🏠", *flags)
    text = Image.open(paths[1]).text
    assert text["prompt"] == "ein grünes Haus 🏠"
    assert (text["seed"], text["image"], text["model"]) == ("7", "1", small.name)
    assert json.loads(text["settings"]) == {
        "guidance_weight": 5.0, "temperature": 0.5, "top_k": 9, "top_p": None, "dtype": "float32",
    }  # fmt: skip
    assert re.fullmatch(r"ein-grünes-haus-seed7-[0-9a-f]{6}-01.png", Path(paths[1]).name)


def test_a_seed_of_64_bits_is_kept(run, loaded, small):
    seed = 2**64 - 1
    flags = ("--prompt", "a cat", "--num_images", 2, "--seed", seed, "--save_indices", "kept.npz")
    status, paths, err = run(*flags)
    assert (status, err) == (0, "")
    assert Image.open(paths[0]).text["seed"] == str(seed) and f"-seed{seed}-" in paths[0]
    assert int(np.load("kept.npz")["seed"]) == seed


def test_each_line_of_a_file_is_a_prompt(run, loaded, small, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa\u2028dog\r\n\r\n  a cat \n".encode())
    status, paths, _ = run("--prompts_file", "prompts.txt", "--num_images", 2)
    assert status == 0
    names = [re.sub("seed0-[0-9a-f]{6}", "seed0-DIGEST", Path(path).name) for path in paths]
    assert names == [
        *("000-a-dog-seed0-DIGEST-00.png", "000-a-dog-seed0-DIGEST-01.png"),
        *("001-a-cat-seed0-DIGEST-00.png", "001-a-cat-seed0-DIGEST-01.png"),
        "prompts-seed0-DIGEST-sheet.png",
    ]
    expected = small.generate_images(["a\u2028dog", "a cat"], 2, progress=lambda *_: None).pixels
    np.testing.assert_array_equal(np.asarray(Image.open(paths[2])), expected[2])
    sheet = np.asarray(Image.open(paths[4]))
    np.testing.assert_array_equal(sheet[4 + 68 : 68 + 68, 4:68], expected[2])
    assert Image.open(paths[4]).text["prompt"] == "a\u2028dog\na cat"


def test_prompts_come_through_a_pipe():
    """--prompts_file <(COMMAND) in a shell passes the path of a pipe."""
    reading, writing = os.pipe()
    os.write(writing, b"a dog\n a cat\n")
    os.close(writing)
    assert cli.read_prompts(Path(f"/dev/fd/{reading}")) == ["a dog", "a cat"]
    os.close(reading)


@pytest.mark.parametrize("full", [False, True])
def test_what_was_generated_before_an_error_is_kept(run, loaded, full, monkeypatch, tmp_path):
    save, saved = gallery.save_png, []

    def broken(path, *rest):
        if len(saved) < 3:  # the fourth image is in the second chunk
            saved.append(str(save(path, *rest)))
            return path
        if not full:
            raise KeyboardInterrupt
        with full_disk(at=100):
            return save(path, *rest)

    monkeypatch.setattr(gallery, "save_png", broken)
    status, paths, err = run("--prompt", PROMPT, "--num_images", 4, "--max_batch", 2)
    named = f"'{paths[0].removesuffix('-00.png')}-03.png'"
    expected = {130: "interrupted", 2: named}[status]
    assert status == (2 if full else 130)
    assert paths == saved and err.endswith(f"{expected}\n")
    assert sorted(saved) == sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.png"))


def test_no_memory_takes_one_line(run, loaded, monkeypatch):
    def allocate(*args, **settings):
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr(image, "make_requests", allocate)
    status, lines, err = run("--prompt", "a")
    assert (status, lines) == (2, [])
    assert_one_line(err, "sample.py", "memory", "9 TiB")


def test_a_question_is_answered(run, loaded, small, golden):
    images = [golden / "preprocess" / name for name in ("img0_50x120.png", "img2_64x64.png")]
    flags = [word for image in images for word in ("--image", image)]
    status, lines, err = run(*flags, "--question", "Which?", "--max_new_tokens", 6)
    assert (status, err) == (0, "")
    assert "\n".join(lines) == small.answer("Which?", images, max_new_tokens=6)


def test_a_chat_remembers_its_turns(run, loaded, small, golden, monkeypatch):
    image = golden / "preprocess" / "img0_50x120.png"
    monkeypatch.setenv("HOME", str(golden))
    typed = "Hi\n/image ~/preprocess/img0_50x120.png\n/img x\n/new\n"
    typed += "Hello\n\n/image nowhere.png\n/image\n/image ~no_such_user/a.png\n"
    typed += f"/image {image}\nWhat is it?\n/quit\nnever\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    conversations = []
    stream = small.stream

    def recorded(conversation, *rest, **settings):
        conversations.append(conversation)
        return stream(conversation, *rest, **settings)

    monkeypatch.setattr(small, "stream", recorded)
    status, lines, err = run("--chat", "--max_new_tokens", 6)
    assert status == 0
    expected = (("/img", "/image FILE"), ("image", "nowhere.png"), ("image", "''"))
    expected += (("image", "~no_such_user/a.png"),)
    errors = [line for line in err.splitlines() if line.startswith("sample.py: ")]
    for line, words in zip(errors, expected, strict=True):
        assert_one_line(line, "sample.py", *words)
    assert len(err.splitlines()) == 5
    assert len(conversations) == 3
    discarded, first = (small.answer(text, max_new_tokens=6) for text in ("Hi", "Hello"))
    assert [m["content"] for m in conversations[2]] == ["Hello", first, "What is it?"]
    assert [len(m.get("images", ())) for m in conversations[2]] == [0, 0, 1]
    last = small.answer(conversations[2], max_new_tokens=6)
    assert "\n".join(lines) == f"{discarded}\n{first}\n{last}"


def test_an_interrupt_ends_one_answer_and_not_the_chat(run, loaded, small, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nHello\n"))
    conversations = []

    def stream(conversation, *rest, **settings):
        conversations.append([message["content"] for message in conversation])
        yield "a"
        if len(conversations) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(small, "stream", stream)
    status, _, err = run("--chat")
    assert status == 0 and conversations == [["Hi"], ["Hello"]]
    assert "discarded" in err.splitlines()[-1]


ONE_SIZE = "one fixed size 384"


@pytest.mark.parametrize(
    ("requested", "error", "words"),
    [
        (
            "cuda",
            AssertionError(),
            "JAX_PLATFORMS=cuda janus_jax[cuda12] janus_jax[cuda13] unset JAX_PLATFORMS cpu",
        ),
        (
            "tpu",
            RuntimeError("no libtpu.so (set JAX_PLATFORMS='' to automatically choose)"),
            "JAX_PLATFORMS=tpu (no libtpu.so) janus_jax[tpu] unset JAX_PLATFORMS cpu",
        ),
        (
            "bogus",
            RuntimeError("unknown"),
            "JAX_PLATFORMS=bogus (unknown) unset JAX_PLATFORMS cpu",
        ),
        ("", RuntimeError("the TPU is in use"), "JAX (the TPU is in use)"),
    ],
)
def test_a_platform_without_devices_takes_one_line(run, monkeypatch, requested, error, words):
    def devices():
        raise error

    before = jax.config.jax_platforms
    monkeypatch.setattr(jax, "devices", devices)
    try:
        jax.config.update("jax_platforms", requested)
        status, lines, err = run("--prompt", "a")
    finally:
        jax.config.update("jax_platforms", before)
    assert (status, lines) == (2, [])
    assert_one_line(err, "sample.py", *words.split())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--prompt --prompts_file --question --chat"),
        (["--prompt", "a", "--chat"], "--chat: --prompt"),
        (["--prompt", "a", "--sed", "1"], "--sed 1"),
        (["--image-size", "512"], ONE_SIZE),
        (["--prompt", "a", "--width=512"], ONE_SIZE),
        (["--prompt", "a", "--seed", "x"], "--seed 'x'"),
        (["--prompt", "a", "--seed", "-1"], "seed [0, 2**64) -1"),
        (["--prompt", "a", "--image", "b"], "--image --prompt"),
        (["--chat", "--num_images", "2"], "--num_images --question"),
        (["--question", "a", "--top_k", "3"], "--top_k temperature 0"),
        (["--prompt", "a", "--temperature", "0", "--top_p", "0.5"], "--top_p temperature 0"),
        (["--prompt", ""], "--prompt ''"),
        (["--prompt", "a", "--num_images", "0"], "num_images 1 0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature -1"),
        (["--prompt", "a", "--top_k", "1000"], "top_k 128 1000"),
        (["--prompt", "a", "--dtype", "float16"], "dtype float32, bfloat16 float16"),
        (["--prompt", "a", "--mesh", "tensor=99"], "tensor=99 99 8"),
        (["--prompt", "a", "--mesh", "x"], "mesh data=1,fsdp=1,tensor=1 'x'"),
        (["--prompt", "a", "--mesh", ""], "mesh data=1,fsdp=1,tensor=1 ''"),
        (["--prompt", "\udcff"], "text Unicode"),
        (["--question", " "], "--question blank"),
        (["--prompts_file", "none.txt"], "--prompts_file none.txt"),
        (["--prompts_file", "blank.txt"], "--prompts_file blank.txt"),
        (["--prompts_file", "bytes.txt"], "--prompts_file bytes.txt UTF-8"),
        (["--prompt", "a", "--output_dir", "blank.txt"], "blank.txt folder"),
        (["--prompt", "a", "--output_dir", "to_nothing"], "to_nothing folder"),
        (["--prompt", "a", "--output_dir", "gs://bucket/a"], "local gs:/"),
        (["--prompt", "a", "--output_dir", "blank.txt/a"], "blank.txt folder"),
        (["--prompt", "a", "--output_dir", ""], "--output_dir ''"),
        (["--prompt", "a", "--save_indices", "a.txt"], ".npz a.txt"),
        (["--prompt", "a", "--save_indices", "b.npz"], "b.npz folder"),
        (["--prompt", "a", "--save_indices", "no/a.npz"], "--save_indices no exist"),
        (["--question", "a", "--image", "none.png"], "none.png"),
        (["--question", "a", "--image", "blank.txt"], "image blank.txt"),
        (["--question", "a", "--image", "/dev/zero"], "/dev/zero regular"),
        (["--question", "a", "--image", "thin.png"], "aspect 1000 60000"),
        (["--prompts_file", "/dev/zero"], "--prompts_file /dev/zero 1000"),
        (["--question", "a", "--max_new_tokens", "0"], "max_new_tokens 1 0"),
        (["--question", "a", "--max_new_tokens", "5000"], "512 5000"),
        (["--prompt", "a", "--model", "nowhere"], "nowhere folder"),
    ],
)
def test_what_is_wrong_takes_one_line(flags, words, run, small, monkeypatch, tmp_path):
    from janus_jax.generation import pipeline as pipelines

    real = pipelines.load
    fine = "nowhere" not in flags and "float16" not in flags
    monkeypatch.setattr(pipelines, "load", lambda *a, **k: small if fine else real(*a, **k))
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "thin.png").write_bytes(png_file(np.zeros((1, 1)), 8, GRAY, size=(60_000, 1)))
    monkeypatch.setattr(cli, "MAX_TEXT_BYTES", 1000)
    (tmp_path / "b.npz").mkdir()
    (tmp_path / "to_nothing").symlink_to(tmp_path / "nothing")
    there = sorted(tmp_path.iterdir())
    status, out, err = run(*flags)
    assert (status, out) == (2, [])
    assert_one_line(err, "sample.py", *words.split())
    assert sorted(tmp_path.iterdir()) == there


@pytest.mark.parametrize(
    "flags",
    [
        ["--prompt", ""],
        ["--prompt", "a", "--num_images", "0"],
        ["--prompt", "a", "--seed", "-1"],
        ["--prompt", "a", "--temperature", "-1"],
        ["--prompt", "a", "--top_k", "0"],
        ["--prompt", "a", "--top_p", "2"],
        ["--prompt", "a", "--guidance_weight", "nan"],
        ["--prompt", "a", "--max_batch", "0"],
        ["--prompt", "a", "--save_indices", "no/a.npz"],
        ["--question", "a", "--image", "broken.png"],
        ["--chat", "--image", "none.png"],
        ["--chat", "--max_new_tokens", "0"],
    ],
)
def test_what_needs_no_model_is_refused_before_one_is_loaded(flags, run, monkeypatch, tmp_path):
    loads = []
    monkeypatch.setattr("janus_jax.generation.pipeline.load", lambda *_, **__: loads.append(1))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    assert run(*flags)[0] == 2
    assert not loads


@pytest.mark.parametrize(
    ("flags", "fails", "advice"),
    [
        (["--prompt", "a"], "stream_images", "--max_batch"),
        (["--question", "a"], "stream", "images --max_new_tokens"),
        (["--chat"], "stream", "images --max_new_tokens"),
        (["--question", "a"], "load", "--dtype bfloat16 --mesh"),
    ],
)
def test_out_of_memory_is_reported_in_one_line(flags, fails, advice, run, small, monkeypatch):
    def exhausted(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    load = exhausted if fails == "load" else lambda *_, **__: small
    monkeypatch.setattr("janus_jax.generation.pipeline.load", load)
    if fails != "load":
        monkeypatch.setattr(small, fails, exhausted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    status, _, err = run(*flags)
    assert status == 2
    message = err.splitlines()[-1]
    assert_one_line(message, "sample.py", "memory", "device", *advice.split())
    for flag in re.findall(r"--\w+", advice):  # the advised flags must be accepted
        cli.parse_flags([*flags, flag, "1"])


def test_other_errors_of_the_runtime_are_not_hidden(run, loaded, small, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(small, "stream_images", broken)
    with pytest.raises(RuntimeError, match="INTERNAL"):
        run("--prompt", "a")


def test_what_a_terminal_cannot_show_is_no_reason_to_stop(golden, tmp_path):
    flags = ("--prompt", "ein grünes Haus", "--num_images", 1, "--output_dir", tmp_path)
    settings = dict(PYTHONIOENCODING="ascii", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    done = subprocess.run(
        [sys.executable, "sample.py", "--model", golden / "janus_small", *map(str, flags)],
        cwd=Path(__file__).parents[1], env=os.environ | settings, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "/ein-gr?nes-haus-seed0-" in done.stdout and len(list(tmp_path.iterdir())) == 2


def test_a_terminal_gets_a_bar(run, loaded, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    _, paths, err = run("--prompt", PROMPT, "--num_images", 1)
    assert len(paths) == 2
    assert "\rgenerating:  12%|" in err and "\rgenerating: 100%|" in err
    assert not err.split("\r")[-2].strip()  # the bar is removed at the end


def test_the_command_itself_explains_itself():
    command = [sys.executable, "sample.py", "--help"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    for flag in ("--prompt", "--question", "--chat", "--mesh", "--save_indices", "--top_p"):
        assert f"\n  {flag} " in done.stdout
