"""Adapters of the library peft on language models of every mixer: they act, train, generate and merge."""

import copy

import pytest
import torch

import everlong
from everlong import laws, numerics
from everlong.config import find, mixer_names
from everlong.generation.sampler import Sampling
from everlong.models.blocks import Layer, SwiGLU
from everlong.models.lm import LanguageModel

pytestmark = pytest.mark.slow  # for the import of peft

GREEDY = Sampling(temperature=0)
TOKENS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def peft():
    import peft

    return peft


def model(name):
    layer = Layer.Config(mixer=find(name).Config(), mlp=SwiGLU.Config(hidden=64))
    cfg = LanguageModel.Config(vocab_size=50, d_model=64, layers=(layer, layer))
    return laws.Subject(name, cfg, cfg.build).module(torch.float32)


def adapted(peft, base, targets):
    """The model under adapters with random weights, in place; and how many there are."""
    made = peft.get_peft_model(base, peft.LoraConfig(target_modules=targets, r=2))
    with torch.no_grad():
        grown = [p.normal_(std=0.05) for key, p in made.named_parameters() if "lora_" in key and "_B" in key]
    return made, len(grown)


@pytest.mark.parametrize("name", mixer_names())
def test_lora_on_every_linear_map(peft, name):
    base = model(name)
    linears = sum(isinstance(part, torch.nn.Linear) for part in base.modules())
    before = base(TOKENS)[0].detach()
    made, count = adapted(peft, base, "all-linear")
    assert count == linears
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.01)
    made.base_model.model.loss(TOKENS, TOKENS).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for key, p in made.named_parameters() if "lora_A" in key)
    optimizer.step()
    made.eval()
    with torch.no_grad():
        want, state = made(TOKENS)
        assert max(numerics.relative_errors(want, before)) > 0.01
        one = made.base_model.model.step(TOKENS[:, 0], state)[0]
        text = list(everlong.generate(base, [1, 2, 3], max_tokens=8, sampling=GREEDY))
        merged = copy.deepcopy(made).merge_and_unload()
        laws.same(merged(TOKENS)[0], want, "logits")
        laws.same(merged.step(TOKENS[:, 0], state)[0], one, "logits of a step")
        assert list(everlong.generate(merged, [1, 2, 3], max_tokens=8, sampling=GREEDY)) == text


def test_lora_on_a_tied_embedding(peft):
    made, count = adapted(peft, model("gla"), ["embedding", "out_proj"])
    assert count == 5
    made.eval()
    with torch.no_grad():
        want = made(TOKENS)[0]
        laws.same(made.merge_and_unload()(TOKENS)[0], want, "logits")
