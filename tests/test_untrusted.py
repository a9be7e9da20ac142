"""Nothing that people download runs code: shards, tokenizers, checkpoints and Hugging Face directories are data.

Each kind is replaced by something whose loading with plain pickle, or whose import, would create a marker file; it goes
through the public commands and must end in a UserError that names it, with no marker. A config .py file is left out: it
is code by design, like train.py itself.
"""

import ast
import json
import os
import pickle
import shutil
import zlib

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import export
import generate
from data import prepare, tokenizer
from errors import UserError
from run import checkpoint
from tests.helpers import ROOT, run_train, small_run
from tests.test_repo import SOURCES


class Payload:
    """Unpickling it creates the marker."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    """A path that must not exist after the test. That the payloads work is shown first, with plain pickle and torch."""
    path = tmp_path / "marker"
    for raw in malicious(path).values():
        if raw[:2] == b"PK":
            (tmp_path / "proof.pt").write_bytes(raw)
            torch.load(tmp_path / "proof.pt", weights_only=False)
        else:
            pickle.loads(raw)
        path.rmdir()  # so it was there
    yield path
    assert not path.exists(), "the payload ran"


def malicious(marker):
    """{kind: bytes} of files that run the payload in the hands of pickle or torch.load."""
    path = marker.with_name("saved.pt")
    torch.save({"weight": Payload(marker)}, path)
    protocols = {f"pickle protocol {n}": pickle.dumps(Payload(marker), protocol=n) for n in (0, 2, 4)}
    return {**protocols, "torch.save": path.read_bytes()}


KINDS = ["pickle protocol 0", "pickle protocol 2", "pickle protocol 4", "torch.save"]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A good data folder, run and exported directory to spoil."""
    folder = tmp_path_factory.mktemp("good")
    small_run(folder, max_steps=1)
    export.export(folder / "run", folder / "hf")
    return folder


@pytest.fixture
def area(good, tmp_path):
    """A copy of it, with the text and the config file of this test's own."""
    for name in ("data", "run", "hf"):
        shutil.copytree(good / name, tmp_path / name)
    (tmp_path / "text.txt").write_text("a few words to prepare\n" * 20)
    settings = (good / "tiny.py").read_text().replace(str(good), str(tmp_path))
    (tmp_path / "tiny.py").write_text(settings)
    return tmp_path


def train(area, *words):
    run_train(area / "tiny.py", f"--out_dir={area}/new", *words)


def refuse(action, *names):
    with pytest.raises(UserError) as error:
        action()
    assert any(str(name) in str(error.value) for name in names), f"{error.value} names none of {names}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["train_000000.bin", "val_000000.bin", "meta.json"])
@pytest.mark.parametrize("foreign", [False, True])
def test_data_folders(area, marker, kind, name, foreign):
    if foreign and name != "meta.json":
        (area / "data/meta.json").unlink()
    (area / "data" / name).write_bytes(malicious(marker)[kind])
    refuse(lambda: train(area), name)
    if name == "meta.json":
        refuse(lambda: prepare.main(["random", f"--out={area}/data"]), name)


def test_a_pickle_beside_the_shards_is_left_alone(area, marker):
    """nanoGPT's folders have a meta.pkl."""
    (area / "data/meta.pkl").write_bytes(malicious(marker)["pickle protocol 4"])
    (area / "data/meta.json").unlink()
    train(area)


TOKENIZERS = {  # file in a folder of its own -> what is given as --tokenizer
    "encoding.json": ".",
    "tokenizer.json": ".",
    "tokenizer.model": ".",
    "ranks.tiktoken": ".",
    "tokenizer.json file": "tokenizer.json",
    "mine.tiktoken": "mine.tiktoken",
    "mine.model": "mine.model",
    "cl100k_base.tiktoken": "cl100k_base.tiktoken",
    "tokenizer.pkl": "tokenizer.pkl",
}


@pytest.mark.parametrize("kind", [*KINDS, "after a line end"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(area, marker, kind, name):
    folder, file = area / "tok", name.split()[0]
    if file in ("encoding.json", "ranks.tiktoken"):
        tokenizer.save(tokenizer.load("bytes"), folder)
    folder.mkdir(exist_ok=True)
    raw = malicious(marker)["pickle protocol 4"]
    (folder / file).write_bytes(
        b"\n" + raw if kind == "after a line end" else malicious(marker)[kind]
    )  # SentencePiece's
    spec = folder / TOKENIZERS[name]
    named = file, folder, "mine"
    refuse(lambda: tokenizer.load(str(spec)), *named)
    refuse(lambda: train(area, f"--tokenizer={spec}"), *named)
    refuse(lambda: prepare.main(["text", str(area / "text.txt"), f"--tokenizer={spec}", f"--out={area}/out"]), *named)
    if spec == folder:  # and as that of a run, an export or the data
        for place in ("run", "hf", "data"):
            shutil.rmtree(area / place / "tokenizer")
            shutil.copytree(folder, area / place / "tokenizer")
        here = file, "tokenizer"
        refuse(lambda: generate.load(area / "run", "cpu"), *here)
        refuse(lambda: generate.load(area / "hf", "cpu"), *here)
        refuse(lambda: train(area), *here)
        refuse(lambda: export.main(["--reverse", str(area / "hf"), str(area / "back")]), *here)


def test_a_sentencepiece_kind_with_a_pickle_for_a_model(area, marker):
    folder = area / "run/tokenizer"
    (folder / "encoding.json").write_text(json.dumps({"kind": "sentencepiece", "name": "x"}))
    (folder / "tokenizer.model").write_bytes(malicious(marker)["pickle protocol 4"])
    refuse(lambda: tokenizer.load(str(folder)), folder, "SentencePiece model of x")


# ---------------------------------------------------------------------- checkpoints


def replace(step, name, raw):
    """Put other bytes into a step folder, with a manifest that matches."""
    (step / name).write_bytes(raw)
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["files"][name] = {"size": len(raw), "crc32": zlib.crc32(raw)}
    manifest["crc32"] = checkpoint._own_crc32(manifest)
    (step / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.damage(step) == ""


def refuse_run(area, step):
    for action in (
        lambda: generate.load(area / "run", "cpu"),
        lambda: generate.load(step, "cpu"),
        lambda: generate.main([str(area / "run"), "--prompt=a", "--device=cpu"]),
        lambda: export.main([str(area / "run"), str(area / "out")]),
        lambda: run_train(area / "tiny.py", "--resume", "--max_steps=2"),
        lambda: train(area, f"--resume={step}", "--max_steps=2"),
    ):
        refuse(action, step, area / "run")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "manifest.json"])
def test_checkpoints(area, marker, kind, name):
    step = checkpoint.find(area / "run")
    raw = malicious(marker)[kind]
    (step / name).write_bytes(raw) if name == "manifest.json" else replace(step, name, raw)
    refuse_run(area, step)


def test_every_tensor_of_a_checkpoint_as_a_pickle(area, marker):
    """The index stays, and points every tensor at a torch.save of the payload."""
    step = checkpoint.find(area / "run")
    raw, metadata = malicious(marker)["torch.save"], pickle.loads((step / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, len(raw)
    replace(step, "__0_0.distcp", raw)
    replace(step, ".metadata", pickle.dumps(metadata))
    refuse_run(area, step)


def test_byte_entries_of_a_checkpoint(area, marker):
    """DCP stores what is no tensor as a pickle, and loads it as one."""
    step = checkpoint.find(area / "run")
    names = pickle.loads((step / ".metadata").read_bytes()).state_dict_metadata
    saved = area / "bytes"
    dcp.save(dict.fromkeys(names, Payload(marker)), storage_writer=dcp.FileSystemWriter(saved), no_dist=True)
    target = dict.fromkeys(names, 0)
    with pytest.raises(CheckpointException, match="File exists"):  # many entries: the second finds the first's marker
        dcp.load(target, storage_reader=dcp.FileSystemReader(saved), no_dist=True)
    marker.rmdir()  # DCP itself did run it
    for path in saved.iterdir():
        replace(step, path.name, path.read_bytes())
    refuse_run(area, step)


@pytest.mark.parametrize("where", ["../stolen", "/dev/stdin", "manifest.json/.."])
def test_tensors_outside_of_a_checkpoint(area, marker, where):
    step = checkpoint.find(area / "run")
    shutil.copy(step / "__0_0.distcp", step.parent / "stolen")
    metadata = pickle.loads((step / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = where
    replace(step, ".metadata", pickle.dumps(metadata))
    refuse_run(area, step)


# ---------------------------------------------------------------------- Hugging Face directories


def refuse_hf(area, *names):
    for action in (
        lambda: generate.load(area / "hf", "cpu"),
        lambda: export.main(["--reverse", str(area / "hf"), str(area / "out")]),
        lambda: generate.main([str(area / "hf"), "--prompt=a", "--device=cpu"]),
    ):
        refuse(action, *names)
    assert not (area / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_hugging_face_files(area, marker, kind, name):
    if name == "pytorch_model.bin":
        (area / "hf/model.safetensors").unlink()
    (area / "hf" / name).write_bytes(malicious(marker)[kind])
    refuse_hf(area, area / "hf")


def test_hugging_face_code_is_not_imported(area, marker, monkeypatch):
    """auto_map names Python files; they are ignored, and the directory is read as the architecture it says it is."""
    code = f"import os\nos.mkdir({str(marker)!r})\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py", "conftest.py"):
        (area / "hf" / name).write_text(code)
    path = area / "hf/config.json"
    about = json.loads(path.read_text())
    names = {"AutoConfig": "configuration_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    path.write_text(json.dumps(about | {"auto_map": names, "trust_remote_code": True}))
    generate.load(area / "hf", "cpu")
    export.main(["--reverse", str(area / "hf"), str(area / "back")])
    path.write_text(json.dumps(about | {"auto_map": names, "model_type": "evil"}))
    refuse_hf(area, area / "hf")
    exec(compile(code, "control", "exec"))  # the code does what it says
    marker.rmdir()


def test_a_folders_name_does_not_become_code(area, marker):
    """--reverse writes a config file, which is code, and quotes the name of the directory in it."""
    evil = area / f'hf"""\nimport os\nos.mkdir({str(marker.name)!r})\n"""'
    shutil.copytree(area / "hf", evil)
    export.main(["--reverse", str(evil), str(area / "back")])
    ast.parse((area / "back/config.py").read_text())
    train(area, f"--resume={area}/back", "--overwrite")
    before = os.getcwd()
    os.chdir(area)
    try:
        run_train(
            area / "back/config.py",
            f"--data={area}/data",
            f"--out_dir={area}/other",
            "--max_steps=1",
            "--wandb=off",
            "--device=cpu",
            "--sequence_length=32",
            "--global_batch_size=2",
            "--dtype=float32",
            "--eval_interval=0",
        )
    finally:
        os.chdir(before)


def test_a_dataset_folder_with_a_script(area, marker):
    folder = area / "dataset"
    folder.mkdir()
    code = f"import os\nos.mkdir({str(marker)!r})\n"
    (folder / "dataset.py").write_text(code)

    def refused(source, path):
        words = [source, str(path), f"--out={area}/out", "--tokenizer=bytes"]
        refuse(lambda: prepare.main(words), folder)

    refused("hf", folder)
    for raw in malicious(marker).values():
        (folder / "train.pkl").write_bytes(raw)
        refused("hf", folder)
        for name in ("train.parquet", "train.jsonl"):
            (folder / name).write_bytes(raw)
            refused(name.split(".")[1], folder / name)
            (folder / name).unlink()


# ---------------------------------------------------------------------- the sources

ALLOWED = {
    ("run/checkpoint.py", "Unpickler"),  # _SafeReader: admits a dozen harmless types
    ("settings.py", "run_path"),  # a config file is code
}


def calls_that_run_code(source):
    """Names of the calls in a source by which data could become code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            yield node.arg
        if isinstance(node, ast.ClassDef):
            yield from (
                base.attr for base in node.bases if isinstance(base, ast.Attribute) and base.attr == "Unpickler"
            )
        if not isinstance(node, ast.Call):
            continue
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        name = node.func.attr if owner else getattr(node.func, "id", "")
        if owner in ("pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle") and name not in (
            "dumps",
            "UnpicklingError",
        ):
            yield name
        elif not owner and name in ("eval", "exec", "__import__", "compile"):
            yield name
        elif name in ("run_path", "run_module", "import_module", "exec_module"):
            yield name
        elif (owner, name) == ("torch", "load") and not any(
            word.arg == "weights_only" and getattr(word.value, "value", 0) is True for word in node.keywords
        ):
            yield "torch.load"


def test_no_source_turns_data_into_code():
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in [*SOURCES, *ROOT.glob("bench/*.py")]
        for name in calls_that_run_code(path.read_text())
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(f)",
        "pickle.loads(b)",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "eval(x)",
        "exec(x)",
        "np.load(p, allow_pickle=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "runpy.run_path(p)",
        "class U(pickle.Unpickler): pass",
        "pickle.Unpickler(f).load()",
        "importlib.import_module(name)",
        "joblib.load(p)",
    ],
)
def test_the_scan_sees(line):
    assert list(calls_that_run_code(line))
    assert not list(calls_that_run_code("torch.load(p, weights_only=True); model.eval(); json.load(f); dcp.load(t)"))
