"""Continue a text with a saved model, as a stream of text pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..arguments import texts
from ..generation.generate import Generation, generate
from ..generation.sampler import Sampling
from ..generation.text import stream_text
from ..tokenizer import Tokenizer
from .folder import load, load_tokenizer
from .session import load_session, save_session


def continue_text(
    folder: str | Path,
    prompt: str,
    *,
    max_tokens: int = 256,
    sampling: Sampling = Sampling(),
    stop: str | Sequence[str] = (),
    session: Path | None = None,
    weights: str | None = None,
    trust_code: bool = False,
) -> Iterator[str]:
    """Pieces of text that continue ``prompt``, from the model in ``folder``; the prompt is read before this returns.

    ``session`` names a file: where it exists the text goes on from it, and it is written at the end, so
    that the next call reads nothing twice. ``weights`` and ``trust_code`` are those of ``load``. ``ValueError``
    for what ``load`` and ``generate`` refuse.
    """
    stop = texts("stop", stop)
    if session is not None and (session.is_dir() or not session.parent.is_dir()):
        raise ValueError(f"session is {session}, expected a file in a folder that exists")
    model, tokenizer = load(folder, weights=weights, trust_code=trust_code), load_tokenizer(folder)
    before = None
    if session is not None and session.exists():
        before = load_session(session, model)
    ids = tokenizer.encode(prompt)
    if before is None and tokenizer.eos is not None:
        ids = [tokenizer.eos, *ids]  # documents begin with it in training
    stop_ids = () if tokenizer.eos is None else (tokenizer.eos,)
    tokens = generate(model, ids, max_tokens=max_tokens, sampling=sampling, session=before, stop_ids=stop_ids)
    return _streamed(tokens, tokenizer, stop, ids, session)


def _streamed(
    tokens: Generation, tokenizer: Tokenizer, stop: Sequence[str], prompt: Sequence[int], session: Path | None
) -> Iterator[str]:
    """The text as it comes; the session is written when it ends."""
    yield from stream_text(tokens, tokenizer, stop, prompt)
    if session is not None:
        save_session(tokens.session, session, tokens.model)
