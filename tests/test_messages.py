"""Tests of messages in the formats of transformers and OpenAI, and of sources of images."""

import base64
import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from janus_jax.processing import chat, image_sources, messages
from janus_jax.processing.processor import Processor

TAG = "<image_placeholder>"
PLACE = {"type": "image"}


def words(text) -> dict:
    return {"type": "text", "text": text}


def at(source, key="image") -> dict:
    return {"type": "image", key: source}


def user(content, **more) -> dict:
    return {"role": "user", "content": content, **more}


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def base64_png(value: int) -> str:
    return base64.b64encode(png(value)).decode()


@pytest.fixture(scope="module")
def processor(golden):
    return Processor.from_dir(golden / "janus")


# Expected texts are the output of the chat template of transformers' Janus checkpoints.
@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([words(" What? ")], "What?"),
        ([at(1), words("What?")], f"{TAG}\nWhat?"),
        ([words("What?"), at(1)], f"What?\n{TAG}"),
        ([words("Before "), at(1), words(" after")], f"Before \n{TAG}\n after"),
        ([at(1), at(2), words("Same?")], f"{TAG}\n\n{TAG}\nSame?"),
        ([words("a"), words("b"), at(1)], f"a b\n{TAG}"),
        ([at(1)], TAG),
    ],
)
def test_parts_are_joined_as_in_transformers(parts, text):
    joined, images = messages.read_content({}, parts, TAG)
    assert joined.strip() == text
    assert images == [part["image"] for part in parts if part["type"] == "image"]


def test_all_sources_of_an_image_are_read(processor, tmp_path):
    (tmp_path / "a b.png").write_bytes(png(255))
    path, text = str(tmp_path / "a b.png"), base64_png(255)
    data = f"data:image/png;base64,{text}"
    parts = [
        *(at(path), at(path, "url"), at(path, "path"), at(f"file://{tmp_path}/a%20b.png", "url")),
        *(at(data, "url"), at(data.replace("/", "%2F").replace("+", "%2B")), at(text, "base64")),
        *(at(Image.open(path)), at(np.full((8, 8, 3), 255, np.uint8)), at(png(255))),
        *({"type": "image_url", "image_url": url} for url in (data, {"url": data}, path)),
        {"type": "image_url", "image_url": {"url": data, "detail": "low"}, "index": None},
        {"type": "image", "index": 14, "image": path, "url": None, "path": ""},
    ]
    _, pixels = processor.conversation([user([*parts, words("Same?")])])
    assert len(pixels) == len(parts)
    assert (pixels == 1).all()


def test_long_base64_is_an_image_as_in_transformers():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    text = base64.encodebytes(file.getvalue()).decode()  # with line breaks
    np.testing.assert_array_equal(image_sources.open_image(text), pixels)


def test_parts_give_what_deepseeks_own_form_gives(processor):
    black, white = (np.full((8, 8, 3), value, np.uint8) for value in (0, 255))
    own = [
        {"role": "<|User|>", "content": f"{TAG}\nWhat?", "images": [white]},
        {"role": "<|Assistant|>", "content": "White."},
        {"role": "<|User|>", "content": f"And this?\n{TAG}", "images": black},
    ]
    parts = [
        {"role": "system", "content": [words(processor.system_prompt)]},
        user([at(white), words("What?")]),
        {"role": "assistant", "content": [words("White.")]},
        user([words("And this?"), at(black)]),
    ]
    tokens, pixels = processor.conversation(own)
    again, same = processor.conversation(parts)
    assert tokens == again
    np.testing.assert_array_equal(pixels, same)
    assert (pixels[0] == 1).all() and (pixels[1] == -1).all()


def test_images_beside_fill_the_places_in_parts(processor):
    white = np.full((8, 8, 3), 255, np.uint8)
    messages_with_places = [user([words("Which?"), PLACE, {"type": "image", "index": 1}])]
    expected = [user([words("Which?"), at(white), at(white)])]
    tokens, pixels = processor.conversation(messages_with_places, [white, white])
    again, _ = processor.conversation(expected)
    carried, _ = processor.conversation([messages_with_places[0] | {"images": [white, white]}])
    assert tokens == again == carried and len(pixels) == 2
    single, _ = processor.conversation([user("What?", image=white)])
    assert single == processor.conversation("What?", [white])[0]


WHITE = np.full((8, 8, 3), 255, np.uint8)
REFUSED = [
    (user([{"type": "video", "video": "a.mp4"}]), "part of a message.*{'type': 'video'"),
    (user(["a"]), "part of a message.*'a'"),
    (user([{"text": "a"}]), "part of a message.*{'text': 'a'}"),
    (user([words(None)]), "part of a message.*{'text': None, 'type': 'text'}"),
    (user([{"type": "image_url", "image_url": {"uri": "a"}}]), "part of a message.*'uri'"),
    (user([words("a") | {"image": "a.png"}]), r"text part.*\['imag"),
    (user([PLACE | {"video": "a.mp4"}]), r"image part.*\['vid"),
    (user([at("a") | {"url": "b"}]), r"image part.*\['image', 'url'\]"),
    (user([at("a"), PLACE]), r"image parts.*\b1 of 2\b"),
    (user([at("a")], images=["b"]), "content.*images.*both"),
    (user("a", images=["b"], image="b"), "images or image.*both"),
    (user([PLACE, PLACE | {"index": 0}]), r"index 0\b.*image 1\b"),
    (user([]), "user message.*''"),
    (user("a", videos=["a.mp4"]), "role, content and images.*'videos'"),
    (user("a", tool_calls=[{"id": 1}]), "'tool_calls'"),
    (user("a", file="a.png"), "media file.*'file'"),
    (user("a", extra={"files": [base64_png(1)]}), "media file.*'extra'"),
    (user([at("%%", "base64")]), "base64.*'%%'"),
    (user([at(f"{'x' * 999}", "base64")]), r"base64.*'x{30,}\.\.\.x+'"),
    (user([at("data:image/png;base64")]), "data: URL.*comma"),
    (user([at("file://elsewhere/a.png")]), "local file.*'file://elsewhere/a.png'"),
    (user([at("https://a.org/b")]), "https://a.org/b.*allow_urls=True"),
    (user([at(WHITE), words(TAG)]), r"\b1 image.*\b2 placeholder.*message 1\b"),
]


@pytest.mark.parametrize(("message", "error"), REFUSED)
def test_what_is_refused(processor, message, error):
    with pytest.raises(ValueError, match=error) as refused:
        processor.conversation([message])
    assert len(str(refused.value)) < 240


def test_a_damaged_image_is_not_repeated(processor):
    text = "QUFB" * 9999
    for source in (f"data:image/png;base64,{text}", f"iVBORw{text}A=", "a/" * 2000 + "b.png"):
        with pytest.raises((ValueError, FileNotFoundError)) as refused:
            processor.conversation([user([at(source)])])
        assert len(str(refused.value)) < 200


def test_none_in_fields_of_a_message_is_nothing(processor):
    conversation = [user("Hi", images=None, audio=None), {"role": "assistant", "content": "Ho"}]
    conversation[1] |= {"tool_calls": None, "refusal": None}
    expected, _ = processor.conversation([user("Hi"), {"role": "assistant", "content": "Ho"}])
    assert processor.conversation(conversation)[0] == expected


def test_an_answer_in_parts_is_an_answer():
    conversation = [user("Hi"), {"role": "assistant", "content": [words("Ho")]}]
    with pytest.raises(ValueError, match=r"user.*'Ho'"):
        chat.check_unanswered(conversation)


def test_a_conversation_of_any_length_is_refused_before_it_is_tokenized_whole(processor):
    long = [user("a "), {"role": "assistant", "content": "b " * 50}] * 20_000 + [user("a")]
    encoded = []

    class Recording(type(processor.tokenizer)):
        def encode(self, text):
            encoded.append(len(text))
            return super().encode(text)

    fields = {f.name: getattr(processor.tokenizer, f.name) for f in dataclasses.fields(Recording)}
    recording = dataclasses.replace(processor, tokenizer=Recording(**fields))
    with pytest.raises(ValueError, match=r"\b4096 tokens.*\d+ char"):
        recording.conversation(long)
    assert encoded == []
    assert recording.conversation("a")[0] and len(encoded) == 1
