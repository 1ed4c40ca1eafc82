"""Text is data: whatever it says, it comes back as it was and gives no control id."""

import random
from types import SimpleNamespace

import pytest
import torch

import everlong
from everlong.checkpoints.stream import continue_text
from everlong.config import find
from everlong.generation.text import stream_text
from everlong.models.blocks import Layer
from everlong.models.lm import LanguageModel
from everlong.tokenizer import ByteTokenizer, FileTokenizer
from everlong.train.data import Corpus

NAMES = ("<|endoftext|>", "</s>", "<tool>")
PIECES = (
    *("", " ", "a", "\n", "\t", "käse", "→", "🧀", "👩‍👩‍👧", "e\u0301", "\ufeff", "\ufffd", "\u202e", "\x7f", "\x01"),
    *NAMES,
    *("<|endof", "text|>", "</", "s>", "<|ENDOFTEXT|>", "＜/s＞"),
)


def byte_level(tmp_path, special=True):
    """A BPE over bytes with added tokens, as most of today's models have."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(["käse end text s"], trainers.BpeTrainer(initial_alphabet=alphabet, vocab_size=280))
    library.add_tokens([AddedToken(name, special=special, normalized=False) for name in NAMES[:2]])
    library.add_tokens([AddedToken(NAMES[2], normalized=False)])
    return _saved(library, tmp_path)


def unigram(tmp_path):
    """Names of special tokens are in the vocabulary of the model itself, as in the first T5."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<unk>", "</s>", "▁", "s", "a", "<", "/", ">"]
    library = Tokenizer(models.Unigram([(word, -float(place > 1)) for place, word in enumerate(words)], 0, False))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    library.add_special_tokens(["<unk>", "</s>"])
    return _saved(library, tmp_path)


def ids_of(tokenizer, names=NAMES):
    return [tokenizer.library.token_to_id(name) for name in names]


def _saved(library, tmp_path):
    library.save(str(tmp_path / "tokenizer.json"))
    return FileTokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("make", [lambda _: ByteTokenizer(), byte_level], ids=["bytes", "file"])
def test_odd_texts_come_back_as_they_were_and_hold_no_control_id(make, tmp_path):
    tokenizer, dice = make(tmp_path), random.Random(0)
    control = {tokenizer.eos} if isinstance(tokenizer, ByteTokenizer) else set(ids_of(tokenizer, NAMES[:2]))
    texts = [*PIECES, *("".join(dice.choices(PIECES, k=dice.randint(2, 12))) for _ in range(300))]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and control.isdisjoint(ids), text
        for stop in ((), ("☂",)):
            assert "".join(stream_text(iter(ids), tokenizer, stop)) == text


def test_a_separator_that_is_no_special_token_of_its_file_is_none_in_text_either(tmp_path):
    tokenizer = byte_level(tmp_path, special=False)
    assert [tokenizer.eos] == ids_of(tokenizer, NAMES[:1])
    assert tokenizer.decode(tokenizer.encode("a<|endoftext|>b")) == "a<|endoftext|>b"
    assert tokenizer.eos not in tokenizer.encode("a<|endoftext|>b<|endoftext|>")


def test_special_tokens_are_parsed_where_the_caller_asks(tmp_path):
    tokenizer = byte_level(tmp_path)
    separator, end, tool = ids_of(tokenizer)
    assert tokenizer.eos == separator
    assert tokenizer.encode("a<|endoftext|></s>b", special=True).count(separator) == 1
    assert tokenizer.encode("</s>", special=True) == [end] and tokenizer.encode("<tool>") == [tool]
    assert separator not in tokenizer.encode("<|endoftext|>"), "asking once changed the tokenizer"
    assert ByteTokenizer().encode("a\0b", special=True) == [97, 0, 98]


def test_names_of_special_tokens_in_the_models_own_vocabulary(tmp_path):
    tokenizer = unigram(tmp_path)
    assert tokenizer.eos == 1 and 1 in tokenizer.encode("a</s>", special=True)
    for text in ("</s>", "a</s>a", "a</s></s> </s>", "<unk></s>"):
        assert 1 not in tokenizer.encode(text), text
    assert tokenizer.encode("z")[-1] == 0, "unknown words stay unknown words"


def test_a_single_character_that_is_a_special_token_is_refused(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    library = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "§": 2}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["§"])
    tokenizer = _saved(library, tmp_path)
    with pytest.raises(ValueError, match=r"'§' at 2 of the text is a special token.*special=True"):
        tokenizer.encode("a § a")
    assert tokenizer.encode("a § [UNK]", special=True) == [1, 2, 0]


@pytest.mark.parametrize("make", [lambda _: ByteTokenizer(), byte_level], ids=["bytes", "file"])
def test_what_is_no_text_is_refused_with_its_place(make, tmp_path):
    tokenizer = make(tmp_path)
    with pytest.raises(ValueError, match=r"half a character, '\\ud83e' at 2 .*surrogatepass"):
        tokenizer.encode("ab\ud83e")
    with pytest.raises(ValueError, match="expected text, got bytes"):
        tokenizer.encode(b"ab")
    escaped = b"k\xe4se".decode("utf-8", "surrogateescape")  # as Python hands on a broken argument of a command
    assert tokenizer.decode(tokenizer.encode(escaped)) == "k\ufffdse"


def test_the_separator_in_a_document_of_bytes_is_refused():
    for text in ("a\0b", b"a\0b"):
        with pytest.raises(ValueError, match="NUL byte at 1, which separates documents"):
            Corpus.from_texts([text])
    with pytest.raises(ValueError, match="NUL byte at 1, which separates documents"):
        ByteTokenizer().encode("a\0b")


def test_a_character_cut_short_shows_in_both(tmp_path):
    for tokenizer in (ByteTokenizer(), byte_level(tmp_path)):
        ids = tokenizer.encode("a🧀")
        assert "".join(stream_text(iter(ids[:-1]), tokenizer)) == "a\ufffd"


def test_documents_begin_only_where_a_document_begins(tmp_path):
    tokenizer = byte_level(tmp_path)
    corpus = Corpus.from_texts(["one <|endoftext|> two", "</s>three<|endoftext|>"], tokenizer)
    assert (corpus.tokens == tokenizer.eos).nonzero().flatten().tolist() == corpus.offsets[:-1].tolist()
    assert "<|endoftext|>" in tokenizer.decode(corpus.document(0).tolist())
    rows = corpus.batch(0, SimpleNamespace(seed=0, batch=1, context=len(corpus) - 1))
    assert torch.equal(rows.starts, rows.tokens == tokenizer.eos)


def test_a_single_text_is_one_document():
    assert Corpus.from_texts("abc").documents == 1 and Corpus.from_texts(b"abc").documents == 1


def test_a_prompt_that_spells_the_separator_is_read_as_text(tmp_path, monkeypatch):
    tokenizer = byte_level(tmp_path)
    layers = (Layer.Config(mixer=find("gla").Config(n_heads=2)),)
    model = LanguageModel.Config(vocab_size=tokenizer.vocab_size, d_model=32, layers=layers).build()
    everlong.save(model, tmp_path / "model", tokenizer)
    read, seen = LanguageModel.read, []
    monkeypatch.setattr(
        LanguageModel, "read", lambda self, tokens, *args, **options: seen.append(tokens) or read(self, tokens, *args)
    )
    list(continue_text(tmp_path / "model", "a<|endoftext|>b", max_tokens=1))
    assert seen[0][0].tolist().count(tokenizer.eos) == 1 and int(seen[0][0, 0]) == tokenizer.eos
