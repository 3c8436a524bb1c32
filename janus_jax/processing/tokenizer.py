"""Text <-> token ids, from the tokenizer.json of a checkpoint folder.

No id is written in code: the released checkpoints differ, so each is looked up by its token's text.
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
from janus_jax.processing.json_files import read_json, read_json_if_any

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
_LETTERS = 32  # for each token that is allowed, of a text that is not tokenized whole at once


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


# Texts that a tokenizer must give back as they are: white space, capitals, composed and decomposed
# accents, letters with a compatibility form, typographic signs, scripts, emoji of one and of
# several code points, all of ASCII that can be seen, and characters that together have every
# leading and trailing byte of UTF-8.
_SURVIVORS = (
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
    """The text of `bos_token` and the like, and which of a folder's small files has it, if any.

    Raises:
        ValueError: it is neither a text nor an object with one.
    """
    for path in (folder / TOKENIZER_CONFIG, folder / SPECIAL_TOKENS):
        stated = read_json_if_any(path).get(name)
        text = stated.get("content") if isinstance(stated, dict) else stated
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{path}: {name} must be a text, got {shorten(stated)}")
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
        raise ValueError(f"{path} is not a tokenizer: {shorten_text(str(error))}") from None
    if dropout := getattr(backend.model, "dropout", None):
        raise ValueError(
            f"{path}: model.dropout must be null, got {shorten(dropout)}: the tokens of a text "
            "would be random; set it to null"
        )
    # A file may carry the settings of the call that was made before it was saved.
    backend.no_truncation()
    backend.no_padding()
    for token in spec.get("added_tokens") or ():
        _check_id(backend, token["content"], token["id"], path)
    return backend


def _check_growth(spec: dict[str, Any], path: Path) -> None:
    """Raises ValueError for parts that can make a text longer without end, a few bytes each."""
    if changing := [kind for kind in _kinds(spec.get("normalizer")) if kind != "Sequence"]:
        got = shorten_text(str(changing[0]))
        raise ValueError(f"{path} must keep texts as they are, got the normalizer {got}; {_ADVICE}")
    if _kinds(spec.get("pre_tokenizer")).count("ByteLevel") > 1:
        raise ValueError(f"{path} must have one ByteLevel pre_tokenizer, got more; {_ADVICE}")


def _kinds(part: Any) -> list[Any]:
    """The types of a part of tokenizer.json and of all the parts that it consists of."""
    kinds, waiting = [], [part]
    while waiting:
        if isinstance(part := waiting.pop(), dict):
            kinds.append(part.get("type"))
            waiting += [one for value in part.values() if isinstance(value, list) for one in value]
    return kinds


def _token_id(backend: tokenizers.Tokenizer, text: Any) -> int | None:
    try:
        return backend.token_to_id(text) if isinstance(text, str) else None
    except UnicodeError:  # lone surrogates, which JSON can hold and UTF-8 cannot
        return None


def _check_id(backend: tokenizers.Tokenizer, text: Any, stated: int | str, path: Path) -> None:
    """Raises ValueError where a file states another id for a token than the tokenizer gives."""
    given = _token_id(backend, text)
    if str(given) != str(stated):
        raise ValueError(
            f"{path}: the added token {shorten(text)} must have the id that the tokenizer gives "
            f"it, {given}, got {shorten(stated)}; use the files of the original checkpoint"
        )


def _check_config(backend: tokenizers.Tokenizer, folder: Path, image_tag: str) -> None:
    """Raises ValueError where the small files name other ids or image tokens than are used."""
    path = folder / TOKENIZER_CONFIG
    added = read_json_if_any(path).get("added_tokens_decoder") or {}
    if not isinstance(added, dict):
        raise ValueError(f"{path}: added_tokens_decoder must be an object, got {shorten(added)}")
    for stated, token in added.items():
        _check_id(backend, token.get("content") if isinstance(token, dict) else token, stated, path)
    used = {"image_token": image_tag, "boi_token": IMAGE_START, "eoi_token": IMAGE_END}
    for name, text in used.items():
        stated, where = read_special_token(folder, name, text)
        if stated != text:
            raise ValueError(f"{where}: {name} must be {text}, got {shorten(stated)}")


def _required_id(
    backend: tokenizers.Tokenizer, path: Path, text: str, stated_in: Path | None = None
) -> int:
    token = _token_id(backend, text)
    if token is None:
        needs = f", as {stated_in} says" if stated_in else ""
        raise ValueError(f"{path} has no token {shorten(text)}, which Janus needs{needs}")
    return token


def _around_change(before: str, after: str) -> slice:
    """The few characters where two texts begin to differ."""
    pairs = enumerate(zip(before, after, strict=False))
    changed = next((i for i, (one, two) in pairs if one != two), min(len(before), len(after)))
    start = max(changed - 3, 0)
    return slice(start, start + 8)  # at most 80 characters where each is escaped


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer and the ids of its special tokens.

    Attributes:
        bos_id, eos_id: begin and end of sentence.
        pad_id: the pad token, or `eos_id` where the file has none (JanusFlow).
        image_id: the placeholder at which an image feature goes.
        image_start_id, image_end_id: the tokens around an image.
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
        """From tokenizer.json, tokenizer_config.json and special_tokens_map.json of a folder.

        Args:
            image_tag: text of the placeholder token (processor_config.json may name another).
        Raises:
            FileNotFoundError: there is no tokenizer.json.
            ValueError: it is broken, not byte-level, lacks a token that Janus needs, changes
                texts, or states other ids than it gives.
        """
        folder = Path(folder)
        path = folder / TOKENIZER
        backend = _read_backend(path)
        eos_id = _required_id(backend, path, *read_special_token(folder, "eos_token", EOS))
        stated_tag = None if image_tag == IMAGE else folder / PROCESSOR
        # The reference takes pad by this text too, whatever pad_token the files state.
        pad_id = backend.token_to_id(PAD)
        added = backend.get_added_tokens_decoder()
        tokenizer = cls(
            backend=backend,
            bos_id=_required_id(backend, path, *read_special_token(folder, "bos_token", BOS)),
            eos_id=eos_id,
            pad_id=eos_id if pad_id is None else pad_id,
            image_id=_required_id(backend, path, image_tag, stated_tag),
            image_start_id=_required_id(backend, path, IMAGE_START),
            image_end_id=_required_id(backend, path, IMAGE_END),
            added={i: (token.content.encode(), token.special) for i, token in added.items()},
        )
        _check_config(backend, folder, image_tag)
        tokenizer._check_survivors(path)
        return tokenizer

    def _check_survivors(self, path: Path) -> None:
        """Raises ValueError where a text does not survive encoding and decoding."""
        for text in _SURVIVORS:
            try:
                decoded = self.decode(self.encode(text)[1:], skip_special=False)
            except Exception as error:  # the library raises bare Exception
                reason = shorten_text(str(error))
                raise ValueError(f"{path} cannot encode {shorten(text)}: {reason}") from None
            if decoded != text:
                before, after = (part[_around_change(text, decoded)] for part in (text, decoded))
                raise ValueError(
                    f"{path} must keep texts as they are, but {before!r} comes back as {after!r}; "
                    f"its pre_tokenizer, model and decoder do not fit together; {_ADVICE}"
                )

    @property
    def largest_id(self) -> int:
        """The largest id that encode can give."""
        return max(self.backend.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """BOS and the ids of the text; the texts of special tokens become those tokens.

        The file's own post-processor, which may or may not add BOS, is left out.

        Raises:
            ValueError: the text holds lone surrogates, as from bytes that are not UTF-8, or an
                expression of the file takes too long to be searched for in it.
        """
        if lone := _LONE_SURROGATE.search(text):
            raise ValueError(f"a text must be valid Unicode, got {lone[0]!r} in it")
        return [self.bos_id, *self._encoding(text).ids]

    def _encoding(self, text: str) -> tokenizers.Encoding:
        try:
            return self.backend.encode(text, add_special_tokens=False)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of Rust, which is no Exception
                raise
            reason = shorten_text(str(error))
            raise ValueError(f"the tokenizers library fails: {reason}") from None

    def is_longer(self, text: str, limit: int) -> bool:
        """Whether a text is certain to have more than `limit` tokens.

        The time is bounded by `limit`, however long the text is. If False, the text is short
        enough to be tokenized and counted.

        Raises:
            ValueError: as encode.
        """
        if len(text) > limit * self._longest_token:
            return True
        letters = limit * _LETTERS
        while letters < len(text):
            words = self._encoding(text[:letters]).word_ids
            # the last words may go on behind the cut, and so have other tokens
            if words and bisect.bisect_left(words, words[-1] - 1) > limit:
                return True
            letters *= 2
        return False

    @functools.cached_property
    def _longest_token(self) -> int:
        """The most letters that one id stands for."""
        return max(map(len, self.backend.get_vocab(with_added_tokens=True)))

    def token_bytes(self, token: int, skip_special: bool = True) -> bytes:
        """The UTF-8 bytes that one id stands for; empty for an id without a token.

        An added token stands for its own text. (`transformers` reads it as byte-level letters too,
        and so turns the added token "ü" of the 7B tokenizer into U+FFFD.)
        """
        token = int(token)
        if token in self.added:
            text, special = self.added[token]
            return b"" if special and skip_special else text
        letters = self.backend.id_to_token(token) or ""
        if not _BYTE_OF_CHARACTER.keys() >= set(letters):
            return letters.encode()
        return bytes(_BYTE_OF_CHARACTER[letter] for letter in letters)

    def decode(self, tokens: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            skip_special: leave out special tokens, as the reference does for an answer.
        """
        data = b"".join(self.token_bytes(token, skip_special) for token in tokens)
        return data.decode("utf-8", errors="replace")


class TextStream:
    """Decodes ids one at a time; the pieces never split a character, and join to `decode`'s text.

    >>> stream = TextStream(tokenizer)
    >>> for token in tokens: print(stream.push(token), end="")
    >>> print(stream.finish())
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that this id completes; often none."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What is left: U+FFFD where the last character is incomplete, otherwise nothing."""
        return self._decoder.decode(b"", final=True)

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text of ids in pieces that are not empty, each as soon as its ids are there."""
        for token in tokens:
            if piece := self.push(token):
                yield piece
        if piece := self.finish():
            yield piece
