"""The page of benchmarks/generate.py."""

from __future__ import annotations

from typing import Any

from common import table

FOUR = ("llama.cpp Q4_0", "llama.cpp Q4_K_M", "onnxruntime-genai int4", "OpenVINO int4")
EIGHT = ("llama.cpp Q8_0", "OpenVINO int8")
PEERS = {"bitgrain W4A8": FOUR, "bitgrain W4A8, head in bfloat16": FOUR, "bitgrain W4A16": FOUR, "bitgrain W8A8": EIGHT}


def comparisons(results: dict[str, Any]) -> list[list[str]]:
    """Our speed / each peer's of as many bits."""
    return [
        [
            ours,
            peer,
            f"{results[ours]['prefill'] / one['prefill']:.2f}",
            f"{results[ours]['decode'] / one['decode']:.2f}",
            f"{results[ours]['peak'] / one['peak']:.2f}",
        ]
        for ours, peers in PEERS.items()
        if ours in results
        for peer, one in results.items()
        if peer.startswith(peers)
    ]


def report(data: dict[str, Any], where: str) -> str:
    """The Markdown page."""
    settings, results = data["settings"], data["results"]
    rows = [
        [name, f"{r['prefill']:.1f}", f"{r['decode']:.2f}", f"{r['peak'] / 1e9:.2f}", f"{r['bare'] / 1e9:.2f}"]
        for name, r in results.items()
    ]
    header = ["", f"prefill {settings['prefill']}, tok/s", "decode, tok/s", "peak GB", "of it imports, GB"]
    if settings["busy"]:
        header += [f"decode beside {settings['busy']} busy", "times slower"]
        for row, one in zip(rows, results.values(), strict=True):
            row += [f"{one['decode_beside']:.2f}", f"{one['decode'] / one['decode_beside']:.1f}"]
    compared = comparisons(results)
    rounds = max((len(r["all_decode"]) for r in results.values()), default=0)
    return (
        "# Generation, end to end\n\n"
        f"{where}; {settings['threads']} threads. A Llama of 1.1 billion random parameters; medians of "
        f"{rounds} interleaved rounds, each contestant in a process of its own.\n\n"
        + table(header, rows)
        + f"\n- decode: {settings['tokens']} tokens after {settings['prompt']}, without the first\n- peak: largest "
        "resident set of the process\n"
        + "".join(f"- left out: {name} ({why.splitlines()[0]})\n" for name, why in data["absent"].items())
        + f"- versions: {', '.join(f'{name} {number}' for name, number in data['versions'].items())}\n"
        + (
            "\n## Ours / theirs\n\nSpeeds above 1: we are faster; memory below 1: we need less.\n\n"
            + table(["", "peer", "prefill", "decode", "peak"], compared)
            if compared
            else ""
        )
    )
