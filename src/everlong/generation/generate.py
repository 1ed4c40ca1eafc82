"""Generation: iterators of tokens over a pool of rows.

``generate`` reads the prompt in pieces, then yields one token at a time. Its ``session`` (state and next
logits) is a value: save it, fork it, give it back to go on without reading anything twice. ``generate_batch`` goes on
with many prompts at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import state as states
from ..arguments import ids, whole
from ..models.lm import LanguageModel
from .pool import Pool
from .sampler import Sampler, Sampling
from .session import Session, new_session

IDS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Generation(Iterator[int]):
    """What ``generate`` returns: an iterator of token ids, with the state that has read them as ``.session``."""

    def __init__(
        self, model: LanguageModel, read: Tensor, session: Session, sampling: Sampling, left: int, stop_ids: set[int]
    ) -> None:
        self.model, self.left, self.stop_ids = model, left, stop_ids
        self._logits, self._pool, self._sampler = (
            session.logits,
            Pool(model, 1),
            Sampler(model.cfg.vocab_size, read.device),
        )
        self._pool.hand_over((0,), session.state)
        self._sampler.put(0, sampling, read[0])
        self._unread: int | None = None

    @property
    def session(self) -> Session:
        """The state after all tokens yielded so far; a copy, so going on does not change it."""
        self._read()
        dtype = self.model.embedding.weight.dtype
        return Session(state=self._pool.take(0), logits=self._logits.to(dtype, copy=True))

    @torch.no_grad()
    def _read(self) -> None:
        """Read the last token that was drawn: not before somebody needs what follows it."""
        if self._unread is not None:
            token = torch.tensor([self._unread], device=self._logits.device)
            self._logits, self._unread = self._pool.step(token, (0,)), None

    def __next__(self) -> int:
        if self.left <= 0:
            raise StopIteration
        self._read()
        token = self._sampler.draw(self._logits, (0,))[0]
        if token in self.stop_ids:
            self.left = 0
            raise StopIteration
        self.left -= 1
        self._unread = token
        return token


def _ids(prompt: Sequence[int]) -> Tensor:
    """The prompt as int64 [T]. ``ValueError`` for text, several rows, and numbers that are no ids."""
    if isinstance(prompt, str):
        raise ValueError("the prompt is text, expected token ids; encode it: tokenizer.encode(prompt)")
    try:
        found = prompt if isinstance(prompt, Tensor) else torch.as_tensor(list(prompt), device="cpu")
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"the prompt is {type(prompt).__name__}, expected a list of token ids ({error})") from error
    if found.dim() != 1 or (found.numel() and found.dtype not in IDS):
        raise ValueError(
            f"the prompt has shape {list(found.shape)} and dtype {found.dtype}, expected a list of token ids"
        )
    return found.to(torch.int64)


def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    max_tokens: int = 256,
    sampling: Sampling = Sampling(),
    session: Session | None = None,
    stop_ids: int | Sequence[int] = (),
    piece: int = 2048,
) -> Generation:
    """Yields token ids that continue ``prompt`` (ids), at most ``max_tokens``, until one of ``stop_ids``.

    ``session`` goes on from an earlier generation (the prompt may then be empty). After or during the
    iteration, ``.session`` is the state that has read every token yielded so far, as a value; a token of
    ``stop_ids`` ends the text without being read, so that a session goes on inside its document. The prompt is read
    before this returns, ``piece`` tokens at a time.
    ``ValueError`` for an empty prompt, ids outside the vocabulary, or weights that give NaN.
    """
    left, ends = whole("max_tokens", max_tokens, 0), set(ids("stop_ids", stop_ids))
    tokens = _checked(prompt, model, sampling)[None]
    if session is not None:
        states.check_like(session, new_session(model, 0), 1, "session")
        states.check_values(session, "session")
    elif not tokens.numel():
        raise ValueError("the prompt is empty; give at least one token, or a session to go on from")
    if tokens.numel():
        logits, state = model.read(tokens, None if session is None else session.state, piece=whole("piece", piece))
        session = Session(state=state, logits=logits)
        return Generation(model, tokens, session, sampling, left, ends)
    assert session is not None
    session = states.map_leaves(torch.clone, session)  # what it was given stays as it is
    return Generation(model, tokens, session, sampling, left, ends)


def _checked(prompt: Sequence[int], model: LanguageModel, sampling: Sampling) -> Tensor:
    """The prompt as int64 [T] where the model is. ``ValueError`` for what is none, and for other settings."""
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling must be Sampling(temperature=..., ...), got {sampling!r}")
    tokens = _ids(prompt).to(model.norm.weight.device)
    if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= model.cfg.vocab_size):
        raise ValueError(
            f"the prompt holds ids from {int(tokens.min())} to {int(tokens.max())}, expected 0 to "
            f"{model.cfg.vocab_size - 1}; encode it with this model's tokenizer"
        )
    return tokens


@dataclass
class _Request:
    """A prompt, and what is still to be drawn for it."""

    index: int
    prompt: Tensor  # int64 [T]
    sampling: Sampling
    left: int
    stop_ids: set[int]


def generate_batch(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = 256,
    sampling: Sampling | Sequence[Sampling] = Sampling(),
    stop_ids: int | Sequence[int] = (),
    rows: int = 16,
    piece: int = 2048,
) -> Batch:
    """Yields ``(index, token)`` for prompts of any lengths, at most ``rows`` at once, each as ``generate`` does.

    ``sampling`` is one for all, or one for each prompt. Where a text ends, the next prompt takes its place. Where all
    of the model is native, a prompt is continued in the same way alone and among others.
    ``ValueError`` for no prompt, an empty one, ids outside the vocabulary, or weights that give NaN.
    """
    left, ends, size = whole("max_tokens", max_tokens, 0), set(ids("stop_ids", stop_ids)), whole("rows", rows)
    if isinstance(prompts, str) or not len(prompts) or any(isinstance(prompt, int) for prompt in prompts):
        raise ValueError("prompts must be lists of token ids, at least one; for a single prompt: generate")
    settings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    if len(settings) != len(prompts):
        raise ValueError(f"{len(settings)} settings of sampling for {len(prompts)} prompts; give one for each")
    requests = []
    for index, (prompt, one) in enumerate(zip(prompts, settings, strict=True)):
        tokens = _checked(prompt, model, one)
        if not tokens.numel():
            raise ValueError(f"prompt {index} is empty; give at least one token")
        requests.append(_Request(index, tokens, one, left, ends))
    return Batch(model, requests if left else [], min(size, len(requests)), whole("piece", piece))


class Batch(Iterator[tuple[int, int]]):
    """What ``generate_batch`` returns: an iterator of (index of the prompt, token id), in the order they are made.

    ``tokens`` collects the ids of every prompt so far.
    """

    def __init__(self, model: LanguageModel, waiting: list[_Request], rows: int, piece: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in waiting]
        self._model, self._piece, self._rows = model, piece, rows
        self._waiting = list(reversed(waiting))
        self._pool, self._sampler = Pool(model, rows), Sampler(model.cfg.vocab_size, model.norm.weight.device)
        self._running: dict[int, _Request] = {}
        self._logits: dict[int, Tensor] = {}  # [1 vocab] of rows that have just begun
        self._ready: list[tuple[int, int]] = []

    def __next__(self) -> tuple[int, int]:
        while not self._ready:
            self._begin()
            if not self._running:
                raise StopIteration
            self._draw()
        return self._ready.pop(0)

    @torch.no_grad()
    def _begin(self) -> None:
        """Read prompts into the rows that are free."""
        for row in range(self._rows):
            if row not in self._running and self._waiting:
                request = self._waiting.pop()
                self._logits[row], state = self._model.read(request.prompt[None], piece=self._piece)
                self._running[row] = request
                self._pool.hand_over((row,), state)
                self._sampler.put(row, request.sampling, request.prompt)

    @torch.no_grad()
    def _draw(self) -> None:
        """One token for every running row."""
        rows = sorted(self._running)
        if self._logits:  # some rows have just begun: theirs beside those of the last step
            self._last = torch.cat([(self._logits.pop(r) if r in self._logits else self._of(r)).float() for r in rows])
        drawn, going = self._sampler.draw(self._last, rows), []
        for place, (row, token) in enumerate(zip(rows, drawn, strict=True)):
            request = self._running[row]
            if token not in request.stop_ids:
                request.left -= 1
                self.tokens[request.index].append(token)
                self._ready.append((request.index, token))
            if token in request.stop_ids or not request.left:
                del self._running[row]
                self._pool.free(row)
            else:
                going.append(place)
        if going:
            self._stepped = [rows[place] for place in going]
            ids = torch.tensor([drawn[place] for place in going], device=self._last.device)
            self._last = self._pool.step(ids, self._stepped)

    def _of(self, row: int) -> Tensor:
        """The logits of a row that has taken the last step."""
        place = self._stepped.index(row)
        return self._last[place : place + 1]
