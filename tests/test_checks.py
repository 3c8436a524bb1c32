"""Tests of the checks of numbers, and of shortened values in messages."""

import re
import time

import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax import checks
from janus_jax.commands import sample as cli


def doubled(value, times: int):
    """Returns nested tuples, each with two references to the next; doubles `times` times."""
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
    path = "/data/" + "folder/" * 100 + "image-000123.png"
    shown = checks.shorten_text(path)
    assert len(shown) == 80
    assert shown.startswith("/data/folder/") and shown.endswith("older/image-000123.png")
    assert checks.shorten_text("as it is") == "as it is"
    assert checks.shorten_text("two\nlines") == "two lines"


@pytest.mark.parametrize(
    "kind", [int, np.int8, np.uint64, np.array, np.float32, jnp.int32, jnp.array, jnp.bfloat16]
)
def test_scalars_of_numpy_and_jax_are_numbers(kind):
    number = checks.check_number("size", kind(7))
    assert (type(number), number) == (float, 7.0)
    if not jnp.issubdtype(jnp.asarray(kind(7)).dtype, jnp.floating):
        count, seed = checks.check_count("size", kind(7)), checks.check_seed(kind(7))
        assert (type(count), count, type(seed), seed) == (int, 7, int, 7)


def test_numbers_of_64_bits_keep_all_bits():
    assert checks.check_seed(np.uint64(2**64 - 1)) == 2**64 - 1
    assert checks.check_seed(np.array(2**63 + 1, np.uint64)) == 2**63 + 1
    assert checks.check_number("size", np.float64(0.1)) == 0.1


@pytest.mark.parametrize(
    "value", [True, np.bool_(True), jnp.array(True), np.nan, np.float32(np.inf), jnp.array(jnp.nan)]
)
def test_truth_values_and_numbers_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match=r"size.*finite"):
        checks.check_number("size", value)
    with pytest.raises(ValueError, match=r"size.*integer"):
        checks.check_count("size", value)


@pytest.mark.parametrize("value", [np.ones(2), np.ones((1, 1), int), jnp.arange(3), np.ones(1)])
@pytest.mark.parametrize("check", [checks.check_number, checks.check_count])
def test_arrays_with_dimensions_are_refused_by_name(check, value):
    shape = re.escape(str(value.shape))
    with pytest.raises(ValueError, match=f"size.*shape {shape}$"):
        check("size", value)


@pytest.mark.parametrize("check", [checks.check_number, checks.check_count])
def test_refusals_repeat_at_most_80_characters(check):
    with pytest.raises(ValueError, match=r"size.*'xxx") as error:
        check("size", "x" * 1000)
    assert len(str(error.value)) < 140
    with pytest.raises(ValueError, match=r"seed.*\b100001 bits"):
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
