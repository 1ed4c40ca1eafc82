"""Causal softmax attention with a key-value cache:  y_t = sum_j softmax_j(scale q_t . k_j) v_j,  j the keys t sees.

Token t sees itself and the earlier tokens of its document; with ``window`` w only the last w of them, itself included.
Query heads may share key-value heads (``k`` and ``v`` have G heads, G divides H; head h reads h // (H / G)).

The state holds keys and values by slot and ``position`` [B] = tokens since the row's document began. The token at
position p lies in slot ``p mod S``. Without a window the cache grows by the tokens of each call, and slots beyond a
row's position are zero; rows may stand at different positions. With a window S = w for ever (a ring).
The products of many tokens, with their gradients, are PyTorch's scaled_dot_product_attention, a well-kept library; one
token in place, where it has most to prepare, has a kernel of its own (``ops/attention_decode``).
Sources: arXiv 1706.03762 eq. 1; 2305.13245 (grouped queries); 2310.06825 sec. 2 (window and ring).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..shapes import check_starts, dims, state_dtype
from ..state import counted, growing, state
from . import dispatch
from .cases import Case
from .common import token_positions
from .native.attention import lower_step
from .record import leaf
from .transforms import transforming

SEQUENCE = ("q", "k", "v")
QUERY_BLOCK = 512  # queries that share a mask: the keys after a block are never read
MASK_ELEMENTS = 2**24


@state
class Cache:
    """Keys and values of a whole document; grows with it."""

    k: Tensor = growing("end")  # [B S G K]
    v: Tensor = growing("end")  # [B S G V]
    position: Tensor = counted("k")  # [B] int64


@state
class Ring(Cache):
    """Keys and values of the last S tokens of a document."""

    k: Tensor  # [B S G K]
    v: Tensor  # [B S G V]
    position: Tensor = counted()  # [B] int64


def empty_cache(k: Tensor, v: Tensor, window: int | None) -> Cache:
    """The state before the first token, for keys like ``k [B ... G K]`` and values like ``v [B ... G V]``."""
    slots = 0 if window is None else window
    keys, values = (x.new_zeros(len(x), slots, *x.shape[-2:]) for x in (k, v))
    position = torch.zeros(len(k), dtype=torch.long, device=k.device)
    return Cache(keys, values, position) if window is None else Ring(keys, values, position)


def slot_positions(position: Tensor, slots: int) -> Tensor:
    """The position of the token in each slot, negative where there is none.  ``[B] -> [B S]``.

    The newest token before ``position`` whose position is the slot's number modulo ``slots``.
    """
    newest = position[:, None] - 1
    return newest - (newest - torch.arange(slots, device=position.device)) % max(slots, 1)


@leaf(lower_step)
def attention_step(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, state: Cache
) -> tuple[Tensor, Cache]:
    """One token, the definition. q [B H K], k [B G K], v [B G V] -> y [B H V], state (the one given is not changed)."""
    slots = state.k.shape[1] if isinstance(state, Ring) else state.k.shape[1] + 1
    mine = torch.arange(slots, device=q.device) == (state.position % slots)[:, None]
    keys, values = (_write(old, new, mine) for old, new in ((state.k, k), (state.v, v)))
    position = state.position + 1
    seen = (torch.arange(slots, device=q.device) < position[:, None])[:, None]
    return _read(q[:, None], keys, values, seen, scale)[:, 0].to(v.dtype), type(state)(keys, values, position)


def _write(old: Tensor, new: Tensor, mine: Tensor) -> Tensor:
    """``old [B S ...]``, grown to the slots of ``mine [B S']``, with ``new [B ...]`` in the marked slots."""
    grown = F.pad(old, [0, 0, 0, 0, 0, mine.shape[1] - old.shape[1]])
    return torch.where(mine[..., None, None], new.to(old.dtype)[:, None], grown)


def _read(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float | None) -> Tensor:
    """Softmax over the keys ``seen [B T S]``, written out.  q [B T H K] -> [B T H V]."""
    wide = state_dtype(keys)
    q = q.to(wide).unflatten(2, (keys.shape[2], -1))
    scores = torch.einsum("btghk,bsgk->bghts", q * _scale(q, scale), keys.to(wide))
    weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(dim=-1)
    return torch.einsum("bghts,bsgv->btghv", weights, values.to(wide)).flatten(2, 3)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    state: Cache | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Cache]:
    """What the loop over ``attention_step`` gives: the cache is played through token by token, on indices of keys.

    Carrying the cache itself would copy the past T times, for autograd too; so only the mask that the
    game leaves behind meets the numbers, in one dense softmax.
    """
    state = empty_cache(k, v, window) if state is None else state
    keys, values = torch.cat([state.k, k.to(state.k.dtype)], 1), torch.cat([state.v, v.to(state.v.dtype)], 1)
    games = [
        _play(int(position), state.k.shape[1], window, [False] * q.shape[1] if begins is None else begins.tolist())
        for position, begins in zip(state.position, [None] * len(q) if starts is None else starts, strict=True)
    ]
    seen, held, position = (torch.stack(column).to(q.device) for column in zip(*games, strict=True))
    new_keys, new_values = (_take(x, held.clamp_min(0), held >= 0) for x in (keys, values))
    return _read(q, keys, values, seen, scale).to(v.dtype), type(state)(new_keys, new_values, position)


def _play(position: int, slots: int, window: int | None, begins: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """One row: which keys each token sees ``[T S+T]``, which the slots hold in the end (or -1), and the position."""
    size = slots + len(begins) if window is None else window
    held = torch.full((size,), -1, device="cpu")
    held[: min(position, slots)] = torch.arange(min(position, slots), device="cpu")
    seen = torch.zeros(len(begins), slots + len(begins), dtype=torch.bool, device="cpu")
    for t, starts in enumerate(begins):
        if starts:
            held[:], position = -1, 0
        held[position % size] = slots + t
        position += 1
        seen[t, held[held >= 0]] = True
    return seen, held, torch.tensor(position, device="cpu")


def attention_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    state: Cache | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Cache]:
    """All tokens at once through scaled_dot_product_attention; where a mask is needed, by blocks of queries."""
    time, out = q.shape[1], v.dtype
    if state is not None:
        k, v = k.to(state.k.dtype), v.to(state.v.dtype)
    anew = state is None or state.k.shape[1] == 0
    if anew and starts is None:  # one document, from its beginning
        return _attend(q, k, v, _View(window), scale).to(out), _filled(k, v, window)
    state = empty_cache(k, v, window) if state is None else state
    document = None if starts is None else starts.long().cumsum(1)
    held = slot_positions(state.position, 0 if anew else state.k.shape[1])  # an empty ring is not worth a look
    view = _View(window, state.position, held, document)
    keys, values = (k, v) if anew else (torch.cat([state.k, k], dim=1), torch.cat([state.v, v], dim=1))
    y = _attend(q, keys, values, view, scale)
    position = token_positions(state.position, time, starts)[:, -1] + 1
    index, valid = _sources(position, view.slots, time, window)
    return y.to(out), type(state)(_take(keys, index, valid), _take(values, index, valid), position)


class _View(NamedTuple):
    """Who sees whom in one call, where S keys from before stand in front of those of its T tokens."""

    window: int | None
    position: Tensor | None = None  # [B] when the call began
    held: Tensor | None = None  # [B S] positions of the keys from before
    document: Tensor | None = None  # [B T] 0 for the document that was under way, then 1, 2, ...

    def first(self, token: int) -> int:
        """The first key that ``token`` or a later one may see."""
        if self.window is None or token < self.window - 1:
            return 0
        return self.slots + token - self.window + 1

    @property
    def slots(self) -> int:
        """S."""
        return 0 if self.held is None else self.held.shape[1]

    def block(self, batch: int, time: int) -> int:
        """How many queries share a mask."""
        rows = 1 if self.position is None else batch
        near = QUERY_BLOCK if self.window is None else min(QUERY_BLOCK, max(self.window, 128))
        return max(1, min(near, MASK_ELEMENTS // (rows * (self.slots + time))))

    def mask(self, begin: int, end: int, device: torch.device) -> Tensor:
        """Bool ``[B 1 t n]`` for tokens ``begin`` to ``end`` and the keys ``first(begin)`` to ``S + end``."""
        near = max(self.first(begin) - self.slots, 0)
        query, key = torch.arange(begin, end, device=device)[:, None], torch.arange(near, end, device=device)
        seen = (key <= query)[None]
        if self.window is not None:
            seen = seen & (query - key < self.window)
        if self.document is not None:
            seen = seen & (self.document[:, begin:end, None] == self.document[:, None, near:end])
        if self.held is not None and self.first(begin) == 0 and self.slots:
            seen = torch.cat([self._old(query, begin, end), seen.expand(len(self.held), -1, -1)], dim=-1)
        return seen[:, None]

    def _old(self, query: Tensor, begin: int, end: int) -> Tensor:
        """Bool ``[B t S]``: the keys from before that each token sees."""
        assert self.held is not None and self.position is not None
        seen = (self.held >= 0)[:, None].expand(-1, end - begin, -1)
        if self.window is not None:
            seen = seen & (self.position[:, None, None] + query - self.held[:, None] < self.window)
        return seen if self.document is None else seen & (self.document[:, begin:end, None] == 0)


def _attend(q: Tensor, keys: Tensor, values: Tensor, view: _View, scale: float | None) -> Tensor:
    """q [B T H K], keys [B S+T G K], values [B S+T G V] -> [B T H V]."""
    batch, time = q.shape[:2]
    if view.position is None and (view.window is None or time <= view.window):
        return sdpa(q, keys, values, None, scale, causal=True)
    size, outputs = view.block(batch, time), []
    for begin in range(0, time, size):
        end = min(begin + size, time)
        near = slice(view.first(begin), view.slots + end)
        mask = view.mask(begin, end, q.device)
        outputs.append(sdpa(q[:, begin:end], keys[:, near], values[:, near], mask, scale))
    return torch.cat(outputs, dim=1)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, *, causal: bool = False) -> Tensor:
    """scaled_dot_product_attention for our order of axes.  q [B T H K], k [B S G K], v [B S G V] -> [B T H V].

    Transforms see the softmax written out: PyTorch's fused kernels have no rules for ``vmap`` and ``jvp``.
    """
    if transforming():
        seen = torch.ones(1, q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
        seen = seen.tril() if causal else seen if mask is None else mask[:, 0]
        return _read(q.to(k.dtype), k, v, seen, scale).to(v.dtype)
    q, k, v = (x.transpose(1, 2) for x in (q.to(k.dtype), k, v))
    grouped = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2)


def _filled(k: Tensor, v: Tensor, window: int | None) -> Cache:
    """The state after one whole document with these keys and values."""
    time = k.shape[1]
    position = torch.full((len(k),), time, dtype=torch.long, device=k.device)
    if window is None:
        return Cache(k.clone(), v.clone(), position)  # the caller may overwrite its own
    if time <= window:
        k, v = (F.pad(x, [0, 0, 0, 0, 0, window - time]) for x in (k, v))
    else:
        k, v = (x[:, -window:].roll(time % window, dims=1) for x in (k, v))
    return Ring(k, v, position)


def _sources(position: Tensor, slots: int, time: int, window: int | None) -> tuple[Tensor, Tensor]:
    """For each slot of the new state: which of the S + T keys it holds, and whether it holds one.  ``[B S'] [B S']``.

    ``position`` [B] is that after the call. The tokens of the last document are the last of the call.
    """
    held = slot_positions(position, slots + time if window is None else window)
    index = slots + time - position[:, None] + held
    return torch.where(index >= slots, index, held % max(slots, 1)), held >= 0


def _take(x: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """``out[b, s] = x[b, index[b, s]]``, zero where not ``valid``.  x [B N ...], index [B S] -> [B S ...]."""
    offset = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    picked = x.flatten(0, 1).index_select(0, (index + offset).flatten()).unflatten(0, index.shape)
    return torch.where(valid[..., None, None], picked, 0.0)


def operations(inputs: dict[str, Any]) -> float:
    """The scores, their softmax and the sum of values, for the pairs of query and key that are in the window."""
    (batch, time, heads, keys), values = inputs["q"].shape, inputs["v"].shape[-1]
    window = min(inputs.get("window") or time, time)
    pairs = time * window - window * (window - 1) / 2
    return float(batch * heads * pairs * (2 * keys + 2 * values + 3))


def graph(inputs: dict[str, Any]) -> float:
    """A few scores for each pair of tokens."""
    batch, time, heads, _ = inputs["q"].shape
    return 4.0 * batch * heads * time**2


TABLE = dispatch.Table(
    "attention",
    dispatch.Impl("torch", attention_chunk),
    dispatch.Impl("reference", attention_reference),
    sequence=SEQUENCE,
)


@dispatch.op(TABLE, step=attention_step, operations=operations, graph=graph)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    state: Cache | None = None,
    starts: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Cache]:
    """Causal softmax attention (see the module for the equation).

    q [B T H K], k [B T G K], v [B T G V] with G a divisor of H; ``window`` keys are seen, the token's own included
    (None: all); ``scale`` defaults to K^-1/2; state a ``Cache``, or with a window a ``Ring`` of that many slots;
    starts bool [B T]. Returns y [B T H V] in the dtype of v, and the state. ``ValueError`` for sizes that do not fit.
    """
    batch, time, heads, _, groups, _ = dims("q B T H K, k B T G K, v B T G V", q, k, v)
    check_starts(starts, batch, time)
    if heads % groups:
        raise ValueError(f"{heads} query heads cannot share {groups} key-value heads; choose a divisor of {heads}")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, expected at least 1 (the token itself) or None for no window")
    if state is not None:
        _check(state, k, v, window)
    inputs = dict(q=q, k=k, v=v, window=window, scale=scale, state=state, starts=starts)
    return dispatch.run(TABLE, inputs, backend)


def _check(state: Cache, k: Tensor, v: Tensor, window: int | None) -> None:
    dims("k B T G K, v B T G V, state.k B S G K, state.v B S G V, state.position B", k, v, *vars(state).values())
    held = state.k.shape[1] if isinstance(state, Ring) else None
    if held != window:
        raise ValueError(
            f"state keeps {held or 'all'} tokens, but window is {window}; begin with state=None or give its own window"
        )


def inputs(case: Case) -> dict[str, object]:
    """Random inputs for tests and benchmarks: ``case.variant`` is full, gqa (one key-value head) or window."""
    groups = 1 if case.variant == "gqa" else case.heads
    shape = (case.batch, case.time)
    return dict(
        q=case.randn(*shape, case.heads, case.keys),
        k=case.randn(*shape, groups, case.keys),
        v=case.randn(*shape, groups, case.values),
        window=WINDOW if case.variant == "window" else None,
    )


WINDOW = 7
VARIANTS = ("full", "gqa", "window")
