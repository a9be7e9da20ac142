"""A trained model and its text: loading, prompts as ids, continuations token by token or several at once.

Behind generate.py, the chat, the page and the notebook box; train.py, evaluate.py and export.py use it too. The loops
are in ../decoding.py, the choice of a token in ../sampling.py.
"""

import codecs
import threading
import time
from pathlib import Path

import torch

import hf
from data import tokenizer as tokenizers
from data.published import Beside
from decoding import pad_left, speculate
from errors import UserError, alike_there
from hf_weights import note, refuse_other_kinds
from kernels import selfcheck
from model import build, pick_device
from run import checkpoint
from settings import model_config

EAGER = threading.Lock()


def load(path, device="auto", dtype="float32", which="latest"):
    """(model, tokenizer) in evaluation mode; model.source is the folder that it was read from. which: "latest" or
    "best", for a run folder; "ema": the average of the weights, of the latest. The tokenizer is one of
    data/tokenizer.py, or None if the folder has none."""
    path, device = Path(path), pick_device(device)
    if not path.is_dir():
        raise UserError(f"no folder {path}{alike_there(path)} (give a run folder, as out/debug, a step folder or an "
                        "exported directory)")
    published, step = hf.is_hf(path), checkpoint.STEP.search(path.name)
    if which != "latest" and (published or step and which == "best"):
        raise UserError(f"{path} holds one model, no {which} one: leave --checkpoint out, or name a run folder")
    if published:
        model = hf.load_model(path, device)
        if encoder := published_tokenizer(path, model.config.vocab_size):
            mark(encoder, path)
    else:
        if not step and not (path / "checkpoints").is_dir():
            refuse_other_kinds(path)
        step_folder = checkpoint.find(path, which)
        manifest = checkpoint.read_manifest(step_folder)
        model = build(model_config(manifest["config"], f"in {manifest.path}"), device)
        if which == "ema" and "ema_updates" not in manifest:
            raise UserError(f"{step_folder} has no average of the weights, as --ema=0.999 keeps one in a training: "
                            "leave --checkpoint out")
        kind = "ema" if which == "ema" else "model"
        checkpoint.load(step_folder, {f"{kind}.{name}": tensor for name, tensor in model.state_dict().items()})
        folder = step_folder.parent.parent / "tokenizer"
        encoder = tokenizers.load(folder) if folder.is_dir() else None
    model.source, model.compute_dtype = path if published else step_folder, getattr(torch, dtype)
    selfcheck.use("auto", device, model.compute_dtype, again=False)
    return model.eval(), encoder


def require_tokenizer(encoder, path):
    """The tokenizer that `load` found for the model in a folder; a UserError if that is None."""
    if encoder is None:
        raise UserError(lacking(path))
    return encoder


def lacking(path):
    """What is wrong with a model without a tokenizer, and what to do about it."""
    run = Path(path).parent.parent if checkpoint.STEP.search(Path(path).name) else path
    return (f"{path} has no tokenizer that can be read: put the tokenizer folder of the training data there, as "
            f"{run}/tokenizer")


def published_tokenizer(path, vocab_size):
    """The tokenizer of a Hugging Face directory; None, with a line, if it cannot be read or is of another model."""
    if (path / "tokenizer").is_dir():  # of our own export
        return tokenizers.load(path / "tokenizer")
    if tokenizers.find(path) is None:
        return None
    try:
        encoder = tokenizers.load(path)
        if encoder.n_vocab > vocab_size:
            raise UserError(f"it has ids up to {encoder.n_vocab - 1}, the model only {vocab_size}")
        return encoder
    except UserError as error:
        note(f"the weights of {path} are read, its tokenizer is not: {error}")


def mark(encoder, folder):
    """Put on a tokenizer what its Hugging Face directory says of texts: if add_bos_token is set `begin`, the id before
    each; `ends`, the ids of generation_config.json; `declared`, all that begins or ends one, and a chat template."""
    beside, ids = Beside(folder), encoder._special_tokens
    starts, ends = ([(ids.get(token, token), where.rpartition(" ")[2]) for token, where in declared]
                    for declared in (beside.starts, beside.ends))
    first = [one for one, file in starts if file == "tokenizer_config.json" and type(one) is int]
    if first and beside.about.get("add_bos_token"):
        encoder.begin = first[0]
    encoder.ends = [one for one, file in ends if file == "generation_config.json" and type(one) is int]
    encoder.declared = {f"id {one}" for one, _ in starts + ends}
    if "chat_template" in beside.about or (folder / "chat_template.jinja").is_file():
        encoder.declared.add("a chat template")


def ends_of(encoder):
    """The ids that end a text."""
    return [one for one in (tokenizers.end_of_text(encoder), *getattr(encoder, "ends", ())) if one is not None]


def encode_prompt(encoder, prompt):
    """The prompt as ids, with the document separator before it, or its `begin`. Of a tokenizer without them nothing
    says where a text starts: there an empty prompt is a line end."""
    first = getattr(encoder, "begin", tokenizers.end_of_text(encoder))
    return ([] if first is None else [first]) + encoder.encode_ordinary(prompt) or encoder.encode_ordinary("\n") or [0]


def stream_text(model, encoder, prompt_ids, max_new_tokens, **options):
    """Yield the continuation piece by piece, up to end of text; a character of several tokens comes when it is
    whole. options: those of `stream`."""
    for _, text in stream(model, encoder, prompt_ids, max_new_tokens, **options):
        yield text


def stream(model, encoder, prompt_ids, max_new_tokens, *, seed=None, on_slide=lambda: None, on_draft=None, **options):
    """Yield (id, the text that it makes whole) of every new token up to end of text, then (None, the rest). on_draft:
    decoding.speculate's, if that is to decode, which takes no other options."""
    refuse_empty(prompt_ids)
    device = model.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    decoder, ends = codecs.getincrementaldecoder("utf-8")("replace"), ends_of(encoder)
    prompt = torch.tensor([prompt_ids], device=device)
    if on_draft:
        new = speculate(model, prompt, max_new_tokens, stop=ends, on_slide=on_slide, on_draft=on_draft)
    else:
        new = model.generate(prompt, max_new_tokens, stop=ends, generator=generator, on_slide=on_slide, **options)
    for ids in eagerly(new):
        if int(ids) in ends:
            break
        yield int(ids), decoder.decode(token_bytes(encoder, int(ids)))
    yield None, decoder.decode(b"", final=True)


def eagerly(steps):
    """What an iterator yields, each made without compiling: lengths change at every token. Never around a yield, and by
    one thread at a time: texts that take turns would put back what the other had set, and leave it so."""
    while True:
        with EAGER, torch.compiler.set_stance("force_eager"):
            made = next(steps, None)
        if made is None:
            return
        yield made


def token_bytes(encoder, token):
    try:
        return encoder.decode_single_token_bytes(token)
    except KeyError:  # the model's vocabulary may be padded beyond the tokenizer's
        return b""


def complete(model, encoder, prompts_ids, max_new_tokens, seeds, **options):
    """The continuations of several prompts in one forward a token: a list of (ids, text, seconds until it ended), each
    what `stream` gives for the prompt alone with the seed of its place. options: those of decoding.generate."""
    for prompt_ids in prompts_ids:
        refuse_empty(prompt_ids)
    device, ends, started = model.device, ends_of(encoder), time.perf_counter()
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    padded_BT, starts_B = pad_left(prompts_ids, device)
    texts, seconds = [[] for _ in prompts_ids], [None] * len(prompts_ids)
    for ids in eagerly(model.generate(padded_BT, max_new_tokens, starts_B=starts_B, stop=ends, generator=generators,
                                      **options)):
        for row, token in enumerate(ids.tolist()):
            if seconds[row] is None and token in ends:
                seconds[row] = time.perf_counter() - started
            elif seconds[row] is None:
                texts[row].append(token)
    now = time.perf_counter() - started
    return [(ids, b"".join(token_bytes(encoder, token) for token in ids).decode("utf-8", "replace"), took or now)
            for ids, took in zip(texts, seconds)]


def refuse_empty(prompt_ids):
    if not prompt_ids:
        raise UserError("the prompt is empty, and the tokenizer has no end-of-text token that could stand for the "
                        "start of a document: give --prompt TEXT")


# ----------------------------------------------------------------------------- what a reader of the text should know

def tell_of_prompt(model, encoder, prompt, prompt_ids):
    """Notes about a prompt that is longer than the context, or spells a special token."""
    limit = model.config.max_position_embeddings
    if len(prompt_ids) > limit:
        note(f"the prompt has {len(prompt_ids)} tokens, the context {limit}: only the last {limit} are read")
    for text, number in encoder._special_tokens.items():
        if text in prompt and number not in prompt_ids[1:]:
            note(f"{text!r} in the prompt is read as plain text, not as the special token")


def tell_of_text(model, encoder, ids, slides):
    """Notes about a text that outgrew the context, or has tokens that the tokenizer does not know."""
    if slides:
        note(f"the context of {model.config.max_position_embeddings} tokens is full: the text went on from its newest "
             "half")
    if unknown := sum(token >= encoder.n_vocab for token in ids):
        note(f"{unknown} of {len(ids)} tokens are none of the tokenizer's {encoder.n_vocab} and are not printed")


def tell_of_loss(encoder, source):
    """A note of what a run or an export, where one token begins and ends a text, does not keep of a directory."""
    end = f"id {tokenizers.end_of_text(encoder) if encoder else None}"
    if lost := sorted(getattr(encoder, "declared", set()) - {end}):
        note(f"not kept of what begins and ends texts of {source}: {', '.join(lost)}; here it is {end} alone. Copy the "
             "rest by hand from tokenizer_config.json, generation_config.json and chat_template.jinja into an export")
