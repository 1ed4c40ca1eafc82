"""Every op: chunk form = reference loop; splits, resets, initial states, extreme gates, all gradients."""

import importlib
from pathlib import Path

import pytest
import torch

import everlong.ops
from everlong import laws, numerics, state
from everlong.laws_aliasing import apart
from everlong.ops.cases import CASES, Case

FOLDER = Path(everlong.ops.__file__).parent
MODULES = {
    path.stem: importlib.import_module(f"everlong.ops.{path.stem}")
    for path in sorted(FOLDER.glob("*.py"))
    if "\nSEQUENCE = (" in path.read_text()
}
OPS = [(name, variant) for name, module in MODULES.items() for variant in getattr(module, "VARIANTS", (None,))]
TWINS = [(n, v, row.name) for n, v in OPS for row in MODULES[n].TABLE if row.name not in ("reference", "native")]


def op_of(name):
    return getattr(MODULES[name], name)


def is_tensor(x):
    """Inputs that are None or plain numbers (a window) are handed on as they are."""
    return isinstance(x, torch.Tensor)


def part(name, inputs, start, end):
    """The inputs of tokens start to end; a vector has no time axis."""
    sequence = {k for k in MODULES[name].SEQUENCE if inputs[k] is not None and inputs[k].dim() > 1}
    return {k: x[:, start:end] if k in sequence else x for k, x in inputs.items()}


def later_state(name, case):
    """A state some tokens into a text, as a constant."""
    prefix = MODULES[name].inputs(case.but(time=5))
    fixed = {k: x for k, x in MODULES[name].inputs(case).items() if k not in MODULES[name].SEQUENCE}
    return state.map_leaves(torch.Tensor.detach, op_of(name)(**{**prefix, **fixed}, backend="reference")[1])


def some_starts(case):
    starts = torch.rand(case.batch, case.time) < 0.1
    starts[0] = False  # one row that keeps the state it was given
    return starts


def with_gradients(run, inputs, initial):
    """Outputs, final state leaves and the gradients of all float inputs and of the initial state."""
    inputs = {k: x.clone().requires_grad_() if is_tensor(x) else x for k, x in inputs.items()}
    leaves = [
        leaf.clone().requires_grad_(leaf.is_floating_point() or leaf.is_complex())
        for _, leaf, _ in state.leaves(initial)
    ]
    y, final = run(**inputs, state=state.rebuild(initial, iter(leaves)))
    outputs = [y, *(leaf for _, leaf, _ in state.leaves(final))]
    torch.manual_seed(5)
    floats = [out for out in outputs if out.requires_grad]
    wide = {True: torch.complex128, False: torch.float64}
    loss = sum((out * torch.randn(out.shape, dtype=wide[out.is_complex()]).to(out.dtype)).real.sum() for out in floats)
    wanted = {k: x for k, x in inputs.items() if is_tensor(x)}
    wanted |= {f"state {i}": leaf for i, leaf in enumerate(leaves) if leaf.requires_grad}
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return outputs, dict(zip(wanted, grads, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name,variant,backend", TWINS)
def test_chunk_equals_reference(name, variant, backend, case):
    case = case.but(variant=variant)
    inputs, initial = MODULES[name].inputs(case), later_state(name, case)
    for starts in (None, some_starts(case)):
        ours, theirs = (
            with_gradients(lambda **kw: op_of(name)(**kw, starts=starts, backend=form), inputs, initial)  # noqa: B023
            for form in (backend, "reference")
        )
        for index, (got, want) in enumerate(zip(ours[0], theirs[0], strict=True)):
            laws.same(got, want, f"output {index}")
        for key, want in theirs[1].items():
            assert (ours[1][key] is None) == (want is None), key
            if want is not None:
                numerics.assert_close(ours[1][key], want, f"gradient of {key}", numerics.BOUNDS["fp64 gradient"])


@pytest.mark.parametrize("name,variant,backend", TWINS)
def test_float32_is_close_to_float64(name, variant, backend):
    for gate in (None, 0.0, -5.0, -50.0):
        inputs = MODULES[name].inputs(Case("single precision", time=300, gate=gate, variant=variant))
        want, final = op_of(name)(**inputs, backend="reference")
        singles = {
            k: x.to(torch.complex64 if x.is_complex() else torch.float32) if is_tensor(x) else x
            for k, x in inputs.items()
        }
        got, ours = op_of(name)(**singles, backend=backend)
        numerics.assert_close(got, want, f"fp32 output at gate {gate}", numerics.TOLERANCE[torch.float32])
        for (leaf, mine, _), (_, theirs, _) in zip(state.leaves(ours), state.leaves(final), strict=True):
            if theirs.is_floating_point() or theirs.is_complex():
                numerics.assert_close(
                    mine, theirs, f"fp32 state {leaf} at gate {gate}", numerics.TOLERANCE[torch.float32]
                )


@pytest.mark.parametrize("name,variant,backend", TWINS)
def test_pieces_equal_the_whole(name, variant, backend):
    case = Case("pieces", time=90, variant=variant)
    inputs = MODULES[name].inputs(case)
    want, final = op_of(name)(**inputs, backend=backend)
    outputs, carried = [], None
    for start, end in ((0, 1), (1, 3), (3, 64), (64, 90)):
        y, carried = op_of(name)(**part(name, inputs, start, end), state=carried, backend=backend)
        outputs.append(y)
    laws.same(torch.cat(outputs, dim=1), want, "output")
    laws.same(carried, final, "final state")


ROWS = [(n, v, row) for n, v in OPS for row in MODULES[n].TABLE]


@pytest.mark.parametrize("name,variant,row", [pytest.param(n, v, r, id=f"{n}-{v}-{r.name}") for n, v, r in ROWS])
@torch.no_grad()
def test_inputs_outputs_and_states_share_no_memory(name, variant, row):
    """The op's verb and its step: whatever is overwritten after the call, nothing else changes."""
    for dtype in (torch.float64, torch.float32):
        case = Case("memory", time=9, variant=variant)
        for initial in (None, later_state(name, case)):
            inputs = {k: single(x, dtype) for k, x in MODULES[name].inputs(case).items()}
            before = None if initial is None else state.map_leaves(lambda leaf: single(leaf, dtype).clone(), initial)  # noqa: B023
            if row.name == "native" and (row.refuse(**inputs, state=before) or dtype == torch.float64):
                continue
            y, after = op_of(name)(**inputs, state=before, backend=row.name)
            tensors = {k: x for k, x in inputs.items() if is_tensor(x)}
            apart({**tensors, "y": y}, {"given state": before if before is not None else (), "new state": after})


def single(x, dtype):
    """Floating and complex tensors in the precision of ``dtype``; all else as it is."""
    if not is_tensor(x) or not (x.is_floating_point() or x.is_complex()):
        return x
    return x.to(dtype.to_complex() if x.is_complex() else dtype)


@pytest.mark.parametrize("name,variant,backend", TWINS)
def test_gradcheck(name, variant, backend):
    case = Case("gradcheck", batch=1, time=5, heads=1, keys=2, values=2, variant=variant)
    inputs, initial = MODULES[name].inputs(case), later_state(name, case)
    used = [key for key, x in inputs.items() if is_tensor(x)]
    starts = torch.tensor([[False, False, False, True, False]])
    floats = [leaf.is_floating_point() or leaf.is_complex() for _, leaf, _ in state.leaves(initial)]

    def run(*tensors):
        given = iter(tensors[len(used) :])
        leaves = [
            next(given) if real else leaf for real, (_, leaf, _) in zip(floats, state.leaves(initial), strict=True)
        ]
        y, final = op_of(name)(
            **{**inputs, **dict(zip(used, tensors[: len(used)], strict=True))},
            state=state.rebuild(initial, iter(leaves)),
            starts=starts,
            backend=backend,
        )
        return y, *(leaf for _, leaf, _ in state.leaves(final) if leaf.requires_grad)

    leaves = [leaf for real, (_, leaf, _) in zip(floats, state.leaves(initial), strict=True) if real]
    tensors = [x.clone().requires_grad_() for x in [*(inputs[key] for key in used), *leaves]]
    assert torch.autograd.gradcheck(run, tensors)
