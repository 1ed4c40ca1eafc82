"""Presets have the published numbers of parameters, counted on the meta device."""

import pytest
import torch

import everlong
from everlong.bench import training
from everlong.compare.architectures import Shape, make
from everlong.models.presets import PRESETS, preset

PUBLISHED = {
    "mamba-130m": 129_135_360,
    "mamba-370m": 371_516_416,
    "mamba-790m": 793_204_224,
    "mamba-1.4b": 1_372_178_432,
    "mamba-2.8b": 2_768_345_600,
    "mamba2-130m": 128_989_632,
    "mamba2-370m": 368_346_624,
    "mamba2-780m": 780_161_280,
    "mamba2-1.3b": 1_343_757_312,
    "mamba2-2.7b": 2_702_599_680,
    "rwkv7-0.1b": 191_034_624,
    "rwkv7-0.4b": 450_767_872,
    "rwkv7-1.5b": 1_527_404_544,
    "rwkv7-2.9b": 2_947_735_040,
    "recurrentgemma-2b": 2_682_862_080,
    "llama-124m": 123_568_896,
    "griffin-200m": 182_920_192,  # these two are shapes of our own
    "jamba-200m": 207_400_416,
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count(name):
    with torch.device("meta"):
        model = everlong.preset(name).build()
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_config_survives_json(name):
    config = everlong.preset(name)
    assert everlong.LanguageModel.Config.from_dict(config.to_dict()) == config


def test_unknown_preset_is_told_with_a_suggestion():
    with pytest.raises(ValueError, match="no preset 'mamba-130'; did you mean 'mamba-130m'"):
        everlong.preset("mamba-130")


SIZES = {"vocab_size", "d_model", "hidden", "n_heads", "head_dim", "head_size", "d_state", "window"}
FAMILIES = {  # family: the published size, and the name in compare
    "mamba": ("mamba-130m", "mamba"),
    "mamba2": ("mamba2-130m", "mamba2"),
    "rwkv7": ("rwkv7-0.1b", "rwkv7"),
    "griffin": ("recurrentgemma-2b", "griffin"),
    "llama": ("llama-124m", "attention"),
}


def recipe(cfg):
    """A configuration without its sizes; the scale of embeddings relative to the width, where it follows the width."""

    def stripped(value):
        if isinstance(value, dict):
            sizes = {key for key in value if key in SIZES or key.endswith("_rank")}
            return {key: stripped(item) for key, item in value.items() if key not in sizes}
        return value

    plain, root = cfg.to_dict(), cfg.d_model**0.5
    if plain["embed_scale"] != 1.0:
        plain["embed_scale"], plain["embed_std"] = plain["embed_scale"] / root, plain["embed_std"] * root
    plain["embed_std"] = pytest.approx(plain["embed_std"])
    unit = [stripped(layer) for layer in plain.pop("layers")[:3]]
    return stripped(plain), unit


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_one_recipe(family):
    """Published sizes, the comparison and the bench of training differ in sizes alone."""
    published, compared = FAMILIES[family]
    shape = training.Shape(layers=3)
    timed = training.llama(shape) if family == "llama" else training.models(shape)[family]
    of_compare = make(compared, Shape(128, 32), repeats=3)
    assert recipe(timed) == recipe(preset(published)) == recipe(of_compare)
