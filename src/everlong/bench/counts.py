"""What an op must do at least: arithmetic of the recurrence that defines it, and bytes of its inputs and outputs.

A form may do more (a chunk form trades arithmetic for matrix products) or less (a convolution by FFT), so GFLOP/s are
useful work per second: comparable between the forms of an op, and an honest lower bound beside a machine's limit.
A multiplication, an addition, a root and an exponential count as one operation each; a complex product as six.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

BACKWARD = 2  # a backward pass counts as two forward passes: a product has two factors to differentiate


def _linear_attention(i: dict[str, Any]) -> float:
    keys = i["q"].shape[-1]
    per_state = 4 + (i["g"] is not None) + 2 * (i.get("bonus") is not None) / i["v"].shape[-1]
    return i["v"].numel() * keys * per_state


def _delta_rule(i: dict[str, Any]) -> float:
    written = 2 if i["b"] is None else 4
    return i["v"].numel() * i["q"].shape[-1] * (4 + written + (i["g"] is not None))


def _selective_scan(i: dict[str, Any]) -> float:
    return i["x"].numel() * (7 * i["A"].shape[1] + 1 + 2 * (i["D"] is not None))


def _diagonal_scan(i: dict[str, Any]) -> float:
    width = i["b"].numel()
    return width * (10 if i["b"].is_complex() or i["g"].is_complex() else 3)


def _diagonal_ssm(i: dict[str, Any]) -> float:
    return i["x"].numel() * i["g"].shape[1] * 11


def _attention(i: dict[str, Any]) -> float:
    (batch, time, heads, keys), values = i["q"].shape, i["v"].shape[-1]
    window = min(i["window"] or time, time)
    pairs = time * window - window * (window - 1) / 2
    return batch * heads * pairs * (2 * keys + 2 * values + 3)


def _long_conv(i: dict[str, Any]) -> float:
    (batch, time, channels), lags = i["x"].shape, i["kernel"].shape[1]
    length = 2 ** math.ceil(math.log2(time + lags))
    return batch * channels * 3 * 2.5 * length * math.log2(length)  # three real transforms: what an FFT needs


def _short_conv(i: dict[str, Any]) -> float:
    return i["x"].numel() * 2 * i["weight"].shape[1]


def _lstm_scan(i: dict[str, Any]) -> float:
    return i["x"].numel() * (2 * i["recurrent"].shape[-1] + 5)


def _slstm_scan(i: dict[str, Any]) -> float:
    return i["x"].numel() * (2 * i["recurrent"].shape[1] + 7)


def _max_plus_scan(i: dict[str, Any]) -> float:
    return 2 * i["x"].numel()


def _norm(i: dict[str, Any]) -> float:
    return i["x"].numel() * (3 + (i["style"] == "layer") + (i.get("weight") is not None) + (i.get("bias") is not None))


def _gate(i: dict[str, Any]) -> float:
    return 5 * i["x"].numel()


def _gated_norm(i: dict[str, Any]) -> float:
    return i["x"].numel() * (8 + (i["weight"] is not None))


def _rg_lru_gates(i: dict[str, Any]) -> float:
    return 15 * i["x"].numel()


OPERATIONS: dict[str, Callable[[dict[str, Any]], float]] = {
    "attention": _attention,
    "delta_rule": _delta_rule,
    "diagonal_scan": _diagonal_scan,
    "diagonal_ssm": _diagonal_ssm,
    "gate": _gate,
    "gated_norm": _gated_norm,
    "linear_attention": _linear_attention,
    "long_conv": _long_conv,
    "lstm_scan": _lstm_scan,
    "max_plus_scan": _max_plus_scan,
    "norm": _norm,
    "rg_lru_gates": _rg_lru_gates,
    "selective_scan": _selective_scan,
    "short_conv": _short_conv,
    "slstm_scan": _slstm_scan,
}


def operations(name: str, inputs: dict[str, Any], *, backward: bool) -> float | None:
    """Operations of an op on ``inputs``; None for an op that is not counted yet."""
    if name not in OPERATIONS:
        return None
    return float(OPERATIONS[name](inputs)) * (1 + BACKWARD * backward)


def traffic(inputs: dict[str, Any], outputs: list[Tensor], *, backward: bool) -> float:
    """Bytes that must be moved: inputs read and outputs written; backward reads both again and writes gradients."""
    given = sum(x.nbytes for x in inputs.values() if isinstance(x, Tensor))
    made = sum(x.nbytes for x in outputs)
    return float(3 * given + 2 * made if backward else given + made)
