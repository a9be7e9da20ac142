"""The chat of generate.py --chat: what the model is given, commands, several lines, interrupting."""

import pytest

import generate
import talk.chat
import talk.text
from tests.helpers import small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "small"
    small_run(folder, max_steps=2)
    return folder / "run"


@pytest.fixture
def given(run, monkeypatch):
    """say(lines, words): generate.main --chat with these lines typed; an exception among them is raised where it would
    be read. Returns (ids, options) of every text that the model was asked for."""
    def say(*lines, words=()):
        typed, asked, plain = iter(lines), [], talk.text.stream

        def read(prompt):
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
    out, said = capsys.readouterr()
    assert said.count("note: 5 tokens in ") == 3 and "tokens/s" in said and "not trained to converse" in out


@pytest.mark.parametrize("text", ["/help", "/hepl", "/", "/clear all", "/Quit", "/temperature"])
def test_commands_that_there_are_not_list_those_there_are(given, capsys, text):
    assert [ids for ids, _ in given(text, " /usr/bin")] == [[256, *b" /usr/bin"]]
    assert capsys.readouterr().out.count(talk.chat.HELP) == 1


def test_a_backslash_goes_on_in_the_next_line(given):
    assert [ids for ids, _ in given("def f():\\", "    return 1", "/quit")] == [[256, *b"def f():\n    return 1"]]
    assert [ids for ids, _ in given("a\\", "\\", KeyboardInterrupt())] == []


def test_history_is_all_that_the_model_sees(given, capsys):
    given("hello", "/history", words=["--temperature=0"])
    _, said = capsys.readouterr().out.split("converse. /help lists the commands.\n")
    said = said.removesuffix("\n\n\n")
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
    out = capsys.readouterr().out
    assert "/top_k 2.5: expected a whole number" in out and "/temperature none: expected a number" in out
    assert out.count("must lie between") == 5 and out.count(talk.chat.HELP) == 0


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
    assert bytes(asked[2][0][1:]).endswith(b"\nstill") and "/quit or Ctrl-D leaves" in capsys.readouterr().out
    pressed.clear()
    with pytest.raises(KeyboardInterrupt):  # outside of a chat it ends the command
        generate.main([str(run), "--prompt=a", "--device=cpu", "--stream"])
