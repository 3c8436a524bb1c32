"""Converts text to token ids and back, with the tokenizer.json of a checkpoint folder.

Token ids differ between the released checkpoints, so that the code has no constants for them: each
special token is looked up by its text.
"""

import bisect
import codecs
import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers

from janus_jax.checks import shorten, shorten_text
from janus_jax.paths import read_json, read_json_if_any

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS, PROCESSOR = "special_tokens_map.json", "processor_config.json"

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
IMAGE = "<image_placeholder>"
IMAGE_START = "<begin_of_image>"
IMAGE_END = "<end_of_image>"

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_ADVICE = "use the tokenizer.json of the original checkpoint"
_CHARACTERS_PER_TOKEN = 32  # is_longer starts with a prefix of this many characters per token


def _byte_of_character() -> dict[str, int]:
    """Returns the byte that each character stands for in byte-level BPE.

    Printable Latin-1 characters stand for themselves, characters from U+0100 on for other bytes.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


# Texts that must be unchanged after encoding and decoding: white space, capitals, composed and
# decomposed accents, characters with a compatibility form, typographic signs, several scripts,
# emoji of one and of several code points, all printable ASCII characters, and characters that
# together have every leading and trailing byte of UTF-8.
_ROUND_TRIP_TEXTS = (
    " Two words,  more   spaces \n\tand\r\n lines ",
    "Café Ångström ÑANDÚ",
    "e\u0301 A\u030a n\u0303",
    "ﬁ ² Ａ Å ｶﾞ … \u00a0",
    "“Quotes” ‘single’ it’s – — • € ™ → ½ × °",
    "你好 नमस्ते مرحبا שלום 한국어",
    "🦙 👩‍👩‍👧 😶‍🌫️ 🇫🇷",
    "".join(map(chr, range(32, 127))),
    "".join(map(chr, [*range(0x80, 0x800, 33), *range(0x800, 0xD800, 1023)])),
    "".join(map(chr, range(0xE000, 0x110000, 4099))),
)


def read_special_token(folder: Path, name: str, default: str) -> tuple[str, Path | None]:
    """Reads the text of a special token such as "bos_token" from the files of a folder.

    Returns:
        The text and the path of the file, or `default` and None if no file has the token.
    Raises:
        ValueError: the value is neither a string nor an object with a string in "content".
    """
    for path in (folder / TOKENIZER_CONFIG, folder / SPECIAL_TOKENS):
        token = read_json_if_any(path).get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{path}: {name} must be a string, got {shorten(token)}")
        if text:
            return text, path
    return default, None


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    spec = read_json(path)
    decoder = spec.get("decoder")
    kind = decoder.get("type") if isinstance(decoder, dict) else decoder
    if kind != "ByteLevel":
        raise ValueError(f"{path} must have a ByteLevel decoder, got {shorten_text(str(kind))}")
    _check_growth(spec, path)
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is not a valid tokenizer: {shorten_text(str(error))}") from None
    if dropout := getattr(backend.model, "dropout", None):
        raise ValueError(
            f"{path}: model.dropout must be null, got {shorten(dropout)}; set it to null, because "
            "dropout makes the tokens of a text random"
        )
    # A file may contain the truncation and padding of the last call before it was saved.
    backend.no_truncation()
    backend.no_padding()
    for token in spec.get("added_tokens") or ():
        _check_id(backend, token["content"], token["id"], path)
    return backend


def _check_growth(spec: dict[str, Any], path: Path) -> None:
    """Raises ValueError for parts with which a small file can make texts grow without limit."""
    if changing := [kind for kind in _kinds(spec.get("normalizer")) if kind != "Sequence"]:
        got = shorten_text(str(changing[0]))
        raise ValueError(f"{path} must not have a normalizer, got {got}; {_ADVICE}")
    if _kinds(spec.get("pre_tokenizer")).count("ByteLevel") > 1:
        rule = "must have at most one ByteLevel pre_tokenizer"
        raise ValueError(f"{path} {rule}, got several; {_ADVICE}")


def _kinds(part: Any) -> list[Any]:
    """Returns the types of a part of tokenizer.json and of all parts inside it."""
    kinds, queue = [], [part]
    while queue:
        if isinstance(part := queue.pop(), dict):
            kinds.append(part.get("type"))
            lists = [value for value in part.values() if isinstance(value, list)]
            queue += [item for items in lists for item in items]
    return kinds


def _token_id(backend: tokenizers.Tokenizer, text: Any) -> int | None:
    try:
        return backend.token_to_id(text) if isinstance(text, str) else None
    except UnicodeError:  # lone surrogates, which JSON allows and UTF-8 does not
        return None


def _check_id(backend: tokenizers.Tokenizer, text: Any, file_id: int | str, path: Path) -> None:
    """Raises ValueError if the id of a token in a file differs from that of the tokenizer."""
    token_id = _token_id(backend, text)
    if str(token_id) != str(file_id):
        expected = f"{token_id} of the tokenizer" if token_id is not None else "of a known token"
        raise ValueError(
            f"{path}: the added token {shorten(text)} must have the id {expected}, got "
            f"{shorten(file_id)}; use the files of the original checkpoint"
        )


def _check_config(backend: tokenizers.Tokenizer, folder: Path, image_tag: str) -> None:
    """Raises ValueError if the small files have other ids or image tokens than those used."""
    path = folder / TOKENIZER_CONFIG
    added = read_json_if_any(path).get("added_tokens_decoder") or {}
    if not isinstance(added, dict):
        raise ValueError(f"{path}: added_tokens_decoder must be an object, got {shorten(added)}")
    for file_id, token in added.items():
        text = token.get("content") if isinstance(token, dict) else token
        _check_id(backend, text, file_id, path)
    used = {"image_token": image_tag, "boi_token": IMAGE_START, "eoi_token": IMAGE_END}
    for name, text in used.items():
        found, where = read_special_token(folder, name, text)
        if found != text:
            raise ValueError(f"{where}: {name} must be {text}, got {shorten(found)}")


def _required_id(
    backend: tokenizers.Tokenizer, path: Path, text: str, required_by: Path | None = None
) -> int:
    token_id = _token_id(backend, text)
    if token_id is None:
        required_by = required_by or "Janus"
        raise ValueError(f"{path} has no token {shorten(text)}, which {required_by} requires")
    return token_id


def _around_change(before: str, after: str) -> slice:
    """Returns a slice of eight characters around the first difference of two texts."""
    pairs = enumerate(zip(before, after, strict=False))
    changed = next((i for i, (a, b) in pairs if a != b), min(len(before), len(after)))
    start = max(changed - 3, 0)
    return slice(start, start + 8)  # at most 80 characters if all are escaped


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer and the ids of its special tokens.

    Attributes:
        backend: the tokenizer of the tokenizers library.
        bos_id, eos_id: begin and end of sentence.
        pad_id: the pad token, or `eos_id` if the file has none (JanusFlow).
        image_id: the placeholder that is replaced by an image feature.
        image_start_id, image_end_id: the tokens before and after an image.
        added: id -> (UTF-8 text, whether the token is special) of each added token.
    """

    backend: tokenizers.Tokenizer = dataclasses.field(repr=False, compare=False)
    bos_id: int
    eos_id: int
    pad_id: int
    image_id: int
    image_start_id: int
    image_end_id: int
    added: dict[int, tuple[bytes, bool]] = dataclasses.field(repr=False, compare=False)

    @classmethod
    def from_dir(cls, folder: str | Path, image_tag: str = IMAGE) -> "Tokenizer":
        """Loads tokenizer.json, tokenizer_config.json and special_tokens_map.json of a folder.

        Args:
            image_tag: text of the placeholder token (processor_config.json may set another).
        Raises:
            FileNotFoundError: tokenizer.json does not exist.
            ValueError: tokenizer.json is invalid, not byte-level, lacks a token that Janus requires
                or changes texts; or the files have different ids for a token.
        """
        folder = Path(folder)
        path = folder / TOKENIZER
        backend = _read_backend(path)
        eos_id = _required_id(backend, path, *read_special_token(folder, "eos_token", EOS))
        required_by = None if image_tag == IMAGE else folder / PROCESSOR
        # Like the reference, look up pad by this text and ignore pad_token in the files.
        pad_id = backend.token_to_id(PAD)
        added = backend.get_added_tokens_decoder()
        tokenizer = cls(
            backend=backend,
            bos_id=_required_id(backend, path, *read_special_token(folder, "bos_token", BOS)),
            eos_id=eos_id,
            pad_id=eos_id if pad_id is None else pad_id,
            image_id=_required_id(backend, path, image_tag, required_by),
            image_start_id=_required_id(backend, path, IMAGE_START),
            image_end_id=_required_id(backend, path, IMAGE_END),
            added={i: (token.content.encode(), token.special) for i, token in added.items()},
        )
        _check_config(backend, folder, image_tag)
        tokenizer._check_round_trip(path)
        return tokenizer

    def _check_round_trip(self, path: Path) -> None:
        """Raises ValueError if a text changes by encoding and decoding."""
        for text in _ROUND_TRIP_TEXTS:
            try:
                decoded = self.decode(self.encode(text)[1:], skip_special=False)
            except Exception as error:  # the library raises bare Exception
                reason = shorten_text(str(error))
                raise ValueError(f"{path} cannot encode {shorten(text)}: {reason}") from None
            if decoded != text:
                before, after = (part[_around_change(text, decoded)] for part in (text, decoded))
                raise ValueError(
                    f"{path} does not preserve texts: {before!r} decodes to {after!r}; its "
                    f"pre_tokenizer, model and decoder do not match; {_ADVICE}"
                )

    @property
    def largest_id(self) -> int:
        """The largest id that encode can return."""
        return max(self.backend.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """Returns BOS and the ids of the text. Texts of special tokens become these tokens.

        The post-processor of the file, which adds BOS in some checkpoints only, is not used.

        Raises:
            ValueError: the text has lone surrogates, for example from bytes that are not UTF-8, or
                the search for a regular expression of the file takes too long.
        """
        if surrogate := _LONE_SURROGATE.search(text):
            raise ValueError(f"a text must be valid Unicode, got {surrogate[0]!r} in it")
        return [self.bos_id, *self._encoding(text).ids]

    def _encoding(self, text: str) -> tokenizers.Encoding:
        try:
            return self.backend.encode(text, add_special_tokens=False)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of Rust; not a subclass of Exception
                raise
            reason = shorten_text(str(error))
            raise ValueError(f"the tokenizers library failed: {reason}") from None

    def is_longer(self, text: str, limit: int) -> bool:
        """Returns whether a text certainly has more than `limit` tokens.

        The time depends on `limit`, but not on the length of the text. If the result is False, the
        text is short enough to be tokenized as a whole.

        Raises:
            ValueError: as encode.
        """
        if len(text) > limit * self._longest_token:
            return True
        length = limit * _CHARACTERS_PER_TOKEN
        while length < len(text):
            words = self._encoding(text[:length]).word_ids
            # do not count the last words: they may continue after the cut and have other tokens
            if words and bisect.bisect_left(words, words[-1] - 1) > limit:
                return True
            length *= 2
        return False

    @functools.cached_property
    def _longest_token(self) -> int:
        """The maximum number of characters of a token."""
        return max(map(len, self.backend.get_vocab(with_added_tokens=True)))

    def token_bytes(self, token: int, skip_special: bool = True) -> bytes:
        """Returns the UTF-8 bytes of a token; empty for an id without a token.

        The bytes of an added token are those of its text. (`transformers` applies the byte-level
        mapping to added tokens, too, and decodes the token "ü" of the 7B tokenizer to U+FFFD.)
        """
        token = int(token)
        if token in self.added:
            text, special = self.added[token]
            return b"" if special and skip_special else text
        characters = self.backend.id_to_token(token) or ""
        if not _BYTE_OF_CHARACTER.keys() >= set(characters):
            return characters.encode()
        return bytes(_BYTE_OF_CHARACTER[character] for character in characters)

    def decode(self, tokens: Iterable[int], skip_special: bool = True) -> str:
        """Returns the text of token ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            skip_special: skip special tokens, as the reference does for answers.
        """
        data = b"".join(self.token_bytes(token, skip_special) for token in tokens)
        return data.decode("utf-8", errors="replace")


class TextStream:
    """Decodes token ids one at a time into pieces that never split a character.

    The concatenated pieces equal the result of `Tokenizer.decode`.

    >>> stream = TextStream(tokenizer)
    >>> for token in tokens: print(stream.push(token), end="")
    >>> print(stream.finish())
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Adds an id; returns the characters that it completes, often none."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """Returns U+FFFD if the last character is incomplete, otherwise an empty string."""
        return self._decoder.decode(b"", final=True)

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yields the text of ids in nonempty pieces, each as soon as its ids are available."""
        for token in tokens:
            if piece := self.push(token):
                yield piece
        if piece := self.finish():
            yield piece
