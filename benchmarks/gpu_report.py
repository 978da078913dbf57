"""The page of `make bench-gpu`."""

from __future__ import annotations

from typing import Any

from common import table

MB = 1e6
ROUNDED = "RTN W4A16"
"""The method that runs on the larger model."""


def report(data: dict[str, Any], machine: str) -> str:
    """Markdown: the jobs, then generation."""
    settings = data["settings"]
    return (
        "# Jobs and generation on a GPU\n\n"
        f"{data['gpu']}; {machine}.\n\n"
        f"Llamas of random weights, blocks of 2048 channels, a vocabulary of 32000. {ROUNDED} and generation: "
        f"{settings['whole']} blocks; the other methods: {settings['blocks']}, calibrated on "
        f"{settings['windows']} x {settings['seqlen']} tokens. MB: what torch allocated at most on the GPU.\n\n"
        + table(
            ["method", "GPU s", "GPU MB", "CPU s", "SQNR dB", "on the CPU", "loss", "on the CPU", "same bytes"],
            [_job(name, job) for name, job in data["jobs"].items()],
        )
        + f"\nOne text, {settings['tokens']} tokens after a prompt of 32, greedy, transformers' `generate`:\n\n"
        + table(
            ["model", "tokens/s", "model MB", "peak MB", "loaded in s"],
            [_generation(name, one) for name, one in data["generation"].items()],
        )
    )


def _job(name: str, job: dict[str, Any]) -> list[str]:
    if "error" in job:
        return [f"{name}: {job['error']}", *["-"] * 8]
    gpu, cpu = job["gpu"], job.get("cpu")
    return [
        name,
        f"{gpu['seconds']:.1f}",
        f"{gpu['gpu_bytes'] / MB:.0f}",
        "-" if cpu is None else f"{cpu['seconds']:.1f}",
        f"{gpu['sqnr_db']:.3f}",
        "-" if cpu is None else f"{cpu['sqnr_db']:.3f}",
        _number(gpu["loss"]),
        "-" if cpu is None else _number(cpu["loss"]),
        "-" if cpu is None else f"{job['equal']:.3%}",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _generation(name: str, one: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{one['tokens_per_second']:.1f}",
        f"{one['model_bytes'] / MB:.0f}",
        f"{one['peak_bytes'] / MB:.0f}",
        f"{one['load_seconds']:.1f}",
    ]
