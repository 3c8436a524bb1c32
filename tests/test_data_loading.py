"""Tests the whole input pipeline, from files to rows, with the shipped model's processor."""

import dataclasses
import json

import numpy as np
import pytest
from png_files import RGB, png_file

from benchmarks import data_loading as benchmark
from janus_jax.data import packing
from janus_jax.data.loading import RowsConfig, open_rows
from janus_jax.data.mixture import mixed_examples, open_parts
from janus_jax.data.records import Record
from janus_jax.data.sources import open_source
from janus_jax.data.writers import write_records
from janus_jax.interop.folders import BUNDLED_FOLDER
from janus_jax.models.janus import JanusConfig
from janus_jax.processing.images import encode_png
from janus_jax.processing.processor import Processor
from janus_jax.shapes import questions, scenes

MODEL = JanusConfig.janus_tiny()


@pytest.fixture(scope="module")
def processor():
    return Processor.from_dir(BUNDLED_FOLDER)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Writes three formats: questions about scenes, captions as text, and captions of images."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    conversations, texts, images = [], [], []
    for _ in range(60):
        scene, prompt = scenes.sample_scene(rng, None)
        image = encode_png(scenes.draw(scene))
        conversations.append(
            Record("understanding", (questions.sample_question(rng, scene),), images=(image,))
        )
        texts.append(Record("text", text=prompt.text))
        images.append(Record("generation", text=prompt.text, images=(image,)))
    thin = png_file(np.zeros((1, 1, 3), int), 8, RGB, size=(60_000, 1))  # huge after resizing
    truncated = conversations[7].images[0][:50]
    conversations[7] = dataclasses.replace(conversations[7], images=(truncated,))
    conversations[8] = dataclasses.replace(conversations[8], images=(thin,))
    write_records("jsonl", folder / "conversations.jsonl", conversations)
    write_records("tar", folder / "texts.tar", texts)
    write_records("arrayrecord", folder / "images.array_record", images)
    return dict(
        understanding=dict(weight=1, format="jsonl", path=str(folder / "conversations.jsonl")),
        text=dict(weight=1, format="tar", path=str(folder / "texts.tar")),
        generation=dict(
            weight=2,
            real=dict(format="arrayrecord", path=str(folder / "images.array_record")),
        ),
    )


@pytest.fixture
def settings(mixture):
    return RowsConfig(
        mixture=mixture,
        seq_len=256,
        max_input_images=4,
        max_generated_images=5,
        batch_size=4,
        streams=2,
        tokenized=False,
        max_bad=0.1,
        threads=2,
        seed=0,
    )


def test_files_become_rows(settings, processor, tmp_path):
    rows, skipped = open_rows(settings, processor, MODEL, tmp_path)
    rows = iter(rows)
    batches = [next(rows) for _ in range(30)]
    for batch in batches:
        assert batch["tokens"].shape == (4, 256) and batch["tokens"].dtype == np.int32
        assert batch["pixels"].shape == (4, 4, 96, 96, 3) and batch["pixels"].dtype == np.uint8
        assert batch["generated"].shape == (4, 5, 96, 96, 3)
        shown = batch["image_mask"].sum(1) // MODEL.und_encoder.num_tokens
        for row in range(4):
            assert batch["pixels"][row, : shown[row]].any(axis=(1, 2, 3)).all()
            assert not batch["pixels"][row, shown[row] :].any()
    generated = sum(batch["gen_mask"].sum() for batch in batches) // MODEL.num_image_tokens
    shown = sum(batch["image_mask"].sum() for batch in batches) // MODEL.num_image_tokens
    assert 1.8 < generated / shown < 2.2
    assert packing.efficiency(np.stack([batch["segment_ids"] for batch in batches])) > 0.85
    assert skipped.counts == {"understanding": {"unreadable image": 2}}
    lines = map(json.loads, (tmp_path / "skipped-000.jsonl").read_text().splitlines())
    torn, thin = sorted(lines, key=lambda line: line["record"])
    assert torn["record"].endswith("conversations.jsonl:8") and "truncated" in torn["detail"]
    assert thin["record"].endswith("conversations.jsonl:9") and "got 60000 x 1" in thin["detail"]


def test_the_rows_are_the_same_on_two_hosts_and_when_gone_on_with(settings, processor, tmp_path):
    def opened(host, hosts, threads):
        cfg = dataclasses.replace(settings, threads=threads)
        return iter(open_rows(cfg, processor, MODEL, tmp_path, host, hosts)[0])

    alone = opened(0, 1, 1)
    want = [next(alone)["tokens"] for _ in range(6)]
    hosts = [opened(host, 2, 3) for host in range(2)]
    for step in range(3):
        found = [next(host)["tokens"] for host in hosts]
        np.testing.assert_array_equal(np.concatenate(found), want[step])
    state = json.loads(json.dumps(hosts[0].get_state() | hosts[1].get_state()))
    resumed = opened(0, 1, 2)
    resumed.set_state(state)
    for step in range(3, 6):
        np.testing.assert_array_equal(next(resumed)["tokens"], want[step])


def text_lines(path, bad):
    """Writes 1000 texts, of which those with a number in `bad` are invalid JSON."""
    good = json.dumps(dict(text="a few words"))
    lines = ("{" if number in bad else good for number in range(1000))
    path.write_text("".join(f"{line}\n" for line in lines))
    return dict(text=dict(format="jsonl", path=str(path)))


def in_order(mixture, seed):
    """Returns the numbers of the records of text_lines in the order in which a run reads them."""
    part = open_parts(mixture, open_source)
    records = mixed_examples(part, 0, 1, lambda record, rng: record, seed)
    return [int(records[i].example.where.rpartition(":")[2]) - 1 for i in range(1000)]


def test_bad_records_that_happen_to_come_first_do_not_stop_a_run(settings, processor, tmp_path):
    mixture = text_lines(tmp_path / "texts.jsonl", bad=())
    unlucky = in_order(mixture, seed=0)[:100:10]
    mixture = text_lines(tmp_path / "texts.jsonl", unlucky)
    cfg = dataclasses.replace(settings, mixture=mixture, streams=1, batch_size=1, max_bad=0.01)
    rows, skipped = open_rows(cfg, processor, MODEL, tmp_path)
    rows = iter(rows)
    seen = sum(len(next(rows)["records"][0]) for _ in range(200))
    assert seen > 3 * 1000  # each bad record was read several times
    assert skipped.counts == {"text": {"malformed": 10}}
    resumed, skipped = open_rows(cfg, processor, MODEL, tmp_path)
    assert next(iter(resumed))["records"] and skipped.counts == {"text": {"malformed": 10}}


def test_more_bad_records_than_a_source_may_have_stop_a_run(settings, processor, tmp_path):
    mixture = text_lines(tmp_path / "texts.jsonl", bad=range(40, 51))
    cfg = dataclasses.replace(settings, mixture=mixture, streams=1, batch_size=1, max_bad=0.01)
    rows = iter(open_rows(cfg, processor, MODEL, tmp_path)[0])
    number = r"\b11 .*\b1000 .*\btext\b.*11 malformed"
    message = rf"{number}.* max_bad=0\.01 .*skipped-000\.jsonl"
    with pytest.raises(ValueError, match=message):
        for _ in range(200):
            next(rows)


def test_the_benchmark_measures_what_it_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "IMAGES", 4)
    found = benchmark.measure(tmp_path, "jsonl", records=40, rows=3)
    assert found["images_per_s"] > 1 and found["tokens_per_s"] > 1000
    assert 0.5 < found["packing_efficiency"] <= 1


def test_what_is_longer_than_the_decoder_s_positions_is_skipped(settings, processor, tmp_path):
    longest = MODEL.language_model.max_position_embeddings
    texts = [Record("text", text="red " * number) for number in (longest + 1, longest // 2)]
    write_records("jsonl", tmp_path / "long.jsonl", texts * 5)
    source = dict(format="jsonl", path=str(tmp_path / "long.jsonl"))
    settings = dataclasses.replace(settings, mixture=source, seq_len=2 * longest, max_bad=0.5)
    rows, skipped = open_rows(settings, processor, MODEL, tmp_path)
    next(iter(rows))
    assert skipped.counts[""]["too long"] > 0


def test_rows_streams_and_hosts_must_divide(settings):
    with pytest.raises(ValueError, match="batch_size=4 streams=2 hosts=4"):
        settings.own_streams(0, 4)
    with pytest.raises(ValueError, match="batch_size=3 streams=2 hosts=1"):
        dataclasses.replace(settings, batch_size=3).own_streams(0, 1)
    with pytest.raises(ValueError, match=r"host .*\[0, 2\).*\b2\b"):
        settings.own_streams(2, 2)
    assert list(settings.own_streams(1, 2)) == [1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(streams=0), r"streams.*\b0\b"),
        (dict(seq_len=1.5), r"seq_len.*\b1\.5\b"),
        (dict(max_input_images=-1), r"max_input_images.* -1\b"),
        (dict(max_bad=1.0), r"max_bad.*\b1\.0\b"),
    ],
)
def test_settings_out_of_range_are_refused(settings, changed, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(settings, **changed)


def test_a_run_does_not_resume_with_other_data(settings, processor, tmp_path):
    def opened(**changed):
        cfg = dataclasses.replace(settings, **changed)
        return iter(open_rows(cfg, processor, MODEL, tmp_path)[0])

    state = opened().get_state()
    with pytest.raises(ValueError, match=r"seq_len 256 -> 300, streams 2 -> 4$"):
        opened(streams=4, seq_len=300).set_state(state)
    tree = settings.mixture | dict(text=settings.mixture["text"] | dict(weight=9))
    with pytest.raises(ValueError, match="weight of text 1 -> 9"):
        opened(mixture=tree).set_state(state)
