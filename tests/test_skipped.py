"""Tests that bad records are counted and listed once, and how many of them stop a run."""

import json
import random

import pytest

from janus_jax.data.mixture import Loaded
from janus_jax.data.records import BadRecord
from janus_jax.data.skipped import Skipped


def bad(number, source="a"):
    return Loaded(source, BadRecord("missing file", "gone", f"x:{number}"))


def good(source="a"):
    return Loaded(source, {})


@pytest.fixture
def opened(tmp_path):
    """Returns a function that makes a Skipped, which continues the list if there is one."""

    def call(max_bad, **num_records):
        return Skipped(tmp_path / "run" / "skipped.jsonl", max_bad, num_records)

    return call


def test_bad_records_are_counted_and_listed_once(opened, tmp_path):
    path = tmp_path / "run" / "skipped.jsonl"
    skipped = opened(0.5, a=12, b=12)
    assert skipped(good())
    assert not any(skipped(bad(number)) for number in (1, 2, 1))
    assert not skipped(Loaded("b", BadRecord("too long", "9 tokens", "y:3")))
    assert skipped.counts == {"a": {"missing file": 2}, "b": {"too long": 1}}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == dict(source="a", record="x:1", reason="missing file", detail="gone")
    assert [line["record"] for line in lines] == ["x:1", "x:2", "y:3"]
    resumed = opened(0.5, a=12, b=12)
    assert resumed.counts == skipped.counts
    assert not resumed(bad(2)) and not resumed(bad(4))
    assert resumed.counts == {"a": {"missing file": 3}, "b": {"too long": 1}}
    assert len(path.read_text().splitlines()) == 4


def test_a_list_that_was_cut_short_is_gone_on_with(opened, tmp_path):
    path = tmp_path / "run" / "skipped.jsonl"
    opened(0.5, a=12)(Loaded("a", BadRecord("odd\u2028", "\udcff", "x\udcff:1")))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:9])
    assert opened(0.5, a=12).counts == {"a": {"odd\u2028": 1}} and path.read_bytes() == whole
    path.write_bytes(whole[:9])
    assert opened(0.5, a=12).counts == {} and path.read_bytes() == b""


def test_a_run_that_restarts_forgets_the_list(opened, tmp_path):
    skipped = opened(0.5, a=12)
    skipped.forget()  # there is no list yet
    skipped(bad(1))
    resumed = opened(0.5, a=12)
    resumed.forget()
    assert resumed.counts == {} and not (tmp_path / "run" / "skipped.jsonl").exists()
    resumed(bad(1))
    assert resumed.counts == {"a": {"missing file": 1}}


def test_more_bad_records_than_a_source_may_have_stop_the_run(opened, tmp_path):
    skipped = opened(0.29, a=100, b=100)  # 0.29 * 100 is less than 29
    for number in range(29):
        assert not skipped(bad(number)) and skipped(good()) and not skipped(bad(number))
    assert not skipped(bad(0, source="b"))
    numbers = r"\b30 .*\b100 records of a\b.*30 missing file.* max_bad=0\.29 "
    with pytest.raises(ValueError, match=f"{numbers}.*{tmp_path / 'run' / 'skipped.jsonl'}"):
        skipped(bad(29))


def test_bad_records_count_through_all_starts_of_a_run(opened):
    for start in range(5):
        skipped = opened(0.25, a=20)
        assert not skipped(bad(start)) and not skipped(bad(0))
    with pytest.raises(ValueError, match=r"\b6 .*\b20 records of a\b"):
        opened(0.25, a=20)(bad(5))
    with pytest.raises(ValueError, match=r"\b6 .*\b20 records of a\b"):
        opened(0.25, a=20)(bad(0))  # the list was not deleted
    assert not opened(0.3, a=20)(bad(0))


def test_none_may_be_bad(opened):
    with pytest.raises(ValueError, match=r"\b1 .*\b1000000 records of a\b.*max_bad=0\b"):
        opened(0, a=1_000_000)(bad(0))


def test_a_large_source_that_is_broken_stops_the_run_at_once(opened):
    for _ in range(2):  # a restarted run is not allowed more
        skipped = opened(0.01, a=10**9)
        with pytest.raises(ValueError, match=r"\b12 of 12\b.*\b1000000000\b"):
            for number in range(20):
                skipped(bad(number))
    skipped = opened(0.01, a=10**9)
    with pytest.raises(ValueError, match=r"\b\d\d of \d\d\d\b.*\b1000000000\b"):
        for number in range(1000):  # 1 in 10 is bad
            skipped(bad(number) if number % 10 == 0 else good())


def test_a_source_with_as_many_bad_records_as_it_may_have_never_stops(opened):
    """This holds for any order, and however often records are read."""
    rng = random.Random(0)
    for most, number in ((0.01, 2000), (0.05, 400), (0.002, 500), (0.5, 40)):
        for _ in range(10):
            skipped = opened(most, a=number)
            skipped.forget()
            for one in (one for _ in range(3) for one in rng.sample(range(number), number)):
                skipped(bad(one) if one < most * number else good())
    assert skipped.counts == {"a": {"missing file": 20}}


def test_records_that_come_again_and_again_do_not_stop_the_run(opened):
    """Evaluation reads the same few records each time, of which too many may be bad."""
    skipped = opened(0.01, a=10_000)
    for _ in range(100):
        for number in range(200):
            skipped(bad(number) if number < 9 else good())
    assert skipped.counts == {"a": {"missing file": 9}}
