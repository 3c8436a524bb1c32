"""Text <-> token ids, from the tokenizer.json of a checkpoint folder.

No id is written in code: the released checkpoints differ, so each is looked up by its token's text.
"""

import bisect
import codecs
import dataclasses
import functools
import re
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from janus_jax.processing.json_files import read_json

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
IMAGE = "<image_placeholder>"
IMAGE_START = "<begin_of_image>"
IMAGE_END = "<end_of_image>"

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_LETTERS = 32  # for each token that is allowed, of a text that is not tokenized whole at once


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def stated_token(folder: Path, name: str, default: str) -> str:
    """The text of `bos_token` and the like, as a folder's small files state it."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        stated = read_json(folder / file).get(name) if (folder / file).is_file() else None
        text = stated.get("content") if isinstance(stated, dict) else stated
        if text:
            return text
    return default


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    decoder = read_json(path).get("decoder")
    kind = decoder.get("type") if isinstance(decoder, dict) else decoder
    if kind != "ByteLevel":
        raise ValueError(f"{path} must have a ByteLevel decoder, got {kind}")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is not a tokenizer: {error}") from None
    # A file may carry the settings of the call that was made before it was saved.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _required_id(backend: tokenizers.Tokenizer, text: str, path: Path) -> int:
    token = backend.token_to_id(text) if isinstance(text, str) else None
    if token is None:
        raise ValueError(f"{path} has no token {text!r}, which Janus needs")
    return token


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
            ValueError: it is broken, not byte-level, or lacks a token that Janus needs.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        backend = _read_backend(path)
        eos_id = _required_id(backend, stated_token(folder, "eos_token", EOS), path)
        # The reference takes pad by this text too, whatever pad_token the files state.
        pad_id = backend.token_to_id(PAD)
        added = backend.get_added_tokens_decoder()
        return cls(
            backend=backend,
            bos_id=_required_id(backend, stated_token(folder, "bos_token", BOS), path),
            eos_id=eos_id,
            pad_id=eos_id if pad_id is None else pad_id,
            image_id=_required_id(backend, image_tag, path),
            image_start_id=_required_id(backend, IMAGE_START, path),
            image_end_id=_required_id(backend, IMAGE_END, path),
            added={i: (token.content.encode(), token.special) for i, token in added.items()},
        )

    @property
    def largest_id(self) -> int:
        """The largest id that encode can give."""
        return max(self.backend.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """BOS and the ids of the text; the texts of special tokens become those tokens.

        The file's own post-processor, which may or may not add BOS, is left out.

        Raises:
            ValueError: the text holds lone surrogates, as from bytes that are not UTF-8.
        """
        if lone := _LONE_SURROGATE.search(text):
            raise ValueError(f"a text must be valid Unicode, got {lone[0]!r} in it")
        return [self.bos_id, *self.backend.encode(text, add_special_tokens=False).ids]

    def is_longer(self, text: str, limit: int) -> bool:
        """Whether a text that is too long to be tokenized whole has more than `limit` tokens.

        Takes a time that `limit` bounds, however long the text is. False for what may as well be
        tokenized whole, and then be counted.

        Raises:
            ValueError: as encode.
        """
        if len(text) > limit * self._longest_token:
            return True
        letters = limit * _LETTERS
        while letters < len(text):
            words = self.backend.encode(text[:letters], add_special_tokens=False).word_ids
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
