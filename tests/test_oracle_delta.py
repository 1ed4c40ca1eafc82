"""The delta rule family against independent implementations: transformers, the rwkv package, a plain fp64 loop."""

import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from everlong.call import Call, ask
from everlong.feedforward.channelmix import ChannelMix
from everlong.mixers.base import Depth
from everlong.mixers.delta_net import DeltaNet
from everlong.mixers.gated_delta import GatedDelta
from everlong.mixers.rwkv7 import RWKV7
from everlong.numerics import BOUNDS, assert_close

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages compared with


def randomise(module, scale=0.3):
    """Random parameters, so that what starts at zero or one is tested too."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module.eval()


def chunked(linear, groups, sizes):
    """The rows of a fused projection, stored group by group, part by part: [sum(sizes) * groups, D] -> parts."""
    parts = linear.weight.unflatten(0, (groups, -1)).split(sizes, dim=1)
    return [part.flatten(0, 1) for part in parts]


@torch.no_grad()
def test_gated_delta_equals_qwen3_next():
    from transformers import DynamicCache
    from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    config = Qwen3NextConfig(
        hidden_size=48,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=24,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-6,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=8,
        pad_token_id=0,
    )
    theirs = randomise(Qwen3NextGatedDeltaNet(config, 0))
    ours = GatedDelta(
        GatedDelta.Config(n_heads=4, n_key_heads=2, expand_k=32 / 48, expand_v=2.0, norm_eps=1e-6), 48
    ).eval()
    q, k, v, z = chunked(theirs.in_proj_qkvz, 2, [16, 16, 48, 48])
    beta, decay = chunked(theirs.in_proj_ba, 2, [2, 2])
    ours.load_state_dict(
        {
            "qkv_proj.weight": torch.cat([q, k, v]),
            "conv.weight": theirs.conv1d.weight,
            "gate_proj.weight": z,
            "beta_proj.weight": beta,
            "decay_proj.weight": decay,
            "A_log": theirs.A_log,
            "dt_bias": theirs.dt_bias,
            "norm.weight": theirs.norm.weight,
            "out_proj.weight": theirs.out_proj.weight,
        }
    )
    x = torch.randn(2, 75, 48)
    cache = DynamicCache(config=config)
    want = theirs(x[:, :70], cache_params=cache)
    got, state = ours(x[:, :70])
    assert_close(got, want, "output of 70 tokens")
    for t in range(70, 75):
        want = theirs(x[:, t : t + 1], cache_params=cache)
        got, state = ours.step(x[:, t], state)
        assert_close(got, want[:, 0], f"token {t} from the state")


class Goose(nn.Module):
    """A whole RWKV-7 model from our modules."""

    def __init__(self, vocab, d_model, layers):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocab, d_model), nn.Linear(d_model, vocab, bias=False)
        self.ln0, self.ln_out = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(2 * layers))
        self.mixes = nn.ModuleList(
            cfg.build(d_model, Depth(layer, layers))
            for layer in range(layers)
            for cfg in (RWKV7.Config(), ChannelMix.Config())
        )

    def run(self, tokens, states, call):
        """tokens [B T] or [B] -> logits and states, with the method ``call`` of each block."""
        x, way, after = self.ln0(self.embedding(tokens)), Call(call), []
        for norm, mix, state in zip(self.norms, self.mixes, states, strict=True):
            y, state, handed = ask(mix, norm(x), state, way)
            x, way = x + y, way.after(handed)
            after.append(state)
        return self.head(self.ln_out(x)), after

    def published(self):
        """The weights under the names of the published checkpoints."""
        names = {"emb.weight": self.embedding.weight, "head.weight": self.head.weight}
        norms = {"blocks.0.ln0": self.ln0, "ln_out": self.ln_out}
        for index, (norm, mix) in enumerate(zip(self.norms, self.mixes, strict=True)):
            block = f"blocks.{index // 2}"
            norms[f"{block}.ln{index % 2 + 1}"] = norm
            if index % 2:
                names |= {
                    f"{block}.ffn.x_k": mix.mix[None, None],
                    f"{block}.ffn.key.weight": mix.in_proj.weight,
                    f"{block}.ffn.value.weight": mix.out_proj.weight,
                }
            else:
                names |= {f"{block}.att.{name}": tensor for name, tensor in time_mix_names(mix).items()}
        for name, norm in norms.items():
            names |= {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}
        return {name: tensor.detach().clone() for name, tensor in names.items()}


def time_mix_names(mix):
    names = {f"x_{letter}": row[None, None] for letter, row in zip("rwkvag", mix.mix, strict=True)}
    for letter, lora in (("w", "decay"), ("a", "rate"), ("v", "value"), ("g", "gate")):
        if hasattr(mix, lora):
            part = getattr(mix, lora)
            names |= {f"{letter}1": part.down, f"{letter}2": part.up}
            names |= {} if part.bias is None else {f"{letter}0": part.bias[None, None]}
    names |= {"k_k": mix.k_k[None, None], "k_a": mix.k_a[None, None], "r_k": mix.r_k}
    names |= {"ln_x.weight": mix.norm_weight, "ln_x.bias": mix.norm_bias}
    linears = {"receptance": mix.r_proj, "key": mix.k_proj, "value": mix.v_proj, "output": mix.out_proj}
    return names | {f"{name}.weight": linear.weight for name, linear in linears.items()}


@pytest.fixture(scope="module")
def rwkv_model():
    """The package's class for RWKV-7; it chooses by environment variables when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RWKV_V7_ON", "1"), ("RWKV_JIT_ON", "1"), ("RWKV_CUDA_ON", "0")):
            patch.setenv(name, value)
        threads = torch.get_num_threads()
        from rwkv.model import RWKV

        torch.set_num_threads(threads)
        yield RWKV


@torch.no_grad()
def test_rwkv7_equals_the_package(rwkv_model, tmp_path, monkeypatch):
    monkeypatch.undo()  # torch.jit, used by the package, cannot read the poisoned torch.empty
    ours = randomise(Goose(32, 128, 3), 0.1)
    torch.save(ours.published(), tmp_path / "goose.pth")
    theirs = rwkv_model(model=os.fspath(tmp_path / "goose"), strategy="cpu fp32")
    tokens = torch.randint(32, (75,)).tolist()
    want, state = theirs.forward(tokens[:70], None, full_output=True)
    got, states = ours.run(torch.tensor([tokens[:70]]), [None] * 6, "forward")
    assert_close(got[0], want, "logits of 70 tokens")
    for t in range(70, 75):
        want, state = theirs.forward([tokens[t]], state)
        got, states = ours.run(torch.tensor([tokens[t]]), states, "step")
        assert_close(got[0], want, f"logits of token {t} from the state")
    assert_close(states[4].memory[0].mT, state[7], "the state of layer 2")


@torch.no_grad()
def test_rwkv7_carries_first_values_across_pieces():
    model = randomise(Goose(32, 64, 2).double(), 0.1)
    tokens = torch.randint(32, (2, 40))
    want, _ = model.run(tokens, [None] * 4, "forward")
    begin, states = model.run(tokens[:, :17], [None] * 4, "forward")
    end, _ = model.run(tokens[:, 17:], states, "forward")
    assert_close(torch.cat([begin, end], dim=1), want, "logits in two pieces")


def test_rwkv7_without_first_values_says_so():
    layer = RWKV7(RWKV7.Config(), 64, Depth(1, 2))
    assert hasattr(layer, "value") and not hasattr(RWKV7(RWKV7.Config(), 64, Depth(0, 2)), "value")
    with pytest.raises(ValueError, match=r"layer 1 needs values\['v_first'\]"):
        layer(torch.zeros(1, 3, 64))
    with pytest.raises(ValueError, match="values"):
        layer.step(torch.zeros(1, 64), layer.init_state(1))
    layer(torch.zeros(1, 3, 64), values={"v_first": torch.zeros(1, 3, 64)})
    alone = RWKV7(RWKV7.Config(value_residual=False), 64, Depth(1, 2))
    alone(torch.zeros(1, 3, 64))


@torch.no_grad()
def test_rwkv7_initial_values():
    layer = RWKV7(RWKV7.Config(), 256, Depth(1, 4))
    n = torch.arange(256, dtype=torch.float64)
    z = ((n % 64) - 31.5) / 31.5
    lin = n / 255 - 0.5
    w0 = -6 + 6 * (n / 255) ** (1 + (1 / 3) ** 0.3) + 0.5 + 2.5 * z * z.abs()
    assert_close(layer.decay.bias, w0.float(), "w0", BOUNDS["fp32 product"])
    assert_close(layer.rate.bias, (-0.19 + 0.3 * z * z.abs() + 0.4 * lin).float(), "a0", BOUNDS["fp32 product"])
    assert_close(layer.value.bias, (0.73 - 0.4 * lin).float(), "v0", BOUNDS["fp32 product"])
    assert_close(layer.mix[1], (1 - (n / 256) ** (0.9 * 0.75)).float(), "x_w", BOUNDS["fp32 product"])
    assert not layer.out_proj.weight.any() and not layer.decay.down.any()
    x = torch.randn(2, 9, 256)
    assert not layer(x, values={"v_first": torch.randn(2, 9, 256)})[0].any()  # a new layer adds nothing


def test_rwkv7_ranks_are_the_published_ones():
    layer = RWKV7(RWKV7.Config(), 768, Depth(1, 12))
    ranks = [getattr(layer, name).down.shape[1] for name in ("decay", "rate", "value", "gate")]
    assert ranks == [64, 64, 32, 128]


def delta_net_loop(layer, x):
    """DeltaNet token by token, from the paper's equations; x [T D]."""
    heads, weight, memory = layer.cfg.n_heads, layer.conv.weight[:, 0], 0
    projected = F.pad(x @ layer.qkv_proj.weight.T, (0, 0, 3, 0))
    outputs = []
    for t, token in enumerate(x):
        mixed = F.silu((projected[t : t + 4] * weight.T).sum(0))
        q, k, v = (part.reshape(heads, -1) for part in mixed.split(layer.widths))
        q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
        beta = (1 + layer.cfg.negative_eigenvalues) * torch.sigmoid(layer.beta_proj.weight @ token)
        erase = torch.eye(k.shape[1], dtype=x.dtype) - beta[:, None, None] * k[:, :, None] * k[:, None]
        memory = (erase @ memory if t else 0) + beta[:, None, None] * k[:, :, None] * v[:, None]
        y = (memory.mT @ q[:, :, None]).squeeze(-1) / k.shape[1] ** 0.5
        y = y / (y.square().mean(-1, keepdim=True) + layer.cfg.norm_eps).sqrt() * layer.norm.weight
        outputs.append(layer.out_proj.weight @ y.flatten())
    return torch.stack(outputs), memory


@pytest.mark.parametrize("negative", [False, True])
@torch.no_grad()
def test_delta_net_equals_the_equations(negative):
    layer = DeltaNet(DeltaNet.Config(n_heads=2, expand_v=1.5, negative_eigenvalues=negative), 32)
    layer = randomise(layer.double())
    x = torch.randn(1, 71, 32, dtype=torch.float64)
    want, memory = delta_net_loop(layer, x[0])
    got, state = layer(x[:, :70])
    assert_close(got[0], want[:70], "output of 70 tokens")
    got, state = layer.step(x[:, 70], state)
    assert_close(got[0], want[70], "one more token")
    assert_close(state.memory[0], memory, "state")
