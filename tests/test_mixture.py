"""Tests mixing, streams and packing: ratios, no lost or repeated records, and resumption."""

import collections
import json

import grain
import numpy as np
import pytest
from ml_collections import ConfigDict

from janus_jax.data import packing
from janus_jax.data.mixture import Streams, mixed_examples, open_parts
from janus_jax.data.records import BadRecord, Record
from janus_jax.data.skipped import Skipped

LENGTH, PAD = 64, 9
NODE = "parts.*format.*path"


class Source:
    """Records whose text is their location; those with an index in `bad` are bad."""

    def __init__(self, format, path, size=12, bad=()):
        self.path, self.size, self.bad = path, size, bad

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        where = f"{self.path}:{index}"
        if index in self.bad:
            return BadRecord("missing file", "gone", where)
        return Record("text", text=where, where=where)


def leaf(path, weight=1, **options):
    return dict(format="x", path=path, weight=weight, **options)


def test_a_config_s_mixture_is_one_too():
    tree = ConfigDict(dict(text=leaf("t", 2), drawn=dict(real=leaf("r"), synthetic=leaf("s"))))
    found = [one.name for one in open_parts(tree, Source).leaves()]
    assert found == ["drawn/real", "drawn/synthetic", "text"]


def keep(record, rng):
    return record


def names(dataset, count):
    return [dataset[i].example.where for i in range(count)]


def test_parts_are_mixed_by_weight_and_nested():
    tree = dict(
        text=leaf("t", 2),
        drawn=dict(weight=6, real=leaf("r", 1, size=5), synthetic=leaf("s", 3, size=1000)),
    )
    part = open_parts(tree, Source)
    assert [one.name for one in part.leaves()] == ["drawn/real", "drawn/synthetic", "text"]
    found = collections.Counter(
        name[0] for i in range(4) for name in names(mixed_examples(part, i, 4, keep, 0), 160)
    )
    assert found == dict(t=160, r=120, s=360)


def test_each_epoch_holds_every_record_once_in_another_order():
    part = open_parts(dict(a=leaf("a", size=12)), Source)
    streams = [mixed_examples(part, i, 3, keep, 0) for i in range(3)]
    dealt = [names(one, 12) for one in streams]
    epochs = [
        [dealt[i % 3][i // 3] for i in range(12 * epoch, 12 * epoch + 12)] for epoch in range(3)
    ]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len(set(epochs[0])) == 12
    assert len(set(map(tuple, epochs))) == 3
    other = names(mixed_examples(part, 0, 1, keep, 1), 12)
    assert other != epochs[0] and sorted(other) == sorted(epochs[0])


def test_sources_of_one_size_are_shuffled_apart():
    part = open_parts(dict(a=leaf("a", size=40), b=leaf("b", size=40)), Source)
    found = names(mixed_examples(part, 0, 1, keep, 0), 80)
    orders = [[name[2:] for name in found if name.startswith(one)] for one in "ab"]
    assert orders[0] != orders[1]


def test_randomness_of_examples_depends_on_the_seed_and_the_epoch():
    part = open_parts(dict(a=leaf("a", size=1)), Source)

    def draw(record, rng):
        return BadRecord("", "", str(rng.integers(10**9)))

    found = names(mixed_examples(part, 0, 1, draw, 0), 50)
    assert len(set(found)) == 50
    assert names(mixed_examples(part, 0, 1, draw, 0), 50) == found
    assert names(mixed_examples(part, 0, 1, draw, 1), 50) != found


def test_a_caption_becomes_an_answer_where_a_question_is_given():
    class Captions(Source):
        def __getitem__(self, index):
            return Record("generation", text="a cat", images=(b"x",))

    part = open_parts(dict(a=leaf("a", question="What is it?")), Captions)
    record = mixed_examples(part, 0, 1, keep, 0)[0].example
    assert (record.kind, record.turns) == ("understanding", (("What is it?", "a cat"),))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, rf"mixture.*{NODE}.*\[\]"),
        (dict(a=dict(weight=1)), rf"\ba .*{NODE}.*\[\]"),
        (dict(a=dict(format="x")), rf"\ba .*{NODE}.*\['format'\]"),
        (dict(a=dict(path="x")), rf"\ba .*{NODE}.*\['path'\]"),
        (dict(a=leaf("x", 0)), r"weight.*\b0 .*\ba$"),
        (dict(a=leaf("x", float("inf"))), r"weight.*\binf .*\ba$"),
        (dict(a=leaf("x", question=" ")), r"question.*' ' .*\ba$"),
        (dict(a=dict(b=leaf("x", "2"))), "weight.*'2' .*a/b$"),
    ],
)
def test_wrong_mixtures_are_refused(tree, message):
    with pytest.raises(ValueError, match=message):
        open_parts(tree, Source)


def lengths_of(record, rng):
    """Makes an example whose length depends on its number, with the number in every token."""
    number = int(record.where.split(":")[1])
    length = 3 + number * 7 % 25
    return dict(
        tokens=np.full(length, 100 + number, np.int32),
        image_mask=np.arange(length) < 2,
        gen_mask=np.zeros(length, bool),
        loss_mask=np.arange(length) > 2,
        kind=np.full(length, number % 3, np.int8),
        records=record.where,
        pixels=np.full((1, 2, 2, 3), number, np.uint8),
        generated=np.zeros((0, 4), np.int32),
    )


def rows_of(index, count, seed=0, skipped=lambda loaded: True):
    part = open_parts(dict(a=leaf("a", size=96)), Source)
    examples = mixed_examples(part, index, count, lengths_of, seed).to_iter_dataset()
    kept = examples.filter(skipped).map(lambda loaded: loaded.example)
    return packing.pack_examples(kept, LENGTH, 6, 2, PAD, seed=index)


def test_rows_hold_whole_examples_one_after_the_other():
    rows = iter(rows_of(0, 1))
    for row in (next(rows) for _ in range(60)):
        assert row["tokens"].shape == row["segment_ids"].shape == (LENGTH,)
        assert row["pixels"].shape == (6, 2, 2, 3) and row["generated"].shape == (2, 4)
        assert row["segment_ids"].max() <= 6
        shown = []
        for segment in range(1, row["segment_ids"].max() + 1):
            own = row["segment_ids"] == segment
            (number,) = set((row["tokens"][own] - 100).tolist())
            assert own.sum() == 3 + number * 7 % 25
            assert row["positions"][own].tolist() == list(range(own.sum()))
            assert row["loss_mask"][own].tolist() == [False] * 3 + [True] * (own.sum() - 3)
            shown.append(number)
        assert row["records"] == [f"a:{number}" for number in shown]
        assert row["pixels"][: len(shown), 0, 0, 0].tolist() == shown
        padding = row["segment_ids"] == 0
        assert set(row["tokens"][padding].tolist()) <= {PAD}
        assert not row["loss_mask"][padding].any() and not row["image_mask"][padding].any()


def test_packing_loses_no_example_and_repeats_none():
    rows = iter(rows_of(0, 1))
    found = collections.Counter()
    for row in (next(rows) for _ in range(400)):
        for segment in range(1, row["segment_ids"].max() + 1):
            found[int(row["tokens"][row["segment_ids"] == segment][0])] += 1
    assert set(found) == set(range(100, 196))
    assert max(found.values()) - min(found.values()) <= 2  # differ by examples in open rows


def dialogue(rng):
    """Returns random lengths as in stage II: of a conversation, a text or a generated image."""
    kind = rng.choice(3, p=[0.2, 0.3, 0.5])
    if kind == 0:
        return 578 + int(rng.integers(20, 400)), 1, 0
    if kind == 1:
        return int(np.clip(rng.lognormal(5.5, 1.0), 10, 4000)), 0, 0
    return 576 + int(rng.integers(10, 120)), 0, 1


def test_a_realistic_mix_fills_the_rows():
    rng = np.random.default_rng(0)
    sizes = [dialogue(rng) for _ in range(3000)]

    rows = [row["segment_ids"] for row in dialogue_rows(sizes)]
    assert packing.efficiency(np.stack(rows[: -packing.OPEN_ROWS])) >= 0.95


def dialogue_rows(sizes, seed=0):
    def example(size):
        length, shown, drawn = size
        masks = {f"{name}_mask": np.zeros(length, bool) for name in ("image", "gen", "loss")}
        masks["kind"] = np.full(length, 0 if shown else 2 if drawn else 1, np.int8)
        pixels = np.zeros((shown, 1, 1, 3), np.uint8)
        return dict(
            tokens=np.ones(length, np.int32),
            **masks,
            pixels=pixels,
            generated=np.zeros((drawn, 1)),
            records="",
        )

    examples = grain.MapDataset.source(sizes).map(example).to_iter_dataset()
    return packing.pack_examples(examples, 4096, 7, 7, PAD, seed)


def test_the_mixture_holds_inside_each_step():
    """A step has one row of each stream; without shuffling, all of them would be long examples."""
    streams = []
    for index in range(24):
        rng = np.random.default_rng(index)
        rows = dialogue_rows([dialogue(rng) for _ in range(500)], index)
        rows = iter(rows)
        kept = [next(rows) for _ in range(32)]
        streams.append([row["kind"][row["segment_ids"] > 0] for row in kept])
    shares = [
        np.bincount(np.concatenate(step), minlength=3) / sum(map(len, step))
        for step in zip(*streams, strict=True)
    ]
    assert np.std(shares, axis=0).max() < 0.05
    assert np.abs(np.array(shares) - np.mean(shares, axis=0)).max() < 0.15


def steps(streams, rows=2, seed=0, settings=None):
    return iter(Streams({i: rows_of(i, 4, seed) for i in streams}, rows, settings or {}))


def by_stream(batch, streams, rows=2):
    parts = np.split(batch["tokens"], len(streams))
    return dict(zip(streams, parts, strict=True))


def test_a_run_resumed_on_other_hosts_continues_as_one_host_would():
    alone = steps(range(4))
    whole = [by_stream(next(alone), range(4)) for _ in range(9)]
    first, second = steps([0, 1]), steps([2, 3])
    for step in range(4):
        for host, own in ((first, [0, 1]), (second, [2, 3])):
            for index, rows in by_stream(next(host), own).items():
                np.testing.assert_array_equal(rows, whole[step][index])
    state = json.loads(json.dumps(first.get_state() | second.get_state()))
    for own in ([0], [1], [2], [3], [1, 3], [0, 1, 2, 3]):
        host = steps(own)
        host.set_state(state)
        for step in range(4, 7):
            for index, rows in by_stream(next(host), own).items():
                np.testing.assert_array_equal(rows, whole[step][index])


def test_a_state_of_other_data_is_refused():
    state = steps([0, 1], settings=dict(streams=2, length=64)).get_state()
    steps([0, 1], settings=dict(streams=2, length=64)).set_state(state)
    with pytest.raises(ValueError, match=r"streams 2 -> 4$"):
        steps([0, 1], settings=dict(streams=4, length=64)).set_state(state)


def test_workers_do_not_change_the_order():
    part = open_parts(dict(a=leaf("a", size=96)), Source)
    orders = []
    for workers in (0, 1, 5):
        options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=8)
        found = iter(mixed_examples(part, 0, 2, keep, 0).to_iter_dataset(options))
        orders.append([next(found).example.where for _ in range(60)])
    assert orders[0] == orders[1] == orders[2]


def test_bad_records_leave_no_gap(tmp_path):
    part = open_parts(dict(a=leaf("a", size=30, bad=(3, 7))), Source)
    skipped = Skipped(tmp_path / "skipped.jsonl", max_bad=0.5, num_records=dict(a=30))
    kept = iter(mixed_examples(part, 0, 1, keep, 0).to_iter_dataset().filter(skipped))
    found = [next(kept).example.where for _ in range(28)]
    assert sorted(found) == sorted(f"a:{i}" for i in range(30) if i not in (3, 7))
