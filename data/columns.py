"""Which column of a table holds the text, and how its rows become texts; the same for jsonl, csv, parquet and datasets.

A column named by --text_column is taken as it is, and so is one that is called "text". Any other is a guess, which has
to be called like a text and to look like prose: what looks like ids, numbers, dates or labels is refused, with all
columns listed. Next: sources.py.
"""

import itertools
import re

from data.files import SHARE
from errors import UserError

SAMPLE = 100  # rows that a guess is made from
TEXT_LIKE = frozenset("text texts content contents body document article story passage paragraph sentence raw_text "
                      "raw_content full_text fulltext main_text markdown prose essay poem lyrics transcript utterance "
                      "review comment post tweet abstract code".split())
NO_TEXT = dict.fromkeys(("list", "object", "bytes"), ", which is no text")
# A word; of scripts without spaces two letters count as one.
WORD = re.compile(r"[\u0e00-\u109f\u1780-\u17ff\u3040-\u9fff]{2}|[^\W\d_]{60}|(?<!\S)[^\w\s]*([^\W\d_]\S*)")
MESSAGES = {"role", "content"}, {"from", "value"}, {"role", "tool_calls"}  # what those of a chat have
DATES = frozenset("mon tue wed thu fri sat sun jan feb mar apr may jun jul aug sep oct nov dec utc gmt".split())


def choose(names, sample, wanted, where, chat=False):
    """The column that holds the text, of those with these names; sample() gives some rows, as dicts. Where that is not
    plain, UserError with all columns."""
    names = list(names)
    if wanted in names or (not wanted and not chat and "text" in names):
        return wanted or "text"
    rows = sample()
    values = {name: [value for row in rows if (value := row.get(name)) not in (None, "")] for name in names}
    kinds = {name: " or ".join(sorted(set(map(kind, values[name])))) or "empty" for name in names}
    listed = ", ".join(f"{name} ({kinds[name]}{NO_TEXT.get(kinds[name], '')}"
                       f"{f': {str(values[name][0])[:30]!r}' if values[name] else ''})" for name in names)
    found = [name for name in names if ("chat" if chat else "text") in kinds[name]]
    likely = found if chat else [name for name in found if name.strip().lower() in TEXT_LIKE]
    pick = (likely or found)[0] if len(likely or found) == 1 else None
    look = pick and not chat and looks_like(values[pick])
    if wanted:
        problem = f"no column {wanted!r}."
    elif pick is None:
        problem = f"which column {'holds the chats' if chat else 'is the text'}?"
    elif likely and not look:
        return pick
    else:
        problem = f"is column {pick!r} the text? It " + (
            f"holds what looks like {look}." if look else "is the only one of strings, but is not called so.")
    if any(len(name.split()) > 4 or re.fullmatch(r"[-+\d.,]+", name) for name in names):
        problem += " The first line of a csv is taken for the names: is a line with them missing here?"
    remedy = "" if chat or "chat" not in kinds.values() else ", or prepare with --chat to make texts of the chats"
    raise UserError(f"{where}: {problem} The columns are {listed}: set --text_column=NAME, or ?column=NAME in "
                    f"data='hf:...'{remedy}")


def kind(value):
    """What a value of a table is, in a word."""
    message = lambda one: isinstance(one, dict) and any(keys <= one.keys() for keys in MESSAGES)
    if isinstance(value, list) and value and all(map(message, value)):
        return "chat"
    names = {str: "text", bytes: "bytes", bool: "yes or no", int: "number", float: "number", dict: "object"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def looks_like(values):
    """What more than half of some texts look like, if that is no prose; else None."""
    texts = [value.strip()[:200] for value in values if isinstance(value, str)]
    if len(texts) >= 20 and len(set(texts)) <= len(texts) / 4:
        return "labels"
    prose = [sum(word[:3].lower() not in DATES for word in WORD.findall(text)) >= 3 for text in texts]
    return "ids, numbers, dates or short words" if sum(prose) < len(texts) / 2 else None


def render(messages, lost):
    """A chat as a text, "ROLE: CONTENT" for every message with an empty line between two, "" if none says anything;
    None if it is no chat or if a message holds something else than a text. lost counts what has no place in it."""
    if messages != [] and kind(messages) != "chat":
        return None
    pairs = []
    for message in messages:
        said = message.get("content") or message.get("value") or ""
        if isinstance(said, list) and all(isinstance(part, dict) for part in said):  # pictures among them
            lost.update(f"{part.get('type')} parts left out" for part in said if not part.get("text"))
            said = "".join(str(part.get("text") or "") for part in said)
        pairs.append((message.get("role") or message.get("from"), said))
        lost.update(f"{key} left out" for key, value in message.items()
                    if key not in ("role", "from", "content", "value") and value not in (None, "", [], {}))
    if not all(isinstance(word, str) for pair in pairs for word in pair):
        return None
    lost.update(messages=len(pairs))
    lost.update("messages without text" for _, said in pairs if not said.strip())
    return "\n\n".join(map(": ".join, pairs)) if any(said.strip() for _, said in pairs) else ""


def texts(rows, wanted, where, account, chat=False, unit="line"):
    """Yield (place, text) of rows, which are pairs of a place, such as the number of the line, and a dict, or a str
    that says why there is none. Rows without a text are counted; more than SHARE of them are an error. null counts as
    an empty text."""
    rows = iter(rows)
    first = list(itertools.islice(rows, SAMPLE))
    dicts = [row for _, row in first if isinstance(row, dict)]
    if first and not dicts:
        place, row = first[0]
        raise UserError(f"{where}, {unit} {place}: {_problem(row, None, chat)} So are all {len(first)} read")
    if not first:
        return
    names = dict.fromkeys(name for row in dicts for name in row)
    column = choose(names, lambda: dicts, wanted or account.about.get("column"), where, chat)
    account.about["column"] = column
    bad, first_bad = 0, None
    for read, (place, row) in enumerate(itertools.chain(first, rows), 1):
        value = row.get(column) if isinstance(row, dict) else row
        text = render(value, account.counts["chats"]) if chat else value
        if isinstance(row, dict) and column in row and (value is None or isinstance(text, str)):
            account.add("rows", "read")
            if value is None:
                account.add("rows", "null, as if empty")
            elif column not in account.said and text.strip():
                account.say(column, f"the text is column {column!r}, which begins {text[:60]!r}")
            yield place, text or ""
        else:
            bad, first_bad = bad + 1, first_bad or (place, row)
            account.add("rows", "without a text, left out", f"{where}, {unit} {place}")
        if bad > SHARE * read and read >= 10 * SAMPLE:
            break
    if bad > SHARE * read:
        place, row = first_bad
        raise UserError(f"{where}, {unit} {place}: {_problem(row, column, chat)} So are {bad:,} of {read:,} rows")


def _problem(row, column, chat):
    if not isinstance(row, dict):
        return f"{row}: the delimiter is another (--delimiter), cells need quotes or have stray ones (--no_quotes)."
    if column not in row:
        return f"no column {column!r}. The columns are {', '.join(map(str, row))}: set --text_column=NAME."
    what = kind(row[column])
    remedy = ": add --chat to make texts of them" if what == "chat" and not chat else ": set --text_column=NAME"
    return f"column {column!r} holds no {'chat of texts' if chat else 'text'} but {what}{remedy}."
