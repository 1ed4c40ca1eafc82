"""Models with their linear weights in int8 or int4, chosen by role.

Linear maps and the embedding are packed. Full precision (fp32) stay the parameters that are no linear maps (decays,
steps, convolutions, norms, low-rank maps of RWKV), the linear maps that a mixer names in ``full_precision`` or
``step_outputs``, those too small to matter, and the state. int8 stay, in an int4 model, the maps in ``int8_at_least``
and an embedding that is not the head.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..mixers import base
from ..ops.native import MISSING
from ..ops.native.product import MAX_IN, check_format
from .identity import record, recorded
from .lm import LanguageModel, shapes_of
from .packed import PackedEmbedding, PackedLinear

LEAST = 64  # narrower maps stay as they are
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Place(NamedTuple):
    """A module that is packed: where it is, in which format, how many of its last outputs stay in fp32."""

    path: str
    module: nn.Linear | nn.Embedding
    format: str
    kept: int


def quantized(model: LanguageModel, format: str) -> LanguageModel:
    """A model with its weights in ``format``, in evaluation mode; what does not change is shared, not copied.

    "int8" and "int4" pack the linear maps and make the rest fp32; "fp32" and "bf16" convert all weights (but, to bf16,
    those that mixers call full precision), as ``model.to(dtype)`` does. ``ValueError`` for an unknown format, for a
    model that is quantised already or wrapped, and for one of which nothing would be packed. ``packed`` says what was.
    """
    check_format(format)
    if model.weights is not None:
        raise ValueError(f"the weights are {model.weights} already; quantise the model in full precision")
    with torch.device("meta"):
        made = model.cfg.build()
    dtype, wide = DTYPES.get(format, torch.float32), base.spared(made)
    tensors = {
        name: _converted(tensor.detach(), torch.float32 if name in wide else dtype)
        for name, tensor in model.state_dict().items()
    }
    odd = sorted(set(tensors) ^ set(made.state_dict()))
    if odd:
        raise ValueError(
            f"the weights are not those of the model's config ({len(odd)} names differ, first {odd[0]!r}); "
            "merge adapters and remove parametrisations and wrappers before changing the format"
        )
    made.load_state_dict(tensors, assign=True)
    if format not in DTYPES:
        _replace(made, format, _pack)
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    if (known := recorded(model)) is not None:
        record(made, known)  # the same model, in another format
    return made.eval()


def prepare(model: LanguageModel, format: str) -> None:
    """Replace what ``quantized`` would, by maps whose values are still to be loaded."""
    _replace(model, format, _hollow)


def places(model: LanguageModel, format: str) -> Iterator[Place]:
    """The modules that ``format`` packs, by role."""
    mixers = [(path, module) for path, module in model.named_modules() if isinstance(module, base.Mixer)]
    for _, mixer in mixers:
        mixer.check_names()
    table = format if model.head is None else "int8"  # rows that are only looked up cost no time
    if model.cfg.d_model >= LEAST:
        yield Place("embedding", model.embedding, table, 0)
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not _fits(module):
            continue
        owners = [(own, mixer) for own, mixer in mixers if path.startswith(own + ".")]
        if not owners:
            yield Place(path, module, format, 0)
            continue
        own, mixer = max(owners, key=lambda pair: len(pair[0]))
        name = path[len(own) + 1 :]
        if not base.listed(name, mixer.full_precision):
            least = "int8" if base.listed(name, mixer.int8_at_least) else format
            yield Place(path, module, least, mixer.step_outputs().get(name, 0))


def packed(model: LanguageModel) -> dict[str, str]:
    """The formats of the packed linear maps and embedding of a quantised model, by their paths."""
    return {path: module.format for path, module in model.named_modules() if isinstance(module, PackedLinear)}


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all weights as they lie in memory, packed or not."""
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def _fits(linear: nn.Linear) -> bool:
    return LEAST <= linear.in_features <= MAX_IN and linear.out_features >= LEAST


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _replace(model: LanguageModel, format: str, make: Callable[[Place], PackedLinear]) -> None:
    found = list(places(model, format))
    if not found:
        raise ValueError(
            f"nothing of this model can be packed in {format}: no linear map and no embedding is {LEAST} or more wide "
            f"(d_model is {model.cfg.d_model}) and free to lose digits; use weights='fp32' or 'bf16'"
        )
    model.weights = format
    if MISSING is not None:
        warnings.warn(f"{format} weights save memory but no time here: {MISSING}", RuntimeWarning, stacklevel=3)
    made: dict[int, PackedLinear] = {}
    for place in found:
        parent, _, name = place.path.rpartition(".")
        weight = id(place.module.weight)
        made[weight] = made.get(weight) or make(place)  # blocks that share a map share the packed one
        setattr(model.get_submodule(parent), name, made[weight])
    model._built = shapes_of(model)


def _pack(place: Place) -> PackedLinear:
    if isinstance(place.module, nn.Embedding):
        return PackedEmbedding.of(place.module.weight, None, place.format)
    return PackedLinear.of(place.module.weight, place.module.bias, place.format, place.kept)


def _hollow(place: Place) -> PackedLinear:
    out, width = place.module.weight.shape
    if isinstance(place.module, nn.Embedding):
        return PackedEmbedding(width, out, place.format)
    return PackedLinear(width, out, place.format, kept=place.kept, bias=place.module.bias is not None)
