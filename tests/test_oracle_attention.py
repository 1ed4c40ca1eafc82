"""Attention against transformers' Llama, Mistral, RecurrentGemma; Hyena against its equations; ops against steps."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    RecurrentGemmaConfig,
    RecurrentGemmaModel,
)

from everlong import laws, state
from everlong.mixers.attention import Attention
from everlong.mixers.hyena import Hyena
from everlong.numerics import BOUNDS, assert_close
from everlong.ops import attention as attention_op
from everlong.ops import long_conv as long_conv_op
from everlong.ops.attention_decode import attention_step_
from everlong.ops.cases import Case

WIDTH = 64
SIZES = dict(
    vocab_size=50,
    hidden_size=WIDTH,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    attn_implementation="eager",
)


class Listener:
    """Runs an official model on text and its continuations; tells what its attention layer was given and gave."""

    def __init__(self, model, layer):
        self.model, self.layer, self.cache = model.double().eval(), layer, DynamicCache(config=model.config)
        layer.register_forward_hook(self._hear, with_kwargs=True)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))

    def _hear(self, module, args, kwargs, output):
        self.x, self.y = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], output[0]

    @torch.no_grad()
    def __call__(self, ids):
        self.model(ids, use_cache=True, past_key_values=self.cache)
        return self.x, self.y

    def ours(self, cfg):
        """Our layer with the weights of theirs."""
        names = {"o_proj": "out_proj"}
        weights = {
            f"{names.get(name.split('.')[0], name.split('.')[0])}.{name.split('.')[1]}": weight
            for name, weight in self.layer.state_dict().items()
            if "proj" in name
        }
        layer = cfg.build(WIDTH).double()
        layer.load_state_dict(weights)
        return layer.eval()


def llama():
    model = LlamaModel(
        LlamaConfig(
            **SIZES,
            num_key_value_heads=2,
            head_dim=24,
            attention_bias=True,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        )
    )
    cfg = Attention.Config(n_kv_heads=2, head_dim=24, rope_theta=500000.0, qkv_bias=True, out_bias=True)
    return model, model.layers[0].self_attn, cfg


def mistral():
    model = MistralModel(MistralConfig(**SIZES, num_key_value_heads=1, sliding_window=9))
    return model, model.layers[0].self_attn, Attention.Config(n_kv_heads=1, window=9)


def griffin():
    model = RecurrentGemmaModel(
        RecurrentGemmaConfig(
            **SIZES,
            num_key_value_heads=1,
            head_dim=16,
            lru_width=WIDTH,
            attention_window_size=9,
            block_types=("attention",),
        )
    )
    cfg = Attention.Config(n_kv_heads=1, head_dim=16, window=9, rope_fraction=0.5, out_bias=True)  # DeepMind's own: 10
    return model, model.layers[0].temporal_block, cfg


@pytest.mark.parametrize("official", [llama, mistral, griffin])
def test_attention_is_the_official_one(official):
    model, layer, cfg = official()
    theirs = Listener(model, layer)
    ours, ids = theirs.ours(cfg), torch.randint(50, (2, 41))
    x, want = theirs(ids[:, :40])
    got, after = ours(x)
    assert_close(got, want, "forty tokens", BOUNDS["fp32 angle"])  # their angles are fp32
    x, want = theirs(ids[:, 40:])
    got, _ = ours.step(x[:, -1], after)
    assert_close(got, want[:, -1], "one more token", BOUNDS["fp32 angle"])
    got = ours.step_(x[:, -1], ours.workspace(after))
    assert_close(got, want[:, -1], "one more token in place", BOUNDS["fp32 angle"])


def safari_filter(p, cfg, lags):
    """Hyena's filter, lag by lag: [D (N-1)] each."""
    channels = p["filter.out.weight"].shape[0]
    bands = (cfg.emb_dim - 1) // 2
    for t in range(lags):
        z = [t / (cfg.max_length - 1)]
        waves = [1e-4 + (bands - 1 - 1e-4) * i / max(bands - 1, 1) for i in range(bands)]
        z += [math.cos(f * 2 * math.pi * t / cfg.max_length) for f in waves]
        z += [-math.sin(f * 2 * math.pi * t / cfg.max_length) for f in waves]
        h = torch.tensor(z, dtype=torch.float64)
        for layer in range(1 + cfg.filter_layers):
            h = p[f"filter.layers.{layer}.weight"] @ h + p[f"filter.layers.{layer}.bias"]
            h = torch.sin(p["filter.frequency"] * h)
        h = p["filter.out.weight"] @ h
        fades = [
            math.log(0.01) / 1.5 + (math.log(0.01) / 0.3 - math.log(0.01) / 1.5) * c / (channels - 1)
            for c in range(channels)
        ]
        yield h * torch.tensor([math.exp(-abs(d) * z[0]) + cfg.shift for d in fades], dtype=torch.float64)


def safari(p, cfg, x):
    """The operator by direct convolution. p: parameters by name, x [B T D]."""
    time, width = x.shape[1:]
    z = x @ p["in_proj.weight"].t() + p["in_proj.bias"]
    z = F.conv1d(F.pad(z.transpose(1, 2), [2, 0]), p["conv.weight"], p["conv.bias"], groups=z.shape[-1])
    *gates, v = z.transpose(1, 2).split(width, dim=-1)
    h = torch.stack(list(safari_filter(p, cfg, time))).unflatten(1, (width, cfg.order - 1))  # [T D N-1]
    for o, gate in enumerate(reversed(gates[1:])):
        v = v * gate
        y = p["bias"][o] * v
        for t in range(time):
            for s in range(t + 1):
                y[:, t] += h[t - s, :, o] * v[:, s]
        v = y
    return (v * gates[0]) @ p["out_proj.weight"].t() + p["out_proj.bias"]


@pytest.mark.parametrize("cfg", Hyena.examples().values(), ids=Hyena.examples())
@torch.no_grad()
def test_hyena_is_its_equations(cfg):
    layer = laws.Subject("Hyena", cfg, lambda: cfg.build(WIDTH)).module()
    x = torch.randn(2, 50, WIDTH, dtype=torch.float64)
    want = safari(layer.state_dict(), cfg, x)
    got, after = layer(x[:, :49])
    assert_close(got, want[:, :49], "output")
    assert_close(layer.step(x[:, 49], after)[0], want[:, 49], "one more token")


def play(step, initial, sequence, fixed, starts):
    """The definition: a step for each token, rows emptied where a document starts."""
    outputs, carried = [], initial
    for t in range(starts.shape[1]):
        empty = [
            torch.where(starts[:, t].view(-1, *[1] * (x.dim() - 1)), torch.zeros_like(x), x)
            for _, x, _ in state.leaves(carried)
        ]
        y, carried = step(
            **{k: x[:, t] for k, x in sequence.items()}, **fixed, state=state.rebuild(carried, iter(empty))
        )
        outputs.append(y)
    return torch.stack(outputs, dim=1), carried


@pytest.mark.parametrize("variant", attention_op.VARIANTS)
def test_attention_is_its_steps(variant):
    case = Case("steps", batch=3, time=30, variant=variant)
    inputs = attention_op.inputs(case)
    window = inputs.pop("window")
    begun = [attention_op.attention(**{k: x[:1, :n] for k, x in inputs.items()}, window=window)[1] for n in (2, 9, 20)]
    initial, starts = state.stack(begun), torch.rand(3, 30) < 0.1  # rows that stand at different positions
    want, final = attention_op.attention(**inputs, window=window, state=initial, starts=starts)
    got, ours = play(attention_op.attention_step, initial, inputs, {}, starts)
    laws.same(got, want, "output")
    laws.same(ours, final, "state")
    owned = state.map_leaves(torch.clone, initial)
    got, ours = play(attention_step_, owned, inputs, {}, starts)
    laws.same(got, want, "output in place")
    slots = min(ours.k.shape[1], final.k.shape[1])
    laws.same(ours.k[:, :slots], final.k[:, :slots], "keys in place")
    assert not ours.k[:, slots:].any() and not final.k[:, slots:].any()


@pytest.mark.parametrize("lags", [5, 100])
def test_long_conv_is_its_steps(lags):
    x, kernel = torch.randn(3, 30, 4, dtype=torch.float64), torch.randn(4, lags, dtype=torch.float64)
    initial = long_conv_op.History(torch.randn(3, 9, 4, dtype=torch.float64))
    starts = torch.rand(3, 30) < 0.1
    want, final = long_conv_op.long_conv(x, kernel=kernel, state=initial, starts=starts)
    got, ours = play(long_conv_op.long_conv_step, initial, {"x": x}, {"kernel": kernel}, starts)
    laws.same(got, want, "output")
    laws.same(ours, final, "state")


@pytest.mark.parametrize("form", ["torch", "reference"])
def test_masks_in_blocks(form, monkeypatch):
    """Blocks of three queries see what one block of all sees."""
    inputs = attention_op.inputs(Case("blocks", time=40, variant="window"))
    for window in (None, 2, 7):
        inputs["window"] = window
        starts = torch.rand(2, 40) < 0.1
        before = attention_op.attention(**inputs)[1]
        for given in (None, starts):
            want = attention_op.attention(**inputs, state=before, starts=given, backend=form)
            with monkeypatch.context() as patch:
                patch.setattr(attention_op, "QUERY_BLOCK", 3)
                got = attention_op.attention(**inputs, state=before, starts=given)
            laws.same(got, want, f"window {window}")


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(n_kv_heads=3), "n_kv_heads is 3, expected a divisor of n_heads = 4"),
        (dict(window=0), "window must be a whole number from 1 to .*, got 0"),
        (dict(rope_fraction=0.2), "rotates 3 channels"),
    ],
)
def test_options_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        Attention.Config(**change).build(WIDTH)


def test_a_ring_needs_its_own_window():
    inputs = attention_op.inputs(Case("ring", variant="window"))
    ring = attention_op.attention(**inputs)[1]
    with pytest.raises(ValueError, match="state keeps 7 tokens, but window is 5"):
        attention_op.attention(**{**inputs, "window": 5}, state=ring)
