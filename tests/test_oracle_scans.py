"""rg_lru against transformers' RecurrentGemma; lru and s4d against plain fp64 transcriptions of their equations."""

import math

import numpy as np
import pytest
import torch

from everlong import numerics
from everlong.mixers.lru import LRU
from everlong.mixers.rg_lru import RGLRU
from everlong.mixers.s4d import S4D, initial_poles


def randomised(module, dtype):
    """All parameters moved off their initial values."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.to(dtype).eval()


def numbers(module):
    return {name: parameter.detach().double().numpy() for name, parameter in module.named_parameters()}


def glu(y, p):
    """GELU, then the linear map to twice the width, then GLU."""
    gelu = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in y.ravel()]).reshape(y.shape)
    a, b = np.split(gelu @ p["out_proj.weight"].T + p["out_proj.bias"], 2, axis=-1)
    return a / (1 + np.exp(-b))


def griffin_pair():
    """transformers' recurrent block with random weights, and ours with the same."""
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

    config = RecurrentGemmaConfig(hidden_size=32, lru_width=32, num_attention_heads=4, num_hidden_layers=3)
    theirs = RecurrentGemmaRecurrentBlock(config, 0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    ours = RGLRU.Config(n_heads=4).build(32)
    names = {"conv_1d.weight": "conv_weight", "conv_1d.bias": "conv_bias"}
    weights = {names.get(name, name.removeprefix("rg_lru.")): w for name, w in theirs.state_dict().items()}
    weights["conv_weight"] = weights["conv_weight"][:, 0]
    ours.load_state_dict(weights)
    return theirs.eval(), ours.eval()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("length", [2, 3, 40])
def test_rg_lru_equals_recurrent_gemma(length):
    theirs, ours = griffin_pair()
    x, more = torch.randn(2, length, 32), torch.randn(2, 3, 32)
    positions = torch.arange(length + 3)[None].expand(2, -1)
    want, _ = theirs(x, position_ids=positions[:, :length], attention_mask=None)
    got, state = ours(x)
    numerics.assert_close(got, want, "output", numerics.BOUNDS["fp32 pass"])
    numerics.assert_close(state.memory, theirs.rg_lru.recurrent_states, "state", numerics.BOUNDS["fp32 pass"])
    for t in range(3):
        want, _ = theirs(more[:, t : t + 1], position_ids=positions[:, length + t, None], attention_mask=None)
        got, state = ours.step(more[:, t], state)
        numerics.assert_close(got, want[:, 0], f"token {t} from the state", numerics.BOUNDS["fp32 pass"])


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_rg_lru_begins_documents_as_recurrent_gemma():
    theirs, ours = griffin_pair()
    theirs.conv_1d.weight[..., :-1] = 0  # theirs lets the convolution reach across documents
    ours.conv_weight[:, :-1] = 0
    starts = torch.zeros(2, 20, dtype=torch.bool)
    starts[0, [4, 11]] = starts[1, [0, 19]] = True
    positions = torch.zeros(2, 20, dtype=torch.long)
    for t in range(1, 20):
        positions[:, t] = torch.where(starts[:, t], 0, positions[:, t - 1] + 1)
    x = torch.randn(2, 20, 32)
    want, _ = theirs(x, position_ids=positions, attention_mask=None)
    numerics.assert_close(ours(x, starts=starts)[0], want, "output", numerics.BOUNDS["fp32 pass"])


@torch.no_grad()
def test_rg_lru_starts_in_the_published_range():
    decay = torch.exp(-torch.nn.functional.softplus(RGLRU.Config().build(512).recurrent_param))
    assert 0.9 <= decay.min() < 0.905 and 0.995 < decay.max() <= 0.999


def lru_loop(p, x):
    """The paper's equations, token by token, one row at a time."""
    decay = np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"]))
    B, C = p["B"][:, 0] + 1j * p["B"][:, 1], p["C"][..., 0] + 1j * p["C"][..., 1]
    y = np.empty_like(x)
    for row in range(len(x)):
        h = np.zeros(len(decay), complex)
        for t, u in enumerate(x[row]):
            h = decay * h + np.exp(p["gamma_log"]) * (B @ u)
            y[row, t] = (C @ h).real + p["D"] * u
    return glu(y, p)


def s4d_convolution(p, x):
    """y = K * u + D u with the kernel of the zero-order hold written out, in every channel."""
    dt, A = np.exp(p["log_dt"])[:, None], -np.exp(p["log_A_real"]) + 1j * p["A_imag"]
    C = p["C"][..., 0] + 1j * p["C"][..., 1]
    length = x.shape[1]
    held = C * (np.exp(dt * A) - 1) / A
    kernel = np.stack([2 * (held * np.exp(dt * A * lag)).sum(-1).real for lag in range(length)])
    y = np.stack([(kernel[t::-1] * x[:, : t + 1]).sum(1) for t in range(length)], axis=1)
    return glu(y + p["D"] * x, p)


@torch.no_grad()
@pytest.mark.parametrize(
    "config,oracle",
    [
        (LRU.Config(d_state=12), lru_loop),
        (LRU.Config(r_min=0.9, r_max=0.999, max_phase=0.3), lru_loop),
        (S4D.Config(), s4d_convolution),
        (S4D.Config(init="inv", d_state=16), s4d_convolution),
        (S4D.Config(init="legs", d_state=16), s4d_convolution),
        (S4D.Config(init="real", d_state=8), s4d_convolution),
    ],
)
def test_equals_the_transcription(config, oracle):
    layer = randomised(config.build(16), torch.float64)
    x = torch.randn(2, 150, 16, dtype=torch.float64)
    want = torch.from_numpy(oracle(numbers(layer), x.numpy()))
    got, state = layer(x[:, :-1])
    numerics.assert_close(got, want[:, :-1], "output")
    numerics.assert_close(layer.step(x[:, -1], state)[0], want[:, -1], "one more token")


@torch.no_grad()
def test_lru_starts_on_the_ring():
    layer = LRU.Config(r_min=0.4, r_max=0.8, max_phase=1.0).build(512)
    size = torch.exp(-layer.nu_log.exp())
    assert size.min() >= 0.4 - 1e-6 and size.max() <= 0.8 + 1e-6
    assert abs(float(size.square().mean()) - (0.4**2 + 0.8**2) / 2) < 0.03  # uniform in area
    numerics.assert_close(layer.gamma_log.exp(), (1 - size.square()).sqrt(), "gamma")
    assert layer.theta_log.exp().min() > 0 and layer.theta_log.exp().max() <= 1.0


def test_s4d_initial_poles():
    lin, inv, legs, real = (initial_poles(kind, 64)[0] for kind in ("lin", "inv", "legs", "real"))
    assert torch.equal(lin.imag, math.pi * torch.arange(32, dtype=torch.float64))
    assert torch.equal(real.real, -torch.arange(1, 33, dtype=torch.float64))
    assert abs(float(legs.imag.max()) - 1303.3) < 0.05 and abs(float(inv.imag.max()) - 1283.4) < 0.05
    order = torch.arange(64, dtype=torch.float64)  # LegS from its definition: A = normal + rank one
    A = -((2 * order[:, None] + 1) * (2 * order + 1)).sqrt().tril(-1) - torch.diag(order + 1)
    P = (order + 0.5).sqrt()
    want = torch.linalg.eigvals(A + P[:, None] * P)
    upper = want[want.imag > 0]
    numerics.assert_close(legs, upper[upper.imag.argsort()], "eigenvalues")
    with pytest.raises(ValueError, match="no initial value 'leg' for S4D; did you mean 'legs'"):
        initial_poles("leg", 64)
