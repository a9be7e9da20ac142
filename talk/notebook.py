"""A prompt box in a notebook: prompt_box("out/debug") shows a field for a prompt, the options, the text as it comes.

It needs ipywidgets. A thread writes the text, so that the notebook goes on meanwhile and the button Stop is heard.
"""

import html
import threading
import time

from errors import UserError, counted, said
from talk.text import encode_prompt, load, require_tokenizer, stream

OPTIONS = {"temperature": 0.8, "top_k": 50, "top_p": 1.0, "max_new_tokens": 200, "seed": 0}
REDRAW = 0.1  # seconds between two sendings of the text to the browser


def prompt_box(path, device="auto", dtype="float32", which="latest", prompt="", **options):
    """A widget; make it the last line of a cell. path, device, dtype, which: as `load` takes them. options: what the
    fields of OPTIONS hold at first; top_k=0 and top_p=1 are off."""
    try:
        import ipywidgets as widgets
    except ImportError as error:
        raise UserError("prompt_box needs ipywidgets: pip install ipywidgets, then restart the notebook's kernel; "
                        "without it, stream_text gives the text: see docs/generate-and-export.md") from error
    if unknown := options.keys() - OPTIONS.keys():
        raise UserError(f"prompt_box has no {', '.join(sorted(unknown))}: there are {', '.join(OPTIONS)}")
    model, encoder = load(path, device, dtype, which)
    require_tokenizer(encoder, path)
    values = OPTIONS | options
    narrow, wide = widgets.Layout(width="155px"), widgets.Layout(width="100%", max_width="800px")
    fields = {
        "temperature": widgets.BoundedFloatText(min=0, max=1000, step=0.1), "top_k": widgets.BoundedIntText(max=2**31),
        "top_p": widgets.BoundedFloatText(min=0, max=1, step=0.05), "max_new_tokens": widgets.BoundedIntText(
            min=1, max=10_000), "seed": widgets.BoundedIntText(max=2**31)}
    for name, field in fields.items():
        field.value, field.layout, field.style = values[name], narrow, {"description_width": "initial"}
        field.description = name.removeprefix("max_new_").replace("_", "-")
    typed = widgets.Textarea(prompt, placeholder="def __init__(self", rows=4, layout=wide)
    go, stop = widgets.Button(description="Continue", button_style="primary"), widgets.Button(description="Stop")
    stop.disabled = True
    text, status = widgets.HTML(layout=wide), widgets.Label("The model continues your text.")
    box = widgets.VBox([typed, widgets.HBox(list(fields.values()), layout=widgets.Layout(flex_flow="row wrap")),
                        widgets.HBox([go, stop]), text, status])
    stopped = threading.Event()

    def write():
        asked = {name: field.value for name, field in fields.items()}
        asked |= {"top_k": asked["top_k"] or None}
        started, drawn, made, shown = time.perf_counter(), 0.0, 0, typed.value
        try:
            for token, piece in stream(model, encoder, encode_prompt(encoder, typed.value), **asked):
                shown, made = shown + piece, made + (token is not None)
                if time.perf_counter() - drawn > REDRAW:
                    text.value, drawn = as_html(shown), time.perf_counter()
                if stopped.is_set():
                    break
            seconds = time.perf_counter() - started
            how = ", stopped" if stopped.is_set() else ""
            status.value = f"{counted(made, 'token')} in {seconds:.1f} s, {made / seconds:.0f} tokens/s{how}"
        except UserError as error:
            status.value = str(error)
        except BaseException as error:
            status.value = said(error)
            raise
        finally:
            text.value, go.disabled, stop.disabled = as_html(shown), False, True

    def start(button):
        stopped.clear()
        go.disabled, stop.disabled, status.value = True, False, "Writing ..."
        box.writing = threading.Thread(target=write, daemon=True)
        box.writing.start()

    go.on_click(start)
    stop.on_click(lambda button: stopped.set())
    return box


def as_html(text):
    """The text as it stands, with its spaces and line ends."""
    return f'<pre style="white-space: pre-wrap; margin: 0">{html.escape(text)}</pre>'
