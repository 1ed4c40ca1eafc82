"""Generation: an iterator of tokens over one owned state, and of text over it.

``generate`` reads the prompt in pieces, then yields one token at a time. Its ``session`` (state and next
logits) is a value: save it, fork it, give it back to go on without reading anything twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import state as states
from ..arguments import COUNT, SEED, SHARE, check, ids, texts, whole
from ..state import state
from ..tokenizer import Decoder as TextDecoder
from ..tokenizer import Tokenizer
from .decode import Decoder
from .lm import LanguageModel

IDS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
COLD = 1e-6  # temperatures below take the most likely token: dividing by them would overflow


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. ``temperature`` 0 takes the most likely one; 0, None and 1.0 switch the rest off.

    The random numbers of ``seed``, and the tokens that ``repetition_penalty`` has seen, begin anew with every call of
    ``generate``, also where that goes on from a session. ``ValueError`` for numbers out of ``bounds``.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    bounds: ClassVar = {
        "temperature": (0.0, 100.0),
        "top_k": (0, COUNT[1]),
        "top_p": SHARE,
        "min_p": SHARE,
        "repetition_penalty": (1e-6, 1e6),
        "seed": SEED,
    }

    def __post_init__(self) -> None:
        check(self)


@state
class Session:
    """Everything needed to go on: the model's state and the logits of the next token."""

    state: Any  # LanguageModel.State
    logits: Tensor  # [B vocab]


def new_session(model: LanguageModel, batch: int = 1) -> Session:
    """An empty session, of the shapes of ``model``; what ``state.load`` needs as ``like``."""
    weight = model.norm.weight
    logits = torch.zeros(batch, model.cfg.vocab_size, dtype=weight.dtype, device=weight.device)
    return Session(state=model.init_state(batch), logits=logits)


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [V] after temperature, top-k, top-p (arXiv 1904.09751) and min-p (arXiv 2407.01082); -inf is out."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], float("-inf"))
    if sampling.min_p > 0:
        odds = logits - logits.max()
        logits = logits.masked_fill(odds < math.log(sampling.min_p), float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        drop = before >= sampling.top_p
        drop[0] = False
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(0, order, drop), float("-inf"))
    return logits


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [V] with those of ``seen`` bool [V] made less likely (CTRL, arXiv 1909.05858)."""
    if penalty == 1.0:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


class Generation(Iterator[int]):
    """What ``generate`` returns: an iterator of token ids, with the state that has read them as ``.session``."""

    def __init__(
        self, model: LanguageModel, read: Tensor, session: Session, sampling: Sampling, left: int, stop_ids: set[int]
    ) -> None:
        self.model, self.sampling, self.left, self.stop_ids = model, sampling, left, stop_ids
        self._logits, self._decoder = session.logits, Decoder(model)
        self._decoder.load(session.state)
        self._seen = torch.zeros(model.cfg.vocab_size, dtype=torch.bool, device=read.device)
        self._seen[read[0]] = True
        self._generator = None if sampling.seed is None else torch.Generator(read.device).manual_seed(sampling.seed)

    @property
    def session(self) -> Session:
        """The state after all tokens yielded so far; a copy, so going on does not change it."""
        dtype = self.model.embedding.weight.dtype
        return Session(state=self._decoder.state(), logits=self._logits.to(dtype, copy=True))

    @torch.no_grad()
    def __next__(self) -> int:
        if self.left <= 0:
            raise StopIteration
        token = self._draw()
        if token in self.stop_ids:
            self.left = 0
            raise StopIteration
        self.left -= 1
        self._seen[token] = True
        self._logits = self._decoder.step(torch.tensor([token], device=self._seen.device))
        return token

    def _draw(self) -> int:
        logits = self._logits[0].float()
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("the model's logits are not finite; its weights hold NaN or overflow in this dtype")
        logits = penalised(logits, self._seen, self.sampling.repetition_penalty)
        if self.sampling.temperature < COLD:
            return int(logits.argmax())
        odds = filtered(logits, self.sampling).softmax(-1)
        return int(torch.multinomial(odds, 1, generator=self._generator))


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
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling must be Sampling(temperature=..., ...), got {sampling!r}")
    tokens = _ids(prompt).to(model.norm.weight.device)[None]
    if session is not None:
        states.check_like(session, new_session(model, 0), 1, "session")
        states.check_values(session, "session")
    elif not tokens.numel():
        raise ValueError("the prompt is empty; give at least one token, or a session to go on from")
    _check_vocabulary(tokens, model.cfg.vocab_size)
    if tokens.numel():
        logits, state = model.read(tokens, None if session is None else session.state, piece=whole("piece", piece))
        session = Session(state=state, logits=logits)
    assert session is not None
    return Generation(model, tokens, session, sampling, left, ends)


def _check_vocabulary(tokens: Tensor, vocabulary: int) -> None:
    if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary):
        raise ValueError(
            f"the prompt holds ids from {int(tokens.min())} to {int(tokens.max())}, expected 0 to "
            f"{vocabulary - 1}; encode it with this model's tokenizer"
        )


def stream_text(
    tokens: Iterator[int], tokenizer: Tokenizer, stop: str | Sequence[str] = (), prompt: Sequence[int] = ()
) -> Iterator[str]:
    """Text pieces from token ids: whole characters only, ended before the first of the ``stop`` texts.

    Text that may be the beginning of a stop text is held back until it is decided. ``prompt`` is what the tokens
    continue; some tokenizers need it to know whether a space belongs before the first word.
    ``ValueError`` for an empty stop text, before any token is drawn.
    """
    return _pieces(tokens, tokenizer.decoder(prompt), texts("stop", stop))


def _pieces(tokens: Iterator[int], decoder: TextDecoder, stop: tuple[str, ...]) -> Iterator[str]:
    held = ""
    for token in tokens:
        held += decoder.feed(token)
        cut = min((held.find(word) for word in stop if word in held), default=-1)
        if cut >= 0:
            yield held[:cut]
            return
        keep = max((size for word in stop for size in range(1, len(word)) if held.endswith(word[:size])), default=0)
        ready = len(held) - keep
        if ready:
            yield held[:ready]
            held = held[ready:]
    held += decoder.flush()
    if held:
        yield held
