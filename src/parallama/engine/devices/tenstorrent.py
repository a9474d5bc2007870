"""What Tenstorrent's plugin reads from the environment. Pure."""

from __future__ import annotations

from pathlib import Path

from .versions import SHARDY


def variables_for(
    library: Path, devices: int | None, grid: tuple[int, ...] | None, partitioner: str
) -> dict[str, str]:
    """Variables that Tenstorrent's plugin, its compiler and its fork of torch_xla read.

    Args:
        devices: device count; None for all there are.
        grid: data x model.
        partitioner: `shardy` if the installed torch_xla converts programs to it.
    """
    variables = {"XLA_STABLEHLO_COMPILE": "1"}
    runtime = library.absolute().parent / "tt-metal"  # beside the plugin in its package
    if runtime.is_dir():
        variables["TT_METAL_RUNTIME_ROOT"] = str(runtime)
    if devices == 1:
        return variables
    if partitioner == "shardy":
        variables[SHARDY] = "1"
    # Releases of 2025 read these two; later ones take the mesh from the program.
    variables["ENABLE_AUTO_PARALLEL"] = "TRUE"
    if grid is not None:
        variables["MESH_SHAPE"] = f"{grid[0]},{grid[1]}"
    return variables
