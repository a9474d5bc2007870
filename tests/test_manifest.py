"""A manifest says of each file what it is, and a folder that differs from it is an error that names the file."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from parallama.errors import CheckpointError
from parallama.files import manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 5000)
    manifest.write(tmp_path, ["model.safetensors", "config.json"])
    return tmp_path


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        manifest.check(folder)
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


def rewrite(folder: Path, content: object) -> None:
    (folder / "manifest.json").write_text(
        content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
    )


def test_a_manifest_has_size_and_sha256_of_each_file(folder):
    content = bytes(range(256)) * 5000
    assert json.loads((folder / "manifest.json").read_text(encoding="utf-8")) == {
        "format": "parallama-manifest",
        "version": 1,
        "files": {
            "config.json": {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()},
            "model.safetensors": {
                "bytes": 1_280_000,
                "sha256": hashlib.sha256(content).hexdigest(),
            },
        },
    }
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]


def test_files_that_are_as_their_manifest_says_pass(folder):
    checked = manifest.check(folder)
    assert checked is not None and set(checked) == {"config.json", "model.safetensors"}
    assert checked["config.json"].bytes == 2


def test_a_folder_without_a_manifest_is_not_checked(tmp_path):
    assert manifest.check(tmp_path) is None


def test_a_changed_byte_is_an_error_that_names_the_file(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(777)
        file.write(b"!")
    first, second = refused(folder).splitlines()
    assert first.startswith("model.safetensors has SHA-256 ")
    assert second.startswith("expected ") and second.endswith(", from manifest.json")


def test_a_file_of_another_size_is_an_error_that_names_both(folder):
    (folder / "config.json").write_bytes(b"{ }")
    assert refused(folder) == "config.json has 3 bytes\nexpected 2, from manifest.json"


def test_a_missing_file_is_an_error_that_names_it(folder):
    (folder / "config.json").unlink()
    assert (
        refused(folder)
        == "manifest.json names 'config.json', which is missing\ncopy or download the folder again"
    )


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "..", "", "a/b", "with\0null", "n" * 300, "\ud800"],
    ids=lambda name: repr(name[:9]),
)
def test_a_manifest_that_names_a_file_elsewhere_is_an_error(folder, name):
    rewrite(
        folder,
        {
            "format": "parallama-manifest",
            "version": 1,
            "files": {name: {"bytes": 0, "sha256": "0" * 64}},
        },
    )
    assert "file name" in refused(folder) or "which is missing" in refused(folder)


def test_a_link_out_of_the_folder_is_an_error_that_names_it(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "config.json"
    (folder / "config.json").rename(outside)
    (folder / "config.json").symlink_to(outside)
    assert refused(folder).startswith("config.json is a link to ")


def test_a_fifo_is_an_error_and_not_waited_for(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert refused(folder) == "config.json is a FIFO\nexpected a regular file"


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "7", "{", '{"format": "parallama-manifest", "format": "parallama-manifest"}'),
        {"format": "another", "version": 1, "files": {}},
        {"format": "parallama-manifest", "version": 2, "files": {}},
        {"format": "parallama-manifest", "version": 1},
        {"format": "parallama-manifest", "version": 1, "files": {"config.json": 7}},
        {
            "format": "parallama-manifest",
            "version": 1,
            "files": {"config.json": {"bytes": -1, "sha256": "0" * 64}},
        },
        {
            "format": "parallama-manifest",
            "version": 1,
            "files": {"config.json": {"bytes": 2, "sha256": "XY"}},
        },
        {
            "format": "parallama-manifest",
            "version": 1,
            "files": {"config.json": {"bytes": "2", "sha256": "0" * 64}},
        },
    ],
    ids=str,
)
def test_what_is_no_manifest_is_an_error_that_names_it(folder, content):
    rewrite(folder, content)
    assert "manifest.json" in refused(folder)


def test_writing_about_a_missing_file_leaves_no_manifest(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        manifest.write(tmp_path, ["config.json"])
    assert list(tmp_path.iterdir()) == []
