"""Linear maps and embeddings whose weights are integers (see ``ops/native/product.py``); for inference only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.native.product import Packed, empty, pack, product, unpack


class PackedLinear(nn.Module):
    """``y = W x + b`` with W in int8 or int4 and x in any floating dtype; sums in fp32.

    The last ``kept`` outputs have fp32 weights. Buffers: ``packed`` (uint8), ``scale``, ``kept_weight``, ``bias``.
    ``ValueError`` where a gradient would be needed, and for changes of dtype.
    """

    scale: Tensor
    packed: Tensor
    kept_weight: Tensor | None
    bias: Tensor | None

    def __init__(self, width: int, out: int, format: str, *, kept: int = 0, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.format = width, out, format
        weight, scale, *_ = empty(out - kept, width, format)
        self.register_buffer("packed", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("kept_weight", torch.empty(kept, width, dtype=torch.float32) if kept else None)
        self.register_buffer("bias", torch.empty(out, dtype=torch.float32) if bias else None)

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, format: str, kept: int = 0) -> PackedLinear:
        """A map with the weights [out in] and the bias [out] given."""
        out, width = weight.shape
        made = cls(width, out, format, kept=kept, bias=bias is not None)
        made.packed, made.scale, *_ = pack(weight[: out - kept], format)  # type: ignore[assignment]
        if kept:
            made.kept_weight = weight[out - kept :].detach().float().clone()
        made.bias = None if bias is None else bias.detach().float()
        return made

    @property
    def matrix(self) -> Packed:
        """The packed part of W."""
        kept = 0 if self.kept_weight is None else len(self.kept_weight)
        return Packed(self.packed, self.scale, self.out_features - kept, self.in_features)

    @property
    def weight(self) -> Tensor:
        """W [out in] in fp32, made anew at every use: slow, for code that asks a linear map for it."""
        whole = unpack(self.matrix)
        return whole if self.kept_weight is None else torch.cat([whole, self.kept_weight])

    def forward(self, x: Tensor) -> Tensor:
        """x [... in] -> y [... out], of x's dtype."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                f"{self.format} weights have no gradients; use torch.no_grad(), or train the model in full precision"
            )
        y = product(x, self.matrix)
        if self.kept_weight is not None:
            kept = Packed(self.kept_weight, None, len(self.kept_weight), self.in_features)
            y = torch.cat([y, product(x, kept)], dim=-1)
        return y if self.bias is None else (y + self.bias).to(x.dtype)

    def train(self, mode: bool = True) -> PackedLinear:
        """Evaluation mode only."""
        if mode:
            raise ValueError(f"{self.format} weights cannot be trained; train in full precision and quantise after")
        return super().train(mode)

    def check_move(self, move: Callable[[Tensor], Tensor]) -> None:
        """``ValueError`` where ``move`` (that of ``.to``) would change the dtype of what is fp32."""
        dtype = move(torch.empty(0, dtype=torch.float32, device=self.packed.device)).dtype
        if dtype != torch.float32:
            raise ValueError(
                f"the weights are {self.format}, so the rest of the model stays in float32 and cannot become "
                f"{str(dtype).removeprefix('torch.')}; load the folder in full precision to convert it"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.check_move(fn)
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.packed.device)  # moved, never converted
        return self

    def extra_repr(self) -> str:
        """Sizes and format."""
        kept = "" if self.kept_weight is None else f", kept={len(self.kept_weight)}"
        return f"{self.in_features}, {self.out_features}, {self.format}{kept}, bias={self.bias is not None}"


class PackedEmbedding(PackedLinear):
    """A table of rows [vocab D]; the same matrix serves a tied head through ``logits``."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [...] -> rows [... D] in fp32. ``IndexError`` for ids outside the table, on a CPU."""
        return unpack(self.matrix, tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [... D] -> [... vocab]."""
        return super().forward(hidden)
