"""Text from token ids: whole characters, ended before stop texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..arguments import texts
from ..tokenizer import Decoder as TextDecoder
from ..tokenizer import Tokenizer


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
