"""Tests that fields written by common trainers are read or refused, and never ignored silently."""

import base64
import json
import re

import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from source_files import CONVERSATION, assert_bad, assert_same, image, write_lines, write_tar

from janus_jax.data.examples import ExampleMaker
from janus_jax.data.reading import image_file
from janus_jax.data.records import BadRecord, Record, parse_record
from janus_jax.data.sources import JsonlSource, ParquetSource, TarSource, open_source
from janus_jax.processing.processor import Processor
from janus_jax.processing.tokenizer import IMAGE

ANSWER = {"role": "assistant", "content": "blue"}


def asked(content="What color?", role="user", **more) -> list[dict]:
    return [{"role": role, "content": content, **more}, ANSWER]


def parse(fields: dict, read=lambda value: f"read {value}".encode()) -> Record | BadRecord:
    """Parses a record whose images are replaced by text with their names."""
    try:
        return parse_record(fields, read)
    except BadRecord as bad:
        return bad


def words(text) -> dict:
    return {"type": "text", "text": text}


DATA = "data:image/png;base64," + base64.b64encode(image(1)).decode()
ONE = ("<image>\nWhat color?", "blue")
READ = {
    "images of a message": ({"messages": asked(images=["s.png"])}, ONE),
    "image of a message": ({"messages": asked(images="s.png")}, ONE),
    "image, singular": ({"messages": asked(image="s.png")}, ONE),
    "DeepSeek": (
        {"messages": [
            {"role": "<|User|>", "content": f"{IMAGE}\nWhat color?", "images": ["s.png"]},
            {"role": "<|Assistant|>", "content": "blue"},
        ]},
        ONE,
    ),
    "DeepSeek, old": (
        {"conversations": [
            {"role": "User", "content": "What color?", "images": ["s.png"]},
            {"role": "Assistant", "content": "blue"},
        ]},
        ONE,
    ),
    "LLaVA": (
        {"id": "7", "image": "s.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat color?"}, {"from": "gpt", "value": "blue"},
        ]},
        ONE,
    ),
    "LLaVA-NeXT": ({"image": ["s.png"], "messages": asked("<image>\nWhat color?")}, ONE),
    "ms-swift": (
        {"messages": asked("<image>\nWhat color?"), "images": ["s.png"], "videos": [], "audios": [],
         "channel": "a", "rejected_response": None, "objects": {}},
        ONE,
    ),
    "transformers": ({"messages": asked([{"type": "image", "url": "s.png"}, words("What color?")])},
                     ONE),
    "OpenAI": (
        {"messages": asked([{"type": "image_url", "image_url": {"url": "s.png"}},
                            words("What color?")])},
        ONE,
    ),
    "parts with all fields": (
        {"messages": asked([{"type": "image", "path": "s.png", "text": None, "url": ""},
                            {"type": "text", "text": "What color?", "path": None}])},
        ONE,
    ),
    "metadata": (
        {"messages": asked(images=["s.png"]), "id": 1, "source": "coco/1.jpg", "width": 4,
         "image_id": "000123", "image_size": [4, 4], "num_images": 1, "url": "http://a.org/1.jpg"},
        ONE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("fields, turn", READ.values(), ids=READ)
def test_images_are_read(fields, turn):
    record = parse(fields)
    assert_same(record, Record("understanding", (turn,), images=(b"read s.png",)))


def test_an_empty_image_is_none():
    """LLaVA's mixtures have an empty image in records without an image."""
    (record,) = map(parse, [{"image": "", "messages": asked()}])
    assert record == Record("understanding", (("What color?", "blue"),))


def test_images_of_several_messages_are_in_the_order_of_their_places(tmp_path):
    for i in range(3):
        (tmp_path / f"{i} a.png").write_bytes(image(i))
    messages = [
        *asked([words("What?"), {"type": "image", "path": "0 a.png"}]),
        *asked("Here?", images=[f"file://{tmp_path}/1%20a.png", DATA]),
        *asked("Sure?"),
        *asked("Last <image> <image>", images=["2 a.png", "0 a.png"]),
    ]
    (record,) = JsonlSource(write_lines(tmp_path / "a.jsonl", {"messages": messages}))
    questions = ("What?\n<image>", "<image>\n<image>\nHere?", "Sure?", "Last <image> <image>")
    images = tuple(map(image, (0, 1, 1, 2, 0)))
    turns = tuple((question, "blue") for question in questions)
    assert_same(record, Record("understanding", turns, images=images))


def test_data_urls_are_read_in_every_format(tmp_path):
    fields = {"messages": asked(images=[DATA])}
    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    writer.write(msgpack.packb(fields))
    writer.close()
    write_lines(tmp_path / "a.jsonl", fields, {"caption": "a", "image": DATA})
    write_tar(tmp_path / "a.tar", {"1.json": json.dumps(fields).encode()})
    pq.write_table(pa.table({"messages": [fields["messages"]]}), tmp_path / "a.parquet")
    expected = Record("understanding", (ONE,), images=(image(1),))
    for format, suffix in (("arrayrecord", "array_record"), ("tar", "tar"), ("parquet", "parquet")):
        (record,) = open_source(format, tmp_path / f"a.{suffix}")
        assert_same(record, expected)
    first, second = JsonlSource(tmp_path / "a.jsonl")
    assert_same(first, expected)
    assert_same(second, Record("generation", text="a", images=(image(1),)))


def test_training_sees_what_answering_sees(golden, tmp_path):
    processor = Processor.from_dir(golden / "janus")
    size = processor.image_config.image_size
    maker = ExampleMaker(processor, size, 16, 64, 500, 4, 1, False)
    (tmp_path / "s.png").write_bytes(image(1))
    path = str(tmp_path / "s.png")
    part = {"type": "image", "path": path}
    conversations = [
        asked(images=[path]),
        asked("<image_placeholder>\nWhat color?", "<|User|>", images=path),
        asked([words("a"), words("b"), part, part, words("c")]) + asked([part]),
    ]
    source = JsonlSource(
        write_lines(tmp_path / "a.jsonl", *({"messages": said} for said in conversations))
    )
    for record, said in zip(source, conversations, strict=True):
        example = maker(record, np.random.default_rng(0))
        tokens, pixels = processor.conversation(said)
        assert example["tokens"].tolist() == tokens
        assert len(example["pixels"]) == len(pixels)


UNREAD = {
    "image beside images": ({"messages": asked(), "images": ["a"], "image": "b"}, "image.*both"),
    "the same of a message": ({"messages": asked(images=["a"], image="b")}, "images.*image.*both"),
    "both places": (
        {"messages": asked(images=["a"]), "images": ["b"]}, r"\b1 in the messages.*\b1\b",
    ),
    "one message without": (
        {"messages": asked(images=["a"]) + asked("<image> Here?")}, r"\b0 images.*\b1 <image>",
    ),
    "fewer than places": (
        {"messages": asked("<image><image>", images=["a"])}, r"\b1 images.*\b2 <image>",
    ),
    "image in an answer": (
        {"messages": [asked()[0], ANSWER | {"images": ["a"]}]}, "images?.*answer",
    ),
    "drawn in an answer": (
        {"image": "a", "conversations": [CONVERSATION[0], {"from": "gpt", "value": "<image>"}]},
        "answer.*<image>",
    ),
    "messages beside conversations": (
        {"messages": asked(), "conversations": CONVERSATION}, "conversations and messages",
    ),
    "caption beside messages": ({"messages": asked(), "caption": "a"}, "messages and caption"),
    "text beside messages": ({"messages": asked(), "text": "a"}, "messages and text"),
    "indices beside messages": ({"messages": asked(), "indices": [1]}, "indices.*caption"),
    "two contents": ({"messages": asked(value="b")}, "value or content.*both"),
    "two roles": ({"messages": asked(**{"from": "human"})}, "from or role.*both"),
    "index": (
        {"messages": asked([{"type": "image", "index": 1}]), "images": ["a"]}, r"index 1\b",
    ),
    "tool calls": ({"messages": asked(tool_calls=[1])}, "'tool_calls'"),
}  # fmt: skip


@pytest.mark.parametrize("fields, detail", UNREAD.values(), ids=UNREAD)
def test_what_does_not_fit_together_is_malformed(fields, detail):
    bad = parse(fields)
    assert isinstance(bad, BadRecord) and bad.reason == "malformed"
    assert re.search(detail, bad.detail), bad.detail


GENERATION = {"caption": "a", "image": "a.png"}
UNDERSTANDING = {"messages": asked(), "images": ["a.png"]}
TEXT = {"text": "a"}
FIELDS = [
    # LLaVA
    (UNDERSTANDING, "video", "a.mp4"),
    # ms-swift
    (UNDERSTANDING, "videos", ["a.mp4"]),
    (UNDERSTANDING, "audios", ["a.wav"]),
    (UNDERSTANDING, "rejected_response", "red"),
    (UNDERSTANDING, "rejected_messages", asked()),
    (UNDERSTANDING, "rejected_images", ["b.png"]),
    (UNDERSTANDING, "objects", {"ref": ["cat"], "bbox": [[1, 2, 3, 4]]}),
    (UNDERSTANDING, "tools", "[]"),
    (UNDERSTANDING, "label", False),
    (UNDERSTANDING, "query", "a"),
    (UNDERSTANDING, "response", "a"),
    (UNDERSTANDING, "history", [["a", "b"]]),
    # LLaMA-Factory
    (UNDERSTANDING, "chosen", {"from": "gpt", "value": "a"}),
    (UNDERSTANDING, "rejected", {"from": "gpt", "value": "a"}),
    (UNDERSTANDING, "kto_tag", True),
    (TEXT, "instruction", "a"),
    (TEXT, "output", "a"),
    # ShareGPT-4o-Image
    (GENERATION, "input_prompt", "a"),
    (GENERATION, "output_image", "b.png"),
    (GENERATION, "input_image", ["b.png"]),
    # Janus-Pro-R1
    (TEXT, "image1", "a.png"),
    (GENERATION, "image2", "b.png"),
    (GENERATION, "img_path", "b.png"),
    (TEXT, "input", "a.png"),
    # others
    (UNDERSTANDING, "pixel_values", b"a"),
    (TEXT, "picture", {"bytes": b"a"}),
    (GENERATION, "Image", "b.png"),
    (GENERATION, "condition_image_path", "b.png"),
    # detected by their values
    (TEXT, "file_name", "images/0001.png"),
    (TEXT, "jpg", b"\xff\xd8"),
    (TEXT, "shown", DATA),
    (TEXT, "shown", {"bytes": None, "path": "a.jpg"}),
    ({"messages": asked()}, "clips", ["a.mp4", "b.mp4"]),
    (TEXT, "shown", DATA.partition(",")[2]),
    ({"messages": asked()}, "meta", {"files": [{"name": "a", "place": "a/b.png"}]}),
    (GENERATION, "target", "b.png"),
    (UNDERSTANDING, "depth", {"bytes": b"a", "path": None}),
]


@pytest.mark.parametrize(("fields", "name", "value"), FIELDS)
def test_fields_that_are_not_read_are_refused_by_name(fields, name, value):
    assert isinstance(parse(fields), Record)
    bad = parse({name: value, **fields})
    assert isinstance(bad, BadRecord) and bad.reason == "unread field"
    assert f"'{name}'" in bad.detail
    for nothing in (None, "", [], {}):
        assert isinstance(parse({name: nothing, **fields}), Record)


@pytest.mark.parametrize(("name", "value"), [("file", "s.png"), ("attachments", ["s"])])
def test_fields_of_messages_are_refused_by_name(name, value):
    bad = parse({"messages": asked(**{name: value})})
    assert isinstance(bad, BadRecord) and f"'{name}'" in bad.detail
    assert isinstance(parse({"messages": asked(**{name: None})}), Record)


@pytest.mark.parametrize("tag", ["img", "image", "video", "audio"])
def test_paths_in_texts_are_refused(tag):
    """ms-swift and Qwen-VL write `<img>a.png</img>`; HTML is allowed."""
    name = f"<{tag}>a/b 1.png</{tag}>".replace(" ", "")
    for said in (asked(f"Image 1: {name}\nWhat?"), [asked()[0], ANSWER | {"content": name}]):
        bad = parse({"messages": said})
        assert isinstance(bad, BadRecord) and bad.reason == "unread field" and name in bad.detail
    assert isinstance(parse({"messages": asked(f'What is <{tag} src="a.png"></{tag}>?')}), Record)


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_prompts_of_the_system_are_refused(name):
    bad = parse({**UNDERSTANDING, name: "Be brief."})
    assert isinstance(bad, BadRecord) and bad.reason == "system turn"
    assert parse({**UNDERSTANDING, name: ""}).images


@pytest.mark.parametrize(("name", "value"), [("loss", False), ("weight", 0), ("loss_scale", 0.5)])
def test_answers_that_count_for_less_are_refused(name, value):
    bad = parse({"messages": [asked()[0], ANSWER | {name: value}]})
    assert isinstance(bad, BadRecord) and bad.reason == "unread field" and name in bad.detail
    assert isinstance(parse({"messages": [asked()[0], ANSWER | {name: 1}]}), Record)


@pytest.mark.parametrize(
    "fields",
    [
        {"sample_id": "1", "text": "Make it blue.", "input": "a.png", "output": "b.png"},
        {"promptid": 1, "prompt": "a cat", "data": [{"img_path": "a.png", "reason": "Yes"}]},
        {"input_prompt": "a cat", "output_image": "a.png", "output_image_resolution": [8, 8]},
        {"instruction": "a", "input": "", "output": "b", "images": ["a.png"]},
        {"query": "<image>a", "response": "b", "images": ["a.png"]},
        {"conversation": [{"human": "a", "assistant": "b"}], "images": ["a.png"]},
        {"type": "T2I_SFT", "txt": "a", "image": "", "image_path": "a.png"},
    ],
)
def test_whole_records_of_other_forms_are_refused(fields):
    bad = parse(fields)
    assert isinstance(bad, BadRecord) and len(bad.detail) < 200


def test_metadata_of_img2dataset_is_harmless():
    metadata = {"url": "https://a.org/1.jpg", "key": "0001", "status": "success", "width": 8,
                "error_message": None, "exif": "{}", "sha256": "ab", "original_width": 9,
                "NSFW": "no", "similarity": 0.3}  # fmt: skip
    metadata["info"] = {"file_name": "coco/1.jpg", "src": "1.png"}
    assert parse({**GENERATION, **metadata}).images == (b"read a.png",)
    assert parse({**TEXT, "meta": {"name": "a"}, "url": "https://a.org/b.jpg", "label": 1})


def test_remote_images_and_long_values():
    url = "https://example.org/" + "a/" * 500 + "s.png"
    bad = parse({"messages": asked(images=[url])})
    assert bad.reason == "remote image" and "https://example.org/" in bad.detail
    long = [bad, parse({"caption": "a", "image": "data:image/png;base64," + "?" * 9999})]
    long += [parse({"conversations": [{"from": "x" * 9999, "value": "a"}]})]
    long += [parse({"messages": asked([{"type": "x" * 9999}])}), parse({"x" * 9999: 1})]
    assert all(isinstance(bad, BadRecord) and len(bad.detail) < 240 for bad in long)


def test_a_field_given_twice_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"caption": "a", "image": "a.png", "image": "b.png"}\n')
    assert_bad(JsonlSource(path)[0], "malformed", f"{path}:1", "'image' twice")


def test_columns_and_members_that_are_not_read_are_refused(tmp_path):
    said = {"messages": [asked(), asked()]}
    numbers = {"embedding": [[0.5], [0.5]], "page": ["a.html", "b.html"]}
    others = {"system": [None, "a"], "shown": [{"bytes": b"a", "path": None}, None]}
    pq.write_table(pa.table(said | numbers | others), tmp_path / "a.parquet")
    first, second = ParquetSource(tmp_path / "a.parquet")
    assert_bad(first, "unread field", f"{tmp_path}/a.parquet:0", "'shown'")
    assert_bad(second, "system turn", f"{tmp_path}/a.parquet:1")
    texts = {"shown": ["a.png", None], "files": [None, [{"place": "b.png"}]]}
    pq.write_table(pa.table({"text": ["a", "b"]} | numbers | texts), tmp_path / "a.parquet")
    first, second = ParquetSource(tmp_path / "a.parquet")
    assert_bad(first, "unread field", f"{tmp_path}/a.parquet:0", "'shown'")
    assert_bad(second, "unread field", f"{tmp_path}/a.parquet:1", "'files'")
    fields = json.dumps({"conversations": CONVERSATION}).encode()
    members = {"1.json": fields, "1.mp4": b"video", "2.json": fields, "2.gif": image(1, "GIF")}
    write_tar(tmp_path / "a.tar", members)
    first, second = TarSource(tmp_path / "a.tar")
    assert_bad(first, "unread field", f"{tmp_path}/a.tar:1", "video or audio")
    assert second.images == (image(1, "GIF"),)
    both = {"caption": "a", "image": "a.png", "images": ["b.png"]}
    write_tar(tmp_path / "b.tar", {"1.json": json.dumps(both).encode(), "1.png": image(1)})
    assert_bad(TarSource(tmp_path / "b.tar")[0], "malformed", f"{tmp_path}/b.tar:1", "image.*both")


def anything(rng: np.random.Generator, depth: int = 3):
    """Returns a random value of any type that a container of records can store."""
    words = ["", "a", "<image>", IMAGE, "user", "<|User|>", "gpt", "image", "text", "s.png", DATA,
             "http://a.org/b.png", "data:x", "file://b/c", "\ud800", "\0", "x" * 300]  # fmt: skip
    kind = rng.integers(7 if depth else 5)
    if kind < 3:
        return words[rng.integers(len(words))]
    if kind < 5:
        return [None, True, 0, 1.5, b"", b"a", 10**400, float("nan"), -1][rng.integers(9)]
    number = rng.integers(4)
    if kind == 5:
        return [anything(rng, depth - 1) for _ in range(number)]
    names = ["type", "text", "image", "images", "url", "image_url", "base64", "role", "from",
             "content", "value", "index", 1, b"b", "video", "bytes", "path"]  # fmt: skip
    return {names[rng.integers(len(names))]: anything(rng, depth - 1) for _ in range(number)}


def mutated(value, rng: np.random.Generator):
    """Replaces random parts of a value by random values."""
    if rng.random() < 0.08:
        return anything(rng)
    if isinstance(value, dict):
        return {name: mutated(part, rng) for name, part in value.items()}
    if isinstance(value, list):
        return [mutated(part, rng) for part in value for _ in range(rng.random() < 0.97)]
    return value


def test_random_records_and_messages_are_read_or_refused(golden, tmp_path):
    processor = Processor.from_dir(golden / "janus")
    forms = [fields for fields, _ in (*READ.values(), *UNREAD.values())] + [GENERATION, TEXT]
    (tmp_path / "s.png").write_bytes(image(1))
    rng = np.random.default_rng(0)
    read = 0
    for number in range(3000):
        fields = mutated(forms[number % len(forms)], rng)
        found = parse(fields, lambda value: image_file(tmp_path, value))
        read += isinstance(found, Record)
        assert isinstance(found, Record) or (found.reason and len(found.detail) < 400), fields
        messages = fields.get("messages") if isinstance(fields, dict) else fields
        try:
            processor.conversation(messages)
        except (ValueError, OSError) as error:
            assert len(str(error)) < 400, messages
    assert 500 < read < 2500
