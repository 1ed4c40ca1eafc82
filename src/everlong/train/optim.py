"""AdamW (arXiv 1711.05101) with the parameters sorted by what they may bear, and the learning rate of each step."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import AdamW

from ..mixers.base import Mixer, listed


def parameter_rules(model: nn.Module) -> dict[str, tuple[bool, float]]:
    """Of every trained parameter, whether it decays and the scale of its learning rate.

    Weight decay is for matrices: vectors (norms, biases), embeddings and what a mixer lists in ``no_decay``
    are spared. A mixer's ``lr_scales`` multiply the learning rate of the parameters they name. ``ValueError`` for a
    mixer that lists what it does not have.
    """
    rules = {name: (p.dim() >= 2, 1.0) for name, p in model.named_parameters() if p.requires_grad}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, Mixer):
            module.check_names()
        for name, _ in module.named_parameters():
            decays, scale = rules.get(prefix + name, (False, 1.0))
            if isinstance(module, Mixer):
                entry = listed(name, module.lr_scales)
                scale = module.lr_scales[entry] if entry else scale
                decays = decays and not listed(name, module.no_decay)
            if isinstance(module, nn.Embedding):
                decays = False
            if prefix + name in rules:
                rules[prefix + name] = (decays, scale)
    return rules


def make_optimizer(model: nn.Module, cfg: Any) -> AdamW:
    """AdamW over groups of equal rules; each group keeps its ``lr_scale``. ``cfg`` is a ``Trainer.Config``."""
    parameters = dict(model.named_parameters())
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, rule in parameter_rules(model).items():
        groups.setdefault(rule, []).append(parameters[name])
    if not groups:
        raise ValueError("the model has no parameters to train (all have requires_grad = False)")
    made = [
        {"params": members, "weight_decay": cfg.weight_decay * decays, "lr_scale": scale}
        for (decays, scale), members in groups.items()
    ]
    return AdamW(made, lr=cfg.lr, betas=tuple(cfg.betas), fused=True)


def learning_rate(step: int, steps: int, cfg: Any) -> float:
    """The rate of a step counted from 0: linear warm-up over a share of the steps, then a cosine to a tenth."""
    warm = max(1, round(cfg.warmup * steps))
    if step < warm:
        return cfg.lr * (step + 1) / warm
    share = (step - warm) / max(1, steps - warm - 1)
    return cfg.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, share))))


def set_learning_rate(optimizer: AdamW, rate: float) -> None:
    """Give every group its share of ``rate``."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
