"""The report on made-up results: whole, partial and hostile ones."""

from __future__ import annotations

import math

CONTEXT = 256
# name, title, memory, bits per byte, drift beyond the context, capacity of recall, state bytes, tokens/s, ms per token
MADE_UP = [
    ("attention", "Attention", "linear", 2.411, 0.21, 64, 0, 21_400, 1.9),
    ("mamba", "Mamba", "constant", 2.302, -0.012, 12, 61_440, 11_900, 1.4),
    ("mamba2", "Mamba-2", "constant", 2.288, -0.015, 20, 198_656, 24_100, 1.1),
    ("rwkv7", "RWKV-7", "constant", 2.351, -0.008, 24, 101_376, 9_800, 1.6),
    ("griffin", "Griffin", "window", 2.377, 0.004, 16, 142_336, 22_900, 1.3),
    ("jamba", "Jamba", "linear", 2.262, 0.05, 48, 66_000, 23_500, 1.2),
]
EQUATIONS = {
    "attention": "y = softmax(q kᵀ / √K) v",
    "mamba": "h = exp(Δ A) h + Δ B x",
    "mamba2": "S = exp(Δ a) S + Δ x Bᵀ",
    "rwkv7": "S = S (diag(w) − κ̂ (a κ̂)ᵀ) + v kᵀ",
    "griffin": "h = a h + √(1 − a²) (i x)",
    "jamba": "S = exp(Δ a) S + Δ x Bᵀ, and attention",
}


def _grows(name: str, fixed: float, tokens: float) -> float:
    return {"attention": 3072 * tokens, "jamba": fixed + 1024 * tokens}.get(name, fixed)


def _slows(name: str, tokens: float) -> float:
    return {"attention": 1 + tokens / 2500, "jamba": 1 + tokens / 9000}.get(name, 1.0)


def made_up_model(row: tuple) -> dict:
    name, title, memory, bpb, drift, capacity, fixed, speed, latency = row
    tokens = [2**k * 1000 for k in range(11)]
    return {
        "name": name,
        "title": title,
        "layers": f"{name} + swiglu, x3",
        "equation": EQUATIONS[name],
        "memory": memory,
        "params": 812_000 + 4_000 * len(name),
        "status": "complete",
        "training": {
            "tokens": 786_432,
            "seconds": 786_432 / speed,
            "tokens_per_second": speed,
            "curve": [[4096 * i, bpb + 5.7 * math.exp(-i / 9) + 0.5 * math.exp(-i / 60)] for i in range(1, 193)],
        },
        "text": {
            "bits_per_byte": bpb,
            "by_position": [[16 * i + 8, bpb + 1.6 / (1 + i * (1.2 if drift > 0 else 1.0))] for i in range(16)],
            "by_length": [[CONTEXT * m, bpb + drift * math.log2(m) * (1 if drift > 0 else 0.5)] for m in (1, 2, 4, 8)],
        },
        "recall": {
            "chance": 1 / 64,
            "pairs": [[n, 1 / 64 + 0.98 / (1 + (n / capacity) ** 3)] for n in (4, 8, 16, 32, 64)],
            "train_tokens": 400_000,
            "train_pairs": 32,
        },
        "state_bytes": {
            "computed": [[t, _grows(name, fixed, t)] for t in [*tokens, 100_000]],
            "measured": [[t, _grows(name, fixed, t)] for t in (1000, 4000, 16_000)],
        },
        "prefill": [[t, 2.4 * speed / _slows(name, t)] for t in (256, 1024, 4096, 16_384)],
        "decode": [
            {"context": t, "p50_ms": latency * _slows(name, t), "p99_ms": latency * _slows(name, t) * 1.35}
            for t in (64, 1024, 4096, 16_384)
        ],
        "samples": [
            {"prompt": "def read_csv(", "text": f"self, {title.lower()!r}):\n\t\tif x < 1 & y > 2:\n        return None\n"},
            {"prompt": "import os\nimport ", "text": "sys\nimport re\n\n\nclass Test(unittest.TestCase):\n" * 3},
        ],
    }


def made_up(*names: str) -> dict:
    """Results that no machine ever gave: smooth formulas around the numbers above."""
    chosen = [row for row in MADE_UP if not names or row[0] in names]
    return {
        "version": 1,
        "command": "everlong compare --quick",
        "created": "2031-02-03T04:05:06Z",
        "complete": True,
        "machine": {
            "cpu": "Imaginary CPU @ 3.00GHz",
            "cores": 2,
            "threads": 2,
            "memory_gib": 7.7,
            "system": "Linux 6.1",
            "python": "3.11.2",
            "torch": "2.13.0",
            "everlong": "0.1.0",
        },
        "settings": {
            "data": ["/usr/lib/python3.11"],
            "data_bytes": 31_457_280,
            "data_files": 1873,
            "train_tokens": 786_432,
            "context": CONTEXT,
            "batch": 16,
            "params": 800_000,
            "seed": 0,
            "quick": True,
            "optimizer": "AdamW, lr 0.002, betas (0.9, 0.95), weight decay 0.1, cosine to 0.1",
            "held_out_bytes": 262_144,
        },
        "models": [made_up_model(row) for row in chosen],
    }
