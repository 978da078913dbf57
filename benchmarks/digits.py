"""A small ResNet on scikit-learn's digits, trained here, then quantized: accuracy on images that it never saw.

    make bench-digits
    make bench-digits ARGS="--seeds 2 --epochs 10"

Each seed draws its own half of the 1797 images for training and is tested on the other half, so that the accuracies of
five seeds are of 4495 answers. Batch norms are folded, 256 training images calibrate, and every row quantizes a copy of
the same network. One thread: the same seeds give the same numbers.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import machine_line, table, write_results

import bitgrain
from bitgrain.numerics import IntFormat, QuantSpec, per_channel, per_tensor
from bitgrain.numerics.granularity import Granularity
from bitgrain.numerics.ranges import MSE, MinMax
from bitgrain.recipes import Scheme, get_scheme, make_recipe
from bitgrain.recipes.spec_model import SchemeModel


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch norms beside a shortcut (He et al., arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut: nn.Module = nn.Identity()
        if not same:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Sequential):
    """Images [n, 1, 8, 8] -> logits [n, 10]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(
            *(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)),
        )


def images(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Half of the digits to train on, half to test on: pixels from 0 to 1, and labels."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[: len(x) // 2], order[len(x) // 2 :]
    return x[train], y[train], x[test], y[test]


def train(x: Tensor, y: Tensor, seed: int, epochs: int, batch: int = 64) -> ResNet:
    """AdamW under a one-cycle schedule, images shifted by at most one pixel."""
    torch.manual_seed(seed)
    model = ResNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    steps = epochs * -(-len(x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    for _ in range(epochs):
        for places in torch.randperm(len(x)).split(batch):
            down, right = torch.randint(0, 3, (2,)).tolist()
            shifted = F.pad(x[places], (1, 1, 1, 1))[:, :, down : down + 8, right : right + 8]
            loss = F.cross_entropy(model(shifted), y[places])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def weights(bits: int, channel: bool) -> QuantSpec:
    """Symmetric integers, with a scale for each output channel or one for all."""
    return QuantSpec(IntFormat(bits), per_channel() if channel else per_tensor(), restricted=True)


def inputs(bits: int, channel: bool = False) -> QuantSpec:
    """Static: a zero point, since what comes out of a ReLU has no negative side; 16 bits are symmetric, as TFLite's."""
    granularity = Granularity(None, 1) if channel else per_tensor()
    if bits == 16:
        return QuantSpec(IntFormat(16), granularity, restricted=True)
    return QuantSpec(IntFormat(bits), granularity, "integer", range=MSE() if bits < 8 and not channel else MinMax())


@dataclass(frozen=True)
class Row:
    """One way to quantize the network. wanted: the columns that say so."""

    name: str
    weights: str
    inputs: str
    scheme: Scheme
    solver: str = "rtn"
    first_last: Scheme | None = None


W8A8 = Scheme("W8A8_STATIC", weights(8, True), inputs(8))


def rows() -> list[Row]:
    """Every row below FP32."""
    tensor, channel = "per tensor", "per output channel"
    found = [
        Row("W8A8", tensor, "static, per tensor", Scheme("W8A8", weights(8, False), inputs(8))),
        Row("W8A8", channel, "static, per tensor", W8A8),
        Row("W8A8", channel, "static, per input channel *", Scheme("W8A8", weights(8, True), inputs(8, True))),
        Row("W8A8", channel, "dynamic, per image", get_scheme("W8A8")),
    ]
    for a in (16, 8, 4):
        w, label = (8, "W8A16INT16") if a == 16 else (4, f"W4A{a}")
        for one in (False, True):
            scheme = Scheme(label, weights(w, one), inputs(a))
            found.append(Row(label, channel if one else tensor, "static, per tensor", scheme))
        if w == 4:
            last = found[-1]
            found.append(replace(last, solver="gptq"))
            found.append(replace(last, solver="gptq", first_last=W8A8))
    return found


@torch.no_grad()
def measure(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, base: Tensor | None) -> dict[str, Any]:
    """Right answers, and the KL divergence in nats per image from the logits `base`."""
    logits = model(x)
    found: dict[str, Any] = {"right": int((logits.argmax(-1) == y).sum()), "images": len(y)}
    if base is not None:
        found["kl"] = float(
            F.kl_div(logits.log_softmax(-1), base.log_softmax(-1), reduction="batchmean", log_target=True)
        )
    return found


def run_seed(seed: int, epochs: int) -> dict[str, Any]:
    """Train, fold, calibrate, and measure all rows."""
    x, y, test_x, test_y = images(seed)
    began = time.process_time()
    model = train(x, y, seed, epochs)
    seconds = time.process_time() - began
    folded = bitgrain.fold_batch_norms_(model, x[:32])
    assert not folded.kept
    with torch.no_grad():
        base = model(test_x)
    calibration = bitgrain.calibrate(model, x[:256].split(64))
    found = [measure(model, test_x, test_y, None)]
    for row in rows():
        copied = copy.deepcopy(model)
        recipe = make_recipe(scheme=SchemeModel.of(row.scheme), solver=row.solver)
        bitgrain.quantize_(copied, recipe, calibration=calibration, first_last=row.first_last)
        found.append(measure(copied, test_x, test_y, base))
    return {"seed": seed, "train_s": seconds, "fold_error": folded.error, "rows": found}


def summarize(seeds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each row over all seeds: accuracies in percent, differences from FP32 in points."""
    labels = [("FP32", "", "", "", ""), *((r.name, r.weights, r.inputs, r.solver, _ends(r)) for r in rows())]
    lines: list[dict[str, Any]] = []
    for i, (name, of_weights, of_inputs, solver, ends) in enumerate(labels):
        found = [seed["rows"][i] for seed in seeds]
        each = [100 * one["right"] / one["images"] for one in found]
        points = [a - 100 * s["rows"][0]["right"] / s["rows"][0]["images"] for a, s in zip(each, seeds, strict=True)]
        line = {"scheme": name, "weights": of_weights, "inputs": of_inputs, "solver": solver, "first_last": ends}
        line |= {"accuracy": statistics.mean(each), "points": statistics.mean(points), "points_by_seed": points}
        line["kl"] = statistics.mean(one["kl"] for one in found) if i else None
        lines.append(line)
    return lines


def _ends(row: Row) -> str:
    return "W8A8" if row.first_last is not None else ""


def report(lines: list[dict[str, Any]], seeds: list[dict[str, Any]]) -> str:
    """The Markdown page."""
    header = ["scheme", "weights", "activations", "solver", "first, last", "accuracy %", "points", "worst seed", "KL"]
    body = [
        [
            *(line[key] for key in ("scheme", "weights", "inputs", "solver", "first_last")),
            f"{line['accuracy']:.2f}",
            f"{line['points']:+.2f}" if line["kl"] is not None else "",
            f"{min(line['points_by_seed']):+.2f}" if line["kl"] is not None else "",
            f"{line['kl']:.2g}" if line["kl"] is not None else "",
        ]
        for line in lines
    ]
    tested = sum(seed["rows"][0]["images"] for seed in seeds)
    seconds = statistics.mean(seed["train_s"] for seed in seeds)
    return (
        "# A small ResNet on digits\n\n"
        f"{machine_line()}, one thread. Trained from {len(seeds)} seeds ({seconds:.0f} CPU seconds each), tested on "
        f"{tested} images that it did not learn from. points: difference in accuracy from FP32, mean of the seeds; KL: "
        "nats per image, from FP32.\n\n"
        + table(header, body)
        + "\n\\* A simulation: the product sums over input channels, so no engine can take their scales out of it.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--name", default="digits", help="of the files in benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [run_seed(seed, arguments.epochs) for seed in range(arguments.seeds)]
    lines = summarize(seeds)
    write_results(arguments.name, {"epochs": arguments.epochs, "rows": lines, "seeds": seeds}, report(lines, seeds))


if __name__ == "__main__":
    main()
