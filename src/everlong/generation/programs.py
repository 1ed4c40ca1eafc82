"""The recordings of a model, made once for each number of rows and kept until the model changes.

A recording's definition is ``model.step``: it replays two random tokens beside it when it is made, and what differs
runs in Python with a reason.

A program computes in fp32 throughout: under bf16 weights it keeps the digits that ``model.step`` rounds away between
operations, so both differ by bf16's rounding (``numerics.TOLERANCE``).

A step is a function of its token, its state and the parameters. What it keeps elsewhere (a counter on a module), and
what other threads do for it, a recording does not see; the two tokens find it where it shows at once.
"""

from __future__ import annotations

import operator
import threading
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import numerics
from .. import state as states
from ..mixers import base
from ..models.blocks import Layer
from ..models.lm import LanguageModel
from ..ops import native
from ..ops.dispatch import backend, named
from ..ops.native import guards
from ..ops.native.guards import Unsupported
from .memory import Memory
from .player import Player
from .recording import Recording, Where, own, refuse_hook, refuse_hooks

CHECKED = 2  # tokens replayed beside ``model.step``
SMALL = 1 << 18  # numbers of a tensor whose values are compared to see whether a model has changed


class Cost(NamedTuple):
    """Seconds that it took to make recordings."""

    recording: float
    checking: float


class Programs:
    """The recordings of a model as it is now. ``reason``: why none can be made.

    ``python`` names the blocks that run in Python, with the reason; where one is found for one number of rows, it is so
    for all (``epoch`` then counts on, and earlier recordings are dropped).
    """

    def __init__(self, model: LanguageModel) -> None:
        self.reason = _refusal(model)
        self.python: dict[Where, str] = {}
        self.epoch, self.cost = 0, Cost(0.0, 0.0)
        self._kept: dict[int, Recording] = {}
        self._found: dict[Where, str] = {}  # blocks that the last recording left to Python
        self._lock = threading.RLock()

    def recording(self, model: LanguageModel, rows: int) -> Recording | None:
        """The recording for so many rows; None, and a ``reason``, where there can be none."""
        with self._lock:
            if self.reason is None and rows not in self._kept:
                with torch.inference_mode(False), torch.no_grad(), backend(None):  # kernels would hide what is recorded
                    self.reason = self._make(model, rows)
                if self.reason is not None:
                    self.epoch, self._kept = self.epoch + 1, {}
            return self._kept.get(rows)

    def names(self) -> dict[str, str]:
        """The blocks in Python by name, with the reason."""
        return {f"layers.{layer}.{index}": why for (layer, index), why in sorted(self.python.items())}

    def _make(self, model: LanguageModel, rows: int) -> str | None:
        """Record until the replay is what ``model.step`` is; a reason where that cannot be."""
        drawn = torch.get_rng_state()
        while True:
            self._rewind(drawn)
            begun = time.perf_counter()
            recording, reason = self._record(model, rows)
            recorded = time.perf_counter()
            found = {} if recording is None else self._differing(model, recording)
            spent = Cost(recorded - begun, time.perf_counter() - recorded)
            self.cost = Cost(*(a + b for a, b in zip(self.cost, spent, strict=True)))
            if recording is None or None in found:
                self._leave(self._found)
                self._rewind(drawn, reason or found.get(None))
                return reason or found.get(None)
            self._leave(self._found | found)  # type: ignore[arg-type]
            if not found:
                self._kept[rows] = recording
                self._rewind(drawn)
                return None

    def _leave(self, found: dict[Where, str]) -> None:
        """Leave these blocks to Python, for any number of rows."""
        if self._kept and not found.keys() <= self.python.keys():
            self.epoch, self._kept = self.epoch + 1, {}
        self.python |= found

    def _rewind(self, drawn: Tensor, reason: str | None = None) -> None:
        """Give back the random numbers that blocks in Python are known to draw; other threads may draw meanwhile."""
        reasons = (reason, *self._found.values(), *self.python.values())
        draws = any(guards.DRAWS in (why or "") for why in reasons)
        if draws and not torch.equal(torch.get_rng_state(), drawn):
            torch.set_rng_state(drawn)

    def _record(self, model: LanguageModel, rows: int) -> tuple[Recording | None, str | None]:
        made, reason = Recording(model, rows, self.python), None
        try:
            made.record(model)
        except Unsupported as error:
            reason = str(error)
        except Exception as error:  # what a step does while it is recorded, or a rule has not foreseen
            reason = f"recording failed: {type(error).__name__}: {error}"
        self._found = {block.where: block.reason for block in made.blocks if block.reason is not None}
        return (made if reason is None else None), reason

    def _differing(self, model: LanguageModel, recording: Recording) -> dict[Where | None, str]:
        """The blocks whose replay is not their step, with the reason; under None a reason against all of it."""
        try:
            return self._beside(model, recording)
        except Exception as failed:
            return {None: f"two tokens beside model.step: {type(failed).__name__}: {failed}"}

    def _beside(self, model: LanguageModel, recording: Recording) -> dict[Where | None, str]:
        """What differs in two random tokens, the second one from the state that the first has left.

        Where numbers are rounded to few digits, two right forms of a deep model drift apart: there each block alone
        is held to its step, elsewhere the whole first.
        """
        numbers, size = torch.Generator("cpu").manual_seed(0), (CHECKED, recording.rows)
        ids = torch.randint(0, model.cfg.vocab_size, size, generator=numbers, device="cpu")
        rounded = recording.half or model.weights is not None
        dtype = torch.bfloat16 if rounded else torch.float32
        whole = None if rounded else self._whole(model, recording, ids)
        if not rounded and whole is None:
            return {}
        player, works = _begin(model, recording)
        found: dict[Where | None, str] = {}
        for tokens in ids:
            player.memory.make_room(0, recording.rows)
            for where, name in player.differing(model, tokens, works, lambda got, want: _alike(got, want, dtype)):
                found[where] = f"replayed, {name} differs from " + ("its step" if where else "the model's")
        return found or ({None: whole} if whole else {})

    def _whole(self, model: LanguageModel, recording: Recording, ids: Tensor) -> str | None:
        player, works = _begin(model, recording)
        want = _begun(model, recording.rows)
        for tokens in ids:
            drawn = torch.get_rng_state()
            logits, want = model.step(tokens, want)
            self._rewind(drawn)  # a block in Python may draw: the same numbers for both
            player.memory.make_room(0, recording.rows)
            if not _alike(player.step(tokens, works, recording.rows), logits, torch.float32):
                return "replayed, logits differ from those of model.step"
        for index, block in enumerate(recording.blocks):
            got = works[index].state() if index in works else player.state(index)
            if not _alike(got, want.layers[block.where[0]][block.where[1]], torch.float32):
                return "replayed, states differ from those of model.step"
        return None


def _begun(model: LanguageModel, rows: int) -> Any:
    """A state in which no number is zero: what a program makes of zeros may be right by chance."""
    numbers, state = torch.Generator("cpu").manual_seed(1), model.init_state(rows)
    made = [
        leaf + 0.1 * torch.rand(leaf.shape, dtype=torch.float32, generator=numbers, device="cpu").to(leaf.dtype)
        if pad is None and leaf.is_floating_point()
        else leaf
        for _, leaf, pad in states.leaves(state)
    ]
    return states.rebuild(state, iter(made))


def _begin(model: LanguageModel, recording: Recording) -> tuple[Player, dict[int, base.Workspace]]:
    """A player on memory of its own, at the state ``_begun``."""
    state, memory, works = _begun(model, recording.rows), Memory(recording, recording.rows), {}
    for index, block in enumerate(recording.blocks):
        given = state.layers[block.where[0]][block.where[1]]
        if block.reason is not None:
            works[index] = block.block.workspace(given)
        else:
            for row in range(recording.rows):
                memory.put(index, row, given, row)
    return Player(recording, memory), works


def _alike(got: Any, want: Any, dtype: torch.dtype) -> bool:
    """Are all tensors equal within the tolerance of ``dtype``? NaN equals NaN."""
    pairs = zip(states.leaves(got), states.leaves(want), strict=True)
    return all(_equal(mine, leaf, dtype) for (_, mine, _), (_, leaf, _) in pairs)


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


def _refusal(model: LanguageModel) -> str | None:
    """Why this model cannot be recorded at all, or None."""
    if native.MISSING is not None:
        return native.MISSING
    if named() not in (None, "native"):
        return f"the backend {named()!r} is asked for, and a program is native"
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
    if own(model, LanguageModel, "step", "_run"):
        raise Unsupported(f"{type(model).__name__} has its own step")
    for index, layer in enumerate(model.layers):
        if own(layer, Layer, "forward", "sequence"):
            raise Unsupported(f"layers.{index} has its own step")
        refuse_hook(f"layers.{index}", layer)
    for name in ("embedding", "embed_norm", "norm", "head"):
        part = getattr(model, name)
        if part is not None:
            refuse_hooks(part, name)


# ---- kept with the model ----


class Kept:
    """What a model carries along: its programs and how it looked when they were made. Copies of a model begin anew."""

    def __init__(self) -> None:
        self.programs: Programs | None = None
        self.marks: tuple[Any, ...] = ()

    def __deepcopy__(self, memo: Any) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, ()


_MAKING = threading.Lock()


def programs(model: LanguageModel) -> Programs:
    """The programs of a model, made anew where anything about it has changed since the last call."""
    with _MAKING:
        kept = vars(model).setdefault("_programs", Kept())
        if kept.programs is None or not _unchanged(kept.marks, _marks(model)):
            kept.programs, marks = Programs(model), _marks(model)
            values = marks[-1] if kept.programs.reason is None else []  # what runs in Python reads them as they are
            kept.marks = (*marks[:-1], [tensor.detach().clone() for tensor in values])
        return kept.programs


def _marks(model: LanguageModel) -> tuple[Any, ...]:
    """All that a recording may depend on: surroundings, objects, places and versions of tensors, small ones whole."""
    hooks = nn.modules.module
    around = (
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        named(),
        native.MISSING,
        native._LIBRARY,
        len(hooks._global_forward_hooks) + len(hooks._global_forward_pre_hooks),
    )
    objects: list[Any] = []
    tensors: list[Tensor] = []
    modules: list[nn.Module] = [model]
    while modules:
        module = modules.pop()
        objects.append(type(module))
        for name, value in vars(module).items():
            if name in ("_programs", "_fingerprint"):
                continue
            objects.extend(value.values()) if isinstance(value, dict) else objects.append(value)
        modules.extend(child for child in module._modules.values() if child is not None)
        for table in (module._parameters, module._buffers):
            tensors.extend(x for x in table.values() if x is not None)
    small = [x for x in tensors if x.numel() < SMALL]
    places = [(x.data_ptr(), object() if x.is_inference() else x._version) for x in tensors if x.numel() >= SMALL]
    return around, objects, places, [x.data_ptr() for x in small], small


def _unchanged(before: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    if before[0] != now[0] or len(before[1]) != len(now[1]) or not all(map(operator.is_, before[1], now[1])):
        return False
    return bool(before[2:4] == now[2:4] and all(map(torch.equal, before[4], now[4])))
