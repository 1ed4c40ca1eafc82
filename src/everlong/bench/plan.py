"""What a command line asks for, checked and made into a plan."""

from __future__ import annotations

from ..models.presets import preset
from ..ops.native.product import FORMATS, check_format
from .clock import Pace
from .engines import check_models
from .models import MEASURES, ModelsPlan, chosen_measures
from .ops import OpsPlan, chosen_backends, chosen_cases, chosen_dtypes, chosen_ops
from .peers import check_peers
from .training import Shape

FULL = {"lengths": "512,2048", "contexts": "512", "batches": "1,4,16", "texts": "10000,100000"}
QUICK = {"lengths": "256", "contexts": "256", "batches": "1,4", "texts": "4000,16000"}
MODELS = ("mamba-130m", "mamba2-130m", "rwkv7-0.1b")
QUICK_MEASURES = ("prefill", "decode", "batch", "memory")


def ops_plan(
    *, ops: list[str], cases: list[str], dtypes: list[str], backends: list[str], seconds: float | None, quick: bool
) -> OpsPlan:
    """The plan of ``everlong bench ops``; empty lists mean all. ``ValueError`` with a suggestion for unknown names."""
    return OpsPlan(
        ops=chosen_ops(ops),
        cases=chosen_cases(cases or (["training"] if quick else [])),
        dtypes=chosen_dtypes(dtypes or (["fp32"] if quick else [])),
        backends=chosen_backends(backends),
        pace=pace(seconds, 0.3 if quick else 1.0),
    )


def models_plan(
    *,
    models: list[str],
    measures: list[str],
    weights: list[str],
    sizes: dict[str, str | None],
    against: list[str],
    seconds: float | None,
    quick: bool,
) -> ModelsPlan:
    """The plan of ``everlong bench models``; what is empty or None has its default, a smaller one where ``quick``.

    ``sizes``: lengths, contexts, batches and texts as typed.
    ``ValueError`` with a suggestion for unknown names, for peers that are not installed, and for numbers below 1.
    """
    models = models or list(MODELS[:1] if quick else MODELS)
    weights = weights or (["bf16"] if quick else list(FORMATS))
    measures = measures or list(QUICK_MEASURES if quick else MEASURES)
    usual = QUICK if quick else FULL
    counts = {name: numbers(name, usual[name] if text is None else text) for name, text in sizes.items()}
    return ModelsPlan(
        models={name: preset(name) for name in check_models(models)},
        measures=chosen_measures(measures),
        weights=tuple(check_format(name) for name in weights),
        lengths=counts["lengths"],
        contexts=counts["contexts"],
        batches=counts["batches"],
        reads=counts["texts"],
        against=tuple(check_peers(against)),
        steps=16 if quick else 64,
        pace=pace(seconds, 3.0 if quick else 20.0),
        training=Shape(context=128) if quick else Shape(),
    )


def pace(seconds: float | None, usual: float) -> Pace:
    """The pace of a comparison of ``seconds``. ``ValueError`` for none and less."""
    return Pace(seconds=usual if seconds is None else seconds)


def numbers(name: str, text: str) -> tuple[int, ...]:
    """``"512, 2048"`` as numbers, ascending. ``ValueError`` for anything else, for none, and for those below 1."""
    try:
        found = sorted({int(part.replace("_", "")) for part in text.split(",") if part.strip()})
    except ValueError as error:
        raise ValueError(f"--{name} must be numbers separated by commas, got {text!r}") from error
    if not found or found[0] < 1:
        raise ValueError(f"--{name} must be numbers of at least 1, got {text!r}")
    return tuple(found)
