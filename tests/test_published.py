"""Tokenizers in the forms in which they are published, made here in small: DeepSeek-V3, Qwen, SmolLM, Llama-3, GPT-2,
Kimi, each against the library it is made for; what separates documents, and what is said of it; long words."""

import base64
import functools
import json

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import export
import generate
import hf
from data import bpe, convert, prepare, tokenizer
from data.shards import open_split, read_meta
from errors import UserError
from run import report
from tests.helpers import ROOT, make_config, records, run_train

CORPUS = [(ROOT / name).read_text(encoding="utf-8")[:20_000] for name in ("README.md", "train.py")]
CORPUS.append("héllo wörld 中文字符测试,中文 ひらがなカタカナ мир 123456 7 e\u0301 hello there I'm CAN'T don't\n" * 30)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_LETTERS = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
KIMI = (
    rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_LETTERS}*[\p{{Ll}}{_LETTERS}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_LETTERS}+[\p{{Ll}}{_LETTERS}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K_LIKE = KIMI.replace(r"&&[^\p{Han}]", "").removeprefix(r"[\p{Han}]+|")


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def byte_level(use_regex=False):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


FORMS = {  # normalizer, steps before BPE
    "deepseek": (None, [*map(split, DEEPSEEK), byte_level()]),
    "qwen": (normalizers.NFC(), [split(LLAMA3.replace("{1,3}", "")), byte_level()]),
    "smollm": (None, [pre_tokenizers.Digits(individual_digits=True), byte_level(True)]),
    "whole numbers": (None, [pre_tokenizers.Digits(individual_digits=False), byte_level(True)]),
    "llama3": (None, [split(LLAMA3), byte_level()]),
    "gpt2": (None, [byte_level(True)]),
    "leaves out": (None, [split(r"\p{L}+|\s+"), byte_level()]),
}
ADDED = [  # every kind of flag, words that are tokens already, one that starts as another does
    AddedToken("<think>", normalized=False),
    AddedToken("</think>"),
    AddedToken("hello"),
    AddedToken("hello there"),
    AddedToken("solo", single_word=True),
    AddedToken("<l>", lstrip=True),
    AddedToken("<r>", rstrip=True, normalized=False),
    AddedToken("é"),
    AddedToken("   "),
    AddedToken("train"),
    AddedToken("世界"),
    AddedToken("<mask>"),  # behind the next, which is looked for before normalising
    AddedToken("<ma", normalized=False),
]
SPECIAL = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")


def make(form, added=(), special=SPECIAL):
    """A tokenizer of the library in a published form; special tokens in a text stay text, as here."""
    made = Tokenizer.from_str(trained(form, tuple(special)))
    made.add_tokens(list(added))
    made.encode_special_tokens = True
    return made


@functools.cache
def trained(form, special):
    made, (normalizer, steps) = Tokenizer(models.BPE()), FORMS[form]
    if normalizer:
        made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=[AddedToken(text, special=True) for text in special],
    )
    made.train_from_iterator(CORPUS, trainer)
    return made.to_str()


@pytest.fixture(scope="module", params=[(form, added) for form in FORMS for added in (False, True)], ids=str)
def forms(request, tmp_path_factory):
    """The library's tokenizer; ours of the same tokenizer.json, saved and loaded; the library's of our export."""
    form, added = request.param
    theirs, folder = make(form, ADDED if added else ()), tmp_path_factory.mktemp("form")
    theirs.save(str(folder / "tokenizer.json"))
    ours = tokenizer.load(folder)
    tokenizer.save(ours, folder / "saved")
    again = tokenizer.load(folder / "saved")
    assert tokenizer.describe(again) == tokenizer.describe(ours)
    exported = Tokenizer.from_str(json.dumps(hf.to_hf_tokenizer(ours)[0]))
    exported.encode_special_tokens = True
    return theirs, again, exported


ATOMS = [*"aA1 \n\t\r.!#_中ひカßſ٣½Ǆ\x00\x1c\u200d\u3000", "hello", "hello there", "solo", " solo ", "<think>"]
ATOMS += ["</think>", "<l>", " <l>", "<r>", "<r> \n x", "é", "e\u0301", "   ", "23", "4567", "世界", "'s", "'LL", "the"]
ATOMS += ["<mask>", "<ma", "train", "👩‍👩", "क्षि", "\r\n", *SPECIAL]


@settings(deadline=None, max_examples=60)
@given(text=st.lists(st.sampled_from(ATOMS), max_size=12).map("".join) | st.text(max_size=30))
def test_published_forms_encode_as_the_library_does(forms, text):
    theirs, ours, exported = forms
    ids = theirs.encode(text).ids
    assert ours.encode_ordinary(text) == ids == exported.encode(text).ids
    assert tokenizer.encode(ours, text).tolist() == [1, *ids]  # behind <｜end▁of▁sentence｜>


def test_published_forms_on_long_texts_and_runs(forms):
    theirs, ours, _ = forms
    lines = "\n" * 1000, "a<mask> <ma"
    for text in ("".join(CORPUS)[:20_000], *lines, "\x00" * 3000, "7" * 1000, "中" * 1000, " " * 3000 + "x"):
        assert ours.encode_ordinary(text) == theirs.encode(text).ids
    assert ours.encode_ordinary_batch(["a 1", "b"], num_threads=2) == [theirs.encode(text).ids for text in ("a 1", "b")]
    spaces = tokenizer.encode(ours, " " * 10**6)
    assert ours.decode(spaces[1:].tolist()) == " " * 10**6
    assert ours.decode(tokenizer.encode(ours, "\x01" * 10**6)[1:].tolist()) == "\x01" * 10**6


def test_old_fingerprints_stay():
    """Of folders that earlier versions wrote: nothing of what was added since is in them."""
    ranks = {bytes([i]): i for i in range(256)}
    plain = tokenizer.encoding("x", ranks, LLAMA3, {"<|end_of_text|>": 256, "<|eot_id|>": 257})
    assert tokenizer.fingerprint(tokenizer.load("bytes")) == "5ebdecd157f033ca"
    assert tokenizer.fingerprint(plain) == "fbbfdc06e7f09f09"
    plain.separator = "<|end_of_text|>"  # what its name says as well
    assert tokenizer.fingerprint(plain) == "fbbfdc06e7f09f09"
    plain.separator = "<|eot_id|>"
    assert tokenizer.fingerprint(plain) != "fbbfdc06e7f09f09"


# ---------------------------------------------------------------------- ranks files


@pytest.fixture(scope="module")
def ranks():
    return tokenizer.train_bpe(CORPUS[2:], 500, pattern=O200K_LIKE)._mergeable_ranks


def write(folder, ranks=None, **files):
    """A folder with a ranks file of the name `ranks_name`, and JSON files."""
    folder.mkdir(parents=True, exist_ok=True)
    name = files.pop("ranks_name", "tiktoken.model")
    if ranks:
        lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
        (folder / name).write_bytes(b"".join(lines))
    for stem, value in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return folder


def test_kimis_own_files(tmp_path, ranks):
    n = len(ranks)
    named = {"[BOS]": n, "[EOS]": n + 1, "<|im_end|>": n + 2, "[PAD]": n + 255}
    added = {str(id): {"content": text, "special": True} for text, id in named.items()}
    added[str(n + 9)] = {"content": "<think>", "special": False}
    about = {"tokenizer_class": "TikTokenTokenizer", "added_tokens_decoder": added, "eos_token": "<|im_end|>"}
    folder = write(tmp_path / "kimi", ranks, tokenizer_config=about, config={"model_type": "kimi_k2"})
    ours = tokenizer.load(folder)
    reserved = {f"<|reserved_token_{i}|>": i for i in range(n, n + 256) if str(i) not in added}
    theirs = tiktoken.Encoding(
        "kimi", pat_str=KIMI, mergeable_ranks=ranks, special_tokens=named | reserved | {"<think>": n + 9}
    )
    assert ours._special_tokens == theirs._special_tokens and ours.n_vocab == theirs.n_vocab == n + 256
    for text in ("I'm here", "CAN'T wait", "世界Hello世界 don't 12345", "a<think>b", "[EOS]", *CORPUS):
        assert ours.encode_ordinary(text) == theirs.encode(text, allowed_special={"<think>"}, disallowed_special=())
    assert tokenizer.end_of_text(ours) == n + 1  # not the end of a chat's turn that the folder declares
    assert any("<|im_end|>" in line and "turn of a chat" in line for line in tokenizer.notes(ours))
    assert tokenizer.fingerprint(tokenizer.load(folder / "tiktoken.model")) == tokenizer.fingerprint(ours)
    exported = Tokenizer.from_str(json.dumps(hf.to_hf_tokenizer(ours)[0]))
    for text in ("世界Hello世界 don't 12345", "a<think>b", CORPUS[2]):
        assert exported.encode(text).ids == ours.encode_ordinary(text)
    assert exported.token_to_id("[PAD]") == n + 255


@pytest.mark.parametrize(
    "name, files, pattern, first",
    [
        ("tokenizer.model", {"params": {"vocab_size": "n + 256"}}, LLAMA3, ["<|begin_of_text|>", "<|end_of_text|>"]),
        ("tokenizer.model", {"config": {"model_type": "llama"}}, LLAMA3, ["<|begin_of_text|>", "<|end_of_text|>"]),
        ("qwen.tiktoken", {"config": {"model_type": "qwen"}}, LLAMA3.replace("{1,3}", ""), ["<|endoftext|>"]),
    ],
)
def test_other_ranks_files_that_their_folder_names(tmp_path, ranks, name, files, pattern, first):
    n = len(ranks)
    files = {stem: {k: n + 256 if v == "n + 256" else v for k, v in value.items()} for stem, value in files.items()}
    write(tmp_path / "m", ranks, ranks_name=name, **files)
    ours = tokenizer.load(tmp_path / "m")
    theirs = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    assert list(ours._special_tokens)[: len(first)] == first and ours._special_tokens[first[0]] == n
    assert ours.n_vocab == n + (208 if "qwen" in name else 256) and tokenizer.end_of_text(ours) == n + len(first) - 1
    for text in CORPUS:
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)
    if "params" in files:  # as the weights' own repository has it, in a folder below
        write(tmp_path / "hub/original", ranks, ranks_name=name, **files)
        assert tokenizer.fingerprint(tokenizer.load(tmp_path / "hub")) == tokenizer.fingerprint(ours)


def test_a_ranks_file_that_nothing_names_is_refused_with_how_to_name_it(tmp_path, ranks):
    path = write(tmp_path / "bare", ranks, ranks_name="mine.tiktoken") / "mine.tiktoken"
    for spec in (path, path.parent, f"{path}?pattern=nonsense"):
        with pytest.raises(UserError, match=r"\?pattern=NAME', with NAME one of nanok2 .*kimi.*o200k_base.*encoding"):
            tokenizer.load(spec)
    before = tokenizer.load(f"{path}?pattern=nanok2")  # as earlier versions read it
    assert tokenizer.fingerprint(before) == tokenizer.fingerprint(tokenizer.encoding("mine", ranks))
    assert tokenizer.load(f"{path}?pattern=kimi")._pat_str == KIMI
    llama4 = write(tmp_path / "l4", ranks, ranks_name="tokenizer.model", params={"vocab_size": len(ranks) + 1135})
    with pytest.raises(UserError, match="nothing says how this ranks file cuts words"):
        tokenizer.load(llama4)
    own = {"pattern": LLAMA3, "special_tokens": {"<end>": len(ranks)}, "separator": "<end>"}
    write(path.parent, encoding=own)
    for spec in (path, path.parent):
        assert tokenizer.load(spec)._pat_str == LLAMA3 and tokenizer.end_of_text(tokenizer.load(spec)) == len(ranks)
    with pytest.raises(UserError, match=r"end_of_text=TOKEN or pattern=NAME"):
        tokenizer.load(f"{path}?patern=kimi")
    with pytest.raises(UserError, match=r"has none|is no tokenizer folder .*tiktoken\.model"):
        tokenizer.load(write(tmp_path / "empty"))


# ---------------------------------------------------------------------- what separates documents


def hub_folder(folder, special, added=(), **files):
    make("gpt2", added, special).save(str(write(folder, **files) / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    "special, files, separator",
    [
        (["<|bos|>", "<|im_end|>"], {"tokenizer_config": {"eos_token": "<|im_end|>"}}, "<|im_end|>"),
        (["<|bos|>", "<x>"], {"tokenizer_config": {"bos_token": {"content": "<|bos|>"}}}, "<|bos|>"),
        (["<|endoftext|>", "<eod>"], {"special_tokens_map": {"eos_token": {"content": "<eod>"}}}, "<eod>"),
        (["<|endoftext|>", "<|im_end|>"], {"config": {"eos_token_id": 1}}, "<|endoftext|>"),
        (["<a>", "<b>", "<|eot_id|>"], {"generation_config": {"eos_token_id": [2, 1]}}, "<b>"),
        (["<a>", "<b>"], {"config": {"eos_token_id": None}, "tokenizer_config": {"eos_token": "<none>"}}, None),
        (["<a>"], {}, None),
        (["</s>"], {}, "</s>"),
    ],
)
def test_the_end_of_text_token_that_the_folder_declares(tmp_path, special, files, separator):
    encoder = tokenizer.load(hub_folder(tmp_path / "t", special, **files))
    expected = None if separator is None else special.index(separator)
    tokenizer.save(encoder, tmp_path / "saved")
    again = tokenizer.load(tmp_path / "saved")
    for one in (encoder, again):
        assert tokenizer.end_of_text(one) == tokenizer.describe(one)["separator"] == expected
        assert tokenizer.encode(one, "a")[0] == (again.encode_ordinary("a")[0] if expected is None else expected)
    assert tokenizer.fingerprint(again) == tokenizer.fingerprint(encoder)
    said = "\n".join(tokenizer.notes(encoder))
    if separator is None:
        assert "warning" in said and "documents run together" in said and "?end_of_text=" in said and special[0] in said
        with pytest.raises(UserError, match=r"none of the special tokens .*<a>"):
            tokenizer.load(f"{tmp_path}/t?end_of_text=<eod>")
    else:
        assert f"documents are separated by {separator}, id {expected}" in said
        assert hf.to_hf_tokenizer(again)[1]["eos_token"] == separator
    chosen = tokenizer.load(f"{tmp_path}/t?end_of_text={special[0]}")
    assert tokenizer.end_of_text(chosen) == 0
    assert (tokenizer.fingerprint(chosen) == tokenizer.fingerprint(encoder)) == (expected == 0)


def test_a_separator_that_a_text_spells_is_text(tmp_path):
    """Also where it was added as no special token: no document can end itself."""
    added = [AddedToken("<eod>"), AddedToken("<think>")]
    folder = hub_folder(tmp_path / "t", ["<a>"], added, tokenizer_config={"eos_token": "<eod>"})
    encoder, theirs = tokenizer.load(folder), make("gpt2", added, ["<a>"])
    ids = tokenizer.encode(encoder, "x<eod>y<think>").tolist()
    assert ids[0] == theirs.token_to_id("<eod>") and ids[0] not in ids[1:] and ids[-1] == theirs.token_to_id("<think>")
    assert theirs.encode("x<eod>y").ids.count(ids[0]) == 1
    plain = hub_folder(tmp_path / "p", [], tokenizer_config={"added_tokens_decoder": {"700": {"content": "<new>"}}})
    assert tokenizer.load(plain)._special_tokens == {"<new>": 700}  # only tokenizer_config.json knows it
    assert tokenizer.load(hub_folder(tmp_path / "n", [])).n_vocab == 701  # none at all: ours, and it is said
    assert any("<|endoftext|> is added, id 700" in line for line in tokenizer.load(tmp_path / "n").notes)


@pytest.fixture(scope="module")
def unseparated(tmp_path_factory):
    """(a tokenizer folder without an end of text, a folder of data made with it)"""
    folder = tmp_path_factory.mktemp("none")
    hub_folder(folder / "tok", ["<a>", "<b>"])
    rows = (json.dumps({"text": f"document number {i}. "}) + "\n" for i in range(300))
    (folder / "x.jsonl").write_text("".join(rows), encoding="utf-8")
    words = [f"--tokenizer={folder}/tok", f"--out={folder}/d", "--val_fraction=0.1"]
    prepare.main(["jsonl", str(folder / "x.jsonl"), *words])
    return folder


def test_training_without_a_separator_warns_and_samples(unseparated, tmp_path, capsys, monkeypatch):
    options = dict(data=f"{unseparated}/d", vocab_size=700, sample_interval=2, sample_prompts=[""], max_steps=2)
    path = make_config(tmp_path / "c.py", out_dir=str(tmp_path / "run"), **options)
    run_train(path)
    said = capsys.readouterr().out
    assert "no end-of-text token: documents run together" in said and "the sample of" not in said
    assert read_meta(unseparated / "d")["separator"] is None
    model, encoder = generate.load(tmp_path / "run", "cpu")
    assert generate.encode_prompt(encoder, "") == encoder.encode_ordinary("\n")
    assert len("".join(generate.stream_text(model, encoder, generate.encode_prompt(encoder, ""), 20, seed=0))) > 3
    export.export(tmp_path / "run", tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text(encoding="utf-8"))["eos_token_id"] is None

    def broken(*args, **options):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(report, "stream_text", broken)
    record = run_train(path, f"--out_dir={tmp_path}/run2")
    said = capsys.readouterr().out
    assert record["step"] == 2 and "the sample of '' is incomplete (RuntimeError: out of luck); the run goes" in said
    assert len(records(tmp_path / "run2")) == 2 and not (tmp_path / "run2/samples.md").exists()


def test_prepared_data_is_separated_by_the_declared_token(unseparated, tmp_path, capsys):
    folder = hub_folder(tmp_path / "t", ["<|bos|>", "<|im_end|>"], tokenizer_config={"eos_token": "<|im_end|>"})
    words = ["jsonl", str(unseparated / "x.jsonl"), "--val_fraction=0.1"]
    prepare.main([*words, f"--tokenizer={folder}", f"--out={tmp_path}/d"])
    assert "documents are separated by <|im_end|>, id 1: eos_token of tokenizer_config.json" in capsys.readouterr().out
    meta, ids = read_meta(tmp_path / "d"), np.concatenate(open_split(tmp_path / "d", "train").arrays)
    assert meta["separator"] == 1 and (ids == 1).sum() == meta["splits"]["train"]["documents"] > 200
    prepare.main([*words, f"--tokenizer={folder}?end_of_text=<|bos|>", f"--out={tmp_path}/e"])
    assert read_meta(tmp_path / "e")["separator"] == 0


# ---------------------------------------------------------------------- long words


@settings(deadline=None, max_examples=40)
@given(
    texts=st.lists(st.text(st.sampled_from("aab \n中"), max_size=200) | st.just("a" * 777), min_size=1, max_size=4),
    size=st.integers(257, 330),
)
def test_merges_of_runs_and_ties_are_those_of_the_tokenizers_library(texts, size):
    other = Tokenizer(models.BPE())
    other.pre_tokenizer = pre_tokenizers.Sequence([split(tokenizer.PATTERN), byte_level()])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)
    other.train_from_iterator(texts, trainer)
    letter = convert.byte_letters()
    ours = tokenizer.train_bpe(texts, size)._mergeable_ranks
    assert {"".join(letter[byte] for byte in token): id for token, id in ours.items()} == other.get_vocab()


def test_training_takes_time_in_proportion_to_the_length_of_a_word():
    """Each of these took minutes to hours when every merge looked at the whole word again."""
    rng = np.random.default_rng(0)
    dna = "".join(rng.choice(list("ACGT"), 200_000))
    chinese = "".join(map(chr, 0x4E00 + rng.zipf(1.5, 100_000) % 3000))
    for text in (dna, "a" * 10**6, chinese):
        encoder = tokenizer.train_bpe([text], 300)
        assert encoder.n_vocab > 270 and encoder.decode(encoder.encode_ordinary(text[:999])) == text[:999]


def test_more_distinct_words_than_memory_holds_are_left_out_and_said(monkeypatch, capsys):
    monkeypatch.setattr(bpe, "MOST", 1000)
    few = tokenizer.train_bpe(["x" * 400, "hello " * 9, "y" * 5000, "never read"], 400)
    assert "trained on the first 1,000 of 5,4" in capsys.readouterr().out
    alone = tokenizer.train_bpe(["x" * 400, "hello " * 9, "y" * 588], 400)
    assert not capsys.readouterr().out and tokenizer.fingerprint(few) == tokenizer.fingerprint(alone)
