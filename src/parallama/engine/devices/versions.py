"""Which versions are installed, and whether they fit by their own metadata. Pure.

Nothing of them is imported.
"""

from __future__ import annotations

import importlib.metadata
import mmap
import platform
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from ...errors import BackendError, lines

TORCH_XLA = "2.9"
PACKAGES = ("parallama", "torch", "torch_xla", "transformers", "safetensors", "tokenizers")
SHARDY = "CONVERT_SHLO_TO_SHARDY"
"""The environment variable by which Tenstorrent's fork of torch_xla converts programs to Shardy.

No other torch_xla knows it.
"""

_ONEDNN_SOURCE = "onednn_fusion_thunk.cc"
"""A file of XLA's whose name stands in what was compiled from it."""


@dataclass(frozen=True, kw_only=True)
class Want:
    """What one package wants of another.

    Attributes:
        by: who wants it.
        spec: the version specifier, as `==2.9.1`; "any version" where it names none.
    """

    by: str
    spec: str
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Installed:
    """A package or Python itself.

    Attributes:
        version: None if it is not installed.
        wanted: by the other packages of `PACKAGES`.
    """

    name: str
    version: str | None
    wanted: tuple[Want, ...]

    @property
    def fits(self) -> bool:
        return self.version is not None and all(want.fits for want in self.wanted)


def survey() -> tuple[Installed, ...]:
    """Python and every package of `PACKAGES`, with what the others want of it."""
    found = {"python": platform.python_version()} | {name: version_of(name) for name in PACKAGES}
    wanted: dict[str, list[Want]] = {name: [] for name in found}
    for by in PACKAGES:
        if found[by] is None:
            continue
        python = importlib.metadata.metadata(by).json.get("requires_python")
        if python:
            wanted["python"].append(_want(by, str(python), found["python"]))
        for text in importlib.metadata.requires(by) or []:
            parsed = _requirement(text)
            if parsed is not None and parsed[0] in wanted:
                wanted[parsed[0]].append(_want(by, parsed[1], found[parsed[0]]))
    torch_xla, torch = found["torch_xla"], found["torch"]
    if torch_xla is not None:
        # Its metadata doesn't say so, but it is compiled against one release of torch.
        wanted["torch"].append(_want("torch_xla", f"~={minor_of(torch_xla)}.0", torch))
    return tuple(
        Installed(name=name, version=version, wanted=tuple(wanted[name]))
        for name, version in found.items()
    )


def check_torch_xla() -> None:
    """Make sure that torch_xla is installed, in the release that this package is made for.

    Raises:
        BackendError: it isn't.
    """
    version = version_of("torch_xla")
    if version is None:
        raise BackendError(
            lines(
                "torch_xla is not installed",
                f"expected torch_xla {TORCH_XLA}.x",
                "run: pip install torch_xla==2.9.0",
            )
        )
    if minor_of(version) != TORCH_XLA:
        raise BackendError(
            lines(
                f"torch_xla {version} is installed",
                f"expected {TORCH_XLA}.x, the release this package is made for",
            )
        )


def version_of(package: str) -> str | None:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def minor_of(version: str) -> str:
    """`2.9` of `2.9.0+git123`."""
    return ".".join(version.split("+")[0].split(".")[:2])


def before(version: str | None, release: str) -> bool:
    """Whether an installed version is older than a release.

    False if it isn't installed, or its version can't be read.
    """
    try:
        return version is not None and Version(version) < Version(release)
    except InvalidVersion:
        return False


def _requirement(text: str) -> tuple[str, str] | None:
    """Package and specifier of a line of `Requires-Dist`, if it holds here without extras."""
    try:
        requirement = Requirement(text)
    except InvalidRequirement:
        return None
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return None
    return requirement.name.lower().replace("-", "_"), str(requirement.specifier)


def _want(by: str, spec: str, version: str | None) -> Want:
    try:
        fits = version is not None and SpecifierSet(spec).contains(
            Version(version), prereleases=True
        )
    except (InvalidSpecifier, InvalidVersion):
        fits = False
    return Want(by=by, spec=spec or "any version", fits=fits)


def partitioner() -> str:
    """`shardy` where the installed torch_xla can convert programs to it, else `gspmd`.

    Tenstorrent's fork can.
    """
    return "shardy" if _torch_xla_holds(SHARDY) else "gspmd"


def onednn_fusions() -> bool:
    """Whether the XLA:CPU in the installed torch_xla has fusions that oneDNN computes.

    Upstream's for x86-64 was built with them.
    """
    return _torch_xla_holds(_ONEDNN_SOURCE)


def _torch_xla_holds(words: str) -> bool:
    if version_of("torch_xla") is None:
        return False
    for file in importlib.metadata.files("torch_xla") or []:
        if file.name.startswith("_XLAC") and file.suffix == ".so":
            return _holds(Path(str(file.locate())), words.encode())
    return False


def _holds(file: Path, words: bytes) -> bool:
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(words) >= 0
