"""Text to token ids and back: bytes, or any file of the ``tokenizers`` library.

Both have ``vocab_size``, ``eos`` (the id that separates documents, or None), ``encode``, ``decode`` and
``decoder()``, an incremental decoder for streaming that never emits half a character.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

FILE = "tokenizer.json"


class Decoder(Protocol):
    """Turns token ids into text as they come."""

    def feed(self, token: int) -> str:
        """The characters completed by ``token``, possibly none."""

    def flush(self) -> str:
        """What is left at the end: a broken character shows as U+FFFD, or not at all with a tokenizer file."""


class Tokenizer(Protocol):
    """What the rest of the library asks of a tokenizer."""

    vocab_size: int
    eos: int | None

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids."""

    def decoder(self, prompt: Sequence[int] = ()) -> Decoder:
        """A fresh incremental decoder of what continues ``prompt``."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255; id 0 (NUL, which no text holds) separates documents.

    ``decode`` and its decoder raise ``ValueError`` for other ids.
    """

    vocab_size = 256
    eos: int | None = 0

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of ``text``."""
        return list(text.encode("utf-8", errors="surrogateescape"))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of bytes; broken characters become U+FFFD."""
        return _as_bytes(tokens).decode("utf-8", errors="replace")

    def decoder(self, prompt: Sequence[int] = ()) -> Decoder:
        """A fresh incremental decoder of what continues ``prompt``."""
        return _ByteDecoder()


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

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without special tokens."""
        return self.library.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.library.decode(list(tokens))

    def decoder(self, prompt: Sequence[int] = ()) -> Decoder:
        """A fresh incremental decoder of what continues ``prompt``."""
        return _FileDecoder(self.library, prompt)


class _FileDecoder:
    def __init__(self, library: Any, prompt: Sequence[int]) -> None:
        from tokenizers.decoders import DecodeStream

        self._library, self._stream = library, DecodeStream(skip_special_tokens=True)
        for token in prompt[-8:]:  # enough to know whether the next word is the first
            self.feed(token)

    def feed(self, token: int) -> str:
        return self._stream.step(self._library, token) or ""

    def flush(self) -> str:
        return ""


def open_tokenizer(name: str | Path | None) -> ByteTokenizer | FileTokenizer:
    """``None`` or "bytes" for bytes; else the path of a tokenizer file, or of a folder with a ``tokenizer.json``."""
    if name is None or str(name) == "bytes":
        return ByteTokenizer()
    path = Path(name)
    if path.is_dir():
        return FileTokenizer(path / FILE) if (path / FILE).is_file() else ByteTokenizer()
    if not path.is_file():
        raise ValueError(f"no tokenizer file {path}; give a tokenizer.json, or 'bytes'")
    return FileTokenizer(path)
