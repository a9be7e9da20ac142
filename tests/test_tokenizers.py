"""Tokenizers of other libraries, each against the library itself; words, SentencePiece; every mistake with its hint."""

import json

import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import hf
from data import convert, tokenizer
from errors import UserError
from tests.helpers import ROOT

CORPUS = [path.read_text() for path in sorted(ROOT.glob("*.py"))[:8]] + [
    "héllo wörld, ça va? 中文字符 中文 мир мира 123456 "
] * 20
HELD_OUT = "".join((ROOT / name).read_text() for name in ("tests/test_muon.py", "README.md", "docs/kernels.md"))
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NASTY = [
    "",
    " ",
    "\n\n  \r\n\t x",
    "a" * 5000,
    " " * 3000 + "b",
    "7" * 1000,
    "Don'T I'LL ſ's",
    "e\u0301 \u200d👩‍👩‍👧 \u2028\x00\x7f",
]


def library_bpe(pattern=None, vocab_size=700, special_tokens=()):
    """A byte-level BPE of the tokenizers library, trained on CORPUS; cut as GPT-2 does, or by a pattern."""
    made = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    made.pre_tokenizer = pre_tokenizers.Sequence([*split, level]) if split else level
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=alphabet,
            show_progress=False,
            special_tokens=[AddedToken(text, special=True) for text in special_tokens],
        ),
    )
    return made


@pytest.fixture(scope="module", params=["gpt2", "special tokens first"])
def pair(request, tmp_path_factory):
    """(the library's tokenizer, ours from its tokenizer.json)"""
    pattern = None if request.param == "gpt2" else LLAMA3
    special = ("<pad>", "<|end_of_text|>") if request.param.startswith("special") else ()
    theirs = library_bpe(pattern, special_tokens=special)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    theirs.save(str(path))
    return theirs, tokenizer.load(path)


def test_converted_tokenizer_json_equals_the_library_token_for_token(pair):
    theirs, ours = pair
    for text in (HELD_OUT, *NASTY):
        assert ours.encode_ordinary(text) == theirs.encode(text).ids
    for id in range(theirs.get_vocab_size()):  # ids that are whole characters decode to the same text
        mine = ours.decode_single_token_bytes(id)
        assert theirs.decode([id], skip_special_tokens=False) == mine.decode("utf-8", "replace")


@settings(deadline=None, max_examples=100)
@given(text=st.text())
def test_converted_equals_the_library_and_round_trips_on_any_text(pair, text):
    theirs, ours = pair
    ids = ours.encode_ordinary(text)
    assert ids == theirs.encode(text).ids and ours.decode(ids) == text


def test_special_tokens_keep_their_ids_and_end_of_text_is_found(pair):
    theirs, ours = pair
    added = {token.content: id for id, token in theirs.get_added_tokens_decoder().items()}
    if added:
        assert ours._special_tokens == added == {"<pad>": 0, "<|end_of_text|>": 1} and ours.n_vocab == 700
        assert tokenizer.end_of_text(ours) == 1
    else:  # none in the file: ours comes after the last
        assert tokenizer.end_of_text(ours) == theirs.get_vocab_size() == ours.n_vocab - 1 == 700
    about = tokenizer.describe(ours)
    assert about["separator"] == tokenizer.end_of_text(ours) and about["special_tokens"] == ours._special_tokens
    assert about["tokenizer_fingerprint"] == tokenizer.fingerprint(ours) and json.dumps(about)


def test_llama3_style_lists_of_every_split_are_read(tmp_path):
    """Files made from ranks list all pairs that make a token, not only the one that does, and rely on ignore_merges for
    tokens that no merge makes."""
    trained = tokenizer.train_bpe(CORPUS, 600, pattern=LLAMA3)
    ranks = dict(trained._mergeable_ranks) | {b"zqj": 599}  # a whole word that no pair of tokens makes
    letters = convert.byte_letters()
    write = lambda token: "".join(letters[byte] for byte in token)
    splits = lambda token: [(token[:i], token[i:]) for i in range(1, len(token))]
    merges = [
        [write(a), write(b)]
        for token in sorted(ranks, key=ranks.get)
        for a, b in sorted((s for s in splits(token) if s[0] in ranks and s[1] in ranks), key=lambda s: ranks[s[0]])
    ]
    assert len(merges) > len(ranks) - 256
    about = json.loads(library_bpe(LLAMA3).to_str())
    about["model"] |= {"vocab": {write(t): i for t, i in ranks.items()}, "merges": merges, "ignore_merges": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(about))
    theirs, ours = Tokenizer.from_str(json.dumps(about)), tokenizer.load(tmp_path)  # a folder that holds one
    for text in (HELD_OUT, "zqj zqjx azqj", *NASTY):
        assert ours.encode_ordinary(text) == theirs.encode(text).ids
    assert ours.encode_ordinary("zqj") == [599]
    exported = Tokenizer.from_str(json.dumps(hf.to_hf_tokenizer(ours)[0]))
    for text in (HELD_OUT.replace("<|endoftext|>", ""), "zqj zqjx azqj", *NASTY):
        assert exported.encode(text).ids == ours.encode_ordinary(text)
    about["model"]["ignore_merges"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="do not follow the merges"):
        tokenizer.load(tmp_path)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.text("abc", min_size=2, max_size=4), min_size=1, max_size=8, unique=True),
    st.randoms(use_true_random=False),
)
def test_any_accepted_merge_list_encodes_as_the_library_does(tokens, random):
    """Merges drawn at random, mostly unlike any training: either refused, or equal on every short text."""
    vocab = {letter: number for number, letter in enumerate(convert.byte_letters().values())}
    merges, ignore_merges = [], random.random() < 0.5
    for token in sorted(tokens, key=len):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
        if pairs and token not in vocab:
            vocab[token] = len(vocab)
            merges.append(random.choice(pairs))
        elif ignore_merges and token not in vocab:  # found as a whole word only
            vocab[token] = len(vocab)
    made = [token for token in vocab if len(token) > 1]
    if random.random() < 0.3:  # ids that do not follow the merges
        vocab |= zip(made, random.sample([vocab[token] for token in made], len(made)))
    theirs = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    ranks = {token.encode("latin-1"): id for token, id in vocab.items() if token.isascii() and token.isprintable()}
    order = {(a.encode(), b.encode()): place for place, (a, b) in enumerate(merges)}
    ranks = ranks | {bytes([b]): vocab[letter] for b, letter in convert.byte_letters().items()}
    texts = {"".join(random.choices("abc", k=k % 9 + 1)) for k in range(100)}
    ours = tokenizer.encoding("x", ranks, r"[a-z]+")
    equal = all(ours.encode_ordinary(text) == theirs.encode(text).ids for text in texts)
    try:
        convert._check("x", ranks, order, ignore_merges, {})
    except UserError:
        return
    assert equal


def spoil(about, kind):
    model, steps = about["model"], about["pre_tokenizer"]["pretokenizers"]
    if kind == "normalizer":
        about["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    elif kind == "prefix space":
        steps[1]["add_prefix_space"] = True
    elif kind == "letter case before the last split":
        steps.insert(0, steps[0])
    elif kind == "no words":
        about["pre_tokenizer"] = steps[1]
    elif kind == "removed":
        steps[0]["behavior"] = "Removed"
    elif kind == "possessive":
        steps[0]["pattern"]["Regex"] = r"\p{N}{1,3}+|\P{N}+"
    elif kind == "line ends":
        steps[0]["pattern"]["Regex"] = r"[^$]+$|[\s\S]"
    elif kind == "hex":
        steps[0]["pattern"]["Regex"] = r"\h+|\H+"
    elif kind == "word class":
        steps[0]["pattern"]["Regex"] = r"\w+|[^\w\s]+|\s+"
    elif kind == "unknown class":
        steps[0]["pattern"]["Regex"] = r"\p{Nonsense}+|[\s\S]"
    elif kind == "metaspace":
        about["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}
    elif kind == "none":
        about["pre_tokenizer"] = None
    elif kind == "unigram":
        about["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0]]}
    elif kind == "byte fallback":
        model["byte_fallback"] = True
    elif kind == "ids swapped":
        model["vocab"] = {token: {300: 400, 400: 300}.get(id, id) for token, id in model["vocab"].items()}
    elif kind == "not bytes":
        model["vocab"]["▁the"] = 5000
    elif kind == "byte missing":
        del model["vocab"]["A"]
    elif kind == "white space":
        about["added_tokens"] = [{"id": 5000, "content": "  ", "special": True}]
    elif kind == "id twice":
        about["added_tokens"] = [{"id": 300, "content": "<x>", "special": True}]


@pytest.mark.parametrize(
    "kind, message",
    [
        ("normalizer", "a normalizer, NFC, Lowercase"),
        ("prefix space", "add_prefix_space"),
        ("letter case before the last split", r"'\(', which tiktoken reads in another way"),
        ("no words", "the pre_tokenizers ByteLevel without use_regex, alone"),
        ("removed", "Removed"),
        ("possessive", r"'\{1,3\}.', which tiktoken reads in another way"),
        ("line ends", "'.', which tiktoken reads in another way"),
        ("hex", "which tiktoken reads in another way"),
        ("word class", "which tiktoken reads in another way"),
        ("unknown class", "tiktoken cannot read the pattern"),
        ("metaspace", "Metaspace"),
        ("none", "no tokenizer.json of a BPE"),
        ("unigram", "no tokenizer.json of a BPE"),
        ("byte fallback", "byte_fallback"),
        ("ids swapped", "do not follow the merges"),
        ("not bytes", "no byte-level BPE"),
        ("byte missing", "single byte is missing"),
        ("white space", "added tokens of white space"),
        ("id twice", "an id stands twice"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(tmp_path, kind, message):
    about = json.loads(library_bpe(LLAMA3, 450).to_str())
    spoil(about, kind)
    (tmp_path / "t.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=message) as error:
        tokenizer.load(str(tmp_path / "t.json"))
    assert kind == "unknown class" or str(tmp_path) in str(error.value)


def test_our_own_export_comes_back_the_same(tmp_path):
    encoder = tokenizer.train_bpe(CORPUS, 700)
    about = hf.to_hf_tokenizer(encoder)[0]
    for merges in (about["model"]["merges"], [" ".join(merge) for merge in about["model"]["merges"]]):  # new, old form
        about["model"]["merges"] = merges
        (tmp_path / "tokenizer.json").write_text(json.dumps(about))
        assert tokenizer.fingerprint(tokenizer.load(tmp_path)) == tokenizer.fingerprint(encoder)


# ---------------------------------------------------------------------- training


@pytest.mark.slow
def test_trained_merges_are_those_of_the_tokenizers_library():
    """Every merge in order, on half a megabyte, so ties and stale counts occur in thousands."""
    corpus = [path.read_text() for path in sorted(ROOT.glob("**/*.py")) if ".venv" not in path.parts]
    other = Tokenizer(models.BPE())
    other.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(tokenizer.PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    other.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=3999, initial_alphabet=alphabet, show_progress=False)
    )
    ours = tokenizer.train_bpe(corpus, 4000)
    assert sum(map(len, corpus)) > 500_000 and ours.n_vocab == 4000
    letter = convert.byte_letters()
    written = {"".join(letter[byte] for byte in token): id for token, id in ours._mergeable_ranks.items()}
    assert written == other.get_vocab()


# ---------------------------------------------------------------------- tiktoken names


def test_names_without_network_say_where_the_file_goes(monkeypatch, tmp_path):
    def offline(address):
        error = ConnectionError("no network")
        error.request = type("Request", (), {"url": address})  # as requests does
        raise error

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", offline)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(UserError, match=r"fetch http\S+/cl100k_base.tiktoken .*--tokenizer=PATH/cl100k_base") as error:
        tokenizer.load("cl100k")
    place = regex.search(r"\$TIKTOKEN_CACHE_DIR/(\w+)", str(error.value))[1]
    tokenizer.save(tokenizer.load("bytes"), tmp_path / "bytes")
    (tmp_path / place).write_bytes((tmp_path / "bytes/ranks.tiktoken").read_bytes())
    monkeypatch.setattr(tiktoken.load, "check_hash", lambda data, expected: True)
    assert tokenizer.load("cl100k").name == "cl100k_base"  # tiktoken itself finds the file there


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base", "o200k_harmony"])
def test_a_ranks_file_named_as_an_encoding_gets_its_pattern_and_special_tokens(tmp_path, monkeypatch, name):
    ranks = tokenizer.train_bpe(["1234567 1234567 don't 12345 x"] * 9, 280)._mergeable_ranks
    tokenizer.save(tokenizer.encoding("x", ranks), tmp_path)
    (tmp_path / "ranks.tiktoken").rename(tmp_path / f"{name}.tiktoken")
    ours = tokenizer.load(tmp_path / f"{name}.tiktoken")
    assert openai_public.load_tiktoken_bpe is tiktoken.load.load_tiktoken_bpe  # put back
    for function in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(openai_public, function, lambda *args, **kwargs: ranks)
    about = getattr(openai_public, name)()
    assert ours._pat_str == about["pat_str"] and ours._special_tokens == about["special_tokens"]
    wrong = {**ranks, b"wrong": min(about["special_tokens"].values())}
    tokenizer.save(tokenizer.encoding("x", wrong), tmp_path)
    (tmp_path / "ranks.tiktoken").rename(tmp_path / f"{name}.tiktoken")
    with pytest.raises(UserError, match="of another tokenizer"):
        tokenizer.load(tmp_path / f"{name}.tiktoken")
    assert ours._mergeable_ranks == ranks and tokenizer.end_of_text(ours) == about["special_tokens"]["<|endoftext|>"]
