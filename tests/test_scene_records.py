"""Tests of the source of scene records: determinism, true texts, ratios, nothing held out."""

import collections
import dataclasses
import functools
import io
import itertools
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from janus_jax.data.loading import RowsConfig, open_rows
from janus_jax.data.records import KINDS, Record
from janus_jax.data.sources import open_source
from janus_jax.interop.folders import BUNDLED_FOLDER
from janus_jax.models.janus import JanusConfig
from janus_jax.processing.processor import Processor
from janus_jax.shapes import checker, questions, scenes
from janus_jax.shapes.source import ALL_FORMATS, TURNS

PAIR = re.compile(rf"({'|'.join(scenes.COLORS)}) ({'|'.join(scenes.SHAPES)})")
RELATION = re.compile(rf"Is the (.+) ({'|'.join(scenes.RELATIONS)}) the (.+)\?")
open_scenes = functools.partial(open_source, "scenes", formats=ALL_FORMATS)
PROMPTS = {p.text: p for kind in scenes.CAPTION_KINDS for p in scenes.prompts("train", kind)}


def decoded(record: Record) -> np.ndarray:
    (image,) = record.images
    return np.asarray(Image.open(io.BytesIO(image)))


def held_out_named(text: str) -> bool:
    """Returns whether a sentence names a held-out composition."""
    return scenes.is_held_out([(shape, color) for color, shape in PAIR.findall(text)])


def pairs_of(scene: scenes.Scene) -> list[scenes.Pair]:
    return [(item.shape, item.color) for item in scene.objects]


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_depends_on_seed_and_number_alone(kind):
    source = open_scenes(kind, count=40, seed=3)
    records = list(source)
    assert len(source) == len(records) == 40 and repr(source) == f"ScenesSource({kind})"
    assert [one.where for one in records] == [f"scenes:{kind}:{i}" for i in range(40)]
    assert {one.kind for one in records} == {kind}
    again = pickle.loads(pickle.dumps(open_scenes(Path(kind), count=60, seed=3)))
    assert [again[i] for i in reversed(range(40))] == records[::-1]
    other = open_scenes(kind, count=40, seed=4)
    mine, others = (
        [dataclasses.replace(one, where="") for one in each] for each in (records, other)
    )
    assert sum(a == b for a, b in zip(mine, others, strict=True)) < 5
    assert len(set(mine)) > 30


def test_kinds_do_not_share_their_scenes():
    first, second, third = (open_scenes(kind, count=50) for kind in KINDS)
    for one, other in itertools.combinations((first, second, third), 2):
        assert sum(one.scene(i) == other.scene(i) for i in range(50)) < 3


@pytest.mark.parametrize("kind", ["generation", "understanding"])
def test_images_are_the_generated_pixels(kind):
    source = open_scenes(kind, count=50)
    for number, record in enumerate(source):
        pixels = decoded(record)
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, scenes.draw(source.scene(number)))


def test_captions_are_true_of_their_images():
    for record in open_scenes("generation", count=200):
        found = checker.detect(decoded(record))
        assert checker.satisfies(PROMPTS[record.text].requirement, found), record.text
        assert record.turns == ()


@pytest.mark.parametrize("kind", scenes.CAPTION_KINDS)
def test_a_path_may_name_the_kind_of_captions(kind):
    records = list(open_scenes(f"generation/{kind}", count=100))
    assert {PROMPTS[record.text].kind for record in records} == {kind}
    assert records[3].where == f"scenes:generation/{kind}:3"


def test_captions_are_of_all_kinds_equally_unless_the_path_names_one():
    texts = [record.text for record in open_scenes("generation", count=1500)]
    found = collections.Counter(PROMPTS[text].kind for text in texts)
    assert set(found) == set(scenes.CAPTION_KINDS)
    # the standard deviation is 0.01
    assert all(abs(number / 1500 - 1 / 6) < 0.04 for number in found.values())


def test_sentences_are_captions_and_descriptions():
    source = open_scenes("text", count=300)
    records = list(source)
    assert all(one.images == one.turns == () for one in records)
    described = [i for i, one in enumerate(records) if one.text not in PROMPTS]
    # Half are captions. Descriptions of two objects and of equal objects are captions too.
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
    source = open_scenes(kind, count=2000, seed=1)
    several = 0
    for number, record in enumerate(source):
        pairs = pairs_of(source.scene(number))
        several += len(set(pairs)) > 1
        assert not scenes.is_held_out(pairs)
        said = [record.text] if record.text else [answer for _, answer in record.turns]
        assert not any(map(held_out_named, said))
    assert several > 500


def test_the_check_of_names_finds_what_is_held_out():
    texts = [p.text for kind in scenes.CAPTION_KINDS for p in scenes.prompts("held_out", kind)]
    assert len(texts) > 100 and all(map(held_out_named, texts))


def relation_questions(relations: float, count: int) -> tuple[list, int]:
    """Returns the (scene, question, answer) about relations, and how many would be possible."""
    source = open_scenes("understanding", count=count, relations=relations)
    asked, possible = [], 0
    for number, record in enumerate(source):
        scene = source.scene(number)
        assert len(record.turns) == TURNS and record.text == ""
        if questions.ask_relation(np.random.default_rng(0), scene) is not None:
            possible += TURNS
        asked += [(scene, *turn) for turn in record.turns if RELATION.fullmatch(turn[0])]
    return asked, possible


def test_relations_are_asked_about_as_often_as_wanted():
    """sample_question asks about a relation with probability 0.1 if the scene allows it."""
    for relations in (0, 0.3, 0.7, 1):
        asked, possible = relation_questions(relations, 700)
        assert 800 < possible < 1200  # of 2100
        expected = relations + (1 - relations) * 0.1
        # the standard deviation is at most 0.016
        assert abs(len(asked) / possible - expected) < 0.06, relations


def named(scene: scenes.Scene, name: str) -> scenes.Object:
    """Returns the only object that matches a name ("cross", "red cross")."""
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
        ("drawing", {}, "scenes source must be one of .*generation/position, .*got 'drawing'"),
        ("generation/dogs", {}, "path of a scenes source must be one of .*, got 'generation/dogs'"),
        ("text/position", {}, "path of a scenes source must be one of .*, got 'text/position'"),
        ("text", dict(count=0), "count must be an integer of at least 1, got 0"),
        ("text", dict(count=1e3), r"count must be an integer of at least 1, got 1000\.0"),
        ("text", dict(seed=-1), "seed must be an integer in .*, got -1"),
        ("text", dict(seed=2**32), "seed must be an integer in .*, got 4294967296"),
        ("generation", dict(relations=0.5), "only be set for .*, got 0.5 for 'generation'"),
        ("understanding", dict(relations=1.5), "relations must be a number from 0 to 1, got 1.5"),
        ("understanding", dict(relations="all"), "relations must be .*, got 'all'"),
        ("understanding", dict(question=1), "wrong options for .* scenes: .*'question'"),
    ],
)
def test_wrong_options_are_refused_in_one_line(path, options, rule):
    with pytest.raises(ValueError, match=rule) as refused:
        open_scenes(path, **options)
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def processor():
    return Processor.from_dir(BUNDLED_FOLDER)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_tokenizer_has_every_word(kind, processor):
    """Every word is one token; otherwise the texts would be harder to learn."""
    for record in open_scenes(kind, count=100, seed=2):
        for text in [record.text, *itertools.chain(*record.turns)]:
            words = re.findall(r"\w+|[^\w\s]", text)
            # one more for BOS, or for the space before the first word
            assert len(processor.tokenizer.encode(f" {text}")) <= len(words) + 2, text


def test_scenes_become_rows_of_the_shipped_model(processor, tmp_path):
    kinds = scenes.CAPTION_KINDS
    drawn = {kind: dict(format="scenes", path=f"generation/{kind}") for kind in kinds}
    mixture = dict(
        understanding=dict(weight=2, format="scenes", path="understanding", relations=0.5),
        text=dict(weight=1, format="scenes", path="text", count=500),
        generation=dict(weight=3, **drawn),
    )
    cfg = RowsConfig(
        mixture=ConfigDict(mixture),
        seq_len=256,
        max_input_images=3,
        max_generated_images=4,
        batch_size=2,
        streams=1,
        tokenized=False,
        max_bad=0,
        threads=1,
        seed=0,
    )
    rows, skipped = open_rows(
        cfg, processor, JanusConfig.janus_tiny(), tmp_path, formats=ALL_FORMATS
    )
    batches = list(itertools.islice(rows, 12))
    places = [place for batch in batches for row in batch["records"] for place in row]
    found = collections.Counter(re.split("[:/]", place)[1] for place in places)
    assert set(found) == set(KINDS) and skipped.counts == {}
    for kind, node in mixture.items():
        assert abs(found[kind] / len(places) - node["weight"] / 6) < 0.1
    first = next(p for p in batches[0]["records"][0] if p.startswith("scenes:generation/"))
    _, path, number = first.split(":")
    image = scenes.draw(open_scenes(path).scene(int(number)))
    np.testing.assert_array_equal(batches[0]["generated"][0, 0], image)
