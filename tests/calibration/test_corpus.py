"""The built-in text: two splits of the running Python's standard library that share no module."""

import sys
import sysconfig
from pathlib import Path

import pytest

from bitgrain.calibration import corpus
from bitgrain.calibration.corpus import HELD_OUT_MODULES, Split, builtin_modules, builtin_text
from bitgrain.errors import TextError

SPLITS: list[Split] = ["calibration", "evaluation"]


@pytest.fixture
def library_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Makes a folder of the test's own the standard library, however small."""
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(corpus, "_LEAST_BYTES", {"calibration": 1, "evaluation": 1})
    return tmp_path


def test_held_out_modules_are_all_here_and_nowhere_else():
    assert list(HELD_OUT_MODULES) == sorted(set(HELD_OUT_MODULES))
    assert 15 <= len(HELD_OUT_MODULES) <= 25
    assert set(HELD_OUT_MODULES) <= sys.stdlib_module_names
    held_out = [name for name, _ in builtin_modules("evaluation")]
    assert held_out == list(HELD_OUT_MODULES)
    assert not {name.partition(".")[0] for name, _ in builtin_modules("calibration")} & set(HELD_OUT_MODULES)


def test_no_held_out_source_is_in_the_calibration_text():
    text = builtin_text("calibration")
    for name, source in builtin_modules("evaluation"):
        middle = source[len(source) // 2 :][:400]
        assert middle not in text, name


@pytest.mark.parametrize("split", SPLITS)
def test_the_text_is_the_same_every_time_and_in_the_order_of_names(split: Split):
    modules = builtin_modules(split)
    assert modules == builtin_modules(split)
    assert [name for name, _ in modules] == sorted(name for name, _ in modules)
    assert builtin_text(split) == "\n".join(source for _, source in modules)
    assert "\r\n" not in builtin_text(split)[:1_000_000]


def test_sizes_are_enough_to_calibrate_and_to_measure():
    assert 4_000_000 < len(builtin_text("calibration").encode()) < 30_000_000
    assert 400_000 < len(builtin_text("evaluation").encode()) < 2_000_000


def test_calibration_has_public_modules_and_no_tests_tables_or_bundles():
    names = {name for name, _ in builtin_modules("calibration")}
    assert {"ast", "asyncio.tasks", "collections", "email.message", "json.decoder", "threading"} <= names
    parts = {part for name in names for part in name.split(".")}
    assert not parts & {"test", "tests", "idlelib", "lib2to3", "ensurepip", "encodings", "pydoc_data", "pip"}
    assert not [name for name in names if name.startswith("_sysconfig")]


@pytest.mark.parametrize("limit", [1, 100, 12_345, 10**9])
def test_max_bytes_cuts_a_prefix(limit: int):
    whole = builtin_text("evaluation")
    part = builtin_text("evaluation", max_bytes=limit)
    assert whole.startswith(part)
    assert len(part.encode()) == min(limit, len(whole.encode()))


def test_max_bytes_never_cuts_a_character(library_at: Path):
    (library_at / "words.py").write_text("äöü\n", encoding="utf-8")
    cuts = [builtin_text("calibration", max_bytes=n) for n in range(1, 8)]
    assert cuts == ["", "ä", "ä", "äö", "äö", "äöü", "äöü\n"]


@pytest.mark.parametrize("limit", [0, -1])
def test_max_bytes_must_be_positive(limit: int):
    with pytest.raises(TextError, match="positive"):
        builtin_text("calibration", max_bytes=limit)


def test_unknown_split():
    with pytest.raises(TextError, match="'calibration' or 'evaluation'"):
        builtin_text("training")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("split", SPLITS)
def test_a_python_without_library_sources(split: Split, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for stdlib in (tmp_path, tmp_path / "python311.zip"):
        monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda stdlib=stdlib: {"stdlib": str(stdlib)})
        with pytest.raises(TextError, match="full Python installation"):
            builtin_text(split)


def test_folders_that_are_not_the_library_are_left_alone(library_at: Path):
    kept = ["ast.py", "json/__init__.py", "json/decoder.py", "heapq.py"]
    dropped = [
        "site-packages/other.py",
        "test/test_ast.py",
        "unittest/test/case.py",
        "encodings/cp1.py",
        "_sysconfigdata_x.py",
        "json/notes.txt",
        "config-3/x.py",
    ]
    for name in kept + dropped:
        path = library_at / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    calibration = dict(builtin_modules("calibration"))
    assert list(calibration) == ["ast", "json", "json.decoder"]
    assert calibration["json"] == "# json/__init__.py\n"
    assert builtin_modules("evaluation") == [("heapq", "# heapq.py\n")]


def test_a_damaged_source_is_named(library_at: Path):
    (library_at / "broken.py").write_bytes(b"# \xff\xfe not UTF-8\n")
    with pytest.raises(TextError, match=r"broken\.py"):
        builtin_text("calibration")


def test_the_library_is_the_one_that_runs():
    root = Path(sysconfig.get_paths()["stdlib"])
    assert dict(builtin_modules("evaluation"))["heapq"] == (root / "heapq.py").read_text(encoding="utf-8")
