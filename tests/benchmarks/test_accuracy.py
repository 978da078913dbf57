"""The pure parts of `make bench-accuracy`: which rows there are, what is read, what is compared, what is kept."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bitgrain.evaluation.language import evaluate_model
from bitgrain.recipes import load_recipe, make_recipe
from bitgrain.recipes.recipe_file import named_recipes
from zoo import build

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import accuracy_peers as peers  # noqa: E402
from accuracy_child import OURS, compare, log_probabilities  # noqa: E402
from accuracy_methods import Method, digest, methods_of, read_methods, select  # noqa: E402
from accuracy_processes import Processes  # noqa: E402
from accuracy_report import Store, cells, page  # noqa: E402
from accuracy_texts import Job, first_documents, last_documents  # noqa: E402

NAMED = {name: path.read_text(encoding="utf-8") for name, path in named_recipes().items()}
ABOUT = {"model": "a", "mark": None, "seqlen": 8, "windows": 2, "calibrate": 3}
TEXTS = [{"text": "t", "sequences": 2, "tokens": 16, "base_perplexity": 9.0}]


def row(name: str, **changes: object) -> dict[str, object]:
    figures = {"kl": 0.01, "kl_p99": 0.1, "top1": 0.9, "perplexity": 9.5, "base_perplexity": 9.0, "tokens": 16}
    plain = {"name": name, "tool": "bitgrain", "key": "k", "code": "c", "bits": 4.0, "bits_stored": 4.1}
    cost = {"activations": False, "cpu_s": 1.0, "wall_s": 2.0, "peak_rss_mb": 3.0, "texts": {"t": figures}}
    return {**plain, **cost, **changes}


# --- methods.yaml ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [*read_methods()["models"], "another"])
def test_every_row_is_a_valid_recipe(model: str):
    methods = methods_of(read_methods(), model, NAMED)
    assert len({m.name for m in methods}) == len(methods)
    for method in (m for m in methods if m.ours):
        settings = method.settings["recipe"]
        keys = {key: value for key, value in settings.items() if key not in OURS}
        keys["scheme"] = method.settings.get("scheme", "W8A16")
        made = load_recipe(settings["base"], **keys) if "base" in settings else make_recipe(**keys)
        assert made.to_yaml()


def test_named_recipes_are_taken_from_the_package_and_watched():
    data = read_methods()
    before = {m.name: digest(m.settings) for m in methods_of(data, "llama", NAMED)}
    after = {
        m.name: digest(m.settings)
        for m in methods_of(data, "llama", {**NAMED, "best": "solver: rtn", "fast": f"# a comment\n{NAMED['fast']}"})
    }
    changed = {name for name in before if before[name] != after[name]}
    assert {"W4A16_ASYM/best", "4.15 bits/best", "W8A8/best"} <= changed
    assert not {"W4A16_ASYM/balanced", "W4A16_ASYM/fast"} & changed
    data["recipes"] = {}
    with pytest.raises(ValueError, match="there is no recipe 'rtn'"):
        methods_of(data, "llama", NAMED)


def test_select():
    methods = [
        Method(name, tool, {}) for name, tool in (("W4/gptq", "bitgrain"), ("W8/gptq", "bitgrain"), ("q/x", "q"))
    ]

    def names(*patterns: str) -> list[str]:
        return [method.name for method in select(methods, patterns)]

    assert names() == names("*") == ["W4/gptq", "W8/gptq", "q/x"]
    assert names("gptq") == names("bitgrain") == ["W4/gptq", "W8/gptq"]
    assert names("W4", "q/*") == ["W4/gptq", "q/x"]
    with pytest.raises(ValueError, match="W5"):
        names("W4", "W5")


# --- texts ----------------------------------------------------------------------------------------------------------


def test_documents():
    text = "one<|>\n two \n<|>  <|>three<|>fou"
    assert last_documents(text, "<|>", 2) == ["two", "three"]  # the last may be cut
    assert last_documents(text, "<|>", 9) == ["one", "two", "three"]
    assert first_documents(text, "<|>", 4) == ["one", "two", "three", "fou"]
    with pytest.raises(ValueError, match="no complete document"):
        last_documents("one", "<|>", 2)


def test_context_follows_contents_and_settings(tmp_path: Path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    for name in ("c", "t"):
        (tmp_path / name).write_text(name)
    job = Job(tmp_path / "m", tmp_path / "c", (tmp_path / "t",))
    first = job.context()
    assert job.context() == first
    assert str(tmp_path) not in json.dumps(job.describe())
    assert Job(job.model, job.calibration, job.texts, windows=7).context() != first
    (tmp_path / "t").write_text("changed")
    assert job.context() != first


# --- the comparison -------------------------------------------------------------------------------------------------


def test_compare_is_bitgrain_evaluate_on_windows():
    base, model = build("llama"), build("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    windows = torch.randint(0, 128, (3, 16), generator=torch.Generator().manual_seed(0))
    found = compare(model, list(windows), lambda i: log_probabilities(base, windows[i]))
    wanted = evaluate_model(model, windows, base=base, batch_size=1).to_json()
    for key in ("kl", "kl_p99", "top1", "perplexity", "base_perplexity", "tokens"):
        assert found[key] == pytest.approx(wanted[key], rel=1e-6)
    assert found["kl"] > 1e-5


class Table(nn.Module):
    """Logits of the next token from a table, whatever was before."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.table = torch.tensor(logits)

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def test_compare_counts_every_token_of_sequences_of_any_length():
    base, model = Table([[0.0, 0.0], [0.0, 0.0]]), Table([[0.0, 0.0], [0.0, 1.0]])
    ids = [torch.tensor([0, 0, 0]), torch.tensor([1])]
    found = compare(model, ids, lambda i: log_probabilities(base, ids[i]))
    q = torch.log_softmax(torch.tensor([0.0, 1.0], dtype=torch.float64), 0)
    assert found["tokens"] == 4
    assert found["kl"] == pytest.approx(float((0.5 * (torch.tensor(0.5).log() - q)).sum()) / 4, rel=1e-6)
    assert found["top1"] == 0.75
    assert found["perplexity"] == found["base_perplexity"] == pytest.approx(2.0)
    with pytest.raises(ValueError, match="NaN"):
        compare(Table([[float("nan"), 0.0]]), [torch.tensor([0, 0])], lambda i: log_probabilities(base, ids[0]))


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_store_resumes_and_refuses_other_texts(tmp_path: Path):
    store = Store(tmp_path, "r", "m", ABOUT, again=False)
    store.texts(TEXTS)
    store.add(row("a"))
    store.add({"name": "b", "tool": "bitgrain", "key": "k", "failed": "no memory"})
    again = Store(tmp_path, "r", "m", ABOUT, again=False)
    assert again.has("a", "k")
    assert not again.has("a", "other")  # other settings under the same name
    assert not again.has("b", "k")  # failures are tried again
    again.add({"name": "a", "tool": "bitgrain", "key": "k", "failed": "killed"})
    assert again.has("a", "k")
    with pytest.raises(ValueError, match=r"\(windows\)"):
        Store(tmp_path, "r", "m", {**ABOUT, "windows": 3}, again=False)
    assert not Store(tmp_path, "r", "m", {**ABOUT, "windows": 3}, again=True).has("a", "k")
    assert "no memory" in (tmp_path / "r.md").read_text()
    assert not list(tmp_path.glob("*.part"))


def test_rows_from_elsewhere_do_not_replace_measured_ones(tmp_path: Path):
    store = Store(tmp_path, "r", "m", ABOUT, again=False)
    store.merge(row("q/x", tool="q", key="", bits=1.0, **{"from": "f"}))
    store.merge(row("q/x", tool="q", key="", bits=2.0, **{"from": "f"}))
    store.add(row("q/x", tool="q", bits=3.0))
    store.merge(row("q/x", tool="q", key="", bits=4.0, **{"from": "f"}))
    assert [one["bits"] for one in json.loads((tmp_path / "r.json").read_text())["rows"]] == [3.0]


def test_table_is_ordered_and_complete():
    peer = row("q/x", tool="q", bits=4.001, bits_stored=None)
    peer["texts"] = {"t": {"kl": 0.001, "kl_p99": None, "top1": 0.5, "perplexity": 10.0}}
    rows = [
        row("acts", activations=True, bits=8.0),
        row("low", bits=3.0),
        row("high"),
        peer,
        {"name": "no", "tool": "bitgrain", "key": "k", "failed": "x"},
    ]
    header, lines = cells(rows, ["t"])
    assert [line[1] for line in lines] == ["x", "high", "low", "acts", "no"]
    assert {len(line) for line in lines} == {len(header)}
    assert lines[0] == ["q", "x", "4.001", "–", "0.00100", "–", "50.00 %", "10.000", "1.0", "2.0", "3"]
    text = page({"model": "m", "measured_on": ABOUT, "texts": TEXTS, "rows": rows})
    assert "several states" not in text
    rows[1]["code"] = "other"
    assert "several states" in page({"model": "m", "measured_on": ABOUT, "texts": TEXTS, "rows": rows})


# --- peers ----------------------------------------------------------------------------------------------------------


def record(**changes: object) -> dict[str, object]:
    figures = {"ppl": 9.5, "base_ppl": 9.0001, "kl": 0.01, "top1": 0.9, "tokens": 16}
    known = {"model": "m", "peer": "hqq", "setting": "w4g64", "ok": True, "nev": 2, "ncal": 3, "bpw": 4.5}
    return {**known, "cpu_s": 1, "quant_s": 2, "rss_mb": 3, "eval": {"held": figures}, **changes}


def job(**changes: object) -> Job:
    return Job(Path("m"), Path("c"), (Path("t"),), **{"windows": 2, "calibrate": 3, **changes})


def test_records_of_the_harness_become_rows_only_on_the_same_texts(tmp_path: Path):
    found = peers.as_row(record(), job(), TEXTS)
    assert (found["bits"], found["bits_stored"], found["cpu_s"]) == (4.5, None, 1)
    assert found["texts"]["t"]["kl"] == 0.01
    with pytest.raises(ValueError, match="another model"):
        peers.as_row(record(), job(), [{**TEXTS[0], "base_perplexity": 9.1}])
    with pytest.raises(ValueError, match="no such thing"):
        peers.as_row(record(ok=False, error="no such\nthing"), job(), TEXTS)
    path = tmp_path / "results.jsonl"
    lines = [record(bpw=1), record(), record(setting="w2g64", ncal=9), record(peer="bnb", setting="int8", ok=False)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, notes = peers.merge(path, job(), TEXTS)
    assert [(one["name"], one["bits"]) for one in rows] == [("hqq/w4g64", 4.5)]  # the latest; others differ or failed
    assert len(notes) == 1
    assert "bnb/int8" in notes[0]


def test_which_settings_quantize_activations():
    weights = ("gptq-w4g128-asym", "w4g128", "Q4_K_M-im", "int8wo", "nf4-dq")
    inputs = ("rtn-w8a8-dyn", "w4a8-gptq", "fp8-dynamic", "int8dq", "qint8-a8")
    assert not any(peers.acts("x", name) for name in weights)
    assert all(peers.acts("x", name) for name in inputs)
    assert not peers.acts("bnb", "int8")


def test_the_harness_is_told_when_it_cannot_measure_the_same():
    assert peers.unsuited(job()) == ""
    assert "512" in peers.unsuited(job(seqlen=256))
    assert "200" in peers.unsuited(job(mark="<|>", windows=5))
    assert peers.unsuited(job(mark="<|>", windows=200)) == ""


def test_the_view_of_the_harness_holds_the_texts_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("harness", "home/venvs", "home/work", "m"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "harness" / "run.py").write_text("")
    monkeypatch.setattr(peers, "HARNESS", tmp_path / "harness")
    monkeypatch.setattr(peers, "DOCUMENTS", 2)
    monkeypatch.setenv("PEERS_HOME", str(tmp_path / "home"))
    (tmp_path / "c").write_text("one#two#three")
    (tmp_path / "t").write_text("a#b#c#cut")
    plain = Job(tmp_path / "m", tmp_path / "c", (tmp_path / "t",))
    view = peers.View(plain, tmp_path / "v").make()
    assert (tmp_path / "v" / "text" / "wikitext2-test.raw").read_text() == "a#b#c#cut"
    assert (tmp_path / "v" / "peers" / "harness" / "run.py").exists()
    assert not (tmp_path / "v" / "home" / "work").exists()  # caches by the model's name: not those of other texts
    assert "stories" not in view.model.name
    parted = peers.View(Job(plain.model, plain.calibration, plain.texts, mark="#"), tmp_path / "w").make()
    assert "stories" in parted.model.name
    told = (tmp_path / "w" / "text" / "tinystories.txt").read_text().split("<|endoftext|>")
    assert told == ["one", "two", "three", "b", "c", "cut off"]


# --- processes ------------------------------------------------------------------------------------------------------


def test_processes_end_with_all_that_they_started(tmp_path: Path):
    running = Processes()
    assert running.run(["sh", "-c", "echo a; echo b >&2; exit 3"], {"PATH": "/bin:/usr/bin"}, 10) == (3, "a\n", "b\n")
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"more than 0.2 s"):
        # the second one holds the pipe open: only ending the whole group ends the wait
        running.run(["sh", "-c", "sleep 20 & sleep 20"], {"PATH": "/bin:/usr/bin"}, 0.2)
    assert time.monotonic() - began < 10
    running.stop()
    with pytest.raises(ValueError, match="stopped"):
        running.run(["true"], {}, 1)
