"""Tests the fields of records: images, conversations, captions, and fields that are refused."""

import io
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import CONVERSATION, assert_bad, assert_same, image, write_lines, write_tar

from janus_jax.data.records import Record
from janus_jax.data.sources import JsonlSource, ParquetSource, TarSource


def test_jsonl_images(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(image(1))
    path = tmp_path / "a.jsonl"
    names = ["a.png", "b.png", "", "a.png/b", "x" * 300, "a\0b", 7]
    write_lines(path, *[{"caption": "a", "image": name} for name in names])
    source = JsonlSource(path, image_root=tmp_path / "images")
    assert source[0].images == (image(1),)
    assert_bad(source[1], "missing file", f"{path}:2", "images/b.png")
    assert_bad(source[2], "malformed", f"{path}:3", r"image.*\b0\b")
    assert_bad(source[3], "missing file", f"{path}:4")
    assert_bad(source[4], "unreadable file", f"{path}:5", "too long")
    assert_bad(source[5], "unreadable file", f"{path}:6", "null")
    assert_bad(source[6], "malformed", f"{path}:7", "path.*int")
    assert_bad(JsonlSource(path)[0], "missing file", f"{path}:1")


TOLD = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
BAD_FIELDS = [
    ({"caption": " ", "indices": [1]}, "empty caption", "' '"),
    ({"caption": 1, "indices": [1]}, "malformed", r"caption.*\b1\b"),
    ({"caption": "a"}, "malformed", r"image.*\b0\b"),
    ({"caption": "a", "indices": [1, [2]]}, "malformed", "indices.*flat"),
    ({"caption": "a", "indices": [1.5]}, "malformed", r"integers.*float64\[1\]"),
    ({"caption": "a", "indices": []}, "malformed", "indices.*non-empty"),
    ({"caption": "a", "indices": [-1]}, "malformed", r"\[0, 2\*\*31\).* -1\b"),
    ({"caption": "a", "indices": [2**31]}, "malformed", r"\[0, 2\*\*31\).* 2147483648\b"),
    ({"caption": "a", "images": "x"}, "malformed", "images.*list.*str"),
    ({"text": ""}, "empty text", ""),
    ({"text": "a", "image": "a.png"}, "malformed", "text and image"),
    ({"text": "a", "indices": [1, 2]}, "malformed", "text and indices"),
    ({"other": 1}, "malformed", r"conversations, messages, caption and text.*\['other'\]"),
    (
        {"conversations": [{"from": "system", "value": "Be brief."}, *CONVERSATION]},
        "system turn",
        "system",
    ),
    (
        {"messages": [{"role": "system", "content": [{"type": "text", "text": "a"}]}, *TOLD]},
        "system turn",
        "system",
    ),
    ({"conversations": "hello"}, "malformed", "conversation.*list"),
    ({"conversations": []}, "malformed", r"answer.*\[\]"),
    ({"conversations": [{"from": ["human"], "value": "a"}]}, "malformed", r"role.*\['human'\]"),
    ({"messages": [TOLD[0] | {"role": "USER"}, TOLD[1]]}, "malformed", "role.*gpt.*'USER'"),
    ({"conversations": [{"from": "gpt", "value": "a"}]}, "malformed", "alternate"),
    (
        {"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "a"}]},
        "malformed",
        "content.*int",
    ),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]},
        "empty answer",
        "",
    ),
]


@pytest.mark.parametrize("fields, reason, detail", BAD_FIELDS)
def test_bad_fields(fields, reason, detail, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", fields)
    bad = JsonlSource(path)[0]
    assert_bad(bad, reason, f"{path}:1", detail)
    again = pickle.loads(pickle.dumps(bad))
    assert str(again) == str(bad) == f"{path}:1: {reason}: {bad.detail}"


def test_conversations_and_messages_are_the_same(tmp_path):
    said = [("human", "Hi?"), ("gpt", "Ho.")]
    path = write_lines(
        tmp_path / "a.jsonl",
        {"conversations": [{"from": role, "value": text} for role, text in said]},
        {
            "conversations": None,
            "messages": [
                {"role": {"human": "user", "gpt": "assistant"}[role], "content": text}
                for role, text in said
            ],
        },
    )
    for record in JsonlSource(path):
        assert_same(record, Record("understanding", (("Hi?", "Ho."),)))


@pytest.mark.parametrize("type", [np.int32, np.int64, np.uint8])
def test_indices_of_no_length(type, tmp_path):
    file = io.BytesIO()
    np.save(file, np.zeros(0, type))
    path = write_tar(tmp_path / "a.tar", {"1.txt": b"a", "1.npy": file.getvalue()})
    detail = rf"non-empty.*{np.dtype(type)}\[0\]"
    assert_bad(TarSource(path)[0], "malformed", f"{path}:1", detail)


def asked(*parts) -> dict:
    return {"messages": [{"role": "user", "content": parts}, TOLD[1]]}


def words(text) -> dict:
    return {"type": "text", "text": text}


PLACE = {"type": "image"}


def test_messages_in_parts_are_joined(tmp_path):
    names = [f"{i}.png" for i in range(3)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(image(i))
    answer = {"role": "assistant", "content": [words("Red"), words(".")]}
    more = [{"role": "user", "content": [words("And this? "), PLACE]}, TOLD[1]]
    messages = [{"role": "user", "content": [PLACE, PLACE, words("Color?")]}, answer, *more]
    path = write_lines(
        tmp_path / "a.jsonl", {"messages": messages, "images": names}, asked(words("Hi"))
    )
    several, alone = JsonlSource(path)
    turns = ("<image>\n\n<image>\nColor?", "Red ."), ("And this? \n<image>", "!")
    images = tuple(image(i) for i in range(3))
    assert_same(several, Record("understanding", turns, images=images))
    assert_same(alone, Record("understanding", (("Hi", "!"),)))


def test_parquet_messages_in_parts(tmp_path):
    # In Parquet all parts have all fields. Data sets on the Hugging Face hub number their images.
    content = [
        [{"index": None, "text": "Color? ", "type": "text"}, {"index": 0, "text": None} | PLACE],
        [{"index": None, "text": "Red.", "type": "text"}],
    ]
    messages = [
        {"role": role, "content": parts}
        for role, parts in zip(("user", "assistant"), content, strict=True)
    ]
    images = [{"bytes": image(1), "path": None}]
    pq.write_table(pa.table({"messages": [messages], "images": [images]}), tmp_path / "a.parquet")
    (found,) = ParquetSource(tmp_path)
    turns = (("Color? \n<image>", "Red."),)
    assert_same(found, Record("understanding", turns, images=(image(1),)))


RULE = (
    r"part of a message .*text, image or image_url"
)
BAD_PARTS = [
    (asked({"type": "video"}), RULE),
    (asked("a"), RULE),
    (asked(words(None)), RULE),
    (asked(words("\ud800")), "UTF-8"),
    ({"messages": [TOLD[0], {"role": "assistant", "content": [PLACE]}]}, "images?.*answer"),
    (asked(PLACE | {"video": "a.mp4"}), r"\['video'\]"),
    (asked(PLACE | {"index": 1}), r"index 1\b.*image 0\b"),
    (asked(PLACE, PLACE | {"index": 0}), r"index 0\b.*image 1\b"),
]


@pytest.mark.parametrize("fields, detail", BAD_PARTS)
def test_bad_parts(fields, detail, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", fields)
    assert_bad(JsonlSource(path)[0], "malformed", f"{path}:1", detail)
