"""The engines of others, on our weights: found by name, imported only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module, util
from typing import Any, NamedTuple

from ...config import suggest
from ...models.lm import LanguageModel
from ..engines import Engine, Unavailable


class Peer(NamedTuple):
    """Where a peer's engine lives, what it imports, and what it calls our formats of weights."""

    module: str
    needs: tuple[str, ...]
    formats: dict[str, str]


PEERS = {
    "transformers": Peer("transformers_engine", ("transformers",), {"fp32": "fp32", "bf16": "bf16"}),
    "llama.cpp": Peer(
        "llama_engine", ("llama_cpp", "gguf"), {"fp32": "f32", "bf16": "f16", "int8": "Q8_0", "int4": "Q4_0"}
    ),
}


def check_peers(names: Sequence[str]) -> list[str]:
    """``names`` if all are known and installed. ``ValueError`` with a suggestion, or with how to install them."""
    for name in names:
        if name not in PEERS:
            raise ValueError(f"no peer {name!r}{suggest(name, PEERS)}")
        if missing := [module for module in PEERS[name].needs if util.find_spec(module) is None]:
            raise ValueError(
                f'{name} cannot be timed: {" and ".join(missing)} not installed; pip install "everlong[peers]"'
            )
    return list(names)


def counterpart(name: str, weights: str) -> str | None:
    """What a peer has for one of our formats of weights, or None."""
    return PEERS[name].formats.get(weights)


def engine(name: str, model: LanguageModel, weights: str, *, tokens: int, batch: int = 1) -> Engine:
    """The engine of a peer on the weights of ``model``, in its own name for the format, for at most ``tokens`` a row.

    ``Unavailable`` where the peer does not have this architecture.
    """
    made: Callable[..., Any] = import_module(f"{__name__}.{PEERS[name].module}").ENGINE
    return made(model, weights, tokens=tokens, batch=batch)


def mixer_of(model: LanguageModel) -> str:
    """The name of the mixer of all layers; ``Unavailable`` for a hybrid, which no peer gets from us."""
    kinds = {next(layer.mixers()).kind for layer in model.cfg.layers}
    if len(kinds) != 1:
        raise Unavailable(f"a hybrid of {' and '.join(sorted(kinds))} is not carried over to peers")
    return kinds.pop()
