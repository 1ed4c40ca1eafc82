"""Mamba, Jamba's Mamba and Mamba-2 equal their implementations in transformers: outputs, states, one more token."""

import pytest
import torch

from everlong.mixers.mamba import Mamba
from everlong.mixers.mamba2 import Mamba2
from everlong.numerics import assert_close

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


def mamba_pair():
    from transformers.models.mamba.modeling_mamba import MambaConfig, MambaMixer

    cfg = MambaConfig(hidden_size=48, state_size=8, conv_kernel=4, num_hidden_layers=1, vocab_size=8)
    return cfg, MambaMixer(cfg, layer_idx=0), Mamba.Config(d_state=8).build(48)


def jamba_pair():
    from transformers.models.jamba.modeling_jamba import JambaConfig, JambaMambaMixer

    cfg = JambaConfig(
        hidden_size=32,
        mamba_d_state=8,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_dt_rank=6,
        num_hidden_layers=2,
        vocab_size=8,
        attn_layer_offset=1,
        attn_layer_period=2,
    )
    return cfg, JambaMambaMixer(cfg, layer_idx=0), Mamba.Config(d_state=8, dt_rank=6, norms="rms").build(32)


def mamba2_pair(groups):
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

    cfg = Mamba2Config(
        hidden_size=32,
        num_heads=8,
        head_dim=8,
        state_size=16,
        n_groups=groups,
        conv_kernel=4,
        chunk_size=16,
        num_hidden_layers=1,
        vocab_size=8,
        layer_norm_epsilon=1e-5,
    )
    return cfg, Mamba2Mixer(cfg, layer_idx=0), Mamba2.Config(d_state=16, head_dim=8, n_groups=groups).build(32)


PAIRS = {
    "mamba": mamba_pair,
    "jamba": jamba_pair,
    "mamba2": lambda: mamba2_pair(1),
    "mamba2, 4 groups": lambda: mamba2_pair(4),
}


@torch.no_grad()
def randomized(theirs, ours):
    """Random weights in the official module, the same in ours, by the same names."""
    for parameter in theirs.parameters():
        parameter.normal_(0.0, 0.3)
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


@pytest.mark.parametrize("name", PAIRS)
@torch.no_grad()
def test_equals_transformers(name):
    from transformers.cache_utils import DynamicCache

    cfg, theirs, ours = PAIRS[name]()
    theirs, ours = randomized(theirs, ours)
    cache, width = DynamicCache(config=cfg), ours.d_model
    x, more = torch.randn(2, 45, width), torch.randn(2, 2, width)
    want, (got, state) = theirs(x, cache_params=cache), ours(x)
    assert_close(got, want, "outputs")
    for t in range(2):
        token = theirs(more[:, t : t + 1], cache_params=cache)[:, 0]
        y, state = ours.step(more[:, t], state)
        assert_close(y, token, f"token {t} from the state")
        layer = cache.layers[0]
        memory = layer.recurrent_states[0]
        memory = memory if name in ("mamba", "jamba") else memory.transpose(-1, -2)  # theirs is [B H V K]
        assert_close(state.memory, memory, "state of the recurrence")
        assert_close(state.conv, layer.conv_states[0].transpose(1, 2)[:, -3:], "state of the convolution")


def test_initial_values():
    depth = type(Mamba.Config().build(8).depth)(layer=3, total=16)
    torch.manual_seed(0)
    for layer in (Mamba.Config().build(64, depth), Mamba2.Config(head_dim=1).build(64, depth)):
        bias = layer.dt_proj.bias if isinstance(layer, Mamba) else layer.dt_bias
        dt = torch.nn.functional.softplus(bias)
        assert 1e-3 <= float(dt.min()) < 3e-3 and 0.03 < float(dt.max()) <= 0.1001
        assert abs(float(dt.log().median()) + 4.6) < 0.6  # log-uniform, not uniform
        assert torch.equal(layer.D, torch.ones_like(layer.D))
        bound = layer.out_proj.in_features**-0.5 / 4  # kaiming uniform with a = sqrt(5), over sqrt(16 layers)
        assert 0.95 * bound < float(layer.out_proj.weight.abs().max()) <= bound
    A = Mamba.Config().build(8).A_log.exp()
    assert_close(A, torch.arange(1.0, 17).expand(16, 16), "A of Mamba")
    A = Mamba2.Config(head_dim=1).build(64).A_log.exp()
    assert 1 <= float(A.min()) < 2 and 15 < float(A.max()) <= 16


def test_unknown_norms_are_refused():
    with pytest.raises(ValueError, match="norms = 'rmss' is not a choice; did you mean 'rms'"):
        Mamba.Config(norms="rmss").build(8)
