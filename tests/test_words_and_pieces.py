"""Word-level tokenizers and SentencePiece: against what they are made of, and through a whole run."""

import collections
import json
import sys

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import export
import generate
from data import tokenizer
from errors import UserError
from tests.helpers import make_config, make_data, run_train
from tests.test_tokenizers import CORPUS, HELD_OUT, NASTY

# ---------------------------------------------------------------------- words


@pytest.fixture(scope="module")
def words():
    return tokenizer.load("words:150", CORPUS)


def test_words_are_the_most_frequent_of_the_text(words):
    found = regex.findall(r"[\w]+(?:['’]\w+)*|[^\w\s]|\n", "".join(text + " " for text in CORPUS))
    counts = collections.Counter(found)
    kept = words.texts[1:-1]
    assert len(kept) == 150 and words.n_vocab == 152 and tokenizer.end_of_text(words) == 151
    assert min(counts[word] for word in kept) >= max(n for word, n in counts.items() if word not in kept)
    assert [counts[word] for word in kept] == sorted((counts[word] for word in kept), reverse=True)
    assert tokenizer.load("words:9", ["b a"]).texts == ["<unk>", "a", "b", "<|endoftext|>"]
    assert tokenizer.load("words:2", iter(["x <unk> y", "y <unk>"])).texts[1:-1] == ["y", "x"]


def test_words_decode_to_readable_text_and_unknown_ones_are_marked():
    encoder = tokenizer.load("words:50", ["Don't stop, she said (twice): go!\nThen the bird’s song."])
    text = "Don't stop, she said: go!\nThen the bird’s song."
    assert encoder.decode(encoder.encode_ordinary(text)) == text
    ids = encoder.encode_ordinary("Then the  zebra\tsaid <unk>.")
    assert encoder.decode(ids) == "Then the <unk> said <unk>." and ids.count(0) == 2
    assert b"".join(map(encoder.decode_single_token_bytes, ids)).decode() == " " + encoder.decode(ids)
    with pytest.raises(KeyError):
        encoder.decode_single_token_bytes(encoder.n_vocab)


@settings(deadline=None, max_examples=200)
@given(ids=st.lists(st.integers(0, 150), max_size=40), text=st.text())
def test_words_encode_what_they_decoded(words, ids, text):
    assert words.encode_ordinary(words.decode(ids)) == ids
    assert words.encode_ordinary(words.decode(words.encode_ordinary(text))) == words.encode_ordinary(text)


@pytest.mark.parametrize(
    "spec, texts", [("words:10", None), ("words:0", ["a"]), ("words:many", ["a"]), ("words:", ["a"])]
)
def test_words_without_data_or_number_say_how(spec, texts):
    with pytest.raises(UserError, match="--tokenizer=words:10000"):
        tokenizer.load(spec, texts)


# ---------------------------------------------------------------------- SentencePiece


@pytest.fixture(scope="module")
def piece_model(tmp_path_factory):
    """A model as Llama's: BPE with byte fallback, text left as it is."""
    sentencepiece = pytest.importorskip("sentencepiece")
    path = tmp_path_factory.mktemp("sp") / "tiny"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.splitlines()),
        model_prefix=str(path),
        vocab_size=800,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return path.with_suffix(".model")


def test_sentencepiece_equals_its_library(piece_model):
    import sentencepiece

    theirs, ours = sentencepiece.SentencePieceProcessor(model_file=str(piece_model)), tokenizer.load(str(piece_model))
    assert ours.n_vocab == theirs.get_piece_size() == 800 and tokenizer.end_of_text(ours) == theirs.eos_id() == 2
    for text in (HELD_OUT, *NASTY):
        ids = ours.encode_ordinary(text)
        assert ids == theirs.encode_as_ids(text) and ours.decode(ids) == theirs.decode_ids(ids)
        pieces = b"".join(map(ours.decode_single_token_bytes, ids))
        assert pieces.removeprefix(b" ").decode() == ours.decode(ids)
    assert ours.decode_single_token_bytes(2) == b"" and tokenizer.describe(ours)["special_tokens"]["</s>"] == 2


def test_a_sentencepiece_end_of_text_of_any_name_separates(piece_model, tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS[0].splitlines()),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        eos_piece="<eod>",
        minloglevel=2,
    )
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")  # Llama-2 has one beside it that is not byte-level
    encoder = tokenizer.load(tmp_path)
    tokenizer.save(encoder, tmp_path / "saved")
    assert tokenizer.end_of_text(encoder) == tokenizer.end_of_text(tokenizer.load(tmp_path / "saved")) == 2
    assert tokenizer.encode(encoder, "a").tolist() == [2, *encoder.processor.encode("a")]
    assert tokenizer.fingerprint(tokenizer.load(tmp_path / "saved")) == tokenizer.fingerprint(encoder)
    plain = tokenizer.load(str(piece_model))  # </s>: nothing that earlier versions did not find
    assert plain.separator is None and tokenizer.end_of_text(plain) == 2


@settings(deadline=None, max_examples=200)
@given(text=st.text())
def test_sentencepiece_round_trip(piece_model, text):
    encoder = tokenizer.load(str(piece_model))
    assert encoder.decode(encoder.encode_ordinary(text)) == text


def test_damaged_sentencepiece_and_missing_package_are_clear(tmp_path, piece_model, monkeypatch):
    (tmp_path / "bad.model").write_bytes(piece_model.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        tokenizer.load(str(tmp_path / "bad.model"))
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="pip install sentencepiece"):
        tokenizer.load(str(piece_model))


# ---------------------------------------------------------------------- both kinds through the whole project


@pytest.mark.parametrize("kind", ["words", "sentencepiece"])
def test_saved_and_loaded_the_same(tmp_path, kind, request):
    made = request.getfixturevalue("words") if kind == "words" else None
    made = made or tokenizer.load(str(request.getfixturevalue("piece_model")))
    tokenizer.save(made, tmp_path / "t")
    again = tokenizer.load(tmp_path / "t")
    assert tokenizer.fingerprint(again) == tokenizer.fingerprint(made) != tokenizer.fingerprint(tokenizer.load("bytes"))
    assert tokenizer.describe(again) == tokenizer.describe(made)
    assert all(made.encode_ordinary(text) == again.encode_ordinary(text) for text in CORPUS[:2])
    if kind == "sentencepiece":  # what counts is the model, not its name
        (tmp_path / "other.model").write_bytes(made.model)
        other = tokenizer.load(str(tmp_path / "other.model"))
        assert other.name != made.name and tokenizer.fingerprint(other) == tokenizer.fingerprint(made)
    else:
        assert tokenizer.fingerprint(tokenizer.load("words:149", CORPUS)) != tokenizer.fingerprint(made)
    assert again.encode_ordinary(HELD_OUT) == made.encode_ordinary(HELD_OUT)
    assert again.decode_bytes(again.encode_ordinary("a b")) == made.decode(made.encode_ordinary("a b")).encode()


@pytest.mark.parametrize("kind", ["words", "sentencepiece"])
def test_a_run_with_it_generates_and_exports(tmp_path, kind, request, capsys):
    if kind == "words":
        encoder = request.getfixturevalue("words")
    else:
        encoder = tokenizer.load(str(request.getfixturevalue("piece_model")))
    data = make_data(tmp_path / "d")
    meta = json.loads((data / "meta.json").read_text())
    (data / "meta.json").write_text(json.dumps(meta | tokenizer.describe(encoder)))
    tokenizer.save(encoder, data / "tokenizer")
    config = make_config(
        tmp_path / "c.py", data=str(data), out_dir=str(tmp_path / "run"), vocab_size=encoder.n_vocab, max_steps=2
    )
    run_train(config)
    capsys.readouterr()
    model, loaded = generate.load(tmp_path / "run", "cpu")
    ids = generate.encode_prompt(loaded, "def import")
    assert ids[0] == tokenizer.end_of_text(encoder)
    streamed = "".join(generate.stream_text(model, loaded, ids, 20, seed=0, temperature=1.0))
    assert streamed.strip() and len(loaded.encode_ordinary(streamed)) > 3
    if kind == "sentencepiece":
        with pytest.raises(UserError, match="move the run's tokenizer folder away"):
            export.export(tmp_path / "run", tmp_path / "hf")
        return
    export.export(tmp_path / "run", tmp_path / "hf")
    theirs = Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json"))
    for text in (HELD_OUT.replace("<|endoftext|>", ""), "a <unk>. héllo! 中文\n\nx", ""):
        assert theirs.encode(text).ids == encoder.encode_ordinary(text)
