"""Text to token ids and back: bytes, or any file of the ``tokenizers`` library.

Both have ``vocab_size``, ``eos`` (the id that separates documents, or None), ``encode``, ``decode`` and
``decoder()``, an incremental decoder for streaming that never emits half a character.

Text is data: whatever it says, ``encode`` gives no control id (separators and the like), since a document that
spells ``<|endoftext|>`` would otherwise end there. Who writes the text himself asks: ``encode(text, special=True)``.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from .arguments import ids

FILE = "tokenizer.json"


class Decoder(Protocol):
    """Turns token ids into text as they come."""

    def feed(self, token: int) -> str:
        """The characters completed by ``token``, possibly none."""

    def flush(self) -> str:
        """What is left at the end: a broken character shows as U+FFFD."""


class Tokenizer(Protocol):
    """What the rest of the library asks of a tokenizer."""

    vocab_size: int
    eos: int | None

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of ``text``; names of special tokens in it become their ids only with ``special``."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids."""

    def decoder(self, prompt: Sequence[int] = ()) -> Decoder:
        """A fresh incremental decoder of what continues ``prompt``."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255; id 0 (NUL, which no text holds) separates documents.

    ``encode`` raises ``ValueError`` for a NUL, ``decode`` and its decoder for other ids.
    """

    vocab_size = 256
    eos: int | None = 0

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The UTF-8 bytes of ``text``; a NUL, the separator, is refused but with ``special``."""
        data = utf8(text)
        return list(data if special else without_nul(data))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of bytes; broken characters become U+FFFD."""
        return _as_bytes(ids("tokens", tokens)).decode("utf-8", errors="replace")

    def decoder(self, prompt: Sequence[int] = ()) -> Decoder:
        """A fresh incremental decoder of what continues ``prompt``."""
        return _ByteDecoder()


def utf8(text: str) -> bytes:
    """The bytes of ``text``; those that were no UTF-8 when the text was read come back as they were.

    ``ValueError`` for half of a surrogate pair and for what is no text.
    """
    if not isinstance(text, str):
        raise ValueError(f"expected text, got {type(text).__name__}; decode bytes first, and ids need no encoding")
    try:
        return text.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds half a character, {text[error.start]!r} at {error.start} (half of a surrogate pair); "
            "replace it: text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
        ) from error


def without_nul(data: bytes) -> bytes:
    """``data`` as it is; ``ValueError`` where a NUL byte, the separator of documents, is in it."""
    if b"\0" in data:
        raise ValueError(
            f"the text holds a NUL byte at {data.index(0)}, which separates documents; take it out "
            "(documents are separated by themselves), or ask for it: encode(text, special=True)"
        )
    return data


def _as_bytes(tokens: Sequence[int]) -> bytes:
    odd = next((token for token in tokens if not 0 <= token < 256), None)
    if odd is not None:
        raise ValueError(
            f"token {odd} is no byte (0 to 255); the model's own tokenizer is needed, save the model with "
            "it: everlong.save(model, folder, tokenizer)"
        )
    return bytes(tokens)


class _ByteDecoder:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        return self._decoder.decode(_as_bytes([token]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class FileTokenizer:
    """A ``tokenizer.json`` of the ``tokenizers`` library.  ``ValueError`` where the file is not one."""

    def __init__(self, path: str | Path) -> None:
        from tokenizers import Tokenizer as Library

        try:
            self.library = Library.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(
                f"{path} is not a tokenizer file of the tokenizers library ({str(error)[:200]})"
            ) from error
        self.library.no_truncation()  # some files come with a longest length, and would drop the rest of a text
        self.library.no_padding()
        self.vocab_size = 1 + max(self.library.get_vocab().values(), default=-1)  # ids may have gaps
        names = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
        ids = (self.library.token_to_id(name) for name in names)
        self.eos = next((found for found in ids if found is not None), None)
        self.library.encode_special_tokens = True  # as any other text

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of ``text``, nothing added; names of special tokens become their ids only with ``special``.

        ``ValueError`` where one character alone would be a special token.
        """
        text = utf8(text).decode("utf-8", errors="replace")
        return self._parsing.encode(text, add_special_tokens=False).ids if special else self._plain(text)

    @cached_property
    def _parsing(self) -> Any:
        """The same tokenizer, as the library has it: names of special tokens become their ids."""
        return type(self.library).from_str(self.library.to_str())

    @cached_property
    def _control(self) -> frozenset[int]:
        """The ids that no text may give; the one for unknown words is none of them."""
        added = self.library.get_added_tokens_decoder().items()
        unknown: set[int | None] = set(
            self.library.encode("\U0010ffff", add_special_tokens=False).ids
        )  # this character is in no text
        unknown.add(self.library.token_to_id(getattr(self.library.model, "unk_token", None) or ""))
        control = {token for token, made in added if made.special} - unknown
        return frozenset(control if self.eos is None else control | {self.eos})

    def _plain(self, text: str) -> list[int]:
        """Where a model's own vocabulary has the name of a special token as a word, that is cut into two words."""
        encoding = self.library.encode(text, add_special_tokens=False)
        if self._control.isdisjoint(encoding.ids):
            return encoding.ids
        spans = [span for token, span in zip(encoding.ids, encoding.offsets, strict=True) if token in self._control]
        short = next((span for span in spans if span[1] - span[0] < 2), None)
        if short is not None:
            raise ValueError(
                f"{text[slice(*short)]!r} at {short[0]} of the text is a special token of this tokenizer; "
                "take it out, or ask for it: encode(text, special=True)"
            )
        cuts = [0, *((first + last) // 2 for first, last in spans), len(text)]
        return [token for first, last in itertools.pairwise(cuts) for token in self._plain(text[first:last])]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.library.decode(list(ids("tokens", tokens)))

    def decoder(self, prompt: Sequence[int] = ()) -> Decoder:
        """A fresh incremental decoder of what continues ``prompt``."""
        return _FileDecoder(self.library, prompt)


class _FileDecoder:
    def __init__(self, library: Any, prompt: Sequence[int]) -> None:
        from tokenizers.decoders import DecodeStream

        self._library, self._stream = library, DecodeStream(skip_special_tokens=True)
        self._shown: list[int] = []  # the tokens of the last text handed out
        self._held: list[int] = []  # those since
        for token in prompt[-8:]:  # enough to know whether the next word is the first
            self.feed(token)

    def feed(self, token: int) -> str:
        self._held.append(token)
        text = self._stream.step(self._library, token) or ""
        if text:
            self._shown, self._held = self._held, []
        return text

    def flush(self) -> str:
        shown = self._library.decode(self._shown)
        return self._library.decode([*self._shown, *self._held])[len(shown) :]


def open_tokenizer(name: str | Path | None) -> ByteTokenizer | FileTokenizer:
    """``None`` or "bytes" for bytes; else the path of a tokenizer file, or of a folder with a ``tokenizer.json``."""
    if name is None or str(name) == "bytes":
        return ByteTokenizer()
    if not str(name).strip():
        raise ValueError("the path of the tokenizer is empty (a variable that is not set?); give a file, or 'bytes'")
    path = Path(name)
    if path.is_dir():
        return FileTokenizer(path / FILE) if (path / FILE).is_file() else ByteTokenizer()
    if not path.is_file():
        raise ValueError(f"no tokenizer file {path}; give a tokenizer.json, or 'bytes'")
    return FileTokenizer(path)
