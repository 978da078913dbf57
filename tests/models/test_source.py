"""Folders and hub names, and what is said about wrong ones."""

from pathlib import Path

import huggingface_hub
import pytest

from bitgrain.errors import ModelError
from bitgrain.models.source import ModelSource, resolve_model


def folder(path: Path, *files: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name in files:
        (path / name).write_text("{}")
    return path


def test_a_folder(tmp_path):
    model = folder(tmp_path / "tiny", "config.json", "model.safetensors")
    expected = ModelSource(path=model, name="tiny", revision=None)
    assert resolve_model(model) == expected
    assert resolve_model(str(model)) == expected


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "nowhere/", "~/nowhere-at-all"])
def test_a_folder_that_does_not_exist(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        resolve_model(name)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no config.json"),
        (["model.safetensors"], "has no config.json"),
        (["config.json"], "no \\*.safetensors weights"),
        (["config.json", "pytorch_model.bin"], "pytorch_model.bin, a pickle.*convert it to safetensors"),
    ],
)
def test_an_incomplete_folder(tmp_path, files, message):
    with pytest.raises(ModelError, match=message):
        resolve_model(folder(tmp_path, *files))


def test_a_file_is_not_a_model(tmp_path):
    model = folder(tmp_path, "config.json", "model.safetensors")
    with pytest.raises(ModelError, match="is a file: pass the folder"):
        resolve_model(model / "model.safetensors")


def test_a_revision_needs_the_hub(tmp_path):
    with pytest.raises(ModelError, match="--revision v2 does not apply"):
        resolve_model(folder(tmp_path, "config.json", "model.safetensors"), revision="v2")


def test_a_hub_name_without_a_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match="nobody/nothing is not an existing folder, and the hub cannot be"):
        resolve_model("nobody/nothing")


def test_a_name_that_the_hub_cannot_have(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="neither an existing folder nor a valid hub name"):
        resolve_model("two words")


def test_a_hub_model_keeps_its_name_and_commit(tmp_path, monkeypatch):
    snapshot = folder(tmp_path / "snapshots" / "abc123", "config.json", "model.safetensors")
    asked = {}

    def fake(name, **settings):
        asked.update(settings, name=name)
        return str(snapshot)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bitgrain.models.source.snapshot_download", fake)
    found = resolve_model("someone/tiny", revision="main")
    assert found == ModelSource(path=snapshot, name="someone/tiny", revision="abc123")
    assert (asked["name"], asked["revision"]) == ("someone/tiny", "main")
    assert "*.bin" not in asked["allow_patterns"]
