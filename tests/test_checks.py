"""What messages show of a user's values."""

import time

import numpy as np
import pytest

from janus_jax import checks, cli


def doubled(value, times: int):
    """A tuple of two references to a tuple of two references ..."""
    for _ in range(times):
        value = (value, value)
    return value


@pytest.mark.parametrize(
    "value",
    [
        "x" * 10_000_000,
        b"x" * 10_000_000,
        bytearray(10_000_000),
        1 << 20_000_000,
        [["x" * 1000] * 1000] * 1000,
        {f"key {i}": list(range(1000)) for i in range(1000)},
        doubled("x", 200),
        np.zeros((1000, 1000)),
        "line\n" * 1000,
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_shortened_value_is_one_short_line_in_bounded_time(value):
    start = time.perf_counter()
    shown = checks.shorten(value)
    assert time.perf_counter() - start < 0.5
    assert 5 < len(shown) <= 80 and "\n" not in shown


@pytest.mark.parametrize("value", ["text", 7, 1.5, None, ["a", 2], ("a",), {"b": b"c"}, "x" * 78])
def test_a_short_value_is_shown_whole(value):
    assert checks.shorten(value) == repr(value)


def test_a_shortened_text_keeps_its_start_and_end():
    path = "/data/" + "folder/" * 100 + "picture-000123.png"
    shown = checks.shorten_text(path)
    assert len(shown) == 80
    assert shown.startswith("/data/folder/") and shown.endswith("older/picture-000123.png")
    assert checks.shorten_text("as it is") == "as it is"
    assert checks.shorten_text("two\nlines") == "two lines"


@pytest.mark.parametrize("check", [checks.check_number, checks.check_count])
def test_refusals_repeat_at_most_80_characters(check):
    with pytest.raises(ValueError, match=r"size must be .* got 'xxx") as error:
        check("size", "x" * 1000)
    assert len(str(error.value)) < 140
    with pytest.raises(ValueError, match=r"seed must be .* got an integer of 100001 bits"):
        checks.check_seed(1 << 100_000)


LONG = "x" * 5000


@pytest.mark.parametrize(
    "flags",
    [
        ("--seed", LONG),
        ("--prompt", "a", LONG),
        ("--prompt", "a", f"--{LONG}"),
        ("--question", "a", "--image", LONG),
        ("--question", "a", "--image", f"data:image/png;base64,{LONG}"),
        ("--question", "a", "--image", f"https://{LONG}"),
        ("--prompts_file", LONG),
        ("--prompt", "a", "--save_indices", LONG),
        ("--prompt", "a", "--save_indices", f"{LONG}/a.npz"),
        ("--prompt", "a", "--num_images", "1" * 4000),
        ("--prompt", " " * 5000),
    ],
)
def test_the_command_repeats_at_most_80_characters(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(flags)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert len(error) < 300 and error.count("\n") == 1
    assert "x" * 81 not in error
