"""Text for training: documents of files, folders and globs, packed into one stream of tokens.

Each document begins with the tokenizer's ``eos`` (NUL for bytes), and ``starts`` is True there, so that nothing of
one document reaches the next. The order of training is a pure function of (seed, step): a run resumes exactly.
"""

from __future__ import annotations

import glob
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..arguments import SEED, whole
from ..tokenizer import ByteTokenizer, Tokenizer, utf8, without_nul

_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


class Batch(NamedTuple):
    """One step's data. ``targets`` holds -100 where nothing is to be predicted; ``starts`` may be None: no documents
    begin inside a row. Every row begins with an empty state.
    """

    tokens: Tensor  # [B T] int64
    targets: Tensor  # [B T] int64
    starts: Tensor | None  # [B T] bool


class Corpus:
    """Documents packed in order, with the number of bytes each was made from (its separator counts as one byte).

    ``tokens [N]`` is uint8 for bytes and int32 otherwise; document i is ``tokens[offsets[i]:offsets[i + 1]]``.
    ``skipped`` says how many files of folders were left out, by reason; ``names`` are the documents' files, if any.
    """

    def __init__(
        self,
        tokens: Tensor,
        offsets: Tensor,
        nbytes: Tensor,
        tokenizer: Tokenizer,
        skipped: dict[str, int] | None = None,
        names: tuple[str, ...] = (),
    ) -> None:
        self.tokens, self.offsets, self.document_bytes = tokens, offsets, nbytes
        self.tokenizer, self.skipped, self.names = tokenizer, skipped or {}, names

    @classmethod
    def from_paths(cls, paths: str | Path | Iterable[str | Path], tokenizer: Tokenizer | None = None) -> Corpus:
        """The text of files, folders (all text files in them) and globs, one document per file, read as bytes.

        Files with NUL bytes are binary: one that is named is refused, those in folders are skipped and counted.
        ``ValueError`` where a path does not exist, cannot be read, is binary, or nothing is left.
        """
        if isinstance(paths, (str, Path)):
            paths = [paths]
        if not isinstance(paths, Iterable):
            raise ValueError(f"paths must be files, folders or globs, got {paths!r}")
        given = [str(path) for path in paths]
        if any(not str(path).strip() for path in given):
            raise ValueError("a path is empty (a variable that is not set?); give . for the folder you are in")
        skipped: dict[str, int] = {}
        texts = {path: data for path, named in _files(given) if (data := _read(path, named, skipped))}
        if not texts:
            raise ValueError(
                f"no text in {', '.join(given) or 'an empty list of paths'}{_because(skipped)}; "
                "give text files, or folders or globs that hold some"
            )
        return cls._pack(list(texts.values()), tokenizer or ByteTokenizer(), skipped, tuple(map(str, texts)))

    @classmethod
    def from_texts(cls, texts: str | bytes | Iterable[str | bytes], tokenizer: Tokenizer | None = None) -> Corpus:
        """A corpus of documents that are already in memory; a single text is one document.

        ``ValueError`` where all are empty, or one holds the separator (a NUL, for bytes).
        """
        if isinstance(texts, (str, bytes)):
            texts = [texts]
        if not isinstance(texts, Iterable):
            raise ValueError(f"texts must be documents as text or bytes, got {texts!r}")
        data = [text if isinstance(text, bytes) else utf8(text) for text in texts]
        if not any(data):
            raise ValueError("the texts are empty; give at least one character")
        return cls._pack([text for text in data if text], tokenizer or ByteTokenizer(), {})

    @classmethod
    def _pack(
        cls, texts: list[bytes], tokenizer: Tokenizer, skipped: dict[str, int], names: tuple[str, ...] = ()
    ) -> Corpus:
        pieces = [_encode(text, tokenizer) for text in texts]
        lengths = torch.tensor([0, *map(len, pieces)])
        nbytes = torch.tensor([len(text) + (tokenizer.eos is not None) for text in texts])
        return cls(torch.from_numpy(np.concatenate(pieces)), lengths.cumsum(0), nbytes, tokenizer, skipped, names)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.offsets) - 1

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.tokenizer.vocab_size

    @property
    def nbytes(self) -> int:
        """Bytes of all documents, one for each separator included."""
        return int(self.document_bytes.sum())

    @property
    def tokens_per_byte(self) -> float:
        """Turns bits per token into bits per byte; 1 for bytes."""
        return len(self) / self.nbytes

    @cached_property
    def fingerprint(self) -> str:
        """A short text that another corpus (almost surely) does not have."""
        checksum = zlib.crc32(self.offsets.numpy().data, zlib.crc32(self.tokens.numpy().data))
        return f"{len(self)} tokens in {self.documents} documents, checksum {checksum:08x}"

    def document(self, index: int) -> Tensor:
        """The tokens [n] int64 of one document, its separator first."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]].long()

    def split(self, held_out: float = 0.02, seed: int = 0) -> tuple[Corpus, Corpus]:
        """Two corpora, for training and for testing: ``held_out`` of the tokens, in whole documents drawn by ``seed``.

        Where the documents are too few or too large for that, the end of the longest one is held out instead.
        """
        whole("seed", seed, *SEED)
        if not (isinstance(held_out, (int, float)) and 0 < held_out < 1):
            raise ValueError(f"held_out must be between 0 and 1, got {held_out!r}")
        wanted, taken, chosen = held_out * len(self), 0, []
        lengths = self.offsets.diff().tolist()
        for index in np.random.default_rng(seed).permutation(self.documents).tolist():
            if taken < wanted and taken + lengths[index] <= 2 * wanted:
                chosen.append(index)
                taken += lengths[index]
        if taken < max(2, wanted / 2):
            return self._cut(max(2, int(wanted)))
        mask = torch.zeros(self.documents, dtype=torch.bool)
        mask[chosen] = True
        return self._select(~mask), self._select(mask)

    def _select(self, mask: Tensor) -> Corpus:
        lengths = self.offsets.diff()
        tokens = self.tokens[mask.repeat_interleave(lengths)]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths[mask].cumsum(0)])
        names = tuple(name for name, kept in zip(self.names, mask.tolist(), strict=False) if kept)
        return Corpus(tokens, offsets, self.document_bytes[mask], self.tokenizer, self.skipped, names)

    def _cut(self, size: int) -> tuple[Corpus, Corpus]:
        """Hold out the last ``size`` tokens of the longest document, as a document of its own."""
        lengths = self.offsets.diff()
        longest = int(lengths.argmax())
        size = min(size, int(lengths[longest]) - 1)
        if size < 2:
            raise ValueError(f"{self.fingerprint}: too little text to hold some out; give more text")
        end = int(self.offsets[longest + 1])
        eos = [] if self.tokenizer.eos is None else [self.tokenizer.eos]
        kept = torch.cat([self.tokens[: end - size], self.tokens[end:]])
        tail = torch.cat([torch.tensor(eos, dtype=self.tokens.dtype), self.tokens[end - size : end]])
        bytes_out = max(1, round(int(self.document_bytes[longest]) * size / int(lengths[longest])))
        offsets, nbytes = self.offsets.clone(), self.document_bytes.clone()
        offsets[longest + 1 :] -= size
        nbytes[longest] -= bytes_out
        ends = torch.tensor([0, len(tail)])
        return (
            Corpus(kept, offsets, nbytes, self.tokenizer, self.skipped, self.names),
            Corpus(
                tail,
                ends,
                torch.tensor([bytes_out + len(eos)]),
                self.tokenizer,
                names=self.names[longest : longest + 1],
            ),
        )

    def windows(self, context: int) -> int:
        """How many sequences of ``context`` tokens (and a last target) fit side by side; ``ValueError`` where none."""
        count = (len(self) - 1) // whole("context", context)
        if count < 1:
            raise ValueError(
                f"the text has {len(self)} tokens, shorter than the context of {context} (and one target); "
                f"give more text, or a context of at most {max(1, len(self) - 1)}"
            )
        return count

    def batch(self, step: int, cfg: Any) -> Batch:
        """The data of a step, a pure function of (``cfg.seed``, step): ``cfg.batch`` rows of ``cfg.context`` tokens.

        An epoch shows every window of the stream once, in an order (and from a first offset) of its own.
        """
        return self.rows(self._offsets(step, cfg), cfg.context)

    def where(self, step: int, cfg: Any, row: int, token: int) -> str:
        """What lies at ``tokens[row, token]`` of a step's batch, for a message: a token of a document, and its file."""
        place = int(self._offsets(step, cfg)[row]) + token
        index = int(torch.searchsorted(self.offsets, place, right=True)) - 1
        name = f" ({self.names[index]})" if self.names else ""
        return f"token {place - int(self.offsets[index])} of document {index}{name}"

    def _offsets(self, step: int, cfg: Any) -> Tensor:
        """Where the rows of a step begin in the stream, [B]."""
        count, seed = self.windows(cfg.context), whole("seed", cfg.seed, *SEED)
        slack = (len(self) - 1) % cfg.context
        offsets = []
        for row in range(step * cfg.batch, (step + 1) * cfg.batch):
            epoch, place = divmod(row, count)
            first, order = _order(seed, epoch, count, slack)
            offsets.append(first + int(order[place]) * cfg.context)
        return torch.tensor(offsets)

    def in_order(self, context: int, batch: int) -> Iterator[Batch]:
        """All windows of the stream once, in order, ``batch`` rows at a time: for measuring."""
        for offsets in (torch.arange(self.windows(context)) * context).split(whole("batch", batch)):
            yield self.rows(offsets, context)

    def rows(self, offsets: Tensor, context: int) -> Batch:
        """The rows of ``context`` tokens that begin at ``offsets [B]`` in the stream."""
        where = offsets[:, None] + torch.arange(context + 1)
        window = self.tokens[where].long()
        nearest = torch.searchsorted(self.offsets, where).clamp_max(self.documents)
        starts = (self.offsets[nearest] == where)[:, :-1].contiguous()
        return Batch(window[:, :-1].contiguous(), window[:, 1:].contiguous(), starts)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int, slack: int) -> tuple[int, np.ndarray]:
    """The first offset and the order of the windows of an epoch."""
    random = np.random.default_rng([seed, epoch])
    return int(random.integers(slack + 1)), random.permutation(count)


def _encode(text: bytes, tokenizer: Tokenizer) -> np.ndarray:
    """Token ids of a document, separator first: uint8 for bytes, else int32."""
    if isinstance(tokenizer, ByteTokenizer):
        return np.frombuffer(b"\0" + without_nul(text), dtype=np.uint8)
    eos = [] if tokenizer.eos is None else [tokenizer.eos]
    return np.array(eos + tokenizer.encode(text.decode("utf-8", errors="replace")), dtype=np.int32)


def _files(names: list[str]) -> Iterator[tuple[Path, bool]]:
    """Every file once, in order, and whether it was named itself (and not found in a folder or by a glob)."""
    seen: set[str] = set()
    for name in names:
        for path, named in _expand(Path(name).expanduser()):
            if (real := os.path.realpath(path)) not in seen:  # links that lead to themselves included
                seen.add(real)
                yield path, named


def _expand(path: Path) -> Iterator[tuple[Path, bool]]:
    if path.is_dir():
        yield from ((found, False) for found in _walk(path))
    elif path.exists():
        yield path, True
    elif glob.has_magic(str(path)):
        found = sorted(glob.glob(str(path), recursive=True))
        if not found:
            raise ValueError(f"no file matches {path}; quote the pattern, and use ** for folders within folders")
        for match in map(Path, found):
            yield from ((inner, False) for inner in (_walk(match) if match.is_dir() else [match]))
    else:
        raise ValueError(f"no such file or folder: {path}")


def _walk(folder: Path, without: frozenset[str] = frozenset()) -> Iterator[Path]:
    """The files below a folder, in order; hidden ones and the folders called ``without`` are left out."""
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in without)
        yield from (Path(here, name) for name in sorted(files) if not name.startswith("."))


def _read(path: Path, named: bool, skipped: dict[str, int]) -> bytes:
    """The bytes of a text file; of any other, an error if it was named, else nothing and a count in ``skipped``."""
    problem, data, advice = "", b"", ""
    try:
        if path.is_file():
            data = path.read_bytes()
            problem = "" if data else "empty"
        else:
            problem, advice = "not a regular file", "give a file, folder or glob"
    except OSError as error:
        problem, advice = "unreadable", f"{error.strerror or error}; check its permissions"
    if b"\0" in data:
        problem, advice = "binary", f"a NUL byte at {data.index(0)}; give text, and UTF-16 as UTF-8"
    if problem and advice and named:
        raise ValueError(f"{path} is {problem}: {advice}")
    if problem:
        skipped[problem] = skipped.get(problem, 0) + 1
    return b"" if problem else data


def _because(skipped: dict[str, int]) -> str:
    return f" ({', '.join(f'{count} {reason}' for reason, count in skipped.items())})" if skipped else ""


def default_paths() -> list[Path]:
    """The ``.py`` files of the running Python's standard library, tests left out: real text that is always there.

    ``ValueError`` where this Python comes without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = [path for path in _walk(root, _SKIPPED_FOLDERS) if path.suffix == ".py"]
    if not found:
        raise ValueError(f"this Python has no sources of its standard library in {root}; give files or folders of text")
    return found
