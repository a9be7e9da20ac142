"""Sampling, the latent cache, sliding, and the command line of generate.py."""

import io
import json

import pytest
import torch

import generate
import mla
from data import tokenizer as tokenizers
from decoding import speculate
from errors import UserError
from model import K2
from sampling import next_token
from tests.helpers import run_train, tiny_model, tokens


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    from tests.helpers import make_config

    folder = tmp_path_factory.mktemp("generate")
    run_train(make_config(folder / "c.py", data=str(data), out_dir=str(folder / "run")))
    return folder / "run"


MODELS = [
    {},
    {"q_lora_rank": 24},
    {"attention": "mha"},
    {"n_routed_experts": 0},
    {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale_all_dim": 1.0}},
]


@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_prefill_and_decode_equal_the_training_forward(changes):
    model, x = tiny_model(**changes).eval(), tokens(3, 40)
    with torch.no_grad():
        full = model(x)
        for cuts in ([40], [39, 1], [1] * 40, [7, 20, 1, 1, 11]):
            cache = model.new_cache(3, 40)
            parts = torch.cat([model(part, cache=cache) for part in x.split(cuts, dim=1)], dim=1)
            assert cache.length == 40 and (parts - full).abs().max() <= 1e-4


@pytest.mark.parametrize("changes", [{}, {"attention": "mha"}], ids=str)
def test_a_prompt_is_read_as_in_training_and_makes_one_row_of_logits(changes, monkeypatch):
    """Scores of all its positions at once and logits of all but the last would be most of the memory."""
    model, x, rows = tiny_model(mtp_depth=1, **changes).eval(), tokens(2, 50), []
    with torch.no_grad():
        cache = model.new_cache(2, 50)
        monkeypatch.setattr(mla, "cached_attention", None)
        assert (model(x, cache=cache) - model(x)).abs().max() <= 1e-5 and cache.length == 50
        monkeypatch.undo()
        after = tokens(2, 5, seed=1)
        assert (model(after, cache=model.new_cache(2, 5)) - model(after)).abs().max() <= 1e-5
    model.lm_head.register_forward_hook(lambda head, given, logits: rows.append(logits[..., 0].numel()))
    for use_cache in (True, False):
        list(model.generate(x, 3, use_cache=use_cache))
    assert rows == [2] * 6
    rows.clear()
    list(speculate(model, x[:1], 3))
    assert max(rows) <= 2


def test_a_cache_has_room_for_what_is_asked_not_for_the_context(monkeypatch):
    model, made, plain = tiny_model(mtp_depth=1).eval(), [], K2.new_cache
    monkeypatch.setattr(K2, "new_cache", lambda *args, **options: made.append(args[1:]) or plain(*args, **options))
    text = lambda n, **options: len(list(model.generate(tokens(2, 10), n, **options)))
    assert (text(5), text(5, use_cache=False), text(300)) == (5, 5, 300)
    assert made[0] == (2, 15) and set(made[1:-1]) == {(2, 64)} and made[-1] == (2, 32 + 14)
    made.clear()
    assert len(list(speculate(model, tokens(1, 10), 5))) == 5 and made == [(1, 15)]


def test_the_cache_holds_the_latent_not_the_heads():
    model = tiny_model()
    assert [layer.shape for layer in model.new_cache(2, 10).layers] == [(2, 10, 16 + 4)] * 3


@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_greedy_text_is_the_same_with_and_without_the_cache_also_past_the_context(changes):
    model, slides = tiny_model(**changes), []
    for length in (5, 60, 100):  # the context is 64
        texts = [
            torch.stack(
                list(
                    model.generate(
                        tokens(2, length), 50, temperature=0, use_cache=cache, on_slide=lambda: slides.append(1)
                    )
                ),
                1,
            )
            for cache in (True, False)
        ]
        assert torch.equal(*texts) and texts[0].shape == (2, 50)
    assert slides


def test_generation_keeps_the_mode_and_needs_no_gradient():
    model = tiny_model()
    model.train()
    next(iter(model.generate(tokens(1, 4), 3)))
    list(model.generate(tokens(1, 4), 3))
    assert model.training and all(p.grad is None for p in model.parameters())


def test_rows_stop_at_end_of_text_each_for_itself():
    model = tiny_model()
    free = torch.stack(list(model.generate(tokens(6, 5), 20, temperature=0)), 1)
    stop = int(free[2, 3])
    stopped = torch.stack(list(model.generate(tokens(6, 5), 20, temperature=0, stop=stop)), 1)
    for row, expected in zip(stopped.tolist(), free.tolist()):
        end = expected.index(stop) + 1 if stop in expected else len(expected)
        assert row[:end] == expected[: len(row)][:end] and set(row[end:]) <= {stop}
    alone = list(model.generate(tokens(6, 5)[2:3], 20, temperature=0, stop=stop))
    assert len(alone) == free[2].tolist().index(stop) + 1  # the stream ends when all have


# ---------------------------------------------------------------------- choosing a token

LOGITS = torch.tensor([[3.0, 2.0, 1.0, -1.0, -2.0]])
HISTORY = torch.zeros(1, 1, dtype=torch.int64)


def chosen(n=400, **options):
    generator = torch.Generator().manual_seed(0)
    history = options.pop("history", HISTORY)
    return {int(next_token(LOGITS, history, generator=generator, **options)) for _ in range(n)}


def test_each_option_by_itself():
    assert chosen() == {0, 1, 2, 3, 4}
    assert chosen(temperature=0) == chosen(top_k=1) == chosen(top_p=1e-6) == chosen(min_p=1.0) == {0}
    assert chosen(top_k=2) == {0, 1} and chosen(top_k=99) == {0, 1, 2, 3, 4}
    probs = LOGITS.softmax(-1)[0]
    assert chosen(top_p=float(probs[:2].sum()) - 1e-4) == {0, 1} and chosen(top_p=float(probs[:2].sum()) + 1e-4) == {
        0,
        1,
        2,
    }
    assert chosen(min_p=float(probs[2] / probs[0]) - 1e-4) == {0, 1, 2}
    assert chosen(temperature=0.01) == {0}


def test_repetition_penalty_lowers_positive_and_negative_logits():
    seen = torch.tensor([[0, 3, 0]])
    probs = []
    for penalty in (1.0, 1.5):
        counts = torch.zeros(5)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3000):
            counts[int(next_token(LOGITS, seen, repetition_penalty=penalty, generator=generator))] += 1
        probs.append(counts / 3000)
    expected = torch.tensor([[2.0, 2.0, 1.0, -1.5, -2.0]]).softmax(-1)[0]
    assert torch.allclose(probs[1], expected, atol=0.04) and probs[1][0] < probs[0][0] - 0.1
    assert chosen(temperature=0, repetition_penalty=4.0) == {1}


def test_same_seed_same_text_other_seed_other_text(run):
    model, encoder = generate.load(run, "cpu")
    text = lambda seed: "".join(generate.stream_text(model, encoder, [1, 2], 40, seed=seed))
    assert text(1) == text(1) != text(2)


# ---------------------------------------------------------------------- loading and the command line


def test_load_takes_a_run_a_step_and_best(run):
    model, encoder = generate.load(run, "cpu")
    step, _ = generate.load(run / "checkpoints/step_00000020", "cpu")
    assert torch.equal(model(tokens(1, 9)), step(tokens(1, 9))) and not model.training and encoder.n_vocab == 257
    with pytest.raises(UserError, match="no folder"):
        generate.load("nowhere")
    with pytest.raises(UserError, match="no best"):
        generate.load(run, which="best")


def test_command_line(run, capsys):
    words = [
        str(run),
        "--prompt",
        "ab",
        "--prompt",
        "a much longer prompt, of another length",
        "--num_samples=2",
        "--device=cpu",
        "--max_new_tokens",
        "15",
        "--top_k=20",
        "--top_p=0.9",
        "--min_p=0.01",
        "--repetition_penalty=1.1",
        "--seed=3",
    ]
    outputs = []
    for more in ([], ["--stream"], ["--no_cache"]):
        generate.main(words + more)
        outputs.append(capsys.readouterr())
    assert outputs[0].out.count("--- ") == 4 and outputs[0].out.count("\nab") == 2 and "tokens/s" in outputs[0].err
    assert outputs[0].out == outputs[1].out == outputs[2].out


def test_batches_and_json_say_what_one_by_one_says(run, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("ab\n\n  \na much longer prompt, of another length\nä€\n", encoding="utf-8")
    words = [str(run), f"--prompts={tmp_path / 'prompts.txt'}", "--prompt=first", "--num_samples=2", "--seed=5",
             "--max_new_tokens=20", "--device=cpu"]
    outputs = []
    for size in (1, 3, 8):
        generate.main([*words, f"--batch_size={size}"])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2] and outputs[0].count("--- ") == 8
    generate.main(["--json", *words])  # the model behind it is no file to write to
    found, said = capsys.readouterr()
    answers = [json.loads(line) for line in found.splitlines()]
    assert [(a["prompt"], a["seed"]) for a in answers[:3]] == [("first", 5), ("first", 6), ("ab", 5)]
    assert answers[-1]["prompt"] == "ä€" and len(answers) == 8 and said.startswith("note: 160 tokens in ")
    assert all(a["tokens"] == 20 and a["seconds"] >= 0 for a in answers)
    generate.main([f"--json={tmp_path / 'texts.jsonl'}", *words])
    assert capsys.readouterr().out == ""
    written = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text("utf-8").splitlines()]
    assert [a["text"] for a in written] == [a["text"] for a in answers]
    told = [f"--- {a['prompt']!r}, sample {a['seed'] - 4}\n{a['prompt']}{a['text']}\n" for a in answers]
    assert "".join(told) == outputs[0]


def test_a_batch_ends_each_text_at_its_own_end(run):
    """The end of one row is neither the other's nor printed, and nothing behind it counts."""
    model, encoder = generate.load(run, "cpu")
    prompts = [[256, *b"ab"], [256, *b"xyz,"]]
    free = [ids for ids, _, _ in generate.complete(model, encoder, prompts, 30, [0, 1], temperature=1.0)]
    end = next(token for token in free[0] if free[1].count(token) == 0 or free[1].index(token) != free[0].index(token))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "end_of_text", lambda encoder: end)
        stopped = generate.complete(model, encoder, prompts, 30, [0, 1], temperature=1.0)
    for (ids, text, _), before in zip(stopped, free):
        assert ids == before[:before.index(end) if end in before else None]
        assert text == bytes(ids).decode("utf-8", "replace")


def test_prompts_end_where_lines_do_and_nowhere_else(tmp_path, monkeypatch):
    prompts = ["first", "a\u2028b\x0cc\x85d\re", "\ufeff last "]
    (path := tmp_path / "prompts").write_bytes(("\ufeff" + "\r\n".join([*prompts, " "]) + "\n").encode())
    assert generate.read_prompts(path) == prompts
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes()), "latin-1"))
    assert generate.read_prompts("-") == prompts


def test_prompt_files_that_are_none(run, tmp_path):
    for name, content, message in (("blank", b" \n\n", "no prompt"), ("latin", b"\xe4\n", "not UTF-8")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            generate.main([str(run), f"--prompts={tmp_path / name}"])
    with pytest.raises(UserError, match=r"no file .*/latn; did you mean .*/latin\? \(--prompts takes a file"):
        generate.main([str(run), f"--prompts={tmp_path / 'latn'}"])
    with pytest.raises(UserError, match="is a folder: --prompts takes a file"):
        generate.main([str(run), f"--prompts={tmp_path}"])


def test_a_text_beyond_the_context_slides_and_says_so_behind_it(run, capsys):
    words = [str(run), "--prompt", "x" * 100, "--max_new_tokens=150", "--temperature=0", "--device=cpu"]
    generate.main(words)
    plain, said = capsys.readouterr()
    assert said.count("is full") == 1 and "101 tokens, the context 64" in said
    assert all(line.startswith("note: ") for line in said.splitlines())
    generate.main([*words, "--stream"])
    assert capsys.readouterr().out == plain


def test_tokens_are_counted_as_ids_and_the_document_start_needs_no_prompt(run, capsys):
    """A model that never ends a text gives as many tokens as were asked for, whatever its bytes decode to."""
    texts = []
    for words in ([], ["--prompt", ""], ["--prompt="]):
        generate.main([str(run), *words, "--max_new_tokens=37", "--device", "cpu", "--stream"])
        out, said = capsys.readouterr()
        texts.append(out)
        assert said.startswith("note: 37 tokens in ")
    model, encoder = generate.load(run, "cpu")
    pieces = generate.stream_text(model, encoder, [256], 37, temperature=0.8, seed=0)  # from the separator, as training
    assert set(texts) == {"".join(pieces) + "\n"}


def test_without_a_separator_the_empty_prompt_is_refused_in_a_line(run):
    model, encoder = generate.load(run, "cpu")
    with pytest.raises(UserError, match="give --prompt"):
        next(generate.stream_text(model, encoder, [], 5))


def test_ids_beyond_the_tokenizer_and_special_texts_are_said(run, capsys, monkeypatch):
    model, encoder = generate.load(run, "cpu")
    made = torch.tensor([[97], [300], [98], [301]])
    monkeypatch.setattr(model, "generate", lambda *args, **options: iter(made))
    monkeypatch.setattr(generate, "load", lambda *args: (model, encoder))
    generate.main(["x", "--prompt", "a<|endoftext|>"])
    out, said = capsys.readouterr()
    assert out == "a<|endoftext|>ab\n" and "2 of 4 tokens are none of the tokenizer's 257" in said
    assert "'<|endoftext|>' in the prompt is read as plain text" in said and "note: 4 tokens in" in said


def test_nan_logits_and_tiny_temperatures():
    for odd in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="NaN or infinite logits"):
            next_token(torch.tensor([[0.0, odd]]), HISTORY)
    ties = torch.tensor([[1.0, 3.0, 3.0, 3.0 - 1e-6]])
    for temperature in (1e-40, 5e-324, 1e-45, 1e-20):
        seen = {int(next_token(ties, HISTORY, temperature=temperature)) for _ in range(60)}
        assert seen == {1, 2}  # the exact limit
    assert chosen(temperature=1e9) == {0, 1, 2, 3, 4}
    assert chosen(repetition_penalty=100, temperature=1e-40) == {1}
    for options in ({"temperature": float("nan")}, {"top_p": float("nan")}, {"min_p": float("nan")}, {"top_k": 0}):
        with pytest.raises(UserError, match=next(iter(options))):
            chosen(1, **options)


NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")


@pytest.mark.parametrize(
    "words, message",
    [
        pytest.param(["--prompt", "x", "--device=cuda"], "is not there", marks=NO_CUDA),
        (["--chat", "--prompt", "x"], "leave --prompt, --prompts and --json out"),
        (["--prompt", "x\udcff"], "no text here"),
        (["--temperature", "nan"], "--temperature=nan"),
        (["--temperature=inf"], "--temperature=inf"),
        (["--top_p=nan"], "--top_p=nan"),
        (["--min_p=nan"], "--min_p=nan"),
        (["--repetition_penalty=nan"], "--repetition_penalty=nan"),
        (["--repetition_penalty=1e-40"], "--repetition_penalty"),
        (["--repetition_penalty=inf"], "--repetition_penalty"),
        (["--seed=-1"], "--seed"),
        (["--seed=9999999999999999999999"], "--seed"),
        (["--prompt", "x", "--temperature=-1"], "--temperature"),
        (["--prompt", "x", "--top_k=0"], "--top_k"),
        (["--prompt", "x", "--top_p=1.5"], "--top_p"),
        (["--prompt", "x", "--max_new_tokens=0"], "--max_new_tokens"),
        (["--prompt", "x", "--num_samples=0"], "--num_samples"),
        (["--prompt", "x", "--batch_size=0"], "--batch_size"),
        (["--seed=9223372036854775807", "--num_samples=2"], "--seed"),
        (["--chat", "--prompts=x"], "leave --prompt, --prompts and --json out"),
        (["--web", "--json"], "leave --prompt, --prompts and --json out"),
        (["--web", "--chat"], "choose one"),
        (["--web", "--num_samples=2"], "the page makes one text"),
        (["--web", "--max_new_tokens=5000"], "at most 4,096"),
        (["--port=8000"], "set --web too"),
        (["--web", "--port=65536"], "0 to 65535"),
        (["--json", "--stream"], "leave --stream"),
        (["--max_new=3"], r"^unrecognized arguments: --max_new=3; did you mean --max_new_tokens\? \(see --help\)$"),
        (["--promt", "x"], r"^unrecognized arguments: --promt x; did you mean --prompt\? \(see --help\)$"),
        (["--json", "--zzz"], r"^unrecognized arguments: --zzz \(see --help\)$"),
        (["--json=nowhere/x.jsonl"], "^--json=nowhere/x.jsonl: no folder nowhere"),
        (["--max-new-tokens=x"], "^argument --max_new_tokens: invalid int value: 'x'"),
    ],
)
def test_mistakes_are_one_line(run, words, message):
    with pytest.raises(UserError, match=message):
        generate.main([str(run), *words])


@pytest.mark.parametrize("value", [
    "-- the well-known top-k users", "--no-name", "--a-b=c-d", "-x", "- item", "--top-k and more", "=--",
    "---\n", "-1", ""])
def test_only_names_of_options_are_altered_never_their_values(value):
    for words in (["--prompt", value], [f"--prompt={value}"]):
        args = generate.parse(["out/my-run", *words, "--top-k=3", "--min-p", "0.5", "--json"])
        assert (args.prompt, args.top_k, args.min_p, args.json) == ([value], 3, 0.5, "-")
    assert generate.parse(["--top-k=3", "--", "--my-run"]).model == "--my-run"


@pytest.mark.parametrize("words, message", [
    (["--prompt", "--top-k"], "--prompt: expected one argument"), (["--prompt", "--json"], "expected one argument"),
    (["--prompt"], "--prompt: expected one argument"), (["--prompt", "--"], "--prompt=--: -- alone is no value"),
    (["--prompt=--"], "-- alone is no value"), (["--promt", "a"], r"did you mean --prompt\?"),
    (["--prompt", "--top-kk=3"], r"--prompt: expected one argument; did you mean --top_k\?")])
def test_what_may_be_an_option_is_no_value(words, message):
    with pytest.raises(UserError, match=message):
        generate.parse(["x", *words])


def test_texts_that_take_turns_leave_the_compiler_as_it_was(run):
    model, encoder = generate.load(run, "cpu")
    compiled = []
    function = torch.compile(lambda x: x + 1, backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    first, second = (generate.stream_text(model, encoder, [256, 1], 8) for _ in range(2))
    next(first), next(second)
    del first  # before the other, which began later
    list(second)
    function(torch.ones(3))
    assert len(compiled) == 1
