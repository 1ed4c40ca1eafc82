"""The laws can fail: each of these mixers breaks one, and the message names it."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from everlong import laws
from everlong.mixers import base
from everlong.models.blocks import Layer
from everlong.models.lm import LanguageModel
from everlong.models.quantize import places
from everlong.ops.transforms import transforming
from everlong.state import state
from everlong.train.optim import parameter_rules


class Average(base.Mixer):
    """A sound mixer:  h_t = a h_{t-1} + x_t,  y = W h."""

    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """No options."""

    @state
    class State:
        """The average."""

        memory: Tensor  # [B D]

    def __init__(self, cfg, d_model, depth=base.Depth()):
        super().__init__(cfg, d_model, depth)
        self.decay = nn.Parameter(torch.full((d_model,), 0.5))
        self.out_proj = nn.Linear(d_model, d_model)

    def init_state(self, batch):
        return self.State(memory=torch.zeros(batch, self.d_model, **self.memory_factory))

    def step(self, x, state):
        memory = torch.sigmoid(self.decay) * self.begin(x, state).memory + x
        return self.out_proj(memory.to(x.dtype)), self.State(memory=memory)

    def forward(self, x, state=None, *, starts=None):
        state, outputs = self.begin(x, state, starts), []
        for t in range(x.shape[1]):
            if starts is not None:
                state = self.State(memory=torch.where(starts[:, t, None], 0.0, state.memory))
            y, state = self.step(x[:, t], state)
            outputs.append(y)
        return torch.stack(outputs, dim=1), state


class Forgets(Average):
    def forward(self, x, state=None, *, starts=None):
        return super().forward(x, None, starts=starts)


class StepsDiffer(Average):
    def step_(self, x, state):
        y, state = self.step(x, state)
        return y * 1.001, state


class Peeks(Average):
    def forward(self, x, state=None, *, starts=None):
        y, state = super().forward(x, state, starts=starts)
        return y + 1e-3 * x.mean(dim=1, keepdim=True), state


class MixesRows(Average):
    def step(self, x, state):
        return super().step(x + 1e-3 * x.mean(dim=0), state)


class IgnoresStarts(Average):
    def forward(self, x, state=None, *, starts=None):
        return super().forward(x, state)


class ResetsByMultiplying(Average):
    def forward(self, x, state=None, *, starts=None):
        state, outputs = self.begin(x, state, starts), []
        for t in range(x.shape[1]):
            if starts is not None:  # zero times NaN is NaN
                state = self.State(memory=state.memory * ~starts[:, t, None])
            y, state = self.step(x[:, t], state)
            outputs.append(y)
        return torch.stack(outputs, dim=1), state


class ChangesItsState(Average):
    def step(self, x, state):
        y, after = super().step(x, state)
        state.memory.copy_(after.memory.detach())
        return y, after


class KeepsItsInput(Average):
    def step(self, x, state):
        y, after = super().step(x, state)
        return y, self.State(memory=x) if x.dtype == torch.float64 and len(x) == 2 else after


class Grows(Average):
    def forward(self, x, state=None, *, starts=None):
        y, state = super().forward(x, state, starts=starts)
        return y, self.State(memory=torch.cat([state.memory, x.flatten(1)], dim=1))


class ForgetsItsConfig(Average):
    @dataclass(frozen=True, kw_only=True)
    class Config(base.Config):
        """An option that does not survive."""

        size: int = 3

        def to_dict(self):
            return {**super().to_dict(), "size": 4}


class WrongMatrix(Average):
    def mixing(self, x):
        values = x[:, :, None]
        matrix = torch.ones(len(x), 1, x.shape[1], x.shape[1], dtype=x.dtype).tril()
        return base.Mixing(matrix, values, self.forward(x)[0][:, :, None])


class HidesItsMatrix(Average):
    def mixing(self, x):
        raise ValueError("not linear in its values")


class NamesWhatIsNot(Average):
    no_decay = ("decay", "out_porj")


class LosesPrecision(Average):
    def forward(self, x, state=None, *, starts=None):
        y, state = super().forward(x, state, starts=starts)
        return (y * 1.2 if x.dtype == torch.bfloat16 else y), state


class StepLosesPrecision(Average):
    def step(self, x, state):
        y, after = super().step(x, state)
        return (y * 1.2 if x.dtype == torch.bfloat16 and not self.whole else y), after

    whole = False

    def forward(self, x, state=None, *, starts=None):
        self.whole = True
        try:
            return super().forward(x, state, starts=starts)
        finally:
            self.whole = False


class RoundsItsState(Average):
    def step(self, x, state):
        y, after = super().step(x, state)
        return y, self.State(memory=after.memory.to(y.dtype))


class DetachesItsState(Average):
    def forward(self, x, state=None, *, starts=None):
        y, state = super().forward(x, state, starts=starts)
        return y, self.State(memory=state.memory.detach())


class ForgetsAfterAWhile(Average):
    def forward(self, x, state=None, *, starts=None):
        y, state = super().forward(x, state, starts=starts)
        return torch.cat([y[:, :256], 1.001 * y[:, 256:]], dim=1), state


class DoesNotCompile(Average):
    def forward(self, x, state=None, *, starts=None):
        if float(x.sum()) > 1e9:
            x = x * 2
        return super().forward(x, state, starts=starts)


class HasDeadParameters(Average):
    def __init__(self, cfg, d_model, depth=base.Depth()):
        super().__init__(cfg, d_model, depth)
        self.unused = nn.Parameter(torch.zeros(3))


class Overflows(Average):
    def forward(self, x, state=None, *, starts=None):
        y, state = super().forward(x, state, starts=starts)
        return y + 1e-30 * torch.exp(x * 3).clamp(max=torch.inf), state


class CountsItsCalls(Average):
    calls = 0

    def step(self, x, state):  # another function from the eleventh call on: no recording of one call can know
        y, after = super().step(x, state)
        self.calls += 1
        return (y if self.calls < 11 else 2 * y), after


class Hidden(torch.autograd.Function):
    """x, by a rule that transforms know nothing of."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


class HidesFromTransforms(Average):
    def forward(self, x, state=None, *, starts=None):
        y, state = super().forward(x, state, starts=starts)
        return Hidden.apply(y), state


class Square(torch.autograd.Function):
    """x^2, whose gradient forgets that it depends on x."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0].detach() * grad


class ForgetsSecondGradients(Average):
    def forward(self, x, state=None, *, starts=None):
        y, state = super().forward(x, state, starts=starts)
        return (y * y if transforming() else Square.apply(y)), state


BROKEN = {
    "split": Forgets,
    "step": StepsDiffer,
    "causality": Peeks,
    "rows": MixesRows,
    "reset": IgnoresStarts,
    "isolation": ResetsByMultiplying,
    "value": ChangesItsState,
    "aliasing": KeepsItsInput,
    "memory": Grows,
    "round trip": ForgetsItsConfig,
    "matrix": WrongMatrix,
    "names": NamesWhatIsNot,
    "bfloat16": LosesPrecision,
    "autocast": RoundsItsState,
    "compile": DoesNotCompile,
    "gradients": HasDeadParameters,
    "decode": CountsItsCalls,
    "transforms": HidesFromTransforms,
}


@pytest.mark.parametrize("law", laws.LAWS)
def test_a_sound_mixer_obeys(law):
    laws.check(laws.subjects(Average)[0], law)


@pytest.mark.parametrize("law", laws.LAWS)
def test_a_broken_one_is_found_and_the_law_named(law):
    with pytest.raises(laws.LawBroken, match=f"{BROKEN[law].__name__} breaks the law of {law} "):
        laws.check(laws.subjects(BROKEN[law])[0], law)


@pytest.mark.parametrize("mixer", [DetachesItsState, ForgetsAfterAWhile])
def test_pieces_are_held_to_the_whole_in_gradients_and_at_length(mixer):
    with pytest.raises(laws.LawBroken, match=f"{mixer.__name__} breaks the law of split "):
        laws.check(laws.subjects(mixer)[0], "split")


def test_a_matrix_that_is_declared_must_be_there():
    with pytest.raises(laws.LawBroken, match="HidesItsMatrix breaks the law of matrix .*not linear in its values"):
        laws.check(laws.subjects(HidesItsMatrix)[0], "matrix")


@pytest.mark.parametrize("table", ["no_decay", "lr_scales", "full_precision", "int8_at_least", "step_outputs"])
def test_a_misspelt_name_is_refused_where_it_is_used(table):
    given = {"out_porj": 2} if table in ("lr_scales", "step_outputs") else ("out_porj",)
    body = {table: (lambda self: given) if table == "step_outputs" else given}
    mixer = type("Misspelt", (Average,), body)
    message = rf"Misspelt\.{table} names 'out_porj', which it does not have; did you mean 'out_proj'\?"
    with pytest.raises(laws.LawBroken, match=message):
        laws.check(laws.subjects(mixer)[0], "names")
    layer = Layer.Config(mixer=mixer.Config())
    model = LanguageModel.Config(vocab_size=50, d_model=64, layers=(layer,)).build()
    for use in (parameter_rules, lambda model: list(places(model, "int8"))):
        with pytest.raises(ValueError, match=message):
            use(model)


def test_a_wrong_second_gradient_is_found():
    with pytest.raises(laws.LawBroken, match="second gradient"):
        laws.check(laws.subjects(ForgetsSecondGradients)[0], "transforms")


def test_a_step_that_loses_precision_is_found():
    with pytest.raises(laws.LawBroken, match="bf16 output of a step"):
        laws.check(laws.subjects(StepLosesPrecision)[0], "bfloat16")


def test_overflow_is_found():
    with pytest.raises(laws.LawBroken, match="not finite at inputs of size 100"):
        laws.check(laws.subjects(Overflows)[0], "gradients")
