"""The models of transformers on our weights: Mamba, Mamba-2 and Llama; reading with a cache, then single tokens."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...models.lm import LanguageModel
from ..engines import Engine, Unavailable
from . import mixer_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Transformers(Engine):
    """A model of transformers with the weights of ours. ``tokens`` and ``batch`` are not needed beforehand."""

    title = "transformers"

    def __init__(self, model: LanguageModel, weights: str, *, tokens: int = 0, batch: int = 1) -> None:
        self.weights, self._ours = weights, model
        self.model = carried_over(model).to(DTYPES[weights])
        self._cache: Any = None

    def truth(self) -> LanguageModel:
        """See ``Engine.truth``."""
        return self._ours

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """See ``Engine.read``."""
        return self._call(tokens, {})

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """See ``Engine.step``."""
        return self._call(tokens[:, None], self._cache)

    def _call(self, tokens: Tensor, cache: dict[str, Any]) -> Tensor:
        out = self.model(tokens, use_cache=True, logits_to_keep=1, **cache)
        self._cache = {name: out[name] for name in ("past_key_values", "cache_params") if name in out}
        return out.logits[:, -1]

    def close(self) -> None:
        """Drop the weights."""
        self.model = self._cache = None


def carried_over(model: LanguageModel) -> Any:
    """The model of transformers that computes what ``model`` does. ``Unavailable`` where there is none."""
    kind = mixer_of(model)
    if kind not in FAMILIES:
        raise Unavailable(f"transformers has no {kind}; it is given {', '.join(FAMILIES)}")
    make, rename = FAMILIES[kind]
    theirs = make(model).eval().requires_grad_(False)
    weights = rename(model)
    if model.head is None:
        weights["lm_head.weight"] = model.embedding.weight
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise Unavailable(f"transformers expects other weights: lacks {missing[:3]}, does not know {unexpected[:3]}")
    return theirs


def _library() -> Any:
    """transformers, kept from asking the network for kernels."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


def _shared(model: LanguageModel) -> dict[str, Any]:
    cfg = model.cfg
    return {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": len(cfg.layers),
        "tie_word_embeddings": cfg.tied,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _state_space(model: LanguageModel) -> dict[str, Any]:
    mixer = model.layers[0].mixer.cfg
    return {
        **_shared(model),
        "state_size": mixer.d_state,
        "conv_kernel": mixer.d_conv,
        "use_conv_bias": mixer.conv_bias,
        "use_bias": mixer.bias,
        "layer_norm_epsilon": model.cfg.norm.eps,
        "residual_in_fp32": model.cfg.residual_fp32,
    }


def _mamba(model: LanguageModel) -> Any:
    library, mixer = _library(), model.layers[0].mixer
    config = library.MambaConfig(**_state_space(model), expand=int(mixer.cfg.expand), time_step_rank=mixer.rank)
    return library.MambaForCausalLM(config)


def _mamba2(model: LanguageModel) -> Any:
    library, mixer = _library(), model.layers[0].mixer
    config = library.Mamba2Config(
        **_state_space(model),
        expand=int(mixer.cfg.expand),
        num_heads=mixer.n_heads,
        head_dim=mixer.cfg.head_dim,
        n_groups=mixer.cfg.n_groups,
    )
    return library.Mamba2ForCausalLM(config)


def _llama(model: LanguageModel) -> Any:
    library, mixer, mlp = _library(), model.layers[0].mixer, model.layers[0].mlp
    config = library.LlamaConfig(
        **_shared(model),
        num_attention_heads=mixer.cfg.n_heads,
        num_key_value_heads=mixer.groups,
        head_dim=mixer.head_dim,
        intermediate_size=mlp.out_proj.in_features,
        rms_norm_eps=model.cfg.norm.eps,
        rope_parameters={"rope_type": "default", "rope_theta": mixer.cfg.rope_theta},
        max_position_embeddings=2**20,
    )
    return library.LlamaForCausalLM(config)


def _backbone_weights(model: LanguageModel) -> dict[str, Tensor]:
    """Mamba and Mamba-2: the mixers' parameters have the official names already."""
    named = {
        "embedding.": "backbone.embeddings.",
        "layers.": "backbone.layers.",
        "norm.": "backbone.norm_f.",
        "head.": "lm_head.",
    }
    found = {}
    for name, tensor in model.state_dict().items():
        ours = next(prefix for prefix in named if name.startswith(prefix))
        found[named[ours] + name.removeprefix(ours).replace(".mixer_norm.", ".norm.")] = tensor
    return found


def _llama_weights(model: LanguageModel) -> dict[str, Tensor]:
    found = {"model.embed_tokens.weight": model.embedding.weight, "model.norm.weight": model.norm.weight}
    if model.head is not None:
        found["lm_head.weight"] = model.head.weight
    for index, layer in enumerate(model.layers):
        mixer, gate_up = layer.mixer, layer.mlp.in_proj.weight.chunk(2)
        parts = {
            "input_layernorm": layer.mixer_norm.weight,
            "post_attention_layernorm": layer.mlp_norm.weight,
            "self_attn.q_proj": mixer.q_proj.weight,
            "self_attn.k_proj": mixer.k_proj.weight,
            "self_attn.v_proj": mixer.v_proj.weight,
            "self_attn.o_proj": mixer.out_proj.weight,
            "mlp.gate_proj": gate_up[0],
            "mlp.up_proj": gate_up[1],
            "mlp.down_proj": layer.mlp.out_proj.weight,
        }
        found.update({f"model.layers.{index}.{name}.weight": tensor for name, tensor in parts.items()})
    return found


FAMILIES: dict[str, tuple[Callable[[LanguageModel], Any], Callable[[LanguageModel], dict[str, Tensor]]]] = {
    "mamba": (_mamba, _backbone_weights),
    "mamba2": (_mamba2, _backbone_weights),
    "attention": (_llama, _llama_weights),
}

ENGINE = Transformers
