"""The law of transforms: ``torch.func`` sees through a mixer as it does through PyTorch's own layers (see ``laws``)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, jvp, vmap

from . import state as states
from .numerics import assert_close

Named = dict[str, Tensor]
BATCH, TIME = 2, 5
REFUSALS = ("no autograd formula was registered", "once_differentiable", "is not implemented", "does not require grad")
GRADIENT = {torch.float64: 1e-7, torch.float32: 1e-3}


def transforms(subject: Any) -> None:
    """grad, vmap, jvp and gradients per sample of torch.func equal what autograd gives one by one; second ones too."""
    with warnings.catch_warnings():  # of PyTorch's own rules for forward mode
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=DeprecationWarning)
        for dtype in (torch.float64, torch.float32):  # fp32 is what kernels take
            case = Case(subject, dtype)
            for check in (case.gradients, case.rows, case.documents, case.directions, case.batches, case.steps):
                check()
        Case(subject, torch.float64).second_gradients()


class Case:
    """A module, its parameters and its inputs."""

    def __init__(self, subject: Any, dtype: torch.dtype, time: int = TIME) -> None:
        self.module = subject.module(dtype)
        self.parameters: Named = {name: p.detach() for name, p in self.module.named_parameters()}
        self.x, self.more = subject.input(BATCH, time, dtype), subject.input(BATCH, time, dtype)
        with torch.no_grad():
            self.weights = torch.randn(self.module(self.x)[0].shape, dtype=torch.float64).to(dtype)
        self.tolerance = GRADIENT[dtype]

    def call(self, parameters: Named, x: Tensor, **options: Any) -> Tensor:
        """The output of the module with these parameters."""
        return functional_call(self.module, parameters, (x,), options)[0]

    def loss(self, parameters: Named, x: Tensor, weights: Tensor) -> Tensor:
        """A weighted sum of the output."""
        return (self.call(parameters, x) * weights).sum()

    def wanted(self, x: Tensor, weights: Tensor) -> Named:
        """The gradients of ``loss`` by autograd."""
        leaves = {name: p.clone().requires_grad_() for name, p in self.parameters.items()}
        found = torch.autograd.grad(self.loss(leaves, x, weights), list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    def same(self, got: Tensor, want: Tensor, what: str) -> None:
        """``AssertionError`` where the two differ."""
        assert_close(got.flatten(), want.flatten(), f"{what} ({self.x.dtype})", self.tolerance)

    def gradients(self) -> None:
        """Of the parameters: all samples together, and each on its own."""
        together = grad(self.loss)(self.parameters, self.x, self.weights)
        per_sample = vmap(grad(lambda p, x, w: self.loss(p, x[None], w[None])), in_dims=(None, 0, 0))
        each = per_sample(self.parameters, self.x, self.weights)
        alone = [self.wanted(self.x[i : i + 1], self.weights[i : i + 1]) for i in range(BATCH)]
        for name, want in self.wanted(self.x, self.weights).items():
            self.same(together[name], want, f"torch.func.grad of {name}")
            self.same(each[name], torch.stack([one[name] for one in alone]), f"gradient per sample of {name}")

    def rows(self) -> None:
        """Several inputs, and several models."""
        pair = torch.stack([self.x, self.more])
        with torch.no_grad():
            got = vmap(lambda x: self.call(self.parameters, x))(pair)
            self.same(got, torch.stack([self.module(x)[0] for x in pair]), "vmap over inputs")
            models = [{n: p * scale for n, p in self.parameters.items()} for scale in (1.0, 0.9)]
            stacked = {name: torch.stack([model[name] for model in models]) for name in self.parameters}
            got = vmap(lambda p: self.call(p, self.x))(stacked)
            self.same(got, torch.stack([self.call(model, self.x) for model in models]), "vmap over models")

    def documents(self) -> None:
        """Starts of documents, the same for all or one's own."""
        pair, starts = torch.stack([self.x, self.more]), torch.zeros(2, *self.x.shape[:2], dtype=torch.bool)
        starts[0, 0, 2] = starts[0, 1, 0] = starts[1, 1, 4] = True
        with torch.no_grad():
            got = vmap(lambda x, s: self.call(self.parameters, x, starts=s))(pair, starts)
            self.same(
                got, torch.stack([self.module(x, starts=s)[0] for x, s in zip(pair, starts, strict=True)]), "vmap"
            )
        self._directional(lambda x: self.call(self.parameters, x, starts=starts[0]), "jvp with starts")

    def directions(self) -> None:
        """Forward mode against reverse mode, of ``torch.func`` and of dual numbers."""
        self._directional(lambda x: self.call(self.parameters, x), "jvp")
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(self.x, self.more)
            _, slope = torch.autograd.forward_ad.unpack_dual(self.module(dual)[0])
        want = jvp(lambda x: self.call(self.parameters, x), (self.x,), (self.more,))[1]
        self.same(slope if slope is not None else torch.zeros_like(want), want, "forward_ad")

    def _directional(self, function: Callable[[Tensor], Tensor], what: str) -> None:
        slope = jvp(function, (self.x,), (self.more,))[1]
        x = self.x.clone().requires_grad_()
        (back,) = torch.autograd.grad((function(x) * self.weights).sum(), x)
        forward, reverse = (slope * self.weights).sum(), (back * self.more).sum()
        scale = slope.norm() * self.weights.norm() + back.norm() * self.more.norm()
        if not abs(float(forward - reverse)) <= self.tolerance * float(scale):
            raise AssertionError(
                f"{what} ({slope.dtype}): {float(forward)} along a direction, {float(reverse)} by autograd"
            )

    def batches(self) -> None:
        """Several gradients at once of a graph built as always."""
        x = self.x.clone().requires_grad_()
        y = self.module(x)[0]
        slopes = torch.stack([self.weights, self.weights.flip(0)])
        (got,) = torch.autograd.grad(y, x, slopes, is_grads_batched=True, retain_graph=True)
        want = [torch.autograd.grad(y, x, slope, retain_graph=True)[0] for slope in slopes]
        self.same(got, torch.stack(want), "is_grads_batched")

    def steps(self) -> None:
        """The step: its Jacobian, and vmap."""
        with torch.no_grad():
            state = states.map_leaves(torch.clone, self.module(self.more)[1])
            token = self.x[:1, 0]
        state = states.gather(state, [0])
        got = jacrev(lambda x: self.module.step(x, state)[0][0, :3])(token)
        x = token.clone().requires_grad_()
        y = self.module.step(x, state)[0][0, :3]
        self.same(
            got, torch.stack([torch.autograd.grad(part, x, retain_graph=True)[0] for part in y]), "jacrev of step"
        )
        with torch.no_grad():
            pair = torch.stack([token, self.more[:1, 0]])
            got = vmap(lambda x: self.module.step(x, state)[0])(pair)
            self.same(got, torch.stack([self.module.step(x, state)[0] for x in pair]), "vmap of step")

    def second_gradients(self) -> None:
        """Right, or refused with an error; never silently wrong."""

        def loss(x: Tensor) -> Tensor:
            return self.call(self.parameters, x).square().sum()

        want = jvp(grad(loss), (self.x,), (self.more,))[1]
        x = self.x.clone().requires_grad_()
        (first,) = torch.autograd.grad(self.module(x)[0].square().sum(), x, create_graph=True)
        if not first.requires_grad:
            raise AssertionError(
                "a gradient says that it depends on nothing, so second ones would be zero without a word"
            )
        try:
            (got,) = torch.autograd.grad((first * self.more).sum(), x)
        except RuntimeError as error:
            if any(words in str(error) for words in REFUSALS):
                return
            raise AssertionError(f"a second gradient is lost and not refused: {error}") from error
        self.same(got, want, "second gradient")
