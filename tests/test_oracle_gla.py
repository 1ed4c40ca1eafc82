"""GLA against the paper's equations (arXiv 2312.06635, sec. 4), written out in fp64 token by token."""

import torch

from everlong.config import find
from everlong.numerics import assert_close


def transcription(weights, x, heads, scale=16.0, eps=1e-5):
    """o_t = S_t^T q_t with S_t = Diag(alpha_t) S_{t-1} + k_t v_t^T, one row of the batch at a time."""
    rows = []
    for row in x:
        memory, outputs = [0.0] * heads, []
        for token in row:
            q, k, v, r = (weights[f"{name}_proj.weight"] @ token for name in ("q", "k", "v", "gate"))
            low = weights["decay_proj.0.weight"] @ token
            alpha = torch.sigmoid(weights["decay_proj.1.weight"] @ low + weights["decay_proj.1.bias"]) ** (1 / scale)
            parts = []
            for head, (qh, kh, vh, ah) in enumerate(zip(*(z.chunk(heads) for z in (q, k, v, alpha)), strict=True)):
                memory[head] = ah[:, None] * memory[head] + torch.outer(kh, vh)
                read = memory[head].T @ (qh / len(qh) ** 0.5)
                parts.append(read / (read.square().mean() + eps).sqrt() * weights["norm.weight"])
            outputs.append(weights["out_proj.weight"] @ (torch.cat(parts) * r * torch.sigmoid(r)))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def test_gla_is_that_of_the_paper():
    layer = find("gla").Config(n_heads=2).build(24).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        x = torch.randn(2, 71, 24, dtype=torch.float64)
        want = transcription(dict(layer.named_parameters()), x, heads=2)
        got, state = layer(x[:, :70])
        assert_close(got, want[:, :70], "outputs")
        assert_close(layer.step(x[:, 70], state)[0], want[:, 70], "one more token from the state")
