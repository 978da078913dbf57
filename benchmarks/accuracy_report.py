"""The results of one model: kept as JSON row by row, and shown as one Markdown table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from common import machine, machine_line, table, write_results

Page = Callable[[Mapping[str, Any]], str]
"""Results -> Markdown."""


class Store:
    """NAME.json and NAME.md in `folder`, written anew after every row, so that a killed run keeps what it has.

    Rows that are there already stay if they were measured on the same model, texts and windows (`context`); otherwise
    ValueError, unless `again`. Files of another kind are replaced.
    """

    def __init__(
        self, folder: Path, name: str, model: str, described: Mapping[str, Any], again: bool, shown: Page | None = None
    ) -> None:
        """shown: what makes the Markdown, `page` if None."""
        self._folder, self._name, self._lock, self._shown = folder, name, Lock(), shown or page
        self._data: dict[str, Any] = {"model": model, "measured_on": dict(described), "texts": [], "rows": []}
        path = folder / f"{name}.json"
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if old.get("rows") and old["measured_on"] != self._data["measured_on"]:
            changed = [key for key, value in described.items() if old["measured_on"].get(key) != value]
            if not again:
                raise ValueError(
                    f"{path.name} holds rows measured otherwise ({', '.join(changed)}): choose another folder "
                    "with --results, or throw them away with --again"
                )
        elif old.get("rows"):
            self._data["rows"] = old["rows"]

    def has(self, name: str, key: str) -> bool:
        """Whether that row was measured with these settings, and did not fail."""
        return any(row["name"] == name and row["key"] == key and "failed" not in row for row in self._data["rows"])

    def texts(self, texts: Sequence[Mapping[str, Any]]) -> None:
        """What the base measured."""
        self._data["texts"] = [dict(text) for text in texts]

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a row in place of an older one of that name; a failure never replaces figures with the same key."""
        with self._lock:
            if "failed" in row and self.has(row["name"], row["key"]):
                return
            self._data["rows"] = [old for old in self._data["rows"] if old["name"] != row["name"]] + [dict(row)]
            self.write()

    def merge(self, row: Mapping[str, Any]) -> None:
        """Keep a row that was measured elsewhere, unless there is one of that name that was measured here."""
        known = [old for old in self._data["rows"] if old["name"] == row["name"]]
        if all("failed" in old or "from" in old for old in known):
            self.add(row)

    def write(self) -> None:
        """Both files."""
        write_results(self._name, self._data, self.page(), self._folder, show=False)

    def page(self) -> str:
        """The Markdown."""
        return self._shown(self._data)


def page(data: Mapping[str, Any]) -> str:
    """One model's results as Markdown."""
    about, texts = data["measured_on"], data["texts"]
    parted = about["mark"] is not None
    lines = [
        f"- {text['text']}: "
        + (f"the last {text['sequences']} complete documents" if parted else f"{text['sequences']} windows")
        + f", {text['tokens']} tokens, base perplexity {text['base_perplexity']:.3f}\n"
        for text in texts
    ]
    codes = {row.get("code") for row in data["rows"] if row["tool"] == "bitgrain" and "failed" not in row}
    failed = [row for row in data["rows"] if "failed" in row]
    notes = sorted({row["not_as_asked"] for row in data["rows"] if row.get("not_as_asked")})
    return (
        f"# Accuracy on {data['model']}\n\n"
        f"{machine_line()}, one thread a row. Linears of the decoder blocks only; embeddings, norms and lm_head as "
        f"they were. Calibration: {about['calibrate']} windows of {about['seqlen']} tokens, for methods that use any. "
        "KL(base || quantized) in nats per token.\n\n"
        + "".join(lines)
        + "- bits: for each weight, codes, zero points and scales, with 16-bit scales counted for everyone; stored: "
        "with scales as they are on disk\n"
        "- CPU s: user and system time of the quantizing process, reading the model included, imports not; "
        "wall s: compare within one run only\n"
        "- rows that quantize activations too, in simulation as vLLM rounds them, stand behind those that do not\n\n"
        + table(*cells(data["rows"], [text["text"] for text in texts]))
        + "".join(f"\n\\* not every layer as asked, for instance {note}" for note in notes[:1])
        + (
            "\nRows of bitgrain come from several states of its code; see `code` in the JSON.\n"
            if len(codes) > 1
            else ""
        )
        + ("\nFailed:\n\n" + "".join(f"- {row['name']}: {row['failed']}\n" for row in failed) if failed else "")
    ).rstrip("\n") + "\n"


def cells(rows: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: weights only first, then by falling bits and rising KL; failed rows last."""
    header = ["tool", "method", "bits", "stored"]
    for text in texts:
        header += [f"{text}: KL", "KL p99", "top-1", "perplexity"]
    header += ["CPU s", "wall s", "peak RSS MB"]

    def order(row: Mapping[str, Any]) -> tuple[Any, ...]:
        first = row["texts"].get(texts[0], {}) if texts else {}
        return row["activations"], -round(row["bits"], 2), first.get("kl", 0.0)

    lines: list[list[str]] = []
    for row in sorted((row for row in rows if "failed" not in row), key=order):
        method = row["name"] if row["tool"] == "bitgrain" else row["name"].split("/", 1)[1]
        line = [row["tool"], method + ("*" if row.get("not_as_asked") else "")]
        line += [number(row["bits"], ".3f"), number(row["bits_stored"], ".3f")]
        for text in texts:
            figures = row["texts"].get(text, {})
            line += [nats(figures.get("kl")), nats(figures.get("kl_p99"), ".2g")]
            top1 = figures.get("top1")
            line += [number(None if top1 is None else 100 * top1, ".2f") + ("" if top1 is None else " %")]
            line += [number(figures.get("perplexity"), ".3f")]
        line += [number(row["cpu_s"], ".1f"), number(row["wall_s"], ".1f"), number(row["peak_rss_mb"], ".0f")]
        lines.append(line)
    for row in (row for row in rows if "failed" in row):
        method = row["name"] if row["tool"] == "bitgrain" else row["name"].split("/", 1)[1]
        lines.append([row["tool"], method, "failed", *[""] * (len(header) - 3)])
    return header, lines


def number(value: float | None, form: str) -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None else format(value, form)


def nats(value: float | None, form: str = ".5f") -> str:
    """A divergence; very small ones keep two digits."""
    return number(value, ".2g" if value is not None and abs(value) < 1e-4 else form)


def provenance() -> dict[str, Any]:
    """Where and when a row was measured."""
    found = machine()
    return {key: found[key] for key in ("date", "cpu", "cores")}
