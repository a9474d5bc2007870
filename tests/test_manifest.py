"""A manifest says of each file what it is, and a file that differs from it is an error."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from messages import check_raised

from parallama.errors import CheckpointError
from parallama.files import manifest

KNOWN = {"format": "parallama-manifest", "version": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 5000)
    manifest.write(tmp_path, ["model.safetensors", "config.json"])
    return tmp_path


def check_refused(folder: Path, *parts: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        manifest.check(folder)
    check_raised(caught.value, 3, *parts)


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
    check_refused(folder, "model.safetensors", "SHA-256", "manifest.json")


def test_a_file_of_another_size_is_an_error_that_names_both(folder):
    (folder / "config.json").write_bytes(b"{ }")
    check_refused(folder, "config.json", "3 bytes", "expected 2", "manifest.json")


def test_a_missing_file_is_an_error_that_names_it(folder):
    (folder / "config.json").unlink()
    check_refused(folder, "manifest.json", "'config.json'", "missing")


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "..", "", "a/b", "with\0null", "n" * 300, "\ud800"],
    ids=lambda name: repr(name[:9]),
)
def test_a_manifest_that_names_a_file_elsewhere_is_an_error(folder, name):
    rewrite(folder, KNOWN | {"files": {name: {"bytes": 0, "sha256": "0" * 64}}})
    check_refused(folder, repr(name)[:9])


def test_a_link_out_of_the_folder_is_an_error_that_names_it(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "config.json"
    (folder / "config.json").rename(outside)
    (folder / "config.json").symlink_to(outside)
    check_refused(folder, "config.json", "link")


def test_a_fifo_is_an_error_and_not_waited_for(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    check_refused(folder, "config.json", "FIFO")


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "7", "{", '{"format": "parallama-manifest", "format": "parallama-manifest"}'),
        KNOWN | {"format": "another", "files": {}},
        KNOWN | {"version": 2, "files": {}},
        KNOWN,
        *(
            KNOWN | {"files": {"config.json": wrong}}
            for wrong in (
                7,
                {"bytes": -1, "sha256": "0" * 64},
                {"bytes": 2, "sha256": "XY"},
                {"bytes": "2", "sha256": "0" * 64},
            )
        ),
    ],
    ids=str,
)
def test_what_is_no_manifest_is_an_error_that_names_it(folder, content):
    rewrite(folder, content)
    check_refused(folder, "manifest.json")


def test_writing_about_a_missing_file_leaves_no_manifest(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        manifest.write(tmp_path, ["config.json"])
    assert list(tmp_path.iterdir()) == []
