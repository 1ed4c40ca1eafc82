"""Training throughput: steps of the optimiser on random bytes, ours and those of transformers in turn.

Every model has the same width and number of layers. Ours are trained as ``everlong train`` does it, transformers'
with its own loss and the same AdamW; bf16 means autocast for all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import arguments
from ..models import families
from ..models.lm import LanguageModel
from ..numerics import BOUNDS, relative_errors
from ..ops.dispatch import backend
from ..train.loop import Trainer
from ..train.optim import make_optimizer
from . import clock
from .engines import randomized

Row = dict[str, Any]
CHECKED = 64  # tokens on which loss and gradients are compared with the reference loops
LIMITS = {
    "fp32": BOUNDS["fp32 gradient"],
    "bf16": BOUNDS["bf16 training"],
}  # largest relative error of loss and of the whole gradient


@dataclass(frozen=True)
class Shape:
    """Sizes of the models and of a step."""

    d_model: int = 256
    layers: int = 6
    batch: int = 4
    context: int = 512
    vocab_size: int = 256
    dtypes: tuple[str, ...] = ("fp32", "bf16")

    def __post_init__(self) -> None:
        arguments.check(self)

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.context


def models(shape: Shape) -> dict[str, LanguageModel.Config]:
    """The families as their papers build them (``models.families``), at this width and depth; heads of 64 or less."""
    heads = max(1, shape.d_model // 64)
    head = shape.d_model // heads
    units = {
        "mamba": families.mamba(),
        "mamba2": families.mamba2(head_dim=head),
        "rwkv7": families.rwkv7(head_size=head),
        "griffin": families.griffin(n_heads=heads, hidden=3 * shape.d_model, window=shape.context // 4),
    }
    return {name: _model(name, unit, shape) for name, unit in units.items()}


def _model(family: str, unit: families.Unit, shape: Shape) -> LanguageModel.Config:
    layers = (unit * shape.layers)[: shape.layers]
    return families.model(family, layers, vocab_size=shape.vocab_size, d_model=shape.d_model)


def llama(shape: Shape) -> LanguageModel.Config:
    """A Llama of this width and depth, for transformers."""
    hidden = -(-shape.d_model * 8 // 48) * 16
    return _model("llama", families.llama(n_heads=max(1, shape.d_model // 64), hidden=hidden), shape)


def throughput(shape: Shape, against: tuple[str, ...], pace: clock.Pace) -> list[Row]:
    """Tokens trained per second by every model, in turn, and how many times faster ours are than transformers'."""
    rows: dict[str, Row] = {}
    contenders: dict[str, clock.Contender] = {}
    for dtype in shape.dtypes:
        for name, cfg in models(shape).items():
            row = _row(name, "everlong", dtype)
            error, reason = check(cfg, shape, dtype)
            row.update(error=error, status="timed" if reason is None else "mismatch", reason=reason)
            rows[f"everlong {name} {dtype}"] = row
            if reason is None:
                contenders[f"everlong {name} {dtype}"] = _our_step(cfg, shape, dtype)
        if "transformers" in against:
            theirs = {"llama": llama(shape)}
            if dtype == "fp32":  # its Mamba takes more than a minute for a step, so once is enough
                theirs["mamba"] = models(shape)["mamba"]
            for name, cfg in theirs.items():
                rows[f"transformers {name} {dtype}"] = _row(name, "transformers", dtype)
                contenders[f"transformers {name} {dtype}"] = _their_step(cfg, shape, dtype)
    laps = clock.interleave(contenders, pace)
    for key, own in laps.items():
        row = rows[key]
        row["tokens_per_second"] = clock.rates(own, shape.tokens)
        if row["engine"] == "everlong":
            row["ratios"] = {
                k: clock.ratios(own, laps[k])
                for k in laps
                if k.startswith("transformers") and k.endswith(row["weights"])
            }
            if row["weights"] == "bf16" and (single := laps.get(key.replace("bf16", "fp32"))):
                row["against_fp32"] = clock.ratios(own, single)
    return list(rows.values())


def _row(name: str, engine: str, dtype: str) -> Row:
    about = {"measure": "training", "model": name, "engine": engine, "weights": dtype}
    return {**about, "status": "timed", "reason": None, "error": None}


def _batch(shape: Shape) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    made = torch.randint(0, shape.vocab_size, (shape.batch, shape.context + 1), generator=generator)
    return made[:, :-1].contiguous(), made[:, 1:].contiguous()


def _mixed(dtype: str) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16")


def _stepper(model: nn.Module, optimizer: Any, loss: Callable[[], Tensor], dtype: str) -> clock.Contender:
    """A contender: loss, gradients, clipping, update."""
    parameters = list(model.parameters())

    def step() -> None:
        with _mixed(dtype):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    return clock.stopwatch(step)


def _our_step(cfg: LanguageModel.Config, shape: Shape, dtype: str) -> clock.Contender:
    torch.manual_seed(0)
    model, (tokens, targets) = cfg.build(), _batch(shape)
    return _stepper(model, make_optimizer(model, Trainer.Config()), lambda: model.loss(tokens, targets), dtype)


def _their_step(cfg: LanguageModel.Config, shape: Shape, dtype: str) -> clock.Contender:
    from .peers.transformers_engine import carried_over

    torch.manual_seed(0)
    model, (tokens, _) = carried_over(cfg.build()).train().requires_grad_(True), _batch(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return _stepper(model, optimizer, lambda: model(tokens, labels=tokens, use_cache=False).loss, dtype)


def check(cfg: LanguageModel.Config, shape: Shape, dtype: str) -> tuple[float, str | None]:
    """Loss and gradients of a short batch against those of the reference loops in fp32: the error, and what differs."""
    model, (tokens, targets) = randomized(cfg).requires_grad_(True), _batch(shape)
    tokens, targets = tokens[:, :CHECKED], targets[:, :CHECKED]

    def slopes(model: LanguageModel, dtype: str) -> Tensor:
        with _mixed(dtype):
            loss = model.loss(tokens, targets)
        loss.backward()
        return torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])

    with backend("reference"):
        want = slopes(copy.deepcopy(model), "fp32")
    got = slopes(model, dtype)
    error = max(relative_errors(got[:1], want[:1])[0], relative_errors(got[1:], want[1:])[0])
    limit = LIMITS[dtype]
    return error, None if error <= limit else f"loss and gradients: relative error {error:.1e}, allowed {limit:.0e}"
