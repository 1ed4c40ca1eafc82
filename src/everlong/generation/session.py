"""Sessions: everything needed to go on with a text, as a value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.lm import LanguageModel
from ..state import state


@state
class Session:
    """Everything needed to go on: the model's state and the logits of the next token."""

    state: Any  # LanguageModel.State
    logits: Tensor  # [B vocab]


def new_session(model: LanguageModel, batch: int = 1) -> Session:
    """An empty session, of the shapes of ``model``; what ``state.load`` needs as ``like``."""
    weight = model.norm.weight
    logits = torch.zeros(batch, model.cfg.vocab_size, dtype=weight.dtype, device=weight.device)
    return Session(state=model.init_state(batch), logits=logits)
