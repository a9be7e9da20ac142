"""README.md, docs/, CONTRIBUTING.md and AGENTS.md against reality: commands, files, links, sizes, what is generated."""

import json
import re
import shlex

import pytest

import export
import settings
from config import FIELDS
from data import prepare
from docs import pictures, settings_table
from tests.helpers import ROOT, small_run
from tests.test_repo import ORDER, SOURCES, read_source

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in
         [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md")), *sorted(ROOT.glob("docs/*.md"))]}
GUIDE = PAGES["docs/reading-guide.md"]
MADE_BY_RUNS = {"config.json", "metrics.jsonl", "samples.md", "curves.png", "meta.json", "manifest.json",
                "tokenizer.json", "encoding.json", "contest.json", "contest.png", "kernels.json"}


def commands(page):
    """The lines of a page's shell blocks, without remarks."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", page, re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.split(" #")[0].strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


COMMANDS = sorted({command for page in PAGES.values() for command in commands(page)})
INSIDE_A_LINE = sorted({command for page in PAGES.values()
                        for command in re.findall(r"`((?:\w+=\S+ )*(?:python|bash|torchrun) [^`]+)`", page)})


def test_pages_are_short():
    assert len(PAGES) >= 14 and len(PAGES["README.md"].splitlines()) <= 160
    assert {name: n for name, page in PAGES.items() if (n := len(page.splitlines())) > 200} == {}


def test_pages_have_commands():
    assert len(COMMANDS) > 40 and len(INSIDE_A_LINE) > 10


@pytest.mark.parametrize("command", sorted({*COMMANDS, *INSIDE_A_LINE}))
def test_commands_parse(command):
    words = shlex.split(command)
    while re.fullmatch(r"\w+=.*", words[0]):  # environment settings
        words.pop(0)
    if words[0].startswith("torchrun"):
        words = ["python", *[word for word in words[1:] if not word.startswith(("--n", "--standalone"))]]
    for word in words:
        assert not word.startswith(("configs/", "tests/")) or (ROOT / word).is_file(), word
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file()
        if words[2:] and words[1] != "launch/test.sh":
            settings.load(words[2:])
    elif words[:2] == ["python", "train.py"]:
        if "--help" not in words:
            settings.load(words[2:]) if words[2].startswith("configs/") else settings.read_words(words[3:])
    elif words[:3] == ["python", "-m", "data.prepare"]:
        assert words[3:] == [] or prepare.parse(words[3:])
    elif words[0] == "python" and words[1] in ("generate.py", "export.py", "evaluate.py"):
        known = (ROOT / words[1]).read_text(encoding="utf-8")
        for word in words[2:]:
            assert not word.startswith("--") or word == "--help" or f'"{word.split("=")[0]}"' in known, word
    elif words[:2] == ["python", "-m"]:
        here = (ROOT / (words[2].replace(".", "/") + ".py")).is_file()
        assert here or words[2] in ("venv", "pip", "pytest", "ruff")
    else:
        assert words[0] in ("git", "cd", "pip", "source", "curl"), f"command not understood: {command}"


def test_commands_write_to_folders_of_their_own():
    """So that every command can run after every other."""
    written = {}
    for command in COMMANDS:
        words = shlex.split(command)
        if "data.prepare" in words:
            rest = words[words.index("data.prepare") + 1 :]
            folder = prepare.parse(rest).out or f"data/{rest[0]}"
        elif {"-m", "--dry_run", "--help"} & set(words) or "--resume" in command or " configs/" not in command:
            continue
        else:
            config = next(word for word in words if word.startswith("configs/"))
            flags = settings.read_words(word for word in words[words.index(config) + 1 :])[1]
            folder = flags.get("out_dir", f"out/{config[8:-3]}")
        assert written.setdefault(folder, command) == command, f"{command} and {written[folder]} write to {folder}"
    assert len(written) > 15


def test_python_of_the_pages_runs(tmp_path, capsys):
    ours, theirs = [code for page in PAGES.values() for code in re.findall(r"```python\n(.*?)```", page, re.S)]
    small_run(tmp_path / "small")
    exec(ours.replace("out/debug", str(tmp_path / "small/run")), names := {})
    assert names["logits"].shape == (1, len(names["ids"]), 257) and capsys.readouterr().out
    export.main([str(tmp_path / "small/run"), str(tmp_path / "hf")])
    exec(theirs.replace('"hf/"', repr(str(tmp_path / "hf"))), names)  # as export.py prints it
    told = "\n".join(line.strip() for line in capsys.readouterr().out.splitlines()[1:])
    assert told == theirs.strip().replace('"hf/"', repr(str(tmp_path / "hf")))
    ids = names["torch"].tensor([names["ids"]])
    assert (names["model"](ids).logits.float() - names["logits"]).abs().max() <= 1e-4
    assert names["tokenizer"].encode("def") == names["ids"][1:]


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    for name in re.findall(r"`([\w./-]+\.(?:py|sh|md|toml|txt|json|png|svg|yaml|sbatch))`", PAGES[page]):
        made = name.split("/")[-1] in MADE_BY_RUNS or name.startswith(("out/", "data/stdlib", "hf/"))
        assert made or (ROOT / name).exists(), f"{page} names {name}, which is not there"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).is_file(), f"{page}: {target}"


def test_messages_of_the_troubleshooting_page_are_ours():
    sources = "".join(map(read_source, SOURCES))
    symptoms = "".join(re.findall(r"^\| (.*?) \|", PAGES["docs/troubleshooting.md"], re.M))
    messages = re.findall(r"`([a-z][^`]* [^`]*)`", symptoms)
    assert len(messages) > 7
    for message in messages:
        assert re.split(r" \d", message)[0] in sources, f"nothing says {message!r}"


@pytest.mark.parametrize("page", PAGES)
def test_rows_of_tables_have_as_many_cells_as_their_heads(page):
    for table in re.findall(r"(?:^\|.*\n)+", PAGES[page], re.M):
        cells = [len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()]
        assert len(cells) > 2 and set(cells) == {cells[0]}, f"{page}: {table}"


def test_speeds_on_the_h100_are_those_of_the_kept_results():
    for commit, arms in (("dfc0dd7", "nanok2 transformers dense"), ("f8767e0", "gpt"), ("19f1a45", "nograph")):
        path = ROOT / f"bench/results/2026-11-27-step-small-bfloat16-cuda-{commit}.json"
        kept = json.loads(read_source(path))["arms"]
        for arm in arms.split():
            speed, shown = kept[arm]["tokens_per_second"] / 1000, f"{kept[arm]['peak_gib']:.1f} GiB"
            pages = ["docs/kernels.md", "docs/comparison.md"][:1 if arm == "nograph" else 2]
            assert [PAGES[page].count(f"| {speed:.0f},000 | {shown}") for page in pages] == [1] * len(pages), arm
            assert PAGES["README.md"].count(f"| {speed:.0f},000 |") == (2 if arm == "nanok2" else arm == "transformers")


def test_figures_of_contests_are_those_of_the_kept_results():
    plain = {page: " ".join(PAGES[page].replace("*", "").split()) for page in ("README.md", "docs/evaluation.md")}
    for name in ("moe-gpt-debug", "moe-dense-debug", "moe-dense-7M-tokens", "muon-adamw-debug", "mla-mha-debug"):
        (path,) = ROOT.glob(f"bench/results/*-contest-{name}.json")
        kept = json.loads(read_source(path))
        (found,) = kept["verdict"].values()
        tokens, seconds = (f"{found[key]['mean']:.2f}" for key in ("tokens", "seconds"))
        hours = f"{sum(run['seconds'] for run in kept['runs'].values()) / 3600:.1f} hours"
        assert hours in plain["docs/evaluation.md"] and f"| {tokens}" in plain["docs/evaluation.md"], name
        if name.startswith("moe"):
            assert re.search(f"{tokens} times the tokens.{{,10}} {seconds} times the seconds .{{,90}}{hours}",
                             plain["README.md"]), name


def test_every_page_is_in_the_readme():
    linked = set(re.findall(r"\]\(([^)\s]+\.md)\)", PAGES["README.md"]))
    assert linked == PAGES.keys() - {"README.md"}


def test_the_page_of_settings_is_what_the_code_says():
    assert PAGES["docs/settings.md"] == settings_table.page(), "make it anew: python -m docs.settings_table"
    assert re.findall(r"^\| `(\w+)` \| `", PAGES["docs/settings.md"], re.M) == list(FIELDS)


def test_the_reading_guide_names_every_module_and_its_length():
    counts = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", GUIDE, re.M)
    modules = {path.relative_to(ROOT).as_posix() for path in SOURCES if path.name != "__init__.py"}
    assert len(counts) == len(modules) and {name for name, _ in counts} == modules
    for name, count in counts:
        actual = len(read_source(ROOT / name).splitlines())
        assert abs(actual - int(count)) <= 15, f"the guide says {name} has {count} lines, it has {actual}"


def test_the_import_graph_of_the_guide_is_the_one_that_is_tested():
    graph = re.search(r"```\n(errors\n.*?)```", GUIDE, re.S)[1].splitlines()
    spelled = [re.sub(r"(\w+)\.\((.*?)\)", lambda m: " ".join(f"{m[1]}.{name}" for name in m[2].split()), line)
               for line in graph]
    assert [sorted(line.split()) for line in spelled] == [sorted(names) for names in ORDER]


def test_the_pictures_are_what_the_code_draws(tmp_path):
    for name in pictures.PICTURES:
        kept, drawn = ROOT / f"assets/{name}.svg", pictures.draw(name, tmp_path)
        assert len(pictures.written_in(kept)) > 10
        assert pictures.written_in(kept) == pictures.written_in(drawn), "draw them anew: python -m docs.pictures"
        assert f"../assets/{name}.svg" in PAGES["docs/method.md"]
