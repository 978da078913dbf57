"""`--device` becomes a device that is there, or one clear error."""

import pytest
import torch

from bitgrain.errors import PlanError
from bitgrain.runtime.device import resolve_device


def test_auto_takes_the_gpu_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device() == resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")


def test_named_devices(monkeypatch: pytest.MonkeyPatch):
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(PlanError, match=r"cuda:2 is not here \(torch sees 2 GPUs\)"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("name", ["", "gpu", "cuda:x", "cpu:zero", "tpu0"])
def test_unknown_names_list_the_known(name: str):
    with pytest.raises(PlanError, match=r"unknown device .*write auto, cpu, cuda or cuda:N"):
        resolve_device(name)


def test_absent_devices_say_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(PlanError, match=r"cuda is not here .*use --device cpu"):
        resolve_device("cuda")
    with pytest.raises(PlanError, match="mps is not here; use --device cpu"):
        resolve_device("mps")
