"""Sessions in files: the state of one text and its next logits, with the fingerprint of the model that read it."""

from __future__ import annotations

from pathlib import Path

from .. import state as states
from ..generation.session import Session, new_session
from ..models.identity import fingerprint
from ..models.lm import LanguageModel


def save_session(session: Session, path: str | Path, model: LanguageModel) -> None:
    """Write a session of ``model`` to one safetensors file, whole or not at all."""
    states.save(session, path, {"fingerprint": fingerprint(model)})


def load_session(path: str | Path, model: LanguageModel) -> Session:
    """A session that ``save_session`` wrote, to go on from with the same model.

    The same weights in another format (int8, say) are the same model. ``ValueError`` for a session of another model,
    of other weights, one that is damaged, and one whose numbers no reading makes.
    """
    theirs, ours = states.read_meta(path).get("fingerprint"), fingerprint(model)
    if theirs is None:
        raise ValueError(
            f"{path} does not say of which model it is a session; write it with save_session, or read a plain state "
            "with state.load"
        )
    if theirs != ours:
        raise ValueError(
            f"{path} is a session of another model, or of other weights (fingerprint {theirs}, this one has {ours}); "
            "go on with the model that wrote it, or begin a session in another file"
        )
    return states.load(path, new_session(model))
