"""Plugin files: what is read from them, what is refused, and options for their clients."""

from __future__ import annotations

import shutil
import struct
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import check_raised
from plugin_maker import make

from parallama.engine.devices import elf, plugins, tenstorrent
from parallama.engine.devices.plugins import ApiVersion
from parallama.errors import BackendError, UsageError

SYMBOL = "GetPjrtApi"
LIBC = next(
    Path(path)
    for path in ("/lib/x86_64-linux-gnu/libc.so.6", "/lib64/libc.so.6", "/usr/lib/libc.so.6")
    if Path(path).exists()
)


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("plugins") / "fits.so")


def patched(plugin: Path, to: Path, place: int, *numbers: int) -> Path:
    """A copy with other 16-bit numbers at a place of its header."""
    data = bytearray(plugin.read_bytes())
    struct.pack_into(f"<{len(numbers)}H", data, place, *numbers)
    to.write_bytes(data)
    return to


def check_refused(library: Path, *parts: object, **arguments: bool) -> None:
    with pytest.raises(BackendError) as caught:
        plugins.check(library, **arguments)
    check_raised(caught.value, 5, repr(str(library)), *parts)


# -- versions


@pytest.mark.parametrize("version", [(0, 57), (0, 70), (0, 75)])
def test_a_plugin_of_a_fitting_version_is_accepted(
    tmp_path: Path, version: tuple[int, int]
) -> None:
    assert plugins.check(make(tmp_path / "p.so", version)) == ApiVersion(*version)


@pytest.mark.parametrize(
    ("version", "reason"), [((0, 76), "newer"), ((0, 56), "0.57"), ((1, 75), "major version")]
)
def test_a_plugin_of_another_version_is_refused_with_both_versions(
    tmp_path: Path, version: tuple[int, int], reason: str
) -> None:
    library, found = make(tmp_path / "p.so", version), str(ApiVersion(*version))
    check_refused(library, found, "torch_xla 2.9.0", "0.57 to 0.75", reason)


def test_the_real_plugin_of_a_newer_version_is_refused_and_not_run() -> None:
    library = plugins.find("xla_cpu_pjrt")
    assert library is not None
    check_refused(library, "0.81", "torch_xla 2.9.0", "0.57 to 0.75")


def test_a_plugin_known_to_take_older_callers_may_be_newer_but_not_older_or_of_another_major(
    tmp_path: Path,
) -> None:
    newer = make(tmp_path / "p.so", (0, 113))
    assert plugins.check(newer, takes_older_callers=True) == ApiVersion(0, 113)
    check_refused(make(tmp_path / "p.so", (0, 56)), "0.56", takes_older_callers=True)
    check_refused(make(tmp_path / "p.so", (1, 2)), "1.2", takes_older_callers=True)


# -- files


def test_a_path_where_nothing_is_is_refused(tmp_path: Path) -> None:
    check_refused(tmp_path / "none.so", SYMBOL)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    check_refused(tmp_path, "folder", SYMBOL)


def test_an_empty_file_a_text_and_a_cut_one_are_refused(tmp_path: Path, fits: Path) -> None:
    library = tmp_path / "p.so"
    for content, parts in (
        (b"", ("empty",)),
        (b"not a plugin", ("ELF", "b'not a pl'")),
        (fits.read_bytes()[:10], ("10 bytes",)),
        (fits.read_bytes()[:300], ("cut short",)),
    ):
        library.write_bytes(content)
        check_refused(library, *parts, SYMBOL)


def test_a_library_for_another_machine_is_refused(tmp_path: Path, fits: Path) -> None:
    for place, number, built in (
        (18, 183, "AArch64"),
        (4, 0x0101, "32-bit x86-64"),
        (18, 4711, "machine 4711"),
    ):
        check_refused(patched(fits, tmp_path / "p.so", place, number), built, "expected x86-64")


def test_a_program_and_an_object_file_are_refused(tmp_path: Path, fits: Path) -> None:
    for number, what in ((2, "program"), (1, "object file"), (9, "ELF type 9")):
        check_refused(patched(fits, tmp_path / "p.so", 16, number), what, SYMBOL)


def test_a_library_that_is_no_plugin_is_refused(tmp_path: Path) -> None:
    for library in (LIBC, make(tmp_path / "p.so", symbol="GetPjrtApi2")):
        check_refused(library, SYMBOL)


def test_a_file_that_may_not_be_read_or_has_an_impossible_name_is_refused(tmp_path: Path) -> None:
    check_refused(tmp_path / ("x" * 300), "File name too long", SYMBOL)


def test_a_library_whose_dependencies_are_missing_is_refused_with_the_loaders_words(
    tmp_path: Path,
) -> None:
    check_refused(make(tmp_path / "p.so", needs="libnowhere.so.1"), "libnowhere.so.1")


# -- loading: a plugin that misbehaves does it in another process


def test_a_plugin_that_crashes_when_asked_is_told_and_survived(tmp_path: Path) -> None:
    check_refused(make(tmp_path / "p.so", get="crash"), "SIGSEGV")


def test_a_plugin_that_hangs_when_asked_is_ended(tmp_path: Path) -> None:
    library = make(tmp_path / "p.so", get="hang")
    with pytest.raises(BackendError) as caught:
        plugins.ask_version(library, limit_s=1)
    check_raised(caught.value, 5, repr(str(library)), "1 s")


def test_a_plugin_without_a_table_is_refused(tmp_path: Path) -> None:
    check_refused(make(tmp_path / "p.so", get="null"), SYMBOL, "table")


def test_the_place_where_one_stands_is_not_imported_from(
    tmp_path: Path, fits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ctypes.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    assert plugins.ask_version(fits) == ApiVersion(0, 75)


# -- reading ELF files


def test_symbols_are_found_through_either_hash_table_and_only_defined_ones(fits: Path) -> None:
    assert elf.exports(fits, "GetPjrtApi") and not elf.exports(fits, "GetPjrt")  # DT_HASH
    assert elf.exports(LIBC, "malloc") and not elf.exports(LIBC, "mallo")  # DT_GNU_HASH
    asked_for = Path(next(p for p in sys.path if p.endswith("lib-dynload"))).glob("_ctypes.*.so")
    assert not any(
        elf.exports(library, "malloc") or elf.exports(library, "PyErr_SetString")
        for library in asked_for
    )


@settings(deadline=None)
@given(st.data())
def test_a_damaged_library_gives_an_answer_or_an_elf_error_and_nothing_else(
    fits: Path, data: st.DataObject
) -> None:
    content = bytearray(fits.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, 350) | st.integers(0, len(content) - 1))] = data.draw(
            st.integers(0, 255)
        )
    library = fits.with_name("damaged.so")
    library.write_bytes(content[: data.draw(st.integers(1, len(content)) | st.just(len(content)))])
    try:
        assert elf.exports(library, "GetPjrtApi") in (True, False)
    except elf.ElfError as error:
        assert str(error)


# -- where plugins are


def test_a_path_is_told_from_a_name_and_known_files_have_their_backends() -> None:
    assert (
        plugins.is_path("./x")
        and plugins.is_path("x.so")
        and plugins.is_path("/a/b")
        and not plugins.is_path("tpu")
    )
    assert [
        plugins.name_of(Path(path)) for path in ("/a/libtpu.so", "b/pjrt_plugin_tt.so", "c/my.1.so")
    ] == ["tpu", "tt", "my"]


def test_an_installed_plugin_is_found_by_its_entry_point_and_no_other_package_is_one() -> None:
    library = plugins.find("xla_cpu_pjrt")
    assert library is not None and library.name == "xla_cpu_pjrt.so"
    assert "xla_cpu_pjrt" in plugins.installed()
    assert (
        plugins.find("numpy") is None
        and plugins.find("no-such thing") is None
        and plugins.find("") is None
    )


def test_a_package_by_the_usual_names_is_found_and_one_with_two_plugins_is_refused(
    tmp_path: Path, fits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pjrt_plugin_mine"
    folder.mkdir()
    shutil.copy(fits, folder / "mine.so")
    (folder / "other.so").write_text("no plugin")
    for package, file in plugins.PACKAGES.values():
        (tmp_path / package).mkdir()
        shutil.copy(fits, tmp_path / package / file)
    monkeypatch.syspath_prepend(tmp_path)
    assert plugins.find("mine") == folder / "mine.so"
    assert plugins.find("tt") == tmp_path / "pjrt_plugin_tt" / "pjrt_plugin_tt.so"
    assert plugins.find("tpu") == tmp_path / "libtpu" / "libtpu.so"
    shutil.copy(fits, folder / "second.so")
    with pytest.raises(BackendError) as caught:
        plugins.find("mine")
    check_raised(caught.value, 5, "'mine'", folder / "mine.so", folder / "second.so")


def test_jaxs_variable_names_libraries() -> None:
    assert plugins.named_libraries("") == {}
    assert plugins.named_libraries("tt:/a/b.so, my : c.so,broken,x:") == {
        "tt": "/a/b.so",
        "my": "c.so",
    }


# -- Tenstorrent


def test_a_tenstorrent_mesh_is_told_to_the_plugin_and_shardy_only_to_the_fork(
    tmp_path: Path,
) -> None:
    library = tmp_path / "pjrt_plugin_tt.so"
    always, several = (
        {"XLA_STABLEHLO_COMPILE": "1"},
        {"ENABLE_AUTO_PARALLEL": "TRUE", "MESH_SHAPE": "2,4"},
    )
    assert tenstorrent.variables_for(library, 8, (2, 4), "gspmd") == always | several
    assert tenstorrent.variables_for(library, 8, (2, 4), "shardy") == always | several | {
        "CONVERT_SHLO_TO_SHARDY": "1"
    }
    assert tenstorrent.variables_for(library, None, None, "gspmd") == always | {
        "ENABLE_AUTO_PARALLEL": "TRUE"
    }


def test_one_tenstorrent_chip_is_told_of_no_mesh(tmp_path: Path) -> None:
    (tmp_path / "tt-metal").mkdir()
    assert tenstorrent.variables_for(tmp_path / "pjrt_plugin_tt.so", 1, (1, 1), "shardy") == {
        "XLA_STABLEHLO_COMPILE": "1",
        "TT_METAL_RUNTIME_ROOT": str(tmp_path / "tt-metal"),
    }


# -- options


def test_options_are_whole_numbers_numbers_truth_values_and_text() -> None:
    words = [
        "a=8",
        "b=-1",
        "c=0.5",
        "d=1e3",
        "e=true",
        "f=False",
        "g=text",
        "h=",
        'i="8"',
        "j=a=b",
        "k.l-m=1.",
        "n=inf",
    ]
    assert plugins.parse_options(words) == {
        "a": 8,
        "b": -1,
        "c": 0.5,
        "d": 1000.0,
        "e": True,
        "f": False,
        "g": "text",
        "h": "",
        "i": "8",
        "j": "a=b",
        "k.l-m": 1.0,
        "n": "inf",
    }
    assert {
        type(value) for value in plugins.parse_options(["a=1", "b=1.0", "c=true"]).values()
    } == {int, float, bool}


@given(
    st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.booleans()
)
def test_a_value_that_python_prints_is_read_back_as_itself(value: bool | int | float) -> None:
    (read,) = plugins.parse_options([f"key={value}"]).values()
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["count"], ("'count'", "key=value")),
        (["=8"], ("'=8'", "key=value")),
        (["a=1", "a=2"], ("'a'", "twice")),
        (["a=9223372036854775808"], ("'a' is 9223372036854775808", "64 bits")),
    ],
)
def test_options_that_cannot_be_read_are_refused(words: list[str], parts: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        plugins.parse_options(words)
    check_raised(caught.value, 2, *parts)


def test_nothing_of_a_plugin_is_loaded_into_this_process(fits: Path) -> None:
    plugins.check(fits)
    assert str(fits) not in Path("/proc/self/maps").read_text()
