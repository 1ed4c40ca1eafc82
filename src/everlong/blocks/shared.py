"""A block whose weights stand at several places of a model, with parts that each place has for itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..config import suggest
from ..mixers import base as contract
from ..ops.linear import Linear
from . import base


class Adapted(nn.Module):
    """``W x + up(down(x))``: a shared linear map, and a low-rank one that a place has for itself (it begins at 0)."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        if rank > min(linear.weight.shape):
            raise ValueError(
                f"rank is {rank}, more than a map of {list(linear.weight.shape)} has; choose a smaller one"
            )
        self.base_layer = linear
        self.down = Linear(linear.in_features, rank, bias=False)
        self.up = Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [... I] -> [... O]."""
        return self.base_layer(x) + self.up(self.down(x))


class Shared(base.Around):
    """All blocks of one ``name`` in a model have the same parameters (Zamba, arXiv 2405.16712), each its own state.

    A place has for itself what ``own`` names, and for the linear maps named in ``adapted`` a low-rank map beside the
    shared one (Zamba2, arXiv 2411.15242). Names are parts of the block: "norm", "inner.out_proj", "in_proj".
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(base.AroundConfig):
        """The block, which parts of it each place has for itself, and the rank of adapters."""

        name: str
        own: tuple[str, ...] = ()
        adapted: tuple[str, ...] = ()
        rank: int = 8

    APART: ClassVar = ("down", "up")  # of an adapter
    cfg: Config

    def __init__(self, cfg: Config, d_model: int, depth: contract.Depth = contract.Depth()) -> None:
        super().__init__(cfg, d_model, depth)
        self.additive = self.block.additive
        names = [name for name, _ in (*self.block.named_modules(), *self.block.named_parameters()) if name]
        for entry in (*cfg.own, *cfg.adapted):
            if not any(contract.listed(name, [entry]) for name in names):
                raise ValueError(f"the shared block {cfg.name!r} has no part {entry!r}{suggest(entry, names)}")
        for path, module in list(self.block.named_modules()):
            if contract.listed(path, cfg.adapted) and isinstance(module, nn.Linear):
                parent, _, leaf = path.rpartition(".")
                setattr(self.block.get_submodule(parent), leaf, Adapted(module, cfg.rank))

    def common(self) -> list[str]:
        """Names of the tensors, as in ``state_dict``, that all places have in common."""
        adapters = [path for path, module in self.named_modules() if isinstance(module, Adapted)]
        apart = [f"{path}.{name}." for path in adapters for name in self.APART]
        own = self.cfg.own
        return [n for n in self.state_dict() if not contract.listed(n, own) and not n.startswith(tuple(apart))]

    def tie(self, first: Shared) -> None:
        """Have the parameters and buffers of ``first``. ``ValueError`` where its configuration is another."""
        if self.cfg != first.cfg:
            raise ValueError(f"two shared blocks are called {self.cfg.name!r} and differ; give one another name")
        for name in self.common():
            path, _, leaf = name.rpartition(".")
            mine, theirs = self.get_submodule(path), first.get_submodule(path)
            for table in ("_parameters", "_buffers"):
                if getattr(theirs, table).get(leaf) is not None:
                    getattr(mine, table)[leaf] = getattr(theirs, table)[leaf]

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """As the block does."""
        return self.block.join(x, y)  # type: ignore[no-any-return]


Shared.Config.owner = Shared


def _later(model: nn.Module) -> Iterator[tuple[str, Shared, str, Shared]]:
    """The shared blocks of a model that are not the first of their name, each with that one, and where they are."""
    first: dict[str, tuple[str, Shared]] = {}
    for path, module in model.named_modules():
        if isinstance(module, Shared):
            where, shared = first.setdefault(module.cfg.name, (path, module))
            if shared is not module:
                yield path, module, where, shared


def tie(model: nn.Module) -> None:
    """Give the shared blocks of a model the weights of the first of their name."""
    for _, module, _, shared in list(_later(model)):
        module.tie(shared)


def stands_for(model: nn.Module) -> dict[str, str]:
    """The names of tensors that stand for others, in ``state_dict``: those of shared blocks, with the first's."""
    return {f"{path}.{name}": f"{where}.{name}" for path, module, where, _ in _later(model) for name in module.common()}
