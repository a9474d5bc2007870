"""PJRT plugins: where they are, whether a file is one, its PJRT API version, its options. Pure.

Nothing of a plugin is loaded into this process: the file is read, then
`python -m parallama.engine.devices.plugins FILE` asks it for its version.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ... import isolated_process
from ...errors import BackendError, UsageError, cause, lines, listed, shown
from . import elf

ENTRY = "GetPjrtApi"
OptionValue = bool | int | float | str
_LIMIT_S = 60.0


@dataclass(frozen=True, order=True)
class ApiVersion:
    """A version of the PJRT C API, as 0.75."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


# What torch_xla 2.9.0 speaks: it logs "The framework PJRT API version is 0.75" when it initializes
# a plugin. libtpu 0.0.21, which it pins, is 0.75 too.
SPOKEN = ApiVersion(0, 75)
# The API's rule (pjrt_c_api.h): another major version is another ABI. A minor version adds fields
# and functions at the end of structures, so each side can see from `struct_size` what the other
# knows. Hence
# - at least 0.57, which "rearranged fields in the PJRT_Api" (the API's changelog): in an older
#   plugin's table torch_xla would call the wrong functions. It looks itself, but only for 0.29
#   ("older than the minimum supported version 0.29", XLA's pjrt_api.cc);
# - at most its own: torch_xla doesn't look. XLA's own implementation, which most plugins are built
#   on, refuses a caller whose structures are shorter. 0.76 and 0.78 lengthened PJRT_ExecuteOptions,
#   so such a plugin starts, shows its devices, and fails at the first execution ("expected 112, got
#   80").
OLDEST = ApiVersion(0, 57)

PACKAGES: Mapping[str, tuple[str, str]] = {
    "tpu": ("libtpu", "libtpu.so"),
    "tt": ("pjrt_plugin_tt", "pjrt_plugin_tt.so"),
}
"""Backend -> (the package that carries its plugin, the file in it)."""
# Tenstorrent writes its plugin by hand and builds it for its fork of torch_xla 2.9.0, with headers
# up to 0.113: it takes shorter structures.
TAKES_OLDER_CALLERS = frozenset({"tt"})
GROUPS = ("xla_plugins", "jax_plugins")
"""Entry points and namespace packages by which PJRT plugins are found (OpenXLA's and JAX's)."""


def is_path(backend: str) -> bool:
    """Whether `--backend` names a file and not a backend."""
    return os.sep in backend or backend.endswith((".so", ".dylib"))


def name_of(library: Path) -> str:
    """The backend that a plugin file is for: `tpu` and `tt` by their packages' file names.

    Else the file's own name: up to its first dot, or all of it where that much is the name of a
    backend that the file isn't.
    """
    for name, (_, file) in PACKAGES.items():
        if file == library.name:
            return name
    stem = library.name.partition(".")[0]
    return library.name if stem == "cpu" or stem in PACKAGES else stem


def installed() -> list[str]:
    """Names of the plugins that installed packages announce in `GROUPS`."""
    return sorted(
        {point.name for group in GROUPS for point in importlib.metadata.entry_points(group=group)}
    )


def named_libraries(text: str) -> dict[str, str]:
    """Backend -> plugin file, of `tt:/path/to/plugin.so,other:/path`."""
    words = [word.partition(":") for word in text.split(",")]
    return {name.strip(): path.strip() for name, _, path in words if path.strip()}


def find(name: str) -> Path | None:
    """The plugin of an installed package, or None.

    Looked for: `libtpu` and `pjrt_plugin_tt`; modules that an entry point of `GROUPS` names;
    `pjrt_plugin_NAME`, `xla_plugins.NAME` and `jax_plugins.NAME`.

    Raises:
        BackendError: the package has several plugins.
    """
    if not re.fullmatch(r"\w+", name):
        return None
    if name in PACKAGES:
        package, file = PACKAGES[name]
        paths = (folder / file for folder in _folders(package))
        return next((path for path in paths if path.is_file()), None)
    points = [
        point.module
        for group in GROUPS
        for point in importlib.metadata.entry_points(group=group, name=name)
    ]
    found: dict[Path, None] = {}
    for module in (*points, f"pjrt_plugin_{name}", *(f"{group}.{name}" for group in GROUPS)):
        for folder in _folders(module):
            libraries = (file for file in sorted(folder.glob("*.so")) if _exports(file))
            found |= dict.fromkeys(file.resolve() for file in libraries)
    if len(found) > 1:
        files = [str(file) for file in found]
        raise BackendError(
            lines(
                f"backend {name!r} has {len(found)} plugins: {listed(files, 2)}",
                "expected one; give its path",
            )
        )
    return next(iter(found), None)


def _folders(module: str) -> Iterator[Path]:
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return
    if found is not None:
        yield from (Path(folder) for folder in found.submodule_search_locations or [])


def _exports(file: Path) -> bool:
    try:
        return elf.exports(file, ENTRY)
    except (elf.ElfError, OSError):
        return False


def check(library: Path, *, takes_older_callers: bool = False) -> ApiVersion:
    """Make sure that a file is a plugin for this machine which torch-xla can talk to.

    Args:
        takes_older_callers: the plugin is known to serve callers older than itself.

    Returns:
        The PJRT API version that it speaks.

    Raises:
        BackendError: it isn't there, no shared library, for another machine, no plugin, can't be
            loaded, or speaks another version.
    """
    _check_file(library)
    version = ask_version(library)
    newest = version if takes_older_callers and version.major == SPOKEN.major else SPOKEN
    if not OLDEST <= version <= newest:
        if version.major != SPOKEN.major:
            reason = "another major version is another interface"
        elif version > SPOKEN:
            reason = "a newer plugin refuses torch_xla's shorter structures at the first execution"
        else:
            reason = f"{OLDEST} rearranged the table of functions"
        raise BackendError(
            lines(
                f"plugin {str(library)!r} speaks PJRT API {version}, torch_xla 2.9.0 speaks "
                f"{SPOKEN}",
                f"expected {OLDEST} to {SPOKEN}: {reason}",
                "use a release of the plugin that was built for one of these",
            )
        )
    return version


def _check_file(library: Path) -> None:
    shown_path = repr(str(library))
    expected = f"expected the path of a PJRT plugin: a shared library that exports {ENTRY}"
    try:
        problem = _problem(library, expected)
    except elf.ElfError as error:
        problem = (f"is no shared library: {error}", expected)
    except (OSError, ValueError) as error:  # ValueError: no path at all, as with a NUL in it
        problem = (f"cannot be read: {getattr(error, 'strerror', None) or error}", expected)
    if problem is not None:
        raise BackendError(lines(f"plugin {shown_path} {problem[0]}", problem[1]))


def _problem(library: Path, expected: str) -> tuple[str, str] | None:
    """What is wrong with a file, and what was expected."""
    if not library.exists():
        return "is not there", expected
    if library.is_dir():
        return "is a folder", expected
    header, own = elf.read_header(library), elf.read_header(Path("/proc/self/exe"))
    if header.platform != own.platform:
        return (
            f"is built for {header.platform}",
            f"expected {own.platform}, which this Python runs on",
        )
    if header.type != elf.SHARED:
        return f"is {elf.TYPES.get(header.type, f'of ELF type {header.type}')}", expected
    if not elf.exports(library, ENTRY):
        return f"exports no {ENTRY}", "expected a PJRT plugin; this is another kind of library"
    return None


def ask_version(library: Path, limit_s: float = _LIMIT_S) -> ApiVersion:
    """Load a plugin in a process of its own and ask for its version.

    Raises:
        BackendError: it can't be loaded, crashes, takes longer than `limit_s`, or gives no answer.
    """
    ended = isolated_process.run_module(
        "parallama.engine.devices.plugins", str(library.absolute()), limit_s=limit_s
    )
    # The last line: a plugin may print others while it is loaded.
    printed = ended.out.strip().splitlines()
    answer = re.fullmatch(r"PJRT (\d{1,9}) (\d{1,9})", printed[-1]) if printed else None
    if ended.code == 0 and answer:
        return ApiVersion(int(answer[1]), int(answer[2]))
    if ended.code == 0:
        last = f"ended with {shown(printed[-1], 160)}" if printed else "printed nothing"
        raise BackendError(
            lines(
                f"plugin {str(library)!r}: the process that loaded it gave no version:"
                f" it {ended.how} and {last}",
                f"expected a plugin whose {ENTRY} returns a table of functions",
            )
        )
    if ended.code == 1 and ended.last_words:
        raise BackendError(
            lines(
                f"plugin {str(library)!r} cannot be loaded: {cause(ValueError(ended.last_words))}"
            )
        )
    limit = f" ({limit_s:g} s)" if ended.code is None else ""
    raise BackendError(
        lines(
            f"plugin {str(library)!r}: the process that loaded it to ask for its version "
            f"{ended.how}{limit}",
            _indented(ended.last_words),
        )
    )


def _indented(words: str) -> str:
    return f"it said: {shown(words, 160)}" if words else ""


def parse_options(given: Sequence[str]) -> dict[str, OptionValue]:
    """`key=value` words as the options of a plugin's client.

    A value is a whole number, a number, true or false, or else text; double quotes force text.

    Raises:
        UsageError: no `=`, no key, a key twice, or a number beyond 64 bits.
    """
    options: dict[str, OptionValue] = {}
    for word in given:
        key, equals, text = word.partition("=")
        if not equals or not re.fullmatch(r"[\w.-]+", key):
            raise UsageError(
                lines(
                    f"backend option {word!r} cannot be read",
                    "expected key=value, as cpu_device_count=8",
                )
            )
        if key in options:
            raise UsageError(lines(f"backend option {key!r} is given twice", "expected each once"))
        options[key] = _value(key, text)
    return options


def _value(key: str, text: str) -> OptionValue:
    if text in ("true", "True", "false", "False"):
        return text in ("true", "True")
    if re.fullmatch(r"[+-]?\d+", text):
        number = int(text)
        if not -(1 << 63) <= number < 1 << 63:
            raise UsageError(
                lines(f"backend option {key!r} is {text}", "expected a whole number of 64 bits")
            )
        return number
    if re.fullmatch(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?", text):
        return float(text)
    return text[1:-1] if len(text) >= 2 and text[0] == text[-1] == '"' else text


def _answer(library: str) -> int:
    """In the child: print the version that a plugin speaks.

    `struct_size` and the version are at the same places in all versions.
    """
    try:
        get = getattr(ctypes.CDLL(library), ENTRY)
    except (OSError, AttributeError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    get.restype = ctypes.c_void_p
    api: int | None = get()
    if api is None:
        sys.stderr.write(f"{ENTRY} gave no table of functions\n")
        return 1
    # PJRT_Api: size_t struct_size, void* extension_start, then PJRT_Api_Version: size_t, void*,
    # int major, int minor.
    if ctypes.c_size_t.from_address(api).value < 40:
        sys.stderr.write(f"{ENTRY} gave a table without a version\n")
        return 1
    major, minor = (ctypes.c_int.from_address(api + place).value for place in (32, 36))
    sys.stdout.write(f"\nPJRT {major} {minor}\n")
    return 0


if __name__ == "__main__":
    code = _answer(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a plugin's own clean-up may crash, and has nothing to say
