"""Scenes as a source of records: the same ones from one seed, true, as often as asked, no leak."""

import collections
import dataclasses
import io
import itertools
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from janus_jax.data import checker, questions, scenes
from janus_jax.data.loading import RowsConfig, open_rows
from janus_jax.data.records import KINDS, Record
from janus_jax.data.scene_batches import TURNS
from janus_jax.data.sources import open_source
from janus_jax.generation.loading import TINY
from janus_jax.models.janus import JanusConfig
from janus_jax.processing.processor import Processor

PAIR = re.compile(rf"({'|'.join(scenes.COLORS)}) ({'|'.join(scenes.SHAPES)})")
RELATION = re.compile(rf"Is the (.+) ({'|'.join(scenes.RELATIONS)}) the (.+)\?")
PROMPTS = {p.text: p for kind in scenes.KINDS for p in scenes.prompts("train", kind)}


def decoded(record: Record) -> np.ndarray:
    (picture,) = record.pictures
    return np.asarray(Image.open(io.BytesIO(picture)))


def held_out_named(text: str) -> bool:
    """Whether a sentence names a held-out composition."""
    return scenes.is_held_out([(shape, color) for color, shape in PAIR.findall(text)])


def pairs_of(scene: scenes.Scene) -> list[scenes.Pair]:
    return [(item.shape, item.color) for item in scene.objects]


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_depends_on_seed_and_number_alone(kind):
    source = open_source("scenes", kind, count=40, seed=3)
    records = list(source)
    assert len(source) == len(records) == 40 and repr(source) == f"ScenesSource({kind})"
    assert [one.where for one in records] == [f"scenes:{kind}:{i}" for i in range(40)]
    assert {one.kind for one in records} == {kind}
    again = pickle.loads(pickle.dumps(open_source("scenes", Path(kind), count=60, seed=3)))
    assert [again[i] for i in reversed(range(40))] == records[::-1]
    other = open_source("scenes", kind, count=40, seed=4)
    mine, others = (
        [dataclasses.replace(one, where="") for one in each] for each in (records, other)
    )
    assert sum(a == b for a, b in zip(mine, others, strict=True)) < 5
    assert len(set(mine)) > 30


def test_kinds_do_not_share_their_scenes():
    first, second, third = (open_source("scenes", kind, count=50) for kind in KINDS)
    for one, other in itertools.combinations((first, second, third), 2):
        assert sum(one.scene(i) == other.scene(i) for i in range(50)) < 3


@pytest.mark.parametrize("kind", ["generation", "understanding"])
def test_pictures_are_the_drawn_pixels(kind):
    source = open_source("scenes", kind, count=50)
    for number, record in enumerate(source):
        pixels = decoded(record)
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, scenes.draw(source.scene(number)))


def test_captions_are_true_of_their_pictures():
    for record in open_source("scenes", "generation", count=200):
        found = checker.detect(decoded(record))
        assert checker.satisfies(PROMPTS[record.text].requirement, found), record.text
        assert record.turns == ()


def test_captions_are_drawn_by_their_weights_in_whichever_order():
    weights = dict(position=6, counting=3, colors=1, color_attr=0)
    source = open_source("scenes", "generation", count=1500, captions=weights)
    records = list(source)
    found = collections.Counter(PROMPTS[record.text].kind for record in records)
    assert set(found) == {"position", "counting", "colors"}
    for kind, part in dict(position=0.6, counting=0.3, colors=0.1).items():
        assert abs(found[kind] / 1500 - part) < 0.05, kind  # deviation at most 0.013
    for same in (ConfigDict(weights), dict(reversed(weights.items()))):
        assert list(open_source("scenes", "generation", count=1500, captions=same)) == records


def test_captions_are_of_all_kinds_equally_unless_told_otherwise():
    texts = [record.text for record in open_source("scenes", "generation", count=1500)]
    found = collections.Counter(PROMPTS[text].kind for text in texts)
    assert set(found) == set(scenes.KINDS)
    assert all(abs(number / 1500 - 1 / 6) < 0.04 for number in found.values())  # deviation 0.01


def test_sentences_are_captions_and_descriptions():
    source = open_source("scenes", "text", count=300)
    records = list(source)
    assert all(one.pictures == one.turns == () for one in records)
    described = [i for i, one in enumerate(records) if one.text not in PROMPTS]
    # captions are half; descriptions of two objects and of equal ones read as captions do
    assert 60 < len(described) < 150
    for i, record in enumerate(records):
        scene = source.scene(i)
        prompt = PROMPTS.get(record.text)
        if prompt is None:
            assert record.text == questions.describe(scene)
        else:
            found = checker.detect(scenes.draw(scene))
            assert checker.satisfies(prompt.requirement, found), record.text


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_held_out_is_shown_or_named(kind):
    source = open_source("scenes", kind, count=2000, seed=1)
    several = 0
    for number, record in enumerate(source):
        pairs = pairs_of(source.scene(number))
        several += len(set(pairs)) > 1
        assert not scenes.is_held_out(pairs)
        said = [record.text] if record.text else [answer for _, answer in record.turns]
        assert not any(map(held_out_named, said))
    assert several > 500


def test_the_check_of_names_finds_what_is_held_out():
    texts = [p.text for kind in scenes.KINDS for p in scenes.prompts("held_out", kind)]
    assert len(texts) > 100 and all(map(held_out_named, texts))


def relation_questions(relations: float, count: int) -> tuple[list, int]:
    """(scene, question, answer) about relations, and how many questions could have been such."""
    source = open_source("scenes", "understanding", count=count, relations=relations)
    asked, possible = [], 0
    for number, record in enumerate(source):
        scene = source.scene(number)
        assert len(record.turns) == TURNS and record.text == ""
        if questions.ask_relation(np.random.default_rng(0), scene) is not None:
            possible += TURNS
        asked += [(scene, *turn) for turn in record.turns if RELATION.fullmatch(turn[0])]
    return asked, possible


def test_relations_are_asked_about_as_often_as_wanted():
    """sample_question asks one time in ten, where it can."""
    for relations in (0, 0.3, 0.7, 1):
        asked, possible = relation_questions(relations, 700)
        assert 800 < possible < 1200  # of 2100
        expected = relations + (1 - relations) * 0.1
        assert abs(len(asked) / possible - expected) < 0.06, relations  # deviation at most 0.016


def named(scene: scenes.Scene, name: str) -> scenes.Object:
    """The one object that a name ("cross", "red cross") fits."""
    fitting = [one for one in scene.objects if name in (one.shape, f"{one.color} {one.shape}")]
    assert len(fitting) == 1, name
    return fitting[0]


def test_answers_about_relations_are_right():
    asked, _ = relation_questions(0.8, 300)
    answers = collections.Counter()
    for scene, question, answer in asked:
        first, relation, second = RELATION.fullmatch(question).groups()
        one, other = named(scene, first), named(scene, second)
        right, down = one.x - other.x, one.y - other.y
        clear = {"right of": right, "left of": -right, "below": down, "above": -down}
        assert answer == ("yes" if clear[relation] > 0 else "no"), question
        assert abs(clear[relation]) == max(abs(right), abs(down)) > 0
        answers[answer, relation] += 1
    assert len(answers) == 8 and min(answers.values()) > len(asked) / 20


@pytest.mark.parametrize(
    ("path", "options", "rule"),
    [
        ("drawing", {}, "path of scenes must be one of understanding, text, generation, got 'draw"),
        ("text", dict(count=0), "count must be a whole number of at least 1, got 0"),
        ("text", dict(count=1e3), r"count must be a whole number of at least 1, got 1000\.0"),
        ("text", dict(seed=-1), "seed must be a whole number in .*, got -1"),
        ("text", dict(seed=2**32), "seed must be a whole number in .*, got 4294967296"),
        ("text", dict(captions=dict(colors=1)), "left to generation, got them for text"),
        ("generation", dict(captions={}), "one of them above 0, got {}"),
        ("generation", dict(captions=dict(colors=0)), "one of them above 0, got {'colors': 0}"),
        ("generation", dict(captions=dict(dogs=1)), "weights of single_object, .*got {'dogs': 1}"),
        ("generation", dict(captions=ConfigDict(dict(colors=-1, position=2))), "got {'colors': -1"),
        ("generation", dict(captions=dict(colors=float("nan"))), "above 0, got {'colors': nan}"),
        ("generation", dict(captions=[1, 2]), r"above 0, got \[1, 2\]"),
        ("generation", dict(relations=0.5), "left to understanding, got it for generation"),
        ("understanding", dict(relations=1.5), "relations must be a number from 0 to 1, got 1.5"),
        ("understanding", dict(relations="all"), "relations must be .*, got 'all'"),
        ("understanding", dict(question=1), "scenes takes other options: .*'question'"),
    ],
)
def test_wrong_options_are_refused_in_one_line(path, options, rule):
    with pytest.raises(ValueError, match=rule) as refused:
        open_source("scenes", path, **options)
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def processor():
    return Processor.from_dir(TINY)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_tokenizer_has_every_word(kind, processor):
    """A token a word: else what is said could not be learned well."""
    for record in open_source("scenes", kind, count=100, seed=2):
        for text in [record.text, *itertools.chain(*record.turns)]:
            words = re.findall(r"\w+|[^\w\s]", text)
            # one more: the beginning of the text, or the space before its first word
            assert len(processor.tokenizer.encode(f" {text}")) <= len(words) + 2, text


def test_scenes_become_rows_of_the_shipped_model(processor, tmp_path):
    captions = dict(counting=1, position=2)
    mixture = dict(
        understanding=dict(weight=2, format="scenes", path="understanding", relations=0.5),
        text=dict(weight=1, format="scenes", path="text", count=500),
        generation=dict(weight=3, format="scenes", path="generation", captions=captions),
    )
    cfg = RowsConfig(
        mixture=ConfigDict(mixture),
        length=256,
        max_pictures=3,
        max_drawn=4,
        rows=2,
        streams=1,
        tokenized=False,
        max_bad=0,
        threads=1,
        seed=0,
    )
    rows, skipped = open_rows(cfg, processor, JanusConfig.janus_tiny(), tmp_path)
    batches = list(itertools.islice(rows, 12))
    places = [place for batch in batches for row in batch["records"] for place in row]
    found = collections.Counter(place.split(":")[1] for place in places)
    assert set(found) == set(KINDS) and skipped.counts == {}
    for kind, node in mixture.items():
        assert abs(found[kind] / len(places) - node["weight"] / 6) < 0.1
    source = open_source("scenes", "generation", captions=captions)
    first = next(p for p in batches[0]["records"][0] if p.startswith("scenes:generation:"))
    picture = scenes.draw(source.scene(int(first.rsplit(":", 1)[1])))
    np.testing.assert_array_equal(batches[0]["drawn"][0, 0], picture)
