"""Our models as GGUF files for llama.cpp: Mamba, Mamba-2, RWKV-7 and Llama; no vocabulary, the weights as they are.

Matrices go to the format asked for, f32, f16, Q8_0 or Q4_0; those whose rows are no multiples of 32 stay f16 in the
quantised ones. Vectors, convolutions and what enters an exponent stay f32, as in llama.cpp's own conversions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...models.lm import LanguageModel
from ..engines import Unavailable
from . import mixer_of

BLOCK = 32  # weights that share a scale in Q8_0 and Q4_0


class Part(NamedTuple):
    """A tensor of the file. ``small`` ones stay f32, ``halves`` at most f16.

    ``pairs``: rows are reordered so that channels i and i + pairs/2 of a head, which rotate together, are neighbours.
    """

    name: str
    tensor: Tensor
    small: bool = False
    halves: bool = False
    pairs: int = 0

    def form(self, weights: str) -> str:
        """The format of this tensor in a file of ``weights``."""
        if self.small or self.tensor.dim() == 1:
            return "f32"
        if weights not in ("f32", "f16") and (self.halves or self.tensor.shape[-1] % BLOCK):
            return "f16"
        return weights


def write(model: LanguageModel, path: Path, weights: str = "f32") -> None:
    """Write ``model`` to ``path``. ``Unavailable`` for architectures that llama.cpp gets in another form."""
    import gguf

    kind = mixer_of(model)
    if kind not in FAMILIES:
        raise Unavailable(f"llama.cpp is not given {kind} models; it gets {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    writer = gguf.GGUFWriter(path, family.name)
    writer.add_context_length(2**20)
    writer.add_embedding_length(model.cfg.d_model)
    writer.add_block_count(len(model.cfg.layers))
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(model.cfg.vocab_size)
    family.keys(writer, model)
    for part in _parts(model, family):
        _add(writer, part, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _parts(model: LanguageModel, family: Family) -> Iterator[Part]:
    yield Part("token_embd.weight", model.embedding.weight)
    if model.head is not None:
        yield Part("output.weight", model.head.weight)
    yield from _norm("output_norm", model.norm)
    if model.embed_norm is not None:
        yield from _norm("token_embd_norm", model.embed_norm)
    for index, layer in enumerate(model.layers):
        for part in family.layer(layer):
            yield part._replace(name=f"blk.{index}.{part.name}")


def _norm(name: str, norm: Any) -> Iterator[Part]:
    yield Part(f"{name}.weight", norm.weight)
    if norm.bias is not None:
        yield Part(f"{name}.bias", norm.bias)


def _add(writer: Any, part: Part, weights: str) -> None:
    import gguf

    tensor, form = part.tensor.detach().float(), part.form(weights)
    if part.pairs:
        tensor = tensor.unflatten(0, (-1, 2, part.pairs // 2)).transpose(1, 2).flatten(0, 2)
    array = tensor.contiguous().numpy()
    if form in ("f32", "f16"):
        writer.add_tensor(part.name, array.astype("float32" if form == "f32" else "float16"))
    else:
        kind = gguf.GGMLQuantizationType[form]
        writer.add_tensor(part.name, gguf.quants.quantize(array, kind), raw_dtype=kind)


@torch.no_grad()
def rounded(model: LanguageModel, weights: str) -> LanguageModel:
    """A copy of ``model`` in fp32 whose matrices hold what a file of ``weights`` (Q8_0, Q4_0) says."""
    import gguf

    if weights in ("f32", "f16"):
        return model
    model = copy.deepcopy(model)
    kind = gguf.GGMLQuantizationType[weights]
    for part in _parts(model, FAMILIES[mixer_of(model)]):
        if part.form(weights) == weights:
            packed = gguf.quants.quantize(part.tensor.numpy(), kind)
            part.tensor.copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind)))
    return model


def _state_space_keys(writer: Any, model: LanguageModel, inner: int, rank: int) -> None:
    cfg = model.layers[0].mixer.cfg
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(cfg.d_conv)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(cfg.d_state)
    writer.add_ssm_time_step_rank(rank)
    writer.add_layer_norm_rms_eps(model.cfg.norm.eps)


def _mamba_keys(writer: Any, model: LanguageModel) -> None:
    mixer = model.layers[0].mixer
    if mixer.cfg.norms != "none":
        raise Unavailable("llama.cpp has Mamba's norms of dt, B and C only without weights")
    _state_space_keys(writer, model, len(mixer.D), mixer.rank)
    writer.add_ssm_dt_b_c_rms(False)


def _mamba2_keys(writer: Any, model: LanguageModel) -> None:
    mixer = model.layers[0].mixer
    _state_space_keys(writer, model, mixer.channels, mixer.n_heads)
    writer.add_ssm_group_count(mixer.cfg.n_groups)


def _state_space(layer: Any) -> Iterator[Part]:
    """What Mamba and Mamba-2 have in common."""
    mixer = layer.mixer
    yield from _norm("attn_norm", layer.mixer_norm)
    yield Part("ssm_in.weight", mixer.in_proj.weight)
    yield Part("ssm_conv1d.weight", mixer.conv1d.weight[:, 0], small=True)
    if mixer.conv1d.bias is not None:
        yield Part("ssm_conv1d.bias", mixer.conv1d.bias)
    yield Part("ssm_out.weight", mixer.out_proj.weight)


def _mamba(layer: Any) -> Iterator[Part]:
    mixer = layer.mixer
    yield from _state_space(layer)
    yield Part("ssm_x.weight", mixer.x_proj.weight)
    yield Part("ssm_dt.weight", mixer.dt_proj.weight)
    yield Part("ssm_dt.bias", mixer.dt_proj.bias)
    yield Part("ssm_a", -mixer.A_log.exp(), small=True)
    yield Part("ssm_d", mixer.D)


def _mamba2(layer: Any) -> Iterator[Part]:
    mixer = layer.mixer
    yield from _state_space(layer)
    yield Part("ssm_dt.bias", mixer.dt_bias)
    yield Part("ssm_a", -mixer.A_log.exp()[:, None], small=True)
    yield Part("ssm_d", mixer.D[:, None], small=True)
    yield Part("ssm_norm.weight", mixer.norm.weight.view(mixer.cfg.n_groups, -1), small=True)


def _rwkv7_keys(writer: Any, model: LanguageModel) -> None:
    mixer, later = model.layers[0].mixer, model.layers[-1].mixer
    if not later.reads_first or mixer.reads_first:
        raise Unavailable("llama.cpp mixes the first layer's values into all others; give at least two layers of these")
    writer.add_feed_forward_length(model.layers[0].mlp.in_proj.out_features)
    writer.add_head_count(0)
    writer.add_token_shift_count(2)
    writer.add_wkv_head_size(mixer.cfg.head_size)
    writer.add_layer_norm_eps(model.cfg.norm.eps)
    writer.add_decay_lora_rank(mixer.decay.down.shape[1])
    writer.add_iclr_lora_rank(mixer.rate.down.shape[1])
    writer.add_value_residual_mix_lora_rank(later.value.down.shape[1])
    writer.add_gate_lora_rank(mixer.gate.down.shape[1])


def _rwkv7(layer: Any) -> Iterator[Part]:
    mixer, mlp = layer.mixer, layer.mlp
    yield from _norm("attn_norm", layer.mixer_norm)
    yield from _norm("attn_norm_2", layer.mlp_norm)
    yield Part("time_mix_lerp_fused.weight", mixer.mix[:, None, None], small=True)
    # the first layer has no values to mix in, but its slots are read: as wide as the rate's
    loras = {"w": mixer.decay, "a": mixer.rate, "v": mixer.value if mixer.reads_first else mixer.rate, "g": mixer.gate}
    for letter, lora in loras.items():
        if lora.bias is not None:
            yield Part(f"time_mix_{letter}0.weight", lora.bias)
        yield Part(f"time_mix_{letter}1.weight", lora.down.t(), halves=True)
        yield Part(f"time_mix_{letter}2.weight", lora.up.t(), halves=True)
    for name in ("k_k", "k_a", "r_k"):
        yield Part(f"time_mix_{name}.weight", getattr(mixer, name).flatten())
    for name, proj in (("receptance", mixer.r_proj), ("key", mixer.k_proj), ("value", mixer.v_proj)):
        yield Part(f"time_mix_{name}.weight", proj.weight)
    yield Part("time_mix_output.weight", mixer.out_proj.weight)
    yield Part("time_mix_ln.weight", mixer.norm_weight)
    yield Part("time_mix_ln.bias", mixer.norm_bias)
    yield Part("channel_mix_lerp_k.weight", mlp.mix[None, None], small=True)
    yield Part("channel_mix_key.weight", mlp.in_proj.weight)
    yield Part("channel_mix_value.weight", mlp.out_proj.weight)


def _llama_keys(writer: Any, model: LanguageModel) -> None:
    mixer = model.layers[0].mixer
    cfg = mixer.cfg
    if cfg.window is not None or cfg.rope_fraction != 1.0 or cfg.rope_theta is None:
        raise Unavailable("llama.cpp's Llama has full attention and rotates whole heads")
    writer.add_feed_forward_length(model.layers[0].mlp.out_proj.in_features)
    writer.add_head_count(cfg.n_heads)
    writer.add_head_count_kv(mixer.groups)
    writer.add_rope_dimension_count(mixer.head_dim)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_layer_norm_rms_eps(model.cfg.norm.eps)


def _llama(layer: Any) -> Iterator[Part]:
    mixer, mlp = layer.mixer, layer.mlp
    yield from _norm("attn_norm", layer.mixer_norm)
    yield from _norm("ffn_norm", layer.mlp_norm)
    yield Part("attn_q.weight", mixer.q_proj.weight, pairs=mixer.head_dim)
    yield Part("attn_k.weight", mixer.k_proj.weight, pairs=mixer.head_dim)
    yield Part("attn_v.weight", mixer.v_proj.weight)
    yield Part("attn_output.weight", mixer.out_proj.weight)
    gate, up = mlp.in_proj.weight.chunk(2)
    yield Part("ffn_gate.weight", gate)
    yield Part("ffn_up.weight", up)
    yield Part("ffn_down.weight", mlp.out_proj.weight)


class Family(NamedTuple):
    """How one architecture is written: llama.cpp's name, its keys and the tensors of a layer."""

    name: str
    keys: Any
    layer: Any


FAMILIES = {
    "mamba": Family("mamba", _mamba_keys, _mamba),
    "mamba2": Family("mamba2", _mamba2_keys, _mamba2),
    "rwkv7": Family("rwkv7", _rwkv7_keys, _rwkv7),
    "attention": Family("llama", _llama_keys, _llama),
}
