"""The chat of generate.py --chat: what the model is given, commands, several lines, interrupting, pipes, terminals."""

import sys
import types

import pytest

import generate
import talk.chat
import talk.text
from data import tokenizer
from tests.helpers import run_script, small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "small"
    small_run(folder, max_steps=2)
    return folder / "run"


@pytest.fixture
def given(run, monkeypatch):
    """say(lines, words): generate.main --chat with these lines typed; an exception among them is raised where it would
    be read. Returns (ids, options) of every text that the model was asked for; say.prompts are what asked for lines."""
    def say(*lines, words=()):
        typed, asked, plain, say.prompts = iter(lines), [], talk.text.stream, []

        def read(prompt):
            say.prompts.append(prompt)
            line = next(typed, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        def stream(model, encoder, prompt_ids, **options):
            asked.append((list(prompt_ids), options))
            return plain(model, encoder, prompt_ids, **options)

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(talk.chat, "stream", stream)
        generate.main([str(run), "--chat", "--max_new_tokens=5", "--device=cpu", *words])
        return asked
    return say


def test_chat_keeps_what_was_said_until_reset(given, capsys):
    (first, _), (second, _), (third, _) = given("hello", "", "   ", "again", "/reset", "hello", "/quit", "never")
    assert first == [256, *b"hello"] == third
    assert second[:6] == first and bytes(second[-6:]) == b"\nagain" and len(second) == 6 + 5 + 6  # its own ids
    said = capsys.readouterr().err
    assert said.count("note: 5 tokens in ") == 3 and "tokens/s" in said and "not trained to converse" in said
    assert said.count("forgotten") == 1


@pytest.mark.parametrize("text, told", [
    ("/help", ""), ("/hepl", "there is no /hepl; did you mean /help?\n"), ("/", "there is no /\n"),
    ("/clear all", "there is no /clear\n"), ("/top-k 3", "there is no /top-k; did you mean /top_k?\n")])
def test_commands_that_there_are_not_are_named_and_list_those_there_are(given, capsys, text, told):
    assert [ids for ids, _ in given(text, " /usr/bin")] == [[256, *b" /usr/bin"]]
    assert f"commands.\n{told}{talk.chat.HELP}\nnote: " in capsys.readouterr().err


def test_a_backslash_goes_on_in_the_next_line(given):
    assert [ids for ids, _ in given("def f():\\", "    return 1", "/quit")] == [[256, *b"def f():\n    return 1"]]
    assert [ids for ids, _ in given("a\\", "\\", KeyboardInterrupt())] == []
    for last, text in (("b\\", b"a\nb"), ("b\\\\", b"a\nb\\")):  # a pipe that ends there
        assert [ids for ids, _ in given("a\\", last)] == [[256, *text]]


def test_history_is_all_that_the_model_sees(given, capsys):
    given("hello", "/history", words=["--temperature=0"])
    said = capsys.readouterr().out.removesuffix("\n\n")
    answer = said[:(len(said) - len("\n<|endoftext|>hello")) // 2]
    assert answer and said == f"{answer}\n<|endoftext|>hello{answer}"


def test_options_change_from_then_on_and_keep_their_limits(given, capsys):
    asked = given("a", "/temperature 0.25", "/top_k 7", "/seed 3", "/max_new_tokens 2", "/top_p 0.5", "b",
                  "/top_k none", "/top_k 2.5", "/temperature none", "/temperature nan", "/temperature -1", "/seed -1",
                  "/max_new_tokens 0", "/top_p 1.5", "c", words=["--temperature=0.5"])
    (_, first), (_, second), (_, third) = asked
    assert first["temperature"] == 0.5 and first["top_k"] is None and first["seed"] == 0
    changed = {"temperature": 0.25, "top_k": 7, "seed": 3, "max_new_tokens": 2, "top_p": 0.5}
    assert {name: second[name] for name in changed} == changed and second["min_p"] is None
    assert {name: third[name] for name in changed} == changed | {"top_k": None}
    said = capsys.readouterr().err
    assert "/top_k must be a whole number or none" in said and "/temperature must be a number" in said
    assert said.count("must lie between") == 5 and said.count(talk.chat.HELP) == 0
    assert given("/temperature", "/top_k", "/seed 9", "/seed", words=["--temperature=0.5"]) == []
    told = capsys.readouterr().err.splitlines()[1:]
    assert told == ["/temperature 0.5", "/top_k none", "/seed 9", "/seed 9"]


def test_what_does_not_go_with_drafts_is_said(monkeypatch, capsys):
    typed = iter(["/temperature 0.5", "/temperatur", "/max_new_tokens 3", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    talk.chat.chat(None, tokenizer.load("bytes"), {"on_draft": print, "max_new_tokens": 5, "seed": 0})
    told = capsys.readouterr().err.splitlines()
    assert told[1] == "/temperature does not go with --speculative, which makes greedy text: start again without it"
    assert told[2] == "there is no /temperatur; did you mean /temperature?" and told[-1] == "/max_new_tokens 3"


def test_ctrl_c_stops_the_answer_and_drops_a_line_but_stays(given, monkeypatch, run, capsys):
    plain, pressed = talk.text.token_bytes, []

    def press(encoder, token):
        pressed.append(token)
        if len(pressed) == 3:
            raise KeyboardInterrupt
        return plain(encoder, token)

    monkeypatch.setattr(talk.text, "token_bytes", press)
    asked = given("hello", "on", KeyboardInterrupt(), "still")
    assert asked[1][0] == [256, *b"hello", *pressed[:2], *b"\non"] and len(asked) == 3  # what was printed is kept
    assert bytes(asked[2][0][1:]).endswith(b"\nstill") and "/quit or Ctrl-D leaves" in capsys.readouterr().err
    pressed.clear()
    with pytest.raises(KeyboardInterrupt):  # outside of a chat it ends the command
        generate.main([str(run), "--prompt=a", "--device=cpu", "--stream"])


def test_of_a_pipe_only_the_answers_come_out(run):
    words = ["generate.py", run, "--chat", "--max_new_tokens=5", "--temperature=0", "--device=cpu"]
    piped = run_script(*words, input="hello\n/reset\nhello\n/what\n", check=0)
    model, encoder = generate.load(run, "cpu")
    answer = "".join(generate.stream_text(model, encoder, [256, *b"hello"], 5, temperature=0))
    assert piped.stdout == f"{answer}\n{answer}\n"
    assert all(line in piped.stderr for line in ("converse", "forgotten", "there is no /what", talk.chat.HELP))


@pytest.mark.parametrize("stdin, stdout", [(True, True), (True, False), (False, True)])
def test_lines_are_asked_for_at_a_terminal_alone(given, monkeypatch, stdin, stdout):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: stdin))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: stdout, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    given("/seed\\", "", "/quit")
    assert given.prompts == (["> ", "... ", "> "] if stdin and stdout else ["", "", ""])
