"""Layers as sequences of blocks: what stands in them keeps the contract, is saved, packed and decoded like the rest."""

import dataclasses
import json

import pytest
import torch
from torch.nn import functional as F

import everlong
from everlong import numerics
from everlong import state as states
from everlong.blocks.aside import Aside
from everlong.blocks.base import Block, Norm
from everlong.blocks.parallel import Parallel
from everlong.blocks.residual import Residual
from everlong.blocks.shared import Shared
from everlong.call import Call, Handed
from everlong.config import find, names
from everlong.feedforward.swiglu import SwiGLU
from everlong.generation.decoder import Decoder
from everlong.kinds import find as kind
from everlong.mixers import base
from everlong.models.blocks import Layer, pattern
from everlong.models.lm import LanguageModel
from everlong.models.quantize import quantized
from everlong.models.sizes import size
from everlong.ops import native
from everlong.ops.linear import Linear

D = 64
MAMBA, ATTEND, LRU = find("mamba2").Config(head_dim=16, d_state=8), find("attention").Config(n_heads=4), None
MLP, RMS, LN = SwiGLU.Config(hidden=96), Norm.Config(), Norm.Config(style="layer")


def res(inner, **options):
    return Residual.Config(inner=inner, **options)


def layer(*blocks):
    return Layer.Config(blocks=blocks)


SHARED = Shared.Config(name="one", block=res(ATTEND, reads=("embeddings",), combine="concat"), own=("norm", "down"))
LORA = Shared.Config(name="two", block=res(MLP), own=("norm",), adapted=("in_proj", "out_proj"), rank=4)
LAYERS = {
    "norm behind": layer(res(MAMBA, norm=None, out_norm=RMS), res(MLP, norm=None, out_norm=RMS)),
    "norms on both sides": layer(res(ATTEND, out_norm=LN), res(MLP, out_norm=LN)),
    "norm of the sum": layer(res(ATTEND, norm=None, sum_norm=LN), res(MLP, norm=None, sum_norm=LN)),
    "scales": layer(res(MAMBA, scale=0.22, skip=1.5), res(MLP, layer_scale=0.1)),
    "one norm for two": layer(Parallel.Config(branches=(res(ATTEND, norm=None), res(MLP, norm=None)), norm=LN)),
    "mean": layer(Parallel.Config(branches=(res(ATTEND, out_norm=RMS), res(MAMBA, out_norm=RMS)), mix="mean")),
    "learned": layer(Parallel.Config(branches=(res(ATTEND), res(MAMBA, scale=0.5)), mix="learned"), res(MLP)),
    "embeddings": layer(res(MAMBA, reads=("embeddings",)), res(MLP, reads=("embeddings",), combine="concat")),
    "handed on": layer(Aside.Config(name="memo", block=res(ATTEND)), res(MAMBA, reads=("memo",)), res(MLP)),
    "shared": layer(Aside.Config(name="zamba", block=SHARED), res(MAMBA, reads=("zamba",))),
    "adapters": layer(res(MAMBA), LORA),
    "rwkv": layer(res(find("rwkv7").Config(head_size=16)), res(kind("channelmix").Config())),
    "first values beside": layer(Parallel.Config(branches=(res(find("rwkv7").Config(head_size=16)), res(MLP)))),
}


def built(name, seed=0, layers=3, **options):
    torch.manual_seed(seed)
    cfg = LanguageModel.Config(vocab_size=50, d_model=D, layers=(LAYERS[name],) * layers, **options)
    model = cfg.build()
    with torch.no_grad():
        for parameter in model.parameters():  # nothing is right because it is zero, or one
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


TOKENS = torch.randint(0, 50, (3, 23), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_pieces_and_steps_are_the_whole(name):
    model = built(name)
    starts = torch.rand(TOKENS.shape, generator=torch.Generator().manual_seed(2)) < 0.1
    want, end = model(TOKENS, starts=starts)
    for cut in (1, 2, 11):
        first, state = model(TOKENS[:, :cut], starts=starts[:, :cut])
        second, state = model(TOKENS[:, cut:], state, starts=starts[:, cut:])
        numerics.assert_close(torch.cat([first, second], 1), want, f"{name} cut at {cut}")
        for (leaf, got, _), (_, kept, _) in zip(states.leaves(state), states.leaves(end), strict=True):
            if got.is_floating_point():
                numerics.assert_close(got, kept, f"{name} {leaf}")
    want, end = model(TOKENS)
    state, work = model.init_state(3), model.workspace(model.init_state(3))
    for t in range(TOKENS.shape[1]):
        logits, state = model.step(TOKENS[:, t], state)
        numerics.assert_close(logits, want[:, t], f"{name} step {t}")
        numerics.assert_close(model.step_(TOKENS[:, t], work), logits, f"{name} step_ {t}")
    for (leaf, got, _), (_, kept, _) in zip(states.leaves(work.state()), states.leaves(state), strict=True):
        assert got.dtype == kept.dtype and got.shape == kept.shape
        numerics.assert_close(got, kept, f"{name} {leaf}")


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wide", [False, True])
@torch.no_grad()
def test_a_program_is_the_step_and_runs_no_python(name, dtype, wide):
    model = built(name, residual_fp32=wide).to(dtype)
    decoder, state = Decoder(model, 2), model.init_state(2)
    for t in range(4):
        want, state = model.step(TOKENS[:2, t], state)
        numerics.assert_close(decoder.step(TOKENS[:2, t]).to(want.dtype), want, f"{name} {t}")
    for (leaf, got, _), (_, kept, _) in zip(states.leaves(decoder.state()), states.leaves(state), strict=True):
        if dtype == torch.float32 or leaf.startswith("layers.0."):  # later layers see inputs of another rounding
            numerics.assert_close(got.to(dtype), kept.to(dtype), f"{name} {leaf}")
    assert native.MISSING or decoder.explain() == []


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_saved_loaded_copied_counted(name, tmp_path):
    model = built(name)
    cfg = LanguageModel.Config.from_dict(json.loads(json.dumps(model.cfg.to_dict())))
    assert cfg == model.cfg
    assert size(model.cfg).parameters == sum(p.numel() for p in model.parameters())
    everlong.save(model, tmp_path / "m")
    want, _ = model(TOKENS)
    for other in (everlong.load(tmp_path / "m"), __import__("copy").deepcopy(model)):
        assert torch.equal(other(TOKENS)[0], want)
        assert [n for n, _ in other.named_parameters()] == [n for n, _ in model.named_parameters()]
    if name != "rwkv":
        packed = quantized(model, "int8")
        everlong.save(packed, tmp_path / "p")
        assert torch.equal(everlong.load(tmp_path / "p")(TOKENS)[0], packed(TOKENS)[0])
    half = built(name).bfloat16().float()
    assert len(list(half.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_reach_everything_and_compile_as_one_graph(name):
    model = built(name)
    loss = model.loss(TOKENS[:, :-1], TOKENS[:, 1:])
    loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing
    torch.compiler.reset()
    compiled = torch.compile(lambda t: model(t)[0], fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        numerics.assert_close(compiled(TOKENS), model(TOKENS)[0], name)


@pytest.mark.parametrize("mlp", [None, MLP])
@pytest.mark.parametrize("norm", [RMS, LN])
def test_the_short_form_is_the_long_one_to_the_bit(mlp, norm):
    short = Layer.Config(mixer=MAMBA, mlp=mlp, norm=norm)
    models = []
    for one in (short, Layer.Config(blocks=short.sequence())):
        torch.manual_seed(3)
        models.append(LanguageModel.Config(vocab_size=50, d_model=D, layers=(one,) * 2).build())
    a, b = models
    assert [p.shape for p in a.parameters()] == [p.shape for p in b.parameters()]
    assert all(map(torch.equal, a.parameters(), b.parameters()))  # drawn in the same order
    for model in models:
        model.loss(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    with torch.no_grad():
        assert torch.equal(a.step(TOKENS[:, 0], a.init_state(3))[0], b.step(TOKENS[:, 0], b.init_state(3))[0])


@torch.no_grad()
def test_blocks_compute_what_they_say():
    x, e = torch.randn(2, 5, D), torch.randn(2, 5, D)
    ours = res(MLP, out_norm=LN, sum_norm=RMS, scale=0.3, skip=2.0, layer_scale=0.7, reads=("embeddings",)).build(D)
    y, _, handed = ours(x, (), Call(values={"embeddings": e}))
    inner = ours.inner.transform(F.rms_norm(x + e, (D,), eps=1e-5))
    want = F.rms_norm(2 * x + 0.7 * 0.3 * F.layer_norm(inner, (D,), eps=1e-5), (D,), eps=1e-5)
    numerics.assert_close(y, want, "residual", numerics.BOUNDS["fp32 product"])
    assert handed == Handed()
    wide = res(MLP, reads=("embeddings",), combine="concat").build(D)
    assert wide.inner.in_proj.in_features == 2 * D
    y, _, _ = wide(x, (), Call(values={"embeddings": e}))
    both = F.rms_norm(torch.cat([x, e], -1), (2 * D,), eps=1e-5)
    numerics.assert_close(y, x + wide.down(wide.inner.transform(both)), "concat", numerics.BOUNDS["fp32 product"])
    for mix, weights in (("sum", (1, 1)), ("mean", (0.5, 0.5)), ("learned", (0.5, 2.0))):
        beside = Parallel.Config(branches=(res(MLP), res(MLP, norm=None)), norm=LN, mix=mix).build(D)
        if mix == "learned":
            beside.mix[1].fill_(2.0)
        normed = F.layer_norm(x, (D,), eps=1e-5)
        parts = [beside.branches[0].inner.transform(F.rms_norm(normed, (D,), eps=1e-5))]
        parts.append(beside.branches[1].inner.transform(normed))
        y, _, _ = beside(x, ((), ()))
        want = x + weights[0] * parts[0] + weights[1] * parts[1]
        numerics.assert_close(y, want, mix, numerics.BOUNDS["fp32 product"])
    aside = Aside.Config(name="a", block=res(MLP)).build(D)
    y, _, handed = aside(x, ())
    assert y is x and torch.equal(handed.values["a"], aside.block.branch(x, (), Call())[0])


def test_places_of_a_shared_block_share_all_but_their_own(tmp_path):
    model = built("adapters")
    sites = [layer.blocks[1] for layer in model.layers]
    proj = [site.block.inner.in_proj for site in sites]
    assert proj[0].base_layer.weight is proj[1].base_layer.weight is proj[2].base_layer.weight
    assert proj[0].up.weight is not proj[1].up.weight and not torch.equal(proj[0].up.weight, proj[1].up.weight)
    assert sites[0].block.norm.weight is not sites[1].block.norm.weight
    alone = sum(p.numel() for p in sites[0].parameters())
    own = sum(p.numel() for name, p in sites[0].named_parameters() if "base_layer" not in name)
    assert (
        sum(p.numel() for p in model.parameters())
        == sum(p.numel() for p in (*model.embedding.parameters(), *model.norm.parameters()))
        + 3 * sum(p.numel() for p in model.layers[0].blocks[0].parameters())
        + alone
        + 2 * own
    )
    model.loss(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    for change in (model.double, model.float, lambda: model.load_state_dict(model.state_dict(), assign=True)):
        change()
        assert proj[0].base_layer.weight is proj[2].base_layer.weight
    everlong.save(model, tmp_path / "m")
    loaded = everlong.load(tmp_path / "m")
    assert len(list(loaded.parameters())) == len(list(model.parameters()))
    packed = quantized(model.float(), "int4")
    first, third = (packed.layers[i].blocks[1].block.inner.in_proj for i in (0, 2))
    assert first.base_layer is third.base_layer and first.base_layer.format == "int4"
    proj[2].base_layer.weight = torch.nn.Parameter(proj[0].base_layer.weight.detach().clone())
    with pytest.raises(ValueError, match="share their weights and are two tensors"):
        everlong.save(model, tmp_path / "two")


class Balanced(base.Mixer):
    """A feed-forward that reports a loss, and hands on how often it was asked."""

    memory = "none"
    values = ("count",)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """How much the loss counts."""

        weight: float = 0.5

        def writes(self, depth):
            return ("count",)

    def __init__(self, cfg, d_model, depth=base.Depth()):
        super().__init__(cfg, d_model, depth)
        self.proj = Linear(d_model, d_model)

    def init_state(self, batch):
        return ()

    def forward(self, x, state=None, *, starts=None, values=None):
        y = self.proj(x)
        if values is None:
            return y, ()
        count = values.get("count", torch.zeros(())) + 1
        return y, (), Handed({"count": count}, {"balance": self.cfg.weight * y.square().mean()})

    def step(self, x, state, *, values=None):
        return self.forward(x, state, values=values)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("long", [False, True])
def test_losses_of_blocks_are_summed_by_name_and_count_in_training_alone(reduction, long, monkeypatch):
    if long:
        monkeypatch.setattr("everlong.models.lm.LOSS_LOGITS", 64)
    cfg = LanguageModel.Config(vocab_size=50, d_model=D, layers=(layer(res(MAMBA), res(Balanced.Config())),) * 2)
    model = cfg.build()
    read = model.hidden(TOKENS)
    assert list(read.losses) == ["balance"] and read.losses["balance"].dim() == 0
    targets = TOKENS.clone()
    targets[:, :5] = -100
    with_loss = model.train().loss(TOKENS, targets, reduction=reduction)
    without = model.eval().loss(TOKENS, targets, reduction=reduction)
    count = 1 if reduction == "mean" else int((targets != -100).sum())
    numerics.assert_close(
        with_loss - without, count * read.losses["balance"], "balance", numerics.BOUNDS["fp32 gradient"]
    )
    with_loss.backward()
    assert all(p.grad is not None for p in model.layers[0].blocks[1].parameters())
    assert not model.hidden(TOKENS).losses["balance"].isnan() and Handed() == Handed({}, {})


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="give one of the two"):
        Layer.Config()
    with pytest.raises(ValueError, match="give one of the two"):
        Layer.Config(mixer=MAMBA, blocks=(res(MLP),))
    with pytest.raises(ValueError, match=r"layers\[0\] \(mamba2\) reads 'memo', which no block before it hands on"):
        LanguageModel.Config(vocab_size=9, d_model=D, layers=(layer(res(MAMBA, reads=("memo",))),))
    with pytest.raises(ValueError, match="combine is 'cat'; did you mean 'concat'"):
        res(MAMBA, combine="cat")
    with pytest.raises(ValueError, match="mix is 'learnt'; did you mean 'learned'"):
        Parallel.Config(branches=(res(MLP),), mix="learnt")
    with pytest.raises(ValueError, match="branches is empty"):
        Parallel.Config(branches=())
    with pytest.raises(ValueError, match=r"branches\[1\] \(residual\) does not only add"):
        Parallel.Config(branches=(res(MLP), res(MLP, sum_norm=RMS))).build(D)
    with pytest.raises(ValueError, match="has no part 'in_porj'; did you mean 'inner.in_proj'"):
        Shared.Config(name="x", block=res(MLP), own=("in_porj",)).build(D)
    other = dataclasses.replace(LORA, rank=8)
    with pytest.raises(ValueError, match="two shared blocks are called 'two' and differ"):
        LanguageModel.Config(vocab_size=9, d_model=D, layers=(layer(LORA), layer(other))).build()
    with pytest.raises(ValueError, match="'embeddings' is the model's"):
        Aside.Config(name="embeddings", block=res(MLP))
    with pytest.raises(TypeError, match="declares side; values are declared as values = "):
        type("Old", (base.Mixer,), {"side": ("v",)})
    assert pattern("ab", a=res(MAMBA), b=MLP)[0] == layer(res(MAMBA))


@pytest.mark.parametrize("pre", [False, True])
@torch.no_grad()
def test_a_hook_on_a_block_or_a_layer_counts_in_every_way(pre):
    for path in ("layers.1", "layers.1.blocks.0"):
        model = built("scales")
        part = model.get_submodule(path)
        if pre:
            part.register_forward_pre_hook(lambda module, given: (given[0] + 1, *given[1:]))
        else:
            part.register_forward_hook(lambda module, given, out: (1.5 * out[0], *out[1:]))
        want, _ = model(TOKENS[:2, :4])
        assert not torch.equal(want, built("scales")(TOKENS[:2, :4])[0])
        decoder, state = Decoder(model, 2), model.init_state(2)
        for t in range(4):
            logits, state = model.step(TOKENS[:2, t], state)
            numerics.assert_close(logits, want[:, t], f"{path} step {t}")
            numerics.assert_close(decoder.step(TOKENS[:2, t]), want[:, t], f"{path} decoded {t}")
        found = dict(decoder.explain())
        assert native.MISSING or list(found) == (["model"] if path == "layers.1" else ["layers.1.0"])
        assert native.MISSING or "forward hook" in next(iter(found.values()))


def test_a_configuration_nested_without_end_is_refused():
    data = {"kind": "residual", "inner": {"kind": "mlp"}}
    for _ in range(3000):
        data = {"kind": "aside", "name": "a", "block": data}
    with pytest.raises(ValueError, match="nested too deeply"):
        Layer.Config.from_dict({"kind": "layer", "blocks": [data]})


def test_every_block_in_its_room_is_a_block():
    for name in names("blocks"):
        found = kind(name)
        assert issubclass(found, Block) and found.Config.owner is found and "arXiv" in found.__doc__
