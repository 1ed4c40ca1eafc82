"""Sessions and states from files: of this very model, and with no number that leads outside of memory."""

import copy

import pytest
import torch

import everlong
from everlong import numerics
from everlong import state as states
from everlong.checkpoints.stream import continue_text
from everlong.config import find, mixer_names
from everlong.generation.decoder import Decoder
from everlong.generation.sampler import Sampling
from everlong.generation.session import Session, new_session
from everlong.mixers.attention import Attention
from everlong.models.blocks import Layer, SwiGLU
from everlong.models.identity import fingerprint
from everlong.models.lm import LanguageModel
from everlong.models.quantize import quantized

GREEDY = Sampling(temperature=0)


def model(mixer="gla", seed=0, d_model=32):
    torch.manual_seed(seed)
    cfg = find(mixer).Config() if isinstance(mixer, str) else mixer
    layer = Layer.Config(mixer=cfg, mlp=SwiGLU.Config())
    return LanguageModel.Config(vocab_size=256, d_model=d_model, layers=(layer,)).build().eval()


ATTENTION = {"full": Attention.Config(), "window": Attention.Config(window=8)}


def read(reader, text=b"some text to read"):
    tokens = everlong.generate(reader, text, max_tokens=2, sampling=GREEDY)
    return list(tokens) and tokens.session


def altered(session, name, change):
    """The session with ``change`` made to one leaf."""
    values = [change(leaf.clone()) if path == name else leaf for path, leaf, _ in states.leaves(session)]
    return states.rebuild(session, iter(values))


def test_a_session_goes_on_with_its_own_model(tmp_path):
    first = model()
    session = read(first)
    everlong.save_session(session, tmp_path / "s", first)
    again = everlong.load_session(tmp_path / "s", first)
    assert all(
        torch.equal(a, b) for (_, a, _), (_, b, _) in zip(states.leaves(again), states.leaves(session), strict=False)
    )
    everlong.save(first, tmp_path / "model")
    loaded = everlong.load(tmp_path / "model")
    assert fingerprint(loaded) == fingerprint(first)
    everlong.load_session(tmp_path / "s", loaded)


def test_a_session_of_another_model_is_refused(tmp_path):
    first, path = model(), tmp_path / "s"
    everlong.save_session(read(first), path, first)
    before = path.read_bytes()
    changed, options = copy.deepcopy(first), first.cfg.replace(embed_scale=2.0).build()
    options.load_state_dict(first.state_dict())
    with torch.no_grad():
        changed.layers[0].mlp.out_proj.weight[0, 0] += 1e-3
    for other in (model(seed=1), changed, options, model("lstm")):
        with pytest.raises(ValueError, match=r"is a session of another model, or of other weights \(fingerprint"):
            everlong.load_session(path, other)
    everlong.save(model(seed=1), tmp_path / "other")
    with pytest.raises(ValueError, match="a session of another model"):
        list(continue_text(tmp_path / "other", "a", session=path))
    assert path.read_bytes() == before
    states.save(read(first), path)
    with pytest.raises(ValueError, match="does not say of which model it is a session; write it with save_session"):
        everlong.load_session(path, first)


def test_a_fingerprint_follows_the_weights(tmp_path):
    first = model(d_model=64)
    before = fingerprint(first)
    everlong.save(first, tmp_path)
    loaded = everlong.load(tmp_path)
    assert fingerprint(loaded) == before
    with torch.no_grad():
        loaded.norm.weight.mul_(2)
    assert fingerprint(loaded) != before
    loaded = everlong.load(tmp_path)
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=1e-3)
    loaded.loss(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)).backward()
    optimizer.step()
    assert fingerprint(loaded) != before
    loaded = everlong.load(tmp_path)
    loaded.cfg = loaded.cfg.replace(embed_scale=2.0)
    assert fingerprint(loaded) != before
    assert fingerprint(copy.deepcopy(first)) == before
    with torch.inference_mode():
        assert fingerprint(model(d_model=64)) == before
    assert fingerprint(torch.compile(first, backend="eager")) == before


def test_the_same_weights_in_fewer_bits_are_the_same_model(tmp_path):
    everlong.save(model(d_model=64), tmp_path / "model")
    full = everlong.load(tmp_path / "model")
    everlong.save_session(read(full), tmp_path / "s", full)
    for small in (everlong.load(tmp_path / "model", weights="int8"), quantized(full, "int4")):
        assert fingerprint(small) == fingerprint(full)
        session = everlong.load_session(tmp_path / "s", small)
        assert len(list(everlong.generate(small, [], max_tokens=3, session=session))) == 3
        everlong.save(small, tmp_path / "small")
        assert fingerprint(everlong.load(tmp_path / "small")) == fingerprint(full)


BAD = (-5, -1, -(2**63), 2**63 - 1, 10**12, 10**6, 100)


@pytest.mark.parametrize("kind", [*ATTENTION, "retention"])
@pytest.mark.parametrize("value", BAD)
def test_positions_lead_nowhere_else(tmp_path, kind, value):
    """``position = -5`` was a write outside of memory, 10^12 an attempt at 192 TB."""
    if kind != "full" and 0 <= value <= 10**12:
        return  # a ring, and a rotation, have no bound but that of any text
    reader = model(ATTENTION.get(kind, kind))
    session = altered(read(reader), "state.layers.0.0.position", lambda leaf: leaf.fill_(value))
    everlong.save_session(session, tmp_path / "s", reader)
    with pytest.raises(ValueError, match=r"layers.0.0.position counts from .* expected 0 to (19|\d{16});"):
        everlong.load_session(tmp_path / "s", reader)
    with pytest.raises(ValueError, match="counts from"):
        everlong.generate(reader, b"a", session=session)
    with pytest.raises(ValueError, match="counts from"):
        Decoder(reader).load(session.state)
    if kind == "full" or (kind == "window" and value < 0):
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match=r"state.position runs from .* no call makes such a state"),
        ):
            reader.step_(torch.tensor([1]), reader.workspace(session.state))


def test_the_models_own_position_is_bounded():
    session = altered(read(model()), "state.position", lambda leaf: leaf.fill_(-1))
    with pytest.raises(ValueError, match="session leaf state.position counts from -1 to -1"):
        everlong.generate(model(), b"a", session=session)


def test_keys_and_values_are_of_one_length(tmp_path):
    reader = model(ATTENTION["full"])
    session = altered(read(reader), "state.layers.0.0.v", lambda leaf: leaf[:, :4])
    with pytest.raises(ValueError, match=r"has histories of \[4, 19\] tokens, expected one length"):
        everlong.generate(reader, b"a", session=session)
    with torch.no_grad(), pytest.raises(ValueError, match="19 keys and 4 values held"):
        reader.step_(torch.tensor([1]), reader.workspace(session.state))
    hyena = model(find("hyena").Config(order=3))
    session = altered(read(hyena), "state.layers.0.0.histories.1.x", lambda leaf: leaf[:, :4])
    with pytest.raises(ValueError, match="expected one length"):
        everlong.generate(hyena, b"a", session=session)


def test_layers_keep_histories_of_their_own():
    layers = tuple(Layer.Config(mixer=find(name).Config()) for name in ("attention", "hyena"))
    both = LanguageModel.Config(vocab_size=256, d_model=32, layers=layers).build().eval()
    decoder = Decoder(both)
    for token in range(40):  # the cache of attention grows ahead of its text, the history of Hyena does not
        decoder.step(torch.tensor([token]))
    states.check_values(decoder.state())


def test_booleans_are_zero_or_one():
    reader = model("rg_lru")
    session = altered(
        read(reader), "state.layers.0.0.begun", lambda leaf: leaf.view(torch.uint8).fill_(7).view(torch.bool)
    )
    with pytest.raises(ValueError, match="holds booleans that are neither 0 nor 1"):
        everlong.generate(reader, b"a", session=session)


@pytest.mark.parametrize("name", ["lru", "s4d"])
@pytest.mark.parametrize("lie", ["last", "odd", "offset"])
def test_states_may_lie_anyhow_in_memory(name, lie):
    mixer = find(name).Config().build(16).eval()
    x = torch.randn(2, 7, 16)
    _, state = mixer(x)
    size = state.memory.shape

    def strange(leaf):
        if lie == "last":
            return leaf.transpose(-1, -2).contiguous().transpose(-1, -2)
        room = torch.zeros(*size[:-1], 3 if lie == "odd" else 2).flatten()
        room = torch.cat([torch.zeros(1), room])[1:].view(*size[:-1], -1)[..., :2]
        return room.copy_(leaf)

    other = states.map_leaves(strange, state)
    for call in (lambda s: mixer(x, s), lambda s: mixer.step(x[:, 0], s)):
        assert torch.equal(call(other)[0], call(state)[0])


@pytest.mark.parametrize("name", mixer_names())
def test_states_of_all_mixers_may_lie_anyhow_in_memory(name):
    mixer = find(name).Config().build(64).eval()
    x = torch.randn(2, 7, 64)
    _, state = mixer(x)

    def strange(leaf):
        wide = leaf[..., None].expand(*leaf.shape, 3).clone()
        return wide[..., 1]

    other = states.map_leaves(strange, state)
    for call in (lambda s: mixer(x, s)[0], lambda s: mixer.step(x[:, 0], s)[0]):
        numerics.assert_close(call(other), call(state), "output", numerics.BOUNDS["fp32 product"])


def test_files_that_hold_no_session(tmp_path):
    reader, path = model(), tmp_path / "s"
    from everlong.files import save_tensors

    save_tensors(path, {"a": torch.ones(1)}, {"format": "pt"})
    with pytest.raises(ValueError, match="holds no state of Everlong"):
        everlong.load_session(path, reader)
    whole = new_session(reader)
    flat = {name: leaf.contiguous() for name, leaf, _ in states.leaves(whole)}
    flat["state.layers.0.0.memory"] = torch.tensor(1.0)
    save_tensors(path, flat, {"format": "everlong-state"})
    with pytest.raises(ValueError, match="another model"):
        states.load(path, whole)
    assert isinstance(whole, Session)


def test_a_session_goes_into_a_folder_that_exists(tmp_path):
    for path in (tmp_path, tmp_path / "none" / "s"):
        with pytest.raises(ValueError, match="expected a file in a folder that exists"):
            continue_text(tmp_path, "a", session=path)
    assert not (tmp_path / "none").exists()
