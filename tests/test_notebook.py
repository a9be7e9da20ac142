"""The prompt box and docs/notebook.ipynb, whose cells run in their order."""

import json
import sys

import pytest

import generate
from errors import UserError
from talk import notebook
from tests.helpers import ROOT, small_run

NEEDS_WIDGETS = "ipywidgets of requirements-dev.txt is not installed"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("notebook") / "small", max_steps=3).replace("tiny.py", "run")


def parts(box):
    """(prompt, fields, Continue, Stop, text, status) of a box."""
    typed, fields, buttons, text, status = box.children
    return typed, dict(zip(notebook.OPTIONS, fields.children)), *buttons.children, text, status


def test_the_box_writes_the_text_of_the_command_line(run):
    pytest.importorskip("ipywidgets", reason=NEEDS_WIDGETS)
    box = generate.prompt_box(run, "cpu", prompt="a<b", max_new_tokens=30, top_k=0)
    typed, fields, go, stop, text, status = parts(box)
    assert (typed.value, fields["top_p"].value, stop.disabled) == ("a<b", 1.0, True)
    fields["seed"].value, fields["temperature"].value = 7, 1.0
    go.click()
    box.writing.join(60)
    model, encoder = generate.load(run, "cpu")
    expected = "".join(generate.stream_text(model, encoder, [256, *b"a<b"], 30, temperature=1.0, seed=7))
    assert text.value == notebook.as_html("a<b" + expected) and "a&lt;b" in text.value
    assert status.value.startswith("30 tokens in ") and (go.disabled, stop.disabled) == (False, True)


def test_the_box_stops_and_tells_what_fails(run, monkeypatch):
    pytest.importorskip("ipywidgets", reason=NEEDS_WIDGETS)
    box, seen = generate.prompt_box(run, "cpu", max_new_tokens=10_000), []
    typed, fields, go, stop, text, status = parts(box)
    plain = notebook.stream

    def watched(*args, **options):
        for piece in plain(*args, **options):
            if len(seen) == 5:
                assert go.disabled and not stop.disabled
                stop.click()
            seen.append(piece)
            yield piece

    monkeypatch.setattr(notebook, "stream", watched)
    go.click()
    box.writing.join(60)
    assert len(seen) == 6 and status.value.startswith("6 tokens in ") and status.value.endswith(", stopped")

    def fails(*args, **options):
        raise UserError("no good")
        yield

    monkeypatch.setattr(notebook, "stream", fails)
    go.click()
    box.writing.join(60)
    assert status.value == "no good" and not go.disabled


def test_without_ipywidgets_a_line_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(UserError, match="pip install ipywidgets"):
        generate.prompt_box(run, "cpu")


def test_the_box_refuses_what_it_has_no_field_for(run):
    pytest.importorskip("ipywidgets", reason=NEEDS_WIDGETS)
    with pytest.raises(UserError, match="no min_p: there are temperature, top_k"):
        generate.prompt_box(run, "cpu", min_p=0.1)


def test_the_notebook_runs(run, monkeypatch, capsys):
    pytest.importorskip("ipywidgets", reason=NEEDS_WIDGETS)
    page = json.loads((ROOT / "docs/notebook.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in page["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 5 and all(not cell.get("outputs") for cell in page["cells"])
    monkeypatch.chdir(ROOT / "docs")
    monkeypatch.setattr(sys, "path", list(sys.path))
    names, told = {}, []
    for cell in cells:
        exec(compile(cell.replace("out/debug", run), "notebook", "exec"), names)
        told.append(capsys.readouterr().out)
    assert len(told[2]) > 20 and told[3].count("%") == 8 and told[4].count("tokens/s") == 3
    assert any("prompt_box" in cell.splitlines()[-1] for cell in cells)  # which shows it
