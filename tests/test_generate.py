"""Generation: sampling, sessions, stop strings, prompts in pieces, streams of whole characters."""

import subprocess
import sys

import pytest
import torch

import everlong
from everlong import numerics
from everlong import state as states
from everlong.config import find, mixer_names
from everlong.generation.sampler import Sampling, filtered, penalised
from everlong.generation.session import new_session
from everlong.generation.text import stream_text
from everlong.models.blocks import Layer
from everlong.models.lm import LanguageModel
from everlong.tokenizer import ByteTokenizer, FileTokenizer, open_tokenizer

GREEDY = Sampling(temperature=0)


def model_of(mixer, **changes):
    layer = Layer.Config(mixer=find(mixer).Config())
    return (
        LanguageModel.Config(vocab_size=256, d_model=64, layers=(layer,) * 2, embed_std=1.0, **changes).build().eval()
    )


@pytest.mark.parametrize("name", mixer_names())
def test_greedy_equals_the_whole_and_sessions_go_on(name, tmp_path):
    model = model_of(name)
    prompt = list(b"the first of many words")
    first = everlong.generate(model, prompt, max_tokens=6, sampling=GREEDY, piece=5)
    text = list(first)
    fork = first.session
    states.save(fork, tmp_path / "session")
    back = states.load(tmp_path / "session", new_session(model))
    more = list(everlong.generate(model, [], max_tokens=5, sampling=GREEDY, session=back))
    assert list(everlong.generate(model, [], max_tokens=5, sampling=GREEDY, session=fork)) == more
    with torch.no_grad():
        for index in range(11):
            logits, _ = model(torch.tensor([prompt + (text + more)[:index]]))
            assert int(logits[0, -1].argmax()) == (text + more)[index], f"token {index}"


def test_a_long_prompt_needs_the_memory_of_a_piece():
    code = (
        "import sys, torch, everlong; from everlong.bench.memory import peak_bytes; from everlong.config import find;"
        "layer = everlong.Layer.Config(mixer=find('gla').Config());"
        "model = everlong.LanguageModel.Config(vocab_size=256, d_model=64, layers=(layer,) * 2).build();"
        "model.read(torch.randint(0, 256, (1, int(sys.argv[1]))), piece=1000);"
        "print(peak_bytes() // 1024)"
    )
    peaks = [
        int(subprocess.run([sys.executable, "-c", code, length], capture_output=True, text=True, check=True).stdout)
        for length in ("3000", "100000")
    ]
    assert peaks[1] - peaks[0] < 8_000, f"{peaks} KiB"  # the hidden states alone would take 25 MB


def test_pieces_do_not_change_what_was_read():
    model = model_of("mamba2")
    tokens = torch.randint(0, 256, (2, 300))
    want, whole = model.read(tokens, piece=300)
    got, pieced = model.read(tokens, piece=7)
    numerics.assert_close(got, want, "logits")
    assert torch.equal(whole.position, pieced.position)


def test_filters():
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
    kept = lambda **options: torch.isfinite(filtered(logits[None], [Sampling(**options)])[0]).tolist()  # noqa: E731
    assert kept(top_k=2) == [False, False, True, True]
    assert kept(top_p=0.6) == [False, False, False, True]  # softmax gives 0.03, 0.09, 0.24, 0.64
    assert kept(top_p=0.7) == [False, False, True, True]
    assert kept(min_p=0.2) == [False, False, True, True]
    assert kept(top_p=0.0) == [False, False, False, True]
    assert torch.equal(filtered(logits[None], [Sampling(temperature=2.0)])[0], logits / 2)
    seen = torch.tensor([True, False, False, True])
    assert penalised(torch.tensor([-1.0, -1.0, 2.0, 2.0]), seen, 2.0).tolist() == [-2.0, -1.0, 2.0, 1.0]


def test_seed_repeats_and_draws_follow_the_distribution():
    model = model_of("gla")
    torch.nn.init.normal_(model.embedding.weight, std=0.02)
    draw = lambda seed: list(everlong.generate(model, b"x", max_tokens=20, sampling=Sampling(seed=seed)))  # noqa: E731
    assert draw(1) == draw(1) != draw(2)


def test_going_on_does_not_change_a_session_taken_before():
    model = model_of("attention")
    tokens = everlong.generate(model, b"abc", max_tokens=30, sampling=GREEDY)
    session = (next(tokens), tokens.session)[1]
    copy = states.map_leaves(torch.clone, session)
    list(tokens)
    for (name, now, _), (_, then, _) in zip(states.leaves(session), states.leaves(copy), strict=True):
        assert torch.equal(now, then), name


def test_stop_ids_end_the_text():
    model = model_of("gla")
    text = list(everlong.generate(model, b"abc", max_tokens=30, sampling=GREEDY))
    stop = text[3]
    assert (
        list(everlong.generate(model, b"abc", max_tokens=30, sampling=GREEDY, stop_ids=[stop]))
        == text[: text.index(stop)]
    )


@pytest.mark.parametrize(
    "text,stop,want",
    [
        ("one END two", ["END"], "one "),
        ("one ENTER", ["END"], "one ENTER"),
        ("aab", ["ab"], "a"),
        ("x\n\ny", ["\n\n", "y"], "x"),
        ("ends in EN", ["END"], "ends in EN"),
        ("käse → ok", [], "käse → ok"),
    ],
)
def test_stop_strings_and_whole_characters(text, stop, want):
    tokenizer = ByteTokenizer()
    pieces = list(stream_text(iter(tokenizer.encode(text)), tokenizer, stop))
    assert "".join(pieces) == want and "\ufffd" not in "".join(pieces)


def test_words_that_continue_a_prompt_keep_their_space():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    library = Tokenizer(models.WordLevel({"▁hello": 0, "▁world": 1, "[UNK]": 2}, unk_token="[UNK]"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = FileTokenizer.__new__(FileTokenizer)
    tokenizer.library = library
    assert "".join(stream_text(iter([1]), tokenizer, prompt=[0])) == " world"
    assert "".join(stream_text(iter([1]), tokenizer)) == "world"


def test_a_session_that_ended_goes_on_inside_its_document():
    model = model_of("gla")
    text = list(everlong.generate(model, b"abc", max_tokens=30, sampling=GREEDY))
    tokens = everlong.generate(model, b"abc", max_tokens=30, sampling=GREEDY, stop_ids=[text[2]])
    shorter = list(tokens)
    want, _ = model.read(torch.tensor([[*b"abc", *shorter]]))
    numerics.assert_close(tokens.session.logits, want, "logits", numerics.BOUNDS["fp32 scan"])


def test_a_tokenizer_file(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(["käse und brot " * 20], trainer)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(tmp_path)
    ids = tokenizer.encode("käse → brot")
    assert tokenizer.decode(ids) == "käse → brot" and tokenizer.eos == 0
    assert "".join(stream_text(iter(ids), tokenizer)) == "käse → brot"
    model = LanguageModel.Config(
        vocab_size=tokenizer.vocab_size, d_model=64, layers=(Layer.Config(mixer=find("gla").Config()),)
    ).build()
    everlong.save(model, tmp_path / "model", tokenizer)
    assert everlong.load_tokenizer(tmp_path / "model").encode("brot") == tokenizer.encode("brot")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer file"):
        open_tokenizer(tmp_path)


def test_a_tokenizer_file_gives_all_of_a_text_and_room_for_its_largest_id(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    library = Tokenizer(models.WordLevel({"a": 0, "b": 5, "[UNK]": 7}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.enable_truncation(4)
    library.enable_padding(length=10)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.encode("a b a b a") == [0, 5, 0, 5, 0]
    assert tokenizer.vocab_size == 8


def test_a_token_that_is_no_byte():
    tokenizer = ByteTokenizer()
    with pytest.raises(ValueError, match="token 300 is no byte.*own tokenizer"):
        tokenizer.decode([65, 300])
    with pytest.raises(ValueError, match="token 256 is no byte"):
        tokenizer.decoder().feed(256)


def test_a_chain_handed_to_another_model_is_read_with_its_weights():
    torch.manual_seed(1)
    first, other = model_of("hyena"), model_of("hyena")
    token = torch.tensor([3])
    with torch.no_grad():
        work = first.workspace(first.init_state(1))
        first.step_(token, work)
        state = work.state()
        want, _ = other.step(token, state)
        numerics.assert_close(other.step_(token, other.workspace(state)), want, "logits")


def test_a_very_low_temperature_takes_the_most_likely_token():
    model = model_of("gla")
    want = list(everlong.generate(model, b"abc", max_tokens=3, sampling=GREEDY))
    assert list(everlong.generate(model, b"abc", max_tokens=3, sampling=Sampling(temperature=1e-42))) == want
