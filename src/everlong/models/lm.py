"""A language model from a pattern of layers: embedding, layers, norm, head.

``model(tokens, state, starts=...) -> (logits, state)`` obeys the contract of the mixers, on token ids. The state is
the pytree of the layers' states and the position of each row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .. import config, shapes
from .. import state as states
from ..blocks import shared
from ..blocks.base import ORDER, Workspaces
from ..call import EMBEDDINGS, Call, through
from ..mixers import base
from ..ops.linear import Linear, linear
from ..ops.native import waiting
from ..state import state
from .blocks import Layer, Norm
from .packed import PackedEmbedding, PackedLinear
from .sizes import check_fits

LOSS_LOGITS = 2**24  # logits held at once by the loss, at most


class Read(NamedTuple):
    """What a model makes of tokens before its head."""

    x: Tensor  # [B T D] hidden states, behind the last norm
    state: Any
    losses: Mapping[str, Tensor]  # of its blocks, by name: scalars that training adds to its loss


class LanguageModel(nn.Module):
    """Tokens [B T] -> logits [B T vocab]."""

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """The whole architecture, visible in the saved JSON.

        ``tied`` shares the embedding with the head; ``embed_scale`` multiplies embeddings (Griffin: sqrt D);
        ``embed_norm`` normalises them (RWKV); ``logit_cap`` c gives ``c tanh(logits / c)``;
        ``residual_fp32`` keeps the sum of the layers in fp32 under bf16 weights (Mamba).
        """

        vocab_size: int
        d_model: int
        layers: tuple[Layer.Config, ...]
        norm: Norm.Config = field(default_factory=Norm.Config)
        embed_norm: Norm.Config | None = None
        tied: bool = True
        embed_scale: float = 1.0
        embed_std: float = 0.02
        logit_cap: float | None = None
        residual_fp32: bool = False

        bounds: ClassVar = {"embed_std": (0.0, 1e6)}

        def __post_init__(self) -> None:
            object.__setattr__(self, "layers", tuple(self.layers) if isinstance(self.layers, list) else self.layers)
            if not isinstance(self.layers, tuple) or not self.layers:
                raise ValueError(f"layers must be a tuple of at least one Layer.Config, got {self.layers!r}")
            for layer in self.layers:
                if not isinstance(layer, Layer.Config):
                    raise ValueError(f"layers holds {layer!r}, expected Layer.Config(mixer=..., mlp=...)")
            self._check_values()
            super().__post_init__()

        def _check_values(self) -> None:
            """Every block finds the values that it reads."""
            there = {EMBEDDINGS}
            for index, layer in enumerate(self.layers):
                depth = base.Depth(index, len(self.layers))
                for block in layer.sequence():
                    missing = [name for name in block.needs(depth) if name not in there]
                    if missing:
                        kinds = ", ".join(mixer.kind for mixer in block.mixers())
                        raise ValueError(
                            f"layers[{index}] ({kinds}) reads {missing[0]!r}, which no block before it hands on; "
                            "the first of a kind that shares values must hand them on (RWKV-7: value_residual=False)"
                        )
                    there.update(block.gives(depth))

        def reads_embeddings(self) -> bool:
            """Whether any block reads the embedded tokens beside the stream."""
            total = len(self.layers)
            depths = ((layer, base.Depth(index, total)) for index, layer in enumerate(self.layers))
            return any(EMBEDDINGS in block.needs(depth) for layer, depth in depths for block in layer.sequence())

        def build(self) -> LanguageModel:
            """The model, at its initial values. ``ValueError``, with the sizes, where memory does not hold it."""
            check_fits(self)
            return LanguageModel(self)

    @state
    class State:
        """What a model keeps of the text it has read."""

        layers: tuple[Any, ...] = states.separate()
        position: Tensor = states.counted()  # [B] int64, tokens since the start of the row's document

    weights: str | None = None  # "int8" or "int4" where the model is quantised (see ``quantize``)
    _fingerprint: tuple[Any, ...] | None = None  # see ``identity``

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        total = len(cfg.layers)
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.d_model)
        nn.init.normal_(self.embedding.weight, std=cfg.embed_std)
        self.embed_norm = cfg.embed_norm.build(cfg.d_model) if cfg.embed_norm else None
        self.layers: Any = nn.ModuleList()
        for index, layer in enumerate(cfg.layers):
            self.layers.append(layer.build(cfg.d_model, base.Depth(index, total)))
            if any(isinstance(part, shared.Shared) for part in self.layers[-1].modules()):
                shared.tie(self.layers)  # at once: memory holds one copy
        self._reads_embeddings = cfg.reads_embeddings()
        self.norm = cfg.norm.build(cfg.d_model)
        self.head = None if cfg.tied else Linear(cfg.d_model, cfg.vocab_size, bias=False)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)

        self._built = shapes_of(self)  # what the config made: ``save`` compares it with what is there

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for module in self.modules():  # before anything is converted
            if isinstance(module, PackedLinear):
                module.check_move(fn)
        moved = super()._apply(fn, recurse)
        shared.tie(self.layers)
        return moved

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """See ``nn.Module.load_state_dict``; blocks that share weights do so behind it too."""
        found = super().load_state_dict(*args, **kwargs)
        shared.tie(self.layers)
        return found

    @property
    def memory(self) -> str:
        """The fastest growth among the layers: none, constant, window or linear."""
        return max((mixer.memory for layer in self.layers for mixer in layer.mixers()), key=ORDER.index)

    def init_state(self, batch: int) -> State:
        """The state before the first token, for ``batch`` rows."""
        position = torch.zeros(batch, dtype=torch.int64, device=next(self.norm.parameters()).device)
        return self.State(layers=tuple(layer.init_state(batch) for layer in self.layers), position=position)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [...] -> residual stream [... D]. ``ValueError`` for ids outside the vocabulary.

        On a GPU, where looking would stall, ids outside it are PyTorch's own device error.
        """
        try:
            x = self.embedding(tokens)
        except IndexError as error:
            raise ValueError(
                f"token ids from {int(tokens.min())} to {int(tokens.max())}, expected 0 to {self.cfg.vocab_size - 1}; "
                "was the text encoded with this model's tokenizer?"
            ) from error
        if self.cfg.embed_scale != 1.0:
            x = x * self.cfg.embed_scale
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        return x.to(shapes.state_dtype(x)) if self.cfg.residual_fp32 else x

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [... D] -> logits [... vocab]."""
        if self.head is not None:
            logits = self.head(hidden)
        elif isinstance(self.embedding, PackedEmbedding):
            logits = self.embedding.logits(hidden)
        else:
            logits = linear(hidden, self._table())
        cap = self.cfg.logit_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _table(self) -> Tensor:
        """The embedding of every token [vocab D], which a tied head multiplies; a wrapper is asked for all of it."""
        if isinstance(self.embedding, nn.Embedding):
            return self.embedding.weight
        return self.embedding(torch.arange(self.cfg.vocab_size, device=next(self.embedding.parameters()).device))

    def hidden(self, tokens: Tensor, state: State | None = None, *, starts: Tensor | None = None) -> Read:
        """Everything but the head: tokens [B T] -> hidden states [B T D], state, losses of the blocks."""
        if not torch.compiler.is_compiling():
            waiting.look()
        before = self._begin(tokens, state, starts)
        x, layers, losses = self._run(self.embed(tokens), before.layers, Call("forward", starts))
        position = before.position + tokens.shape[1]
        if starts is not None:
            position = torch.where(starts.any(dim=1), starts.flip(1).long().argmax(dim=1) + 1, position)
        return Read(self.norm(x), self.State(layers=layers, position=position), losses)

    def _run(self, x: Tensor, state: Any, call: Call) -> tuple[Tensor, tuple[Any, ...], Mapping[str, Tensor]]:
        """The layers one after another, each with what those before it have handed on."""
        call = call._replace(values={EMBEDDINGS: x}) if self._reads_embeddings else call
        x, after, handed = through(self.layers, x, state, call)
        return x, after, handed.losses

    def _begin(self, tokens: Tensor, state: State | None, starts: Tensor | None) -> State:
        batch, time = shapes.dims("tokens B T", tokens)
        _check_ids(tokens)
        if batch == 0 or time == 0:
            raise ValueError(f"tokens are empty (B = {batch}, T = {time}); give at least one row and one token")
        shapes.check_starts(starts, batch, time)
        if state is None:
            return self.init_state(batch)
        states.check_like(state, self.init_state(0), batch)
        return state

    def forward(
        self, tokens: Tensor, state: State | None = None, *, starts: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """tokens [B T] -> logits [B T vocab], state. ``starts`` bool [B T] begins documents."""
        read = self.hidden(tokens, state, starts=starts)
        return self.logits(read.x), read.state

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """One token per row: tokens [B] -> logits [B vocab], state. ``state`` is not changed."""
        shapes.dims("tokens B", tokens)
        _check_ids(tokens)
        if not isinstance(state, self.State):
            raise ValueError(f"state is {type(state).__name__}, expected that of init_state(batch) or another call")
        x, layers, _ = self._run(self.embed(tokens), state.layers, Call("step"))
        return self.logits(self.norm(x)), self.State(layers=layers, position=state.position + 1)

    def workspace(self, state: State) -> Workspace:
        """A workspace that begins with ``state``, which is not changed."""
        states.check_like(state, self.init_state(0), len(state.position))
        return Workspace(self, state)

    def step_(self, tokens: Tensor, work: Workspace) -> Tensor:
        """``step`` for the owner of a ``workspace``, written in place: tokens [B] -> logits [B vocab]."""
        shapes.dims("tokens B", tokens)
        _check_ids(tokens)
        x, _, _ = self._run(self.embed(tokens), work.layers, Call("step_"))
        work.position = work.position + 1
        return self.logits(self.norm(x))

    def loss(self, tokens: Tensor, targets: Tensor, *, starts: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """Cross-entropy in nats of ``targets [B T]`` (-100 = not counted), reduced by "mean", "sum" or "none".

        While the model is in training, the losses of its blocks are added to each counted token's; not to "none".
        The logits of a large vocabulary are never held all at once: pieces of tokens are recomputed in backward.
        """
        read = self.hidden(tokens, starts=starts)
        rows, wanted = read.x.flatten(0, 1), targets.flatten()
        size = 1 << (max(1, LOSS_LOGITS // self.cfg.vocab_size).bit_length() - 1)  # one piece of ``ops/linear``
        if len(rows) <= size:
            losses = self._losses(rows, wanted)
        else:
            losses = torch.cat(
                [
                    checkpoint(self._losses, r, w, use_reentrant=False)
                    for r, w in zip(rows.split(size), wanted.split(size), strict=True)
                ]
            )
        if reduction == "none":
            return losses.view_as(targets)
        count = (wanted != -100).sum()
        total = losses.sum()
        for extra in read.losses.values() if self.training else ():
            total = total + count * extra
        return total if reduction == "sum" else total / count.clamp_min(1)

    def _losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(hidden)
        return F.cross_entropy(logits.to(shapes.state_dtype(logits)), targets, reduction="none")

    @torch.no_grad()
    def read(self, tokens: Tensor, state: State | None = None, *, piece: int = 2048) -> tuple[Tensor, State]:
        """Read a long prompt in pieces: tokens [B T] -> logits [B vocab] after the last token, state."""
        shapes.dims("tokens B T", tokens)
        if piece < 1:
            raise ValueError(f"piece must be at least 1 token, got {piece}")
        x = None
        for part in tokens.split(piece, dim=1):
            x, state, _ = self.hidden(part, state)
        if x is None or state is None:
            raise ValueError("tokens are empty (T = 0); give at least one token")
        return self.logits(x[:, -1]), state


class Workspace:
    """The state of a model that one owner goes on from in place, token by token (``LanguageModel.step_``)."""

    def __init__(self, model: LanguageModel, state: LanguageModel.State) -> None:
        self.layers, self._kind = Workspaces(model.layers, state.layers), type(state)
        self.position = state.position

    def state(self) -> LanguageModel.State:
        """A copy of the state, as ``step`` would return it."""
        return self._kind(layers=self.layers.state(), position=self.position.clone())


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    """The shapes of a module's parameters and buffers by name."""
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _check_ids(tokens: Tensor) -> None:
    if tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"tokens have dtype {tokens.dtype}, expected int64 ids; encode the text first")


LanguageModel.Config.owner = LanguageModel
