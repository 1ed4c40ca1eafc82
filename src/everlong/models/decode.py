"""Decoding by a native program: a model's ``step`` is recorded once and replayed for every token.

``Decoder(model, batch)`` owns a state and writes it in place. Its definition is ``model.step``: it replays two random
tokens beside it when it is made, and what differs runs in Python with a reason. Blocks that cannot be replayed run
through their own ``step_``, in between.

A program computes in fp32 throughout: under bf16 weights it keeps the digits that ``model.step`` rounds away between
operations, so both differ by bf16's rounding (``numerics.TOLERANCE``).

A step is a function of its token, its state and the parameters. What it keeps elsewhere (a counter on a module), and
what other threads do for it, a recording does not see; the two tokens find it where it shows at once.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import numerics, shapes
from .. import state as states
from ..ops import native
from ..ops.native.product import MAX_ROWS
from . import guards
from .blocks import Layer
from .guards import Unsupported
from .lm import LanguageModel
from .replay import Replay, Where, own, refuse_hooks

CHECKED = 2  # tokens replayed beside ``model.step``


class Cost(NamedTuple):
    """Seconds that it took to make a decoder."""

    recording: float
    checking: float


class Decoder:
    """``decoder.step(tokens [B]) -> logits [B vocab]``, for a state that the decoder alone owns.

    ``load`` takes a state, ``state`` gives a copy of it. Logits are a view that the next step overwrites, in fp32
    where the program runs natively. ``explain()`` says which blocks do not, ``cost`` what making it took. More than
    64 rows are several programs. Parameters are taken as they are when it is made: make a new one after training.
    ``ValueError`` for ids outside the vocabulary, states of another model.
    """

    def __init__(self, model: LanguageModel, batch: int = 1) -> None:
        if batch < 1:
            raise ValueError(f"batch must be at least 1 row, got {batch}")
        self.model, self.batch, self.cost = model, batch, Cost(0.0, 0.0)
        self.reason = _refusal(model)
        self._replays: list[Replay] = []
        if self.reason is None:
            with torch.inference_mode(False), torch.no_grad():
                self.reason = self._make()
        if self.reason is not None:
            self._state: Any = model.init_state(batch)
        elif len(self._replays) > 1:
            self._logits = torch.cat([replay.logits for replay in self._replays])

    # ---- the public face ----

    def explain(self) -> list[tuple[str, str]]:
        """The blocks that run in Python, with the reason; empty where the whole step is native.

        Where all of the model does, that line comes first.
        """
        found = {block.name: block.reason for replay in self._replays for block in replay.blocks if block.reason}
        return [*([("model", self.reason)] if self.reason is not None else []), *found.items()]

    def load(self, state: Any) -> None:
        """Take a copy of ``state`` [B rows] as the state to go on from."""
        states.check_like(state, self.model.init_state(0), self.batch)
        states.check_values(state)
        if self.reason is not None:
            self._state = states.map_leaves(torch.clone, state)
            return
        begin = 0
        for replay in self._replays:
            rows = slice(begin, begin + replay.rows)
            replay.load(state if len(self._replays) == 1 else states.map_leaves(lambda leaf, r=rows: leaf[r], state))
            begin += replay.rows

    def state(self) -> Any:
        """A copy of the state after all tokens so far, as ``model.step`` would return it."""
        if self.reason is not None:
            return states.map_leaves(torch.clone, self._state)
        kept = [replay.state() for replay in self._replays]
        return kept[0] if len(kept) == 1 else states.stack(kept)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """One token per row: ids [B] -> logits [B vocab]; the state moves on."""
        self._check(tokens)
        if self.reason is not None:
            logits, self._state = self.model.step_(tokens, self._state)
            return logits
        tokens = tokens.long().contiguous()
        if len(self._replays) == 1:
            return self._replays[0].step(tokens)
        begin = 0
        for replay in self._replays:
            end = begin + replay.rows
            self._logits[begin:end] = replay.step(tokens[begin:end])
            begin = end
        return self._logits

    def _check(self, tokens: Tensor) -> None:
        shapes.dims(f"tokens {self.batch}", tokens)
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens have dtype {tokens.dtype}, expected int64 ids; encode the text first")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.model.cfg.vocab_size:
            raise ValueError(
                f"token ids from {low} to {high}, expected 0 to {self.model.cfg.vocab_size - 1}; "
                "was the text encoded with this model's tokenizer?"
            )

    # ---- making it ----

    def _make(self) -> str | None:
        """Record until the replay is what ``model.step`` is; a reason where that cannot be."""
        python: dict[Where, str] = {}
        drawn = torch.get_rng_state()
        while True:
            self._rewind(drawn)
            begun = time.perf_counter()
            reason = self._record(python)
            recorded = time.perf_counter()
            found = {} if reason is not None else self._differing()
            spent = Cost(recorded - begun, time.perf_counter() - recorded)
            self.cost = Cost(*(a + b for a, b in zip(self.cost, spent, strict=True)))
            if reason is not None or not found or None in found:
                self._rewind(drawn, reason or found.get(None))
                return reason or found.get(None)
            python |= found  # type: ignore[arg-type]

    def _rewind(self, drawn: Tensor, reason: str | None = None) -> None:
        """Give back the random numbers that blocks in Python are known to draw; other threads may draw meanwhile."""
        reasons = [reason, *(block.reason for replay in self._replays for block in replay.blocks)]
        draws = any(guards.DRAWS in (why or "") for why in reasons)
        if draws and not torch.equal(torch.get_rng_state(), drawn):
            torch.set_rng_state(drawn)

    def _record(self, python: dict[Where, str]) -> str | None:
        parts = -(-self.batch // MAX_ROWS)
        sizes = [self.batch // parts + (part < self.batch % parts) for part in range(parts)]
        self._replays = []
        for rows in sizes:
            self._replays.append(Replay(self.model, rows, python))
            try:
                self._replays[-1].record()
            except Unsupported as error:
                return str(error)
            except Exception as error:  # what a step does while it is recorded, or a rule has not foreseen
                return f"recording failed: {type(error).__name__}: {error}"
        return None

    def _differing(self) -> dict[Where | None, str]:
        """The blocks whose replay is not their step, with the reason; under None a reason against all of it."""
        for replay in self._replays:
            try:
                found = self._beside(replay)
            except Exception as failed:
                return {None: f"two tokens beside model.step: {type(failed).__name__}: {failed}"}
            if found:
                return found
            replay.load(self.model.init_state(replay.rows))
        return {}

    def _beside(self, replay: Replay) -> dict[Where | None, str]:
        """What differs in two random tokens, the second one from the state that the first has left.

        Where numbers are rounded to few digits, two right forms of a deep model drift apart: there each block alone
        is held to its step, elsewhere the whole first.
        """
        numbers, size = torch.Generator("cpu").manual_seed(0), (CHECKED, replay.rows)
        ids = torch.randint(0, self.model.cfg.vocab_size, size, generator=numbers, device="cpu")
        rounded = replay.half or self.model.weights is not None
        dtype = torch.bfloat16 if rounded else torch.float32
        whole = None if rounded else self._whole(replay, ids)
        if not rounded and whole is None:
            return {}
        replay.load(self._begun(replay.rows))
        found: dict[Where | None, str] = {}
        for tokens in ids:
            for where, name in replay.differing(tokens, lambda got, want: _alike(got, want, dtype)):
                found[where] = f"replayed, {name} differs from " + ("its step" if where else "the model's")
        return found or ({None: whole} if whole else {})

    def _begun(self, rows: int) -> Any:
        """A state in which no number is zero: what a program makes of zeros may be right by chance."""
        numbers, state = torch.Generator("cpu").manual_seed(1), self.model.init_state(rows)
        made = [
            leaf + 0.1 * torch.rand(leaf.shape, dtype=torch.float32, generator=numbers, device="cpu").to(leaf.dtype)
            if pad is None and leaf.is_floating_point()
            else leaf
            for _, leaf, pad in states.leaves(state)
        ]
        return states.rebuild(state, iter(made))

    def _whole(self, replay: Replay, ids: Tensor) -> str | None:
        want = self._begun(replay.rows)
        replay.load(want)
        for tokens in ids:
            drawn = torch.get_rng_state()
            logits, want = self.model.step(tokens, want)
            self._rewind(drawn)  # a block in Python may draw: the same numbers for both
            if not _alike(replay.step(tokens), logits, torch.float32):
                return "replayed, logits differ from those of model.step"
        same = _alike(replay.state(), want, torch.float32)
        return None if same else "replayed, states differ from those of model.step"


def _alike(got: Any, want: Any, dtype: torch.dtype) -> bool:
    """Are all tensors equal within the tolerance of ``dtype``? NaN equals NaN, and spare room is not counted."""
    pairs = zip(states.leaves(got), states.leaves(want), strict=True)
    return all(_equal(*_common(mine, leaf, pad), dtype) for (_, mine, pad), (_, leaf, _) in pairs)


def _equal(got: Tensor, want: Tensor, dtype: torch.dtype) -> bool:
    if got.shape != want.shape or not want.is_floating_point():
        return bool(got.shape == want.shape and (got == want).all())
    got, want = got.float(), want.float()
    finite = torch.isfinite(want)
    if not torch.equal(finite, torch.isfinite(got)):
        return False
    whole, row = numerics.relative_errors(got.where(finite, 0), want.where(finite, 0))
    limit = numerics.TOLERANCE[dtype]
    return whole <= limit and row <= limit * numerics.ROW[dtype]


def _common(got: Tensor, want: Tensor, pad: str | None) -> tuple[Tensor, Tensor]:
    """Both without spare room in a leaf that grows."""
    if pad is None:
        return got, want
    length = min(got.shape[1], want.shape[1])
    return (got[:, :length], want[:, :length]) if pad == "end" else (got[:, -length:], want[:, -length:])


def _refusal(model: LanguageModel) -> str | None:
    """Why this model cannot be recorded at all, or None."""
    if native.MISSING is not None:
        return native.MISSING
    for name, x in model.state_dict().items():
        if x.device.type != "cpu" or x.dtype in (torch.float64, torch.float16):
            return f"{name} is {x.dtype} on {x.device}; the kernels take fp32 and bf16 on the CPU"
    try:
        _refuse_own(model)
    except Unsupported as error:
        return str(error)
    return None


def _refuse_own(model: LanguageModel) -> None:
    """``Unsupported`` where something else than the recorded blocks has a part in ``model.step``."""
    hooks = nn.modules.module
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        raise Unsupported("a forward hook for all modules")
    if own(model, LanguageModel, "step", "_step", "step_"):
        raise Unsupported(f"{type(model).__name__} has its own step")
    for index, layer in enumerate(model.layers):
        if own(layer, Layer, "step", "_blocks"):
            raise Unsupported(f"layers.{index} has its own step")
    for name in ("embedding", "embed_norm", "norm", "head"):
        part = getattr(model, name)
        if part is not None:
            refuse_hooks(part, name)
