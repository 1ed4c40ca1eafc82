"""A wrapper, a hook or a parametrisation on any part of a mixer has its effect: nothing reads past it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from everlong import laws
from everlong.config import find, mixer_names
from everlong.feedforward.channelmix import ChannelMix
from everlong.generation.decoder import Decoder
from everlong.mixers import base
from everlong.models.blocks import MLP, Layer, SwiGLU
from everlong.models.lm import LanguageModel

KINDS = [*(find(name) for name in mixer_names()), SwiGLU, MLP, ChannelMix]
SUBJECTS = [subject for kind in KINDS for subject in laws.subjects(kind)]
PLACES = [
    pytest.param(subject, path, id=f"{subject.name}-{path}")
    for subject in SUBJECTS
    for path, part in subject.build().named_modules()
    if isinstance(part, (nn.Linear, nn.Conv1d, base.RMSNorm))
]
LINEAR = [place for place in PLACES if isinstance(place.values[0].build().get_submodule(place.values[1]), nn.Linear)]


class Adapter(nn.Module):
    """``inner(x) + B A x``, with weights of its own; it has none of a linear map's attributes."""

    def __init__(self, inner, rank=2):
        super().__init__()
        out, width = inner.weight.shape
        self.inner = inner
        self.A = nn.Parameter(torch.randn(rank, width, dtype=inner.weight.dtype) * width**-0.5)
        self.B = nn.Parameter(torch.randn(out, rank, dtype=inner.weight.dtype) * 0.1)

    def forward(self, x):
        return self.inner(x) + (x @ self.A.t()) @ self.B.t()


class Plain(nn.Module):
    """A wrapper around anything: twice its output."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


class Shifted(Plain):
    def forward(self, x):
        return self.inner(x + 1)


def replace(module, path, make):
    parent, _, name = path.rpartition(".")
    parent = module.get_submodule(parent)
    setattr(parent, name, make(getattr(parent, name)))
    return module.get_submodule(path)


def doubled(part):
    """Weights of a part that gives twice its output."""
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.mul_(2)


def everything(module, x):
    """Outputs of forward, of step, of step_ and of mixing, under documents and from a state."""
    starts = torch.zeros(x.shape[:2], dtype=torch.bool)
    starts[1, 2] = starts[0, 5] = True
    y, state = module(x[:, :6], starts=starts[:, :6])
    more, state = module(x[:, 6:8], state)
    outputs = [y, more, module.step(x[:, 8], state)[0], module.step_(x[:, 8], module.workspace(state))]
    if type(module).mixing is not base.Mixer.mixing:
        outputs.append(module.mixing(x).output)
    return outputs


def agree(got, want, plain):
    names = ("forward", "forward from a state", "step", "step_", "mixing")
    for name, ours, theirs in zip(names, got, want, strict=False):
        laws.same(ours, theirs, name)
    assert any(not torch.equal(a, b) for a, b in zip(want, plain, strict=True)), "the change of weights has no effect"


@pytest.mark.parametrize("subject,path", LINEAR)
def test_an_adapter_is_other_weights(subject, path):
    module, x = subject.module(), subject.input(2, 9)
    with torch.no_grad():
        plain = everything(module, x)
    merged = copy.deepcopy(module)
    adapter = replace(module, path, Adapter)
    with torch.no_grad():
        merged.get_submodule(path).weight.add_(adapter.B @ adapter.A)
        agree(everything(module, x), everything(merged, x), plain)
    y, _ = module(x)
    for output in (y, module.step(x[:, 0], module.init_state(2))[0]):
        grads = torch.autograd.grad(output.square().sum(), [adapter.A, adapter.B], retain_graph=True, allow_unused=True)
        assert all(grad is not None for grad in grads), "the adapter receives no gradient"
    assert all(grad.abs().max() > 0 for grad in torch.autograd.grad(y.square().sum(), [adapter.A, adapter.B]))


@pytest.mark.parametrize("subject,path", PLACES)
def test_wrappers_and_hooks_on_any_part(subject, path):
    """Also on convolutions and norms: twice the output is twice the weights."""
    plain, merged, wrapped, hooked = (subject.module() for _ in range(4))
    replace(wrapped, path, Plain)
    hooked.get_submodule(path).register_forward_hook(lambda part, given, out: 2 * out)
    doubled(merged.get_submodule(path))
    x = subject.input(2, 9)
    with torch.no_grad():
        old, want = everything(plain, x), everything(merged, x)
        agree(everything(wrapped, x), want, old)
        agree(everything(hooked, x), want, old)


@pytest.mark.parametrize("subject,path", PLACES)
def test_a_hook_before_a_part_changes_its_input(subject, path):
    plain, wrapped, hooked = (subject.module() for _ in range(3))
    replace(wrapped, path, Shifted)
    hooked.get_submodule(path).register_forward_pre_hook(lambda part, given: (given[0] + 1,))
    x = subject.input(2, 9)
    with torch.no_grad():
        agree(everything(hooked, x), everything(wrapped, x), everything(plain, x))


@pytest.mark.parametrize("subject,path", PLACES)
def test_a_parametrised_weight_is_read_anew(subject, path):
    module, x = subject.module(), subject.input(2, 9)
    with torch.no_grad():
        plain = everything(module, x)
        if isinstance(module.get_submodule(path), base.RMSNorm):
            nn.utils.parametrize.register_parametrization(module.get_submodule(path), "weight", nn.Identity())
            last = "parametrizations.weight.original"
        else:
            parametrizations.weight_norm(module.get_submodule(path))
            last = "parametrizations.weight.original0"  # the sizes of the rows
        for ours, theirs in zip(everything(module, x), plain, strict=True):
            laws.same(ours, theirs, "as it was")
        module.get_submodule(path).get_parameter(last).mul_(1.5)
        merged = subject.module()
        merged.get_submodule(path).weight.mul_(1.5)
        agree(everything(module, x), everything(merged, x), plain)


def language_model(cfg, tied):
    layer = Layer.Config(mixer=cfg, mlp=SwiGLU.Config(hidden=64))
    return LanguageModel.Config(vocab_size=50, d_model=64, layers=(layer,), tied=tied)


@pytest.mark.parametrize("name", mixer_names())
def test_a_recorded_decoder_honours_every_adapter(name):
    model = laws.Subject(name, cfg := language_model(find(name).Config(), False), cfg.build).module(torch.float32)
    paths = [path for path, part in model.named_modules() if isinstance(part, nn.Linear)]
    tokens = torch.randint(0, 50, (2, 4))
    for path in paths:
        wrapped, merged = copy.deepcopy(model), copy.deepcopy(model)
        adapter = replace(wrapped, path, Adapter)
        with torch.no_grad():
            merged.get_submodule(path).weight.add_(adapter.B @ adapter.A)
            _, state = merged(tokens)
            want, _ = merged.step(tokens[:, 0], state)
            decoder = Decoder(wrapped, batch=2)
            decoder.load(wrapped(tokens)[1])
            laws.same(decoder.step(tokens[:, 0]), want, path)
            assert not torch.equal(want, model.step(tokens[:, 0], model(tokens)[1])[0]), path


def test_a_tied_head_honours_a_wrapped_embedding():
    cfg = language_model(find("gla").Config(), True)
    model = laws.Subject("gla", cfg, cfg.build).module()
    merged, tokens = copy.deepcopy(model), torch.randint(0, 50, (2, 9))
    model.embedding = Plain(model.embedding)
    with torch.no_grad():
        doubled(merged.embedding)
        laws.same(model(tokens)[0], merged(tokens)[0], "logits")
        state = merged(tokens)[1]
        laws.same(model.step(tokens[:, 0], state)[0], merged.step(tokens[:, 0], state)[0], "logits of a step")
