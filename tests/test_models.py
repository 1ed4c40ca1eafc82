"""Whole models obey the laws too: two layers of every mixer, on token ids."""

import pytest
import torch

from everlong import laws
from everlong import state as states
from everlong.config import find, mixer_names
from everlong.models.blocks import MLP, Layer, Norm, SwiGLU, pattern
from everlong.models.lm import LanguageModel


class Tokens(laws.Subject):
    """A subject that reads token ids instead of vectors."""

    def input(self, batch, time, dtype=torch.float64):
        return torch.randint(0, self.config.vocab_size, (batch, time))


def subject(name, cfg):
    layers = pattern(
        "ab",
        a=Layer.Config(mixer=cfg, mlp=SwiGLU.Config()),
        b=Layer.Config(mixer=cfg, mlp=MLP.Config(), norm=Norm.Config(style="layer")),
    )
    model = LanguageModel.Config(
        vocab_size=50,
        d_model=64,
        layers=layers,
        embed_norm=Norm.Config(),
        logit_cap=30.0,
        tied=False,
        residual_fp32=True,
        embed_scale=8.0,
    )
    return Tokens(name, model, model.build)


@pytest.mark.parametrize("law", ["split", "rows", "reset", "value", "aliasing", "round trip", "compile"])
@pytest.mark.parametrize("name", mixer_names())
def test_law(name, law):
    laws.check(subject(name, find(name).Config()), law)


@pytest.mark.parametrize("name", mixer_names())
def test_steps_equal_the_whole(name):
    model = subject(name, find(name).Config()).module()
    tokens = torch.randint(0, 50, (2, 40))
    with torch.no_grad():
        want, final = model(tokens)
        got, state = laws._steps(model.step, tokens, model.init_state(2))
        work = model.workspace(model.init_state(2))
        laws.same(got, want, "logits of single steps")
        laws.same(torch.stack([model.step_(t, work) for t in tokens.unbind(1)], 1), want, "logits of steps in place")
        laws.same(work.state(), state, "state of steps in place")
        assert torch.equal(state.position, final.position) and torch.equal(work.state().position, final.position)


def test_a_hybrid_whose_rwkv7_is_not_in_front():
    def model(*mixers):
        layers = tuple(Layer.Config(mixer=mixer) for mixer in mixers)
        return LanguageModel.Config(vocab_size=50, d_model=64, layers=layers)

    gla, rwkv7 = find("gla").Config(), find("rwkv7").Config
    for mixers in ((gla, rwkv7()), (rwkv7(value_residual=True),), (gla, rwkv7(value_residual=True), rwkv7())):
        with pytest.raises(ValueError, match=r"layers\[[01]\] \(rwkv7\) reads 'v_first'.*value_residual=False"):
            model(*mixers)
    for mixers in ((gla, rwkv7(value_residual=False), gla, rwkv7()), (rwkv7(), gla, rwkv7())):
        logits = model(*mixers).build()(torch.randint(0, 50, (2, 5)))[0]
        assert logits.isfinite().all()


@pytest.mark.parametrize("name", mixer_names())
def test_a_state_keeps_no_more_memory_than_it_says(name):
    for cfg in find(name).examples().values():
        model = subject(name, cfg).module()
        with torch.no_grad():
            _, state = model(torch.randint(0, 50, (2, 100)))
        for leaf_name, leaf, _ in states.leaves(state):
            held = leaf.untyped_storage().nbytes()
            assert held == leaf.numel() * leaf.element_size(), f"{leaf_name} is a view of {held} bytes"
