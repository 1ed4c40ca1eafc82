"""What a model costs: bytes of state by length, tokens per second of reading a prompt, latency of the next token."""

from __future__ import annotations

import os
import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import state as states
from ..bench.clock import quantile
from ..generation.decoder import Decoder
from ..models.lm import LanguageModel

STATE_LENGTHS = tuple(2**power for power in range(10, 21))  # 1K to 1M tokens
WARM_UP = 3  # decoded tokens that are not timed: the first may copy a cache into a longer buffer


def computed_bytes(model: LanguageModel) -> list[list[int]]:
    """``[tokens, bytes]`` of one row's state from 1K to 1M tokens, from the shapes of its leaves alone."""
    empty = model.init_state(1)
    return [[length, states.nbytes_after(empty, length)] for length in STATE_LENGTHS]


def measured_bytes(model: LanguageModel, tokens: Tensor, lengths: tuple[int, ...]) -> list[list[int]]:
    """``[tokens, bytes]`` of real states after reading ``lengths`` (ascending) of ``tokens [1 T]``, as one stream.

    ``RuntimeError`` where a state is not as large as ``nbytes_after`` computes: then its declarations are wrong.
    """
    state, read, found = None, 0, []
    for length in lengths:
        _, state = model.read(_cycled(tokens, length)[:, read:], state)
        read, held = length, states.nbytes(state)
        if held != (wanted := states.nbytes_after(model.init_state(1), length)):
            raise RuntimeError(
                f"the state holds {held:,} bytes after {length:,} tokens, but {wanted:,} were computed from its "
                "shapes; a leaf that grows must be declared with state.growing(...)"
            )
        found.append([length, held])
    return found


def _cycled(tokens: Tensor, length: int) -> Tensor:
    """``length`` tokens [1 length], the text repeated where it is shorter."""
    return tokens.repeat(1, -(-length // tokens.shape[1]))[:, :length]


class Speed(NamedTuple):
    """``prefill`` [[length, tokens/s]], ``decode`` [{"context", "p50_ms", "p99_ms"}], and the ``engine`` of decoding.

    ``engine``: {"in_python", "blocks"}, how many blocks run in Python and of how many. ``load``: of the machine in the
    minute before, in processes; None where the system does not tell.
    """

    prefill: list[list[float]]
    decode: list[dict[str, Any]]
    engine: dict[str, int]
    load: float | None


def engine(decoder: Decoder) -> tuple[int, int]:
    """How many blocks of a model a decoder runs in Python, and how many blocks there are."""
    blocks = sum(len(layer.sequence()) for layer in decoder.model.cfg.layers)
    names = [name for name, _ in decoder.explain()]
    return (blocks if "model" in names else len(names)), blocks


def speed(model: LanguageModel, tokens: Tensor, lengths: tuple[int, ...], *, seconds: float, steps: int) -> Speed:
    """Reading prompts of ``lengths`` (ascending), and decoding after those of 1K tokens and more.

    A length is read in pieces from an empty state as often as ``seconds`` allow (once at least); the median counts.
    A length above 1K that would take more than 4 times ``seconds`` (by the last one's speed) is left out. Decoding
    times ``steps`` tokens (fewer if ``seconds`` are over, 20 at least), one by one, on the state that was read.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    prefill: list[list[float]] = []
    decode: list[dict[str, Any]] = []
    model.read(_cycled(tokens, lengths[0]))
    decoder = Decoder(model)
    for length in lengths:
        if prefill and length > 1024 and length / prefill[-1][1] > 4 * seconds:
            break
        rate, state = _prefill(model, _cycled(tokens, length), seconds)
        prefill.append([length, rate])
        if length >= 1024:
            decode.append({"context": length, **_decode(decoder, tokens, state, seconds, steps)})
    in_python, blocks = engine(decoder)
    return Speed(prefill, decode, {"in_python": in_python, "blocks": blocks}, load)


def _prefill(model: LanguageModel, prompt: Tensor, seconds: float) -> tuple[float, Any]:
    """Tokens per second (median) and the state after the prompt."""
    times: list[float] = []
    state: Any = None
    while not times or (len(times) < 9 and sum(times) + times[-1] < seconds):
        began = time.perf_counter()
        _, state = model.read(prompt)
        times.append(time.perf_counter() - began)
    return prompt.shape[1] / statistics.median(times), state


@torch.no_grad()
def _decode(decoder: Decoder, tokens: Tensor, state: Any, seconds: float, steps: int) -> dict[str, float]:
    """Milliseconds per token, as ``generate`` makes them: on one owned state."""
    decoder.load(state)
    times: list[float] = []
    for index in range(WARM_UP + steps):
        token = tokens[:, index % tokens.shape[1]]
        began = time.perf_counter()
        decoder.step(token)
        times.append(1000 * (time.perf_counter() - began))
        if len(times) >= WARM_UP + 20 and sum(times) > 1000 * seconds:
            break
    times = sorted(times[WARM_UP:])
    return {"p50_ms": quantile(times, 0.5), "p99_ms": quantile(times, 0.99)}
