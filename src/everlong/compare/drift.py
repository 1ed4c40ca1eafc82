"""What quantised weights change: logits at random weights, and perplexity on held-out text after training.

``python -m everlong.compare.drift`` prints two tables, of presets and of small models that it trains itself. The
training is that of ``everlong compare`` (its text, sizes and optimiser).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from ..arguments import SEED, texts, whole
from ..models.presets import preset
from ..models.quantize import quantized, weight_bytes
from ..ops.native.product import check_format
from ..train.data import Corpus, default_paths
from ..train.loop import Trainer, evaluate
from .architectures import count, sized
from .settings import Settings

FORMATS = ("bf16", "int8", "int4")
PRESETS = ("mamba-130m", "mamba2-130m", "rwkv7-0.1b", "llama-124m")
MIXERS = ("attention", "mamba", "mamba2", "rwkv7", "griffin", "jamba")
TOKENS = 64  # of the prompt whose logits are compared


class Drift(NamedTuple):
    """One model: bytes of its weights, and how far it drifts, by format; ``base`` describes full precision."""

    name: str
    base: str
    nbytes: dict[str, int]
    drift: dict[str, float]


@torch.no_grad()
def logit_drift(name: str, formats: str | Iterable[str] = FORMATS, seed: int = 0) -> Drift:
    """A preset at its random initial weights: the relative L2 error of the logits of 64 random tokens."""
    torch.manual_seed(whole("seed", seed, *SEED))
    model = preset(name).build().eval()
    tokens = torch.randint(model.cfg.vocab_size, (1, TOKENS))
    want, sizes, drift = model(tokens)[0], {"fp32": weight_bytes(model)}, {}
    for format in texts("formats", formats):
        made = quantized(model, format)
        drift[format] = float((made(tokens)[0].float() - want).norm() / want.norm())
        sizes[format] = weight_bytes(made)
    return Drift(name, f"{count(model.cfg) / 1e6:.0f} M", sizes, drift)


def perplexity_drift(name: str, settings: Settings, text: Corpus, formats: str | Iterable[str] = FORMATS) -> Drift:
    """An architecture trained on ``text``: the change of its perplexity on the held-out part, as a share."""
    learnt, held_out = text.split(settings.held_out, settings.seed)
    torch.manual_seed(settings.seed)
    model = sized(name, settings.params, vocab_size=text.vocab_size, context=settings.context).build()
    Trainer(model, learnt, settings.training()).run()
    model.eval()
    loss, bits = evaluate(model, held_out, settings.context)
    sizes, drift = {"fp32": weight_bytes(model)}, {}
    for format in texts("formats", formats):
        made = quantized(model, format)
        drift[format] = math.exp(evaluate(made, held_out, settings.context)[0] - loss) - 1
        sizes[format] = weight_bytes(made)
    return Drift(name, f"{count(model.cfg) / 1e6:.2f} M, {bits:.3f} bits per byte", sizes, drift)


def table(rows: Iterable[Drift], measure: str) -> Iterator[str]:
    """Lines of a Markdown table, each as soon as its model is measured."""
    for number, row in enumerate(rows):
        if number == 0:
            yield "| model | fp32 | " + " | ".join(f"{format}: {measure}, size" for format in row.drift) + " |"
            yield "|---" * (2 + len(row.drift)) + "|"
        cells = [f"{d:.2%}, {row.nbytes[f] / row.nbytes['fp32']:.0%}" for f, d in row.drift.items()]
        yield f"| {row.name} | {row.base} | " + " | ".join(cells) + " |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m everlong.compare.drift", description=__doc__)
    parser.add_argument("--presets", default=",".join(PRESETS), help="of everlong.preset; '' for none")
    parser.add_argument("--mixers", default=",".join(MIXERS), help="as of everlong compare; '' for none")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--params", type=int, default=Settings().params, help="of each trained model")
    parser.add_argument("--tokens", type=int, default=Settings().tokens, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    formats = [check_format(name) for name in chosen.formats.split(",")]
    for line in table((logit_drift(n, formats, chosen.seed) for n in _names(chosen.presets)), "error of logits"):
        print(line, flush=True)
    names = _names(chosen.mixers)
    if names:
        print(flush=True)
        settings = Settings(params=chosen.params, tokens=chosen.tokens, seed=chosen.seed)
        text = Corpus.from_paths(default_paths())
        for line in table((perplexity_drift(name, settings, text, formats) for name in names), "perplexity"):
            print(line, flush=True)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


if __name__ == "__main__":
    main()
