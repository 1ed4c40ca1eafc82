"""The laws of the contract, as functions that raise ``LawBroken`` naming the law and what differs.

``LAWS`` maps a law's name to a function of a ``Subject``: a way to build a mixer (or a stack of
layers), its width, and a seed. Subjects are built in float64 with perturbed parameters, so that
projections which start at zero hide nothing.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import state as states
from .config import Config
from .files import atomic_save_tensors, read_tensors
from .generation.decoder import Decoder
from .laws_aliasing import aliasing
from .laws_isolation import isolation
from .laws_precision import autocast, bfloat16
from .laws_transforms import transforms
from .mixers import base
from .models.blocks import Layer, SwiGLU
from .models.lm import LanguageModel
from .numerics import assert_close

LENGTHS = (1, 2, 63, 100, 300)


class LawBroken(AssertionError):
    """A mixer broke a law of the contract; the message names the law."""


class Subject(NamedTuple):
    """What is tested: ``build()`` makes a fresh module with the contract of a mixer."""

    name: str
    config: Config
    build: Callable[[], Any]
    d_model: int = 64

    def module(self, dtype: torch.dtype = torch.float64) -> Any:
        """A module in evaluation mode; parameters at their initial values plus noise."""
        torch.manual_seed(0)
        module = self.build().to(dtype)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return module.eval()

    def input(self, batch: int, time: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Random inputs [B T D], different in each call."""
        return torch.randn(batch, time, self.d_model, dtype=torch.float64).to(dtype)


def same(got: Any, want: Any, what: str, tolerance: float | None = None) -> None:
    """All leaves of two states, or two tensors, agree; integer leaves exactly."""
    if isinstance(want, Tensor):
        got, want = ((what, got, None),), ((what, want, None),)
    else:
        got, want = list(states.leaves(got)), list(states.leaves(want))
    for (name, ours, _), (_, theirs, _) in zip(got, want, strict=True):
        label = what if name == what else f"{what}, leaf {name}"
        if ours.shape != theirs.shape:
            raise AssertionError(f"{label}: shapes {list(ours.shape)} and {list(theirs.shape)} differ")
        if theirs.is_floating_point() or theirs.is_complex():
            assert_close(ours, theirs, label, tolerance)
        elif not torch.equal(ours, theirs):
            raise AssertionError(f"{label}: integers differ")


def _pieces(module: Any, x: Tensor, cuts: list[int], state: Any = None) -> tuple[Tensor, Any]:
    outputs = []
    for start, end in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        y, state = module(x[:, start:end], state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def _steps(step: Callable[..., Any], x: Tensor, state: Any) -> tuple[Tensor, Any]:
    outputs = []
    for t in range(x.shape[1]):
        y, state = step(x[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def _random_cuts(length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(length)
    random = sorted(set(torch.randint(1, length, (4,), generator=generator).tolist())) if length > 1 else []
    short = [cut for cut in (1, 2, 4, 5) if cut < length]  # pieces shorter than any convolution
    return [random, short]


def split(subject: Subject) -> None:
    """Calling on a, then on b with the state, equals calling on ab: outputs, final state, gradients."""
    module = subject.module()
    for length in LENGTHS:
        x = subject.input(2, length)
        with torch.no_grad():
            want, final = module(x)
            if float(want.abs().max()) < 1e-9:
                raise AssertionError("the output is zero, so nothing was tested")
            for cuts in _random_cuts(length):
                got, ours = _pieces(module, x, cuts)
                same(got, want, f"output of {length} tokens cut at {cuts}")
                same(ours, final, f"final state of {length} tokens cut at {cuts}")
    x = subject.input(2, 40)
    x.requires_grad_(x.is_floating_point())
    want, final = module(x)
    got, ours = _pieces(module, x, [1, 17])
    _same_gradients(module, x, (want, final), (got, ours), "40 tokens cut at 1 and 17")


def _same_gradients(module: Any, x: Tensor, whole: tuple[Tensor, Any], ours: tuple[Tensor, Any], what: str) -> None:
    """Both ways to the same outputs and state have the same gradients, of the input and of every parameter."""
    floats = [
        [leaf for _, leaf, _ in states.leaves(state) if leaf.dtype.is_floating_point] for _, state in (whole, ours)
    ]
    pairs = list(zip([whole[0], *floats[0]], [ours[0], *floats[1]], strict=True))
    weights = [torch.randn_like(want) for want, _ in pairs]
    named = {**({"the input": x} if x.requires_grad else {}), **dict(module.named_parameters())}
    found: list[tuple[Tensor | None, ...]] = []
    for side in range(2):
        total = torch.stack([(pair[side] * weight).sum() for pair, weight in zip(pairs, weights, strict=True)]).sum()
        found.append(torch.autograd.grad(total, list(named.values()), allow_unused=True))
    for name, theirs, mine in zip(named, *found, strict=True):
        if (mine is None) != (theirs is None):
            raise AssertionError(f"only one of the two ways to {what} uses {name}")
        if theirs is not None:
            same(mine, theirs, f"gradient of {name} over {what}", 1e-7)


def step(subject: Subject) -> None:
    """forward over T tokens equals T calls of step: outputs, final state, gradients; and step_ equals step."""
    module = subject.module()
    for length in (1, 12, 63):
        x = subject.input(2, length).requires_grad_()
        with torch.no_grad():
            prefix = module(subject.input(2, 3))[1]
        want, final = module(x, prefix)
        got, ours = _steps(module.step, x, prefix)
        same(got, want, f"output of {length} steps")
        same(ours, final, f"final state after {length} steps")
        _same_gradients(module, x, (want, final), (got, ours), f"{length} steps")
        with torch.no_grad():
            work = module.workspace(prefix)
            got = torch.stack([module.step_(token, work) for token in x.unbind(1)], 1)
            same(got, want, f"output of {length} calls of step_")
            same(work.state(), final, f"state of the workspace after {length} calls of step_")


def causality(subject: Subject) -> None:
    """Output t does not depend on input after t."""
    module = subject.module()
    x = subject.input(2, 63)
    for t in (0, 1, 30, 61):
        changed = torch.cat([x[:, : t + 1], 10 * subject.input(2, 62 - t)], dim=1)
        with torch.no_grad():
            same(module(changed)[0][:, : t + 1], module(x)[0][:, : t + 1], f"output up to token {t}")
        z = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(module(z)[0][:, t].sum(), z)
        leak, own = float(grad[:, t + 1 :].abs().max()), float(grad.abs().max())
        if leak > 1e-12 * max(own, 1.0):
            raise AssertionError(f"output {t} has a gradient of {leak:.1e} from later inputs")


@torch.no_grad()
def rows(subject: Subject) -> None:
    """Gathering, stacking and reordering rows of a batch and of its state commutes with the model."""
    module = subject.module()
    x, more = subject.input(3, 20), subject.input(3, 7)
    want, final = module(x)
    then, _ = module(more, final)
    order = [2, 0, 2, 1]
    got, _ = module(x[order])
    same(got, want[order], "output of reordered rows")
    same(module(more[order], states.gather(final, order))[0], then[order], "output from a gathered state")
    same(module.step(more[order][:, 0], states.gather(final, order))[0], then[order][:, 0], "step from gathered rows")
    lengths = (5, 20, 11)  # rows with histories of different lengths
    singles = [module(x[i : i + 1, :n])[1] for i, n in enumerate(lengths)]
    alone = torch.cat([module(more[i : i + 1], single)[0] for i, single in enumerate(singles)])
    same(module(more, states.stack(singles))[0], alone, "output from stacked states")
    stepped, _ = _steps(module.step, more, states.stack(singles))
    same(stepped, alone, "steps from stacked states")


@torch.no_grad()
def reset(subject: Subject) -> None:
    """Packing documents with starts[b, t] = True at each first token equals running them separately."""
    module = subject.module()
    x, more = subject.input(2, 100), subject.input(2, 6)
    old = module(subject.input(2, 9))[1]
    for firsts in ([[0, 1, 5, 50], [0, 64, 99]], [[0], [0, 2, 3]], [[17], [0, 40]]):
        starts = torch.zeros(2, 100, dtype=torch.bool)
        for row, begins in enumerate(firsts):
            starts[row, begins] = True
        got, packed = module(x, old, starts=starts)
        then, _ = module(more, packed)
        for row, begins in enumerate(firsts):
            last = states.gather(old, [row])
            for begin, end in zip([0, *begins], [*begins, 100], strict=True):
                if begin in begins:
                    last = None
                if begin == end:
                    continue
                want, last = module(x[row : row + 1, begin:end], last)
                same(got[row : row + 1, begin:end], want, f"row {row}, tokens {begin} to {end} of starts {begins}")
            want, _ = module(more[row : row + 1], last)
            same(then[row : row + 1], want, f"row {row}, tokens after the pack with starts {begins}")


@torch.no_grad()
def value(subject: Subject) -> None:
    """A call never changes the state, or the input, that it was given."""
    module = subject.module()
    x, more = subject.input(2, 9), subject.input(2, 5)
    old = module(x)[1]
    copy, more_copy = states.map_leaves(torch.clone, old), more.clone()
    module(more, old)
    module.step(more[:, 0], old)
    for (name, now, _), (_, then, _) in zip(states.leaves(old), states.leaves(copy), strict=True):
        if not torch.equal(now, then):
            raise AssertionError(f"state leaf {name} was changed by a call")
    if not torch.equal(more, more_copy):
        raise AssertionError("the input was changed by a call")


@torch.no_grad()
def memory(subject: Subject) -> None:
    """The declared growth of the state is what ``nbytes`` shows."""
    module = subject.module()
    sizes = [states.nbytes(module(subject.input(1, length))[1]) for length in (64, 256, 512)]
    declared = module.memory
    grows = sizes[2] - sizes[1]
    if declared in ("none", "constant", "window") and not sizes[0] == sizes[1] == sizes[2]:
        raise AssertionError(f"declared {declared!r}, but the state has {sizes} bytes after 64, 256, 512 tokens")
    if declared == "none" and sizes[0]:
        raise AssertionError(f"declared 'none', but the state has {sizes[0]} bytes")
    if declared == "linear" and not (sizes[1] > sizes[0] and grows * 192 == (sizes[1] - sizes[0]) * 256):
        raise AssertionError(f"declared 'linear', but the state has {sizes} bytes after 64, 256, 512 tokens")


@torch.no_grad()
def round_trip(subject: Subject) -> None:
    """Config to JSON and back, weights and state to safetensors and back: equal to the bit."""
    data = json.loads(json.dumps(subject.config.to_dict()))
    if Config.from_dict(data, trust_code=True) != subject.config:  # its code runs already
        raise AssertionError("the config read back from JSON differs")
    module = subject.module()
    x = subject.input(2, 10)
    want, final = module(x)
    with tempfile.TemporaryDirectory() as folder:
        weights, saved = Path(folder) / "weights.safetensors", Path(folder) / "state.safetensors"
        tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
        if tensors:
            atomic_save_tensors(weights, tensors, {})
            fresh = subject.build().to(torch.float64).eval()
            fresh.load_state_dict(read_tensors(weights))
            if not torch.equal(fresh(x)[0], want):
                raise AssertionError("a module with the weights read back gives another output")
        if states.nbytes(final):
            states.save(final, saved)
            again = states.load(saved, module.init_state(1))
            for (name, ours, _), (_, theirs, _) in zip(states.leaves(again), states.leaves(final), strict=True):
                if not torch.equal(ours, theirs):
                    raise AssertionError(f"state leaf {name} read back differs")


@torch.no_grad()
def matrix(subject: Subject) -> None:
    """Where the mixer is linear in its values, the mixing matrix times the values equals the output."""
    module = subject.module()
    if type(module).mixing is base.Mixer.mixing:
        return  # it says of itself that it has no matrix
    matrix, values, output = module.mixing(subject.input(2, 37))
    if matrix.shape != (2, values.shape[2], 37, 37):
        raise AssertionError(
            f"the matrix has shape {list(matrix.shape)}, expected [B H T T] = {[2, values.shape[2], 37, 37]}"
        )
    if float(matrix.triu(1).abs().max()) > 1e-12:
        raise AssertionError("the matrix is not causal")
    same(torch.einsum("bhij,bjhv->bihv", matrix, values), output, "matrix times values")


@torch.no_grad()
def compiles(subject: Subject) -> None:
    """torch.compile(fullgraph=True) accepts forward and step, with the same results."""
    module = subject.module()
    x = subject.input(2, 12)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    want, final = module(x)
    got, ours = compiled(x)
    same(got, want, "compiled output")
    same(ours, final, "compiled state")
    step = torch.compile(module.step, fullgraph=True, backend="eager")
    same(step(x[:, 0], final)[0], module.step(x[:, 0], final)[0], "compiled step")


def gradients(subject: Subject) -> None:
    """Every parameter receives a gradient; outputs and gradients stay finite for inputs of size 100."""
    for scale in (1.0, 100.0):
        for dtype in (torch.float64, torch.float32):
            module = subject.module(dtype)
            x = (scale * subject.input(2, 63)).to(dtype).requires_grad_()
            y, _ = module(x)
            y.square().mean().backward()
            named = {"the input": x, **dict(module.named_parameters())}
            for name, tensor in named.items():
                if tensor.grad is None or (scale == 1.0 and not tensor.grad.abs().max() > 0):
                    raise AssertionError(f"{name} receives no gradient")
                if not bool(torch.isfinite(tensor.grad).all()):
                    raise AssertionError(f"the gradient of {name} is not finite at inputs of size {scale:g} ({dtype})")
            if not bool(torch.isfinite(y).all()):
                raise AssertionError(f"the output is not finite at inputs of size {scale:g} ({dtype})")


def names(subject: Subject) -> None:
    """What the mixer lists by name (no_decay, lr_scales, full_precision, int8_at_least, step_outputs) exists in it."""
    module = subject.module()
    if isinstance(module, base.Mixer):
        module.check_names()
        maps = {name for name, part in module.named_modules() if hasattr(part, "out_features")}
        for name in module.step_outputs():
            if name not in maps:
                raise AssertionError(f"step_outputs names {name!r}, which is no linear map of it")


@torch.no_grad()
def decodes(subject: Subject) -> None:
    """In a language model, the replayed steps of a decoder equal those of ``step``: logits and final state."""
    cfg = subject.config
    if isinstance(cfg, base.Config):
        layer = Layer.Config(mixer=cfg, mlp=SwiGLU.Config())
        cfg = LanguageModel.Config(vocab_size=50, d_model=subject.d_model, layers=(layer, layer))
    model = subject._replace(build=cfg.build).module(torch.float32)
    tokens = torch.randint(0, 50, (3, 12))
    _, state = model(tokens[:, :5])
    decoder = Decoder(model, batch=3)
    decoder.load(state)
    for t in range(5, 12):
        want, state = model.step(tokens[:, t], state)
        same(decoder.step(tokens[:, t]), want, f"logits of step {t}")
    same(decoder.state(), state, "the decoder's state")


LAWS: dict[str, Callable[[Subject], None]] = {
    "split": split,
    "step": step,
    "causality": causality,
    "rows": rows,
    "reset": reset,
    "isolation": isolation,
    "value": value,
    "aliasing": aliasing,
    "memory": memory,
    "round trip": round_trip,
    "matrix": matrix,
    "bfloat16": bfloat16,
    "autocast": autocast,
    "compile": compiles,
    "gradients": gradients,
    "decode": decodes,
    "names": names,
    "transforms": transforms,
}


def check(subject: Subject, law: str) -> None:
    """Test one law; ``LawBroken`` names the law, the mixer and what differs."""
    torch.manual_seed(1)
    try:
        LAWS[law](subject)
    except (AssertionError, ValueError, RuntimeError, TypeError) as error:
        raise LawBroken(
            f"{subject.name} breaks the law of {law} ({(LAWS[law].__doc__ or '').strip()}): {error}"
        ) from error


def subjects(mixer: Any) -> list[Subject]:
    """One subject per example configuration of a mixer class."""
    name = mixer.__name__
    return [
        Subject(name if label == "default" else f"{name}, {label}", cfg, partial(cfg.build, 64))
        for label, cfg in mixer.examples().items()
    ]
