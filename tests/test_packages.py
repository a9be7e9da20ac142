"""The source packages of data.prepare, on packages made up here, installed in a folder of the test's own."""

import shutil
import sys
import tomllib

import numpy as np
import pytest

from data import prepare, sources
from data.files import Account
from data.shards import open_split, read_meta
from tests.helpers import ROOT, run_train
from tests.test_prepare import contents, stored

UMLAUTS = f"# {'ä' * 40}"
SOURCE = '"""Documentation of {0}, in words."""\n\ndef {0}(text):\n    return text.strip()\n'
LICENCES = {  # the metadata's lines and what they say
    "License-Expression: MIT\nLicense: other\n": "MIT",
    "License: BSD-3-Clause\nClassifier: License :: OSI Approved :: BSD License\n": "BSD-3-Clause",
    "License: Copyright of somebody\n        All rights kept.\nClassifier: License :: OSI Approved :: BSD License\n":
        "BSD License",
    "License: MIT License\n        Copyright of somebody\n": "MIT License",
    "Classifier: Programming Language :: Python\nClassifier: License :: OSI Approved :: Zlib\n"
    "Classifier: License :: Public Domain\n": "Zlib, Public Domain",
    "": "not stated",
}


def install(site, name, files, requires=(), licence=""):
    """An installed package as pip leaves it: its files, METADATA and RECORD."""
    about = site / f"{name.replace('-', '_')}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{licence}"
                                    + "".join(f"Requires-Dist: {one}\n" for one in requires), encoding="utf-8")
    for path, text in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text, encoding="utf-8")
    (about / "RECORD").write_text("".join(f"{path},,\n" for path in sorted(files, reverse=True)), encoding="utf-8")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of packages, of which nanok2 requires alpha and nowhere, and a standard library of one file."""
    site, library = tmp_path / "site", tmp_path / "library/std.py"
    tables = "TABLE = [\n" + "    0x1f, 0x2e, 0x3d, 0x4c,\n" * 99 + "]\n"
    install(site, "alpha", {
        "alpha/__init__.py": "", "alpha/b.py": SOURCE.format("b"), "alpha/a.py": SOURCE.format("a"),
        "alpha/tests/test_a.py": SOURCE.format("test_a"), "alpha/testing/tools.py": SOURCE.format("tools"),
        "alpha/_vendor/other.py": SOURCE.format("other"), "alpha/table.py": tables,
        "alpha/long.py": f"text = '{'words ' * 99}'\n", "alpha/README.txt": "how to", "alpha/LICENSE": "be kind",
        "alpha/types.pyi": "def a(): ...", "../bin/alpha.py": SOURCE.format("command"), "alpha/umlauts.py": UMLAUTS,
    }, ["beta.two >= 1 ; python_version > '3'", "absent ; python_version < '3'", "extra ; extra == 'all'"],
        "License-Expression: MIT\n")
    install(site, "Beta-Two", {"beta.py": SOURCE.format("beta"), "same.py": SOURCE.format("a")},
            ["Alpha[all]", "gone", "triton"])
    install(site, "triton", {"triton/__init__.py": SOURCE.format("triton")})
    install(site, "unasked", {"unasked.py": SOURCE.format("unasked")})
    library.parent.mkdir()
    library.write_text(SOURCE.format("std"), encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    monkeypatch.setattr(sources, "REQUIREMENTS", ("alpha", "nowhere"))
    monkeypatch.setattr(sources, "stdlib_files", lambda: [library])
    return site


def prepared(out, *words):
    prepare.main(["packages", "--tokenizer=bytes", "--val_fraction=1e-9", f"--out={out}", *words])
    found = stored(out)
    return found["train"] + found["val"]


def test_what_is_read_and_left_out(site, tmp_path, capsys):
    texts = [SOURCE.format(name) for name in ("std", "a", "b")] + [UMLAUTS, SOURCE.format("beta")]
    assert prepared(tmp_path / "d") == texts
    account, lines = read_meta(tmp_path / "d")["account"], capsys.readouterr().out.splitlines()
    assert account["files"] == {"of tests, left out": 2, "copies of other packages, left out": 1, "empty": 1, "read": 6,
                                "that look generated, left out": 2}
    names = account["names"]
    assert names["files that look generated, left out"] == [f"{site}/alpha/{name}.py" for name in ("long", "table")]
    assert account["documents"]["duplicates dropped"] == 1
    assert account["packages"] == {"not installed, left out": 2, "of torch for CUDA, left out": 1}
    assert any("2 not installed, left out (nowhere, gone)" in line for line in lines)
    size = lambda *names: sum(len(SOURCE.format(name)) for name in names)
    version = ".".join(map(str, sys.version_info[:3]))
    assert list(account["installed"].items()) == [
        (f"Python {version}", {"files": 1, "bytes": size("std"), "licence": "PSF-2.0"}),
        ("alpha 1.0", {"files": 4, "bytes": size("a", "b") + 82, "licence": "MIT"}),
        ("beta-two 1.0", {"files": 2, "bytes": size("beta", "a"), "licence": "not stated"})]
    for name, part in account["installed"].items():
        assert [line.split() for line in lines if line.startswith(name)] == [
            [*name.split(), str(part["bytes"]), "bytes,", "licence:", *part["licence"].split()]]


def test_twice_the_same_whatever_the_order_on_disk(site, tmp_path, capsys):
    first = prepared(tmp_path / "1")
    record = site / "alpha-1.0.dist-info/RECORD"
    record.write_text("".join(sorted(record.read_text(encoding="utf-8").splitlines(True))), encoding="utf-8")
    shutil.copytree(site, tmp_path / "elsewhere")
    sys.path[0] = str(tmp_path / "elsewhere")
    assert prepared(tmp_path / "2", "--workers=3") == first
    folders = [contents(tmp_path / name) for name in ("1", "2")]
    metas = [folder.pop(next(path for path in folder if path.name == "meta.json")) for folder in folders]
    assert folders[0] == folders[1] and len(folders[0]) > 2
    assert metas[0].replace(str(site).encode(), str(tmp_path / "elsewhere").encode()) == metas[1]
    capsys.readouterr()
    prepared(tmp_path / "2")
    assert "is ready" in capsys.readouterr().out
    (tmp_path / "elsewhere/beta.py").write_text("another = 1\n", encoding="utf-8")
    with pytest.raises(prepare.UserError, match="made in another way"):
        prepared(tmp_path / "2")


def test_limit_and_files_that_are_gone(site, tmp_path):
    (site / "alpha/b.py").unlink()
    assert prepared(tmp_path / "d", "--limit=2") == [SOURCE.format("std"), SOURCE.format("a")]
    account = read_meta(tmp_path / "d")["account"]
    assert account["names"]["files of a package but gone"] == [f"{site}/alpha/b.py"]
    assert sum(len(np.concatenate(open_split(tmp_path / "d", split).arrays)) for split in ("train", "val")) == sum(
        1 + len(SOURCE.format(name)) for name in ("std", "a"))


@pytest.mark.parametrize("lines", LICENCES)
def test_licences(tmp_path, monkeypatch, lines):
    install(tmp_path, "gamma", {"gamma.py": SOURCE.format("gamma")}, licence=lines)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sources, "REQUIREMENTS", ("gamma",))
    monkeypatch.setattr(sources, "stdlib_files", lambda: [])
    sources.installed_files("packages", account := Account())
    assert account.about["installed"]["gamma 1.0"]["licence"] == LICENCES[lines]


def test_what_is_required_is_what_pyproject_says_and_is_enough():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(line.split(">")[0] for line in project["dependencies"]) == list(sources.REQUIREMENTS)
    files = sources.installed_files("packages", account := Account())
    assert sum(path.stat().st_size for path in files) == sum(p["bytes"] for p in account.about["installed"].values())
    assert sum(path.stat().st_size for path in files) > 60e6
    assert len(set(files)) == len(files) and {path.suffix for path in files} == {".py"}
    assert sources.installed_files("stdlib", Account()) == files[:len(sources.stdlib_files())]


def test_its_two_commands_train_the_laptop_config(tmp_path):
    """At full size of the model, on the first documents, with small batches and few steps."""
    prepare.main(["packages", "--limit=60", "--vocab_size=400", f"--out={tmp_path / 'data'}"])
    few = ("--max_steps=2", "--global_batch_size=2", "--micro_batch_size=2", "--eval_batches=1", "--decay_steps=1",
           "--sample_prompts=['class Matrix']")
    last = run_train(ROOT / "configs/laptop.py", f"--data={tmp_path / 'data'}", f"--out_dir={tmp_path / 'run'}", *few)
    assert last["step"] == 2 and 4 < last["loss"] < 12 and last["dead_experts"] < 5 * 64
    told = (tmp_path / "run/samples.md").read_text(encoding="utf-8")
    assert "class Matrix" in told and len(list((tmp_path / "run/checkpoints").glob("step_*"))) == 1
