"""mLSTM, sLSTM, LSTM against their official code at random weights; linear attention, retention against the papers."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F
from transformers import xLSTMConfig
from transformers.models.xlstm.modeling_xlstm import xLSTMModel
from xlstm.blocks.mlstm.backends import parallel_stabilized_simple
from xlstm.blocks.mlstm.layer import mLSTMLayer, mLSTMLayerConfig
from xlstm.blocks.slstm.layer import sLSTMLayer, sLSTMLayerConfig

from everlong.mixers.linear_attention import LinearAttention
from everlong.mixers.lstm import LSTM
from everlong.mixers.mlstm import MLSTM, Parts
from everlong.mixers.retention import Retention
from everlong.mixers.slstm import SLSTM
from everlong.numerics import BOUNDS, assert_close

WIDTH = 64


def randomised(module, scale=0.1):
    """A module in fp64 whose every parameter is its initial value plus noise."""
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module.eval()


def tokens(batch=2, time=75):
    return torch.randn(batch, time, WIDTH, dtype=torch.float64)


def official_mlstm():
    return randomised(mLSTMLayer(mLSTMLayerConfig(embedding_dim=WIDTH, num_heads=4, context_length=128)))


def our_mlstm(theirs, **options):
    ours = MLSTM.Config(**options).build(WIDTH).double()
    cell = theirs.mlstm_cell
    ours.load_state_dict(
        {
            "up_proj.weight": theirs.proj_up.weight,
            "down_proj.weight": theirs.proj_down.weight,
            "conv.weight": theirs.conv1d.conv.weight,
            "conv.bias": theirs.conv1d.conv.bias,
            "q_weight": theirs.q_proj.weight,
            "k_weight": theirs.k_proj.weight,
            "v_weight": theirs.v_proj.weight,
            "gates.weight": torch.cat([cell.igate.weight, cell.fgate.weight]),
            "gates.bias": torch.cat([cell.igate.bias, cell.fgate.bias]),
            "norm_weight": 1 + cell.outnorm.weight,
            "skip": theirs.learnable_skip,
        }
    )
    return ours


@torch.no_grad()
def test_mlstm_is_the_parallel_form_of_xlstm():
    theirs, x = official_mlstm(), tokens()
    # the stabiliser begins at 0 here and at -inf in the parallel form, which only the eps of the denominator can tell
    theirs.mlstm_cell.backend_fn = partial(parallel_stabilized_simple, eps=0.0)
    ours = our_mlstm(theirs, eps=0.0)
    want = theirs(x)
    assert_close(ours(x)[0], want, "mlstm")
    _, state = ours(x[:, :40])
    assert_close(ours.step(x[:, 40], state)[0], want[:, 40], "one more token")


@torch.no_grad()
def test_mlstm_is_the_recurrent_form_of_xlstm():
    theirs, x = official_mlstm(), tokens()
    ours, carried, steps = our_mlstm(theirs), {}, []
    for t in range(x.shape[1]):
        y, carried = theirs.step(x[:, t : t + 1], **carried)
        steps.append(y)
    y, state = ours(x)
    assert_close(y, torch.cat(steps, dim=1), "mlstm")
    c, n, m = carried["mlstm_state"]
    assert_close(state.memory, torch.cat([c, n], dim=-1), "state")
    assert_close(state.m, m[..., 0, 0], "stabiliser")


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_mlstm_cell_is_that_of_transformers(scale):
    sizes = dict(vocab_size=8, hidden_size=2 * WIDTH, num_hidden_layers=1, num_heads=4, qk_dim_factor=1.0)
    kernels = dict(
        chunkwise_kernel="chunkwise--native_autograd",
        sequence_kernel="native_sequence__native",
        step_kernel="native",
        mode="inference",
    )
    backend = xLSTMModel(xLSTMConfig(**sizes, **kernels)).blocks[0].mlstm_layer.mlstm_backend
    q, k, v = (torch.randn(2, 75, 4, 32) for _ in range(3))
    i, f = scale * torch.randn(2, 75, 4), scale * torch.randn(2, 75, 4)
    first = [part.movedim(2, 1)[:, :, :70] for part in (q, k, v, i, f)]
    want, (c, n, m) = backend(**dict(zip("qkvif", first, strict=True)), return_last_states=True)
    ours = MLSTM.Config().build(WIDTH)
    parts = Parts(q, k, v, i, F.logsigmoid(f))
    empty = ours.init_state(2)
    got, memory, top = ours._cell(Parts(*(part[:, :70] for part in parts)), empty.memory, empty.m, None)
    assert_close(got, want.movedim(1, 2), "cell")
    more, _ = backend(
        **dict(zip("qkvif", [part.movedim(2, 1)[:, :, 70:] for part in (q, k, v, i, f)], strict=True)),
        c_initial=c,
        n_initial=n,
        m_initial=m,
        return_last_states=True,
    )
    got, _, _ = ours._cell(Parts(*(part[:, 70:] for part in parts)), memory, top, None)
    assert_close(got, more.movedim(1, 2), "cell from a state")


def official_slstm():
    layer = sLSTMLayer(sLSTMLayerConfig(embedding_dim=WIDTH, num_heads=4, backend="vanilla"))
    layer.reset_parameters()
    return randomised(layer)


def our_slstm(theirs):
    ours, cell = SLSTM.Config().build(WIDTH).double(), theirs.slstm_cell
    ours.load_state_dict(
        {
            "conv.weight": theirs.conv1d.conv.weight,
            "conv.bias": theirs.conv1d.conv.bias,
            "if_weight": torch.cat([theirs.fgate.weight, theirs.igate.weight], dim=1),  # by slot, not by name
            "zo_weight": torch.cat([theirs.zgate.weight, theirs.ogate.weight], dim=1),
            "recurrent": cell._recurrent_kernel_int2ext(cell._recurrent_kernel_),
            "bias": cell._bias_int2ext(cell._bias_),
            "norm_weight": 1 + theirs.group_norm.weight,
        }
    )
    return ours


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_slstm_is_that_of_xlstm(scale):
    theirs, x = official_slstm(), (scale * tokens()).requires_grad_()
    ours = our_slstm(theirs)
    want, final = theirs(x[:, :70], return_last_state=True)
    got, state = ours(x[:, :70])
    assert_close(got, want, "slstm")
    assert_close(state.cell.flatten(2), final["slstm_state"].transpose(0, 1), "state")
    weight = torch.randn_like(want)
    assert_close(
        *(torch.autograd.grad((y * weight).sum(), x)[0] for y in (got, want)), "gradient", BOUNDS["fp64 gradient"]
    )
    with torch.no_grad():
        more, _ = theirs(x[:, 70:71], **final, return_last_state=True)
        assert_close(ours.step(x[:, 70], state)[0], more[:, 0], "one more token")


def test_slstm_begins_like_that_of_xlstm():
    theirs = sLSTMLayer(sLSTMLayerConfig(embedding_dim=WIDTH, num_heads=4, backend="vanilla"))
    theirs.reset_parameters()
    ours, cell = SLSTM.Config().build(WIDTH), theirs.slstm_cell
    assert_close(ours.bias, cell._bias_int2ext(cell._bias_), "biases", BOUNDS["fp32 product"])
    assert not ours.recurrent.any()
    assert not cell._recurrent_kernel_.any()
    assert (ours.if_weight.std() / theirs.igate.weight.std()).item() == pytest.approx(1, abs=0.2)


def test_lstm_is_that_of_torch():
    theirs = torch.nn.LSTM(WIDTH, WIDTH, batch_first=True).double()
    ours = LSTM.Config().build(WIDTH).double()
    ours.load_state_dict({name.removesuffix("_l0"): weight for name, weight in theirs.named_parameters()})
    x = tokens().requires_grad_()
    want, (h, c) = theirs(x[:, :70])
    got, state = ours(x[:, :70])
    assert_close(got, want, "lstm")
    assert_close(state.cell, torch.stack([h[0], c[0]], dim=1), "state")
    weight = torch.randn_like(want)
    mine = torch.autograd.grad((got * weight).sum(), [x, *ours.parameters()])
    for ours_, theirs_ in zip(mine, torch.autograd.grad((want * weight).sum(), [x, *theirs.parameters()]), strict=True):
        assert_close(ours_, theirs_, "gradient", BOUNDS["fp64 gradient"])
    more, _ = theirs(x[:, 70:71], (h, c))
    assert_close(ours.step(x[:, 70], state)[0], more[:, 0], "one more token")


def heads(x, proj, n=4):
    """[B T D] -> [B H T K]."""
    return (x @ proj.weight.T).unflatten(-1, (n, -1)).transpose(1, 2)


@torch.no_grad()
def test_linear_attention_is_the_paper():
    mixer, x = randomised(LinearAttention.Config().build(WIDTH)), tokens()
    q, k, v = (heads(x, proj) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    q, k = (torch.where(part > 0, part + 1, part.exp()) for part in (q, k))
    want = torch.zeros_like(v)
    for t in range(x.shape[1]):  # eq. 12: a ratio of two sums over the past
        weight = torch.einsum("bhk,bhsk->bhs", q[:, :, t], k[:, :, : t + 1])
        want[:, :, t] = torch.einsum("bhs,bhsv->bhv", weight, v[:, :, : t + 1]) / (weight.sum(-1, keepdim=True) + 1e-6)
    want = want.transpose(1, 2).flatten(2) @ mixer.out_proj.weight.T
    assert_close(mixer(x)[0], want, "linear attention")
    _, state = mixer(x[:, :70])
    assert_close(mixer.step(x[:, 70], state)[0], want[:, 70], "one more token")


def retention_of_the_paper(mixer, x, eps):
    """The parallel form, arXiv 2307.08621 eq. 5-8, with its three normalisers, rotation as complex numbers."""
    n, length = 4, x.shape[1]
    q, k, v = (heads(x, proj) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    size = q.shape[-1]
    turn = torch.arange(length)[:, None] * 10000 ** -torch.linspace(0, 1, size // 2, dtype=torch.float64)
    q, k = (
        torch.view_as_complex(part.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(turn), turn)
        for part in (q, k * size**-0.5)
    )
    gamma = 1 - 2.0 ** (-5 - torch.arange(n, dtype=torch.float64))
    apart = torch.arange(length)[:, None] - torch.arange(length)
    decay = torch.where(apart >= 0, gamma[:, None, None] ** apart.clamp(min=0), 0.0)
    decay = decay / decay.sum(-1, keepdim=True).sqrt()
    scores = (q @ k.conj().mT).real * decay
    scores = scores / scores.abs().sum(-1, keepdim=True).clamp(1, 5e4)
    y = scores @ v
    y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt()
    return (F.silu(x @ mixer.gate_proj.weight.T) * y.transpose(1, 2).flatten(2)) @ mixer.out_proj.weight.T


@torch.no_grad()
@pytest.mark.parametrize(("eps", "tolerance"), [(1e-24, None), (1e-6, BOUNDS["eps of a norm"])])
def test_retention_is_the_paper_up_to_the_eps_of_its_norm(eps, tolerance):
    mixer, x = randomised(Retention.Config(norm_eps=eps).build(WIDTH)), tokens()
    want = retention_of_the_paper(mixer, x, eps)
    assert_close(mixer(x)[0], want, "retention", tolerance)
    _, state = mixer(x[:, :70])
    assert_close(mixer.step(x[:, 70], state)[0], want[:, 70], "one more token", tolerance)
