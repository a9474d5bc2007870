"""The package's rooms import downwards only, as docs/design.md says.

Every rule here reads the source, and names file and line.
"""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
from rooms import DESIGN, FILES, ROOMS, SOURCE, name_of, room_of, with_tables

# Imports that the table does not allow: (files, what they import) -> why.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("engine/interface", "engine/torch_xla/mesh"): "the one place where an engine is chosen",
    ("__init__", "engine/torch_xla/mesh"): "`DeviceMesh` is a public name",
    ("sharded/shard_model", "engine/torch_xla/*"): "the user's own model runs on lazy tensors",
    ("sharded/reshard_model", "engine/torch_xla/mesh"): "the same model, moved",
    ("train/trainer", "engine/torch_xla/mesh"): "training is torch-xla's for now",
    ("train/trainer", "train/torch_xla/step"): "the one way to its steps",
    ("train/trained_model", "train/torch_xla/lora"): "adapters are saved as PEFT has them",
    ("prove/module_parity", "engine/torch_xla/*"): "hooks look into transformers' own forward",
    ("prove/gradient_parity", "engine/torch_xla/*"): "a backward of torch, through `shard_model`",
    ("bench/recipe", "engine/torch_xla/backends"): "a peer, as torch-xla's users write it",
}
# Files of other rooms that are pure, too.
PURE_FILES = {
    *(f"train/{name}" for name in ("options", "layout", "schedule", "settings", "records")),
    *(f"train/{name}" for name in ("packing", "manifest", "logs", "report")),
    *(f"train/{name}" for name in ("declared", "yaml_config", "watch", "signals")),
    "train/torch_xla/state_layout",
    *(f"train/{name}" for name in ("batch", "encoding", "data_sources", "corpus", "resume")),
    *(f"train/{name}" for name in ("row_forms", "data_files", "key_names")),
    *("files/disk", "files/model_files", "files/manifest", "files/safetensors_header"),
    *("files/weight_files", "files/weight_reader", "files/gguf_header"),
    *("files/bounded_process", "files/tokenizer_pipeline", "files/tokenizer_trial"),
    *("files/bounded_tokenizer", "inference/text_stream"),
    *("prove/hlo", "prove/tolerance", "prove/shipped_text", "prove/doctor", "prove/self_test"),
    *("prove/findings", "prove/compiled_collectives", "prove/inspection"),
    "evaluate/harness_logs",
    *("engine/torch_xla/onednn", "engine/torch_xla/flags", "inference/session_shapes"),
    *("inference/run_stats", "inference/sampling_defaults", "inference/sampling_params"),
    *("inference/seeds", "inference/messages", "inference/requests"),
    *("bench/keeper", "bench/profile", "bench/rows", "bench/train_rows", "bench/markdown_table"),
    *("bench/report_text", "bench/report_markdown", "cli/option_groups", "cli/input"),
    *("bench/serve_options", "bench/serve_arrivals", "bench/serve_client", "bench/serve_load"),
    *("bench/serve_metrics", "bench/serve_report"),
    "cli/output",
}
XLA_FILES = {"engine/torch_xla/*", "bench/recipe"}  # the last is what torch-xla's users write
ENVIRONMENT_FILES = {
    *("environment", "engine/devices/discovery"),
    *("engine/torch_xla/backends", "engine/torch_xla/xla_output"),
}
HEAVY = {"torch", "torch_xla", "transformers", "jax"}
SHAPELESS_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "config"}


def place(path: Path, node: ast.AST | None = None) -> str:
    return f"{path.relative_to(SOURCE.parents[1])}:{getattr(node, 'lineno', 1)}"


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """Every import of a file, at any depth, with its absolute dotted name.

    That is, for example, `parallama.plan.make_plan.make_plan`.
    """
    package = ("parallama", *path.relative_to(SOURCE).parent.parts)
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            for alias in node.names:
                yield (
                    node,
                    ".".join((*base, *(node.module or "").split("."), alias.name)).replace(
                        "..", "."
                    ),
                )


def own_imports(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """The files of the package that a file imports, as `plan/heads` or `plan/__init__`."""
    for node, name in imports(path):
        package, *rest = name.split(".")
        if package == "parallama":
            yield node, file_of(rest)


def file_of(dotted: list[str]) -> str:
    """The file that holds what a dotted name below the package stands for."""
    for end in range(len(dotted), -1, -1):
        path = SOURCE.joinpath(*dotted[:end])
        if end and path.with_suffix(".py").exists():
            return "/".join(dotted[:end])
        if (path / "__init__.py").exists():
            return "/".join((*dotted[:end], "__init__"))
    raise AssertionError(dotted)


def lines_on_import(path: Path) -> set[int]:
    """The lines of a file's imports outside functions and `if TYPE_CHECKING:`."""
    found: set[int] = set()
    waiting: list[ast.AST] = [tree_of(path)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.add(node.lineno)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting.extend(ast.iter_child_nodes(node))
    return found


def report(problems: list[str]) -> None:
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


def only_for_types(path: Path, node: ast.stmt) -> bool:
    """Whether an import stands under `if TYPE_CHECKING:`, and never runs."""
    return any(
        isinstance(block, ast.If)
        and "TYPE_CHECKING" in ast.unparse(block.test)
        and block.lineno < node.lineno <= (block.end_lineno or 0)
        for block in ast.walk(tree_of(path))
    )


def test_every_folder_is_a_room_and_every_room_a_folder():
    folders = {room_of(name_of(path)) for path in FILES}
    assert folders == set(ROOMS)


def test_a_room_imports_only_rooms_that_the_table_allows():
    problems = []
    for path in FILES:
        own = name_of(path)
        room = room_of(own)
        for node, other in own_imports(path):
            target = room_of(other)
            allowed = target == room or target in ROOMS[room].may.split()
            if not allowed and not exception(own, other):
                problems.append(f"{place(path, node)}: {room} imports {other}")
    report(problems)


def exception(own: str, other: str) -> bool:
    return any(fnmatch(own, files) and fnmatch(other, what) for files, what in EXCEPTIONS)


def test_the_design_has_this_table_and_every_file():
    """`python tests/rooms.py` writes both into docs/design.md."""
    text = DESIGN.read_text(encoding="utf-8")
    assert text == with_tables(text)


def test_rooms_are_in_order():
    """The table itself has no circle: a room may import only rooms above it, the face aside."""
    order = list(ROOMS)
    for number, (name, room) in enumerate(ROOMS.items()):
        below = set(room.may.split()) - set(order[:number]) - {"face"}
        assert not below, f"{name} may import {below}, which stand below it"


def test_the_exceptions_are_needed():
    problems = []
    for (files, what), reason in EXCEPTIONS.items():
        if not any(
            fnmatch(name_of(path), files) and fnmatch(other, what)
            for path in FILES
            for _, other in own_imports(path)
        ):
            problems.append(f"EXCEPTIONS allows {files} to import {what} ({reason}): none does")
    report(problems)


def test_pure_files_import_no_torch_anywhere():
    report(
        [
            f"{place(path, node)}: pure file {name_of(path)} imports {name}"
            for path in FILES
            if ROOMS[room_of(name_of(path))].pure or name_of(path) in PURE_FILES
            for node, name in imports(path)
            if name.split(".")[0] in HEAVY and not only_for_types(path, node)
        ]
    )


def test_only_the_engine_imports_torch_xla():
    report(
        [
            f"{place(path, node)}: imports {name}; only {', '.join(sorted(XLA_FILES))} may"
            for path in FILES
            for node, name in imports(path)
            if name.split(".")[0] in {"torch_xla", "_XLAC"}
            and not any(fnmatch(name_of(path), files) for files in XLA_FILES)
        ]
    )


def test_torch_xla_is_imported_inside_functions_only():
    """Backends set environment variables before torch_xla reads them."""
    report(
        [
            f"{place(path, node)}: imports {name} on import"
            for path in FILES
            for node, name in imports(path)
            if name.split(".")[0] == "torch_xla" and node.lineno in lines_on_import(path)
        ]
    )


def test_the_commands_help_costs_no_torch():
    """`--help` does not import torch: no file that the command line imports on import does."""
    waiting, seen, problems = ["__init__", "__main__", "cli/__init__"], set(), []
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        path = SOURCE / f"{name}.py"
        on_import = lines_on_import(path)
        problems += [
            f"{place(path, node)}: imports {heavy} on import, and --help reaches it"
            for node, heavy in imports(path)
            if node.lineno in on_import and heavy.split(".")[0] in HEAVY
        ]
        waiting += [other for node, other in own_imports(path) if node.lineno in on_import]
    assert len(seen) > 10
    report(problems)


def test_only_few_files_read_and_write_environment_variables():
    problems, files = [], ", ".join(sorted(ENVIRONMENT_FILES))
    for path in FILES:
        if name_of(path) in ENVIRONMENT_FILES:
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute) and node.attr in {
                "environ",
                "environb",
                "getenv",
                "putenv",
                "unsetenv",
            }:
                problems.append(f"{place(path, node)}: uses os.{node.attr}; only {files} may")
        problems += [
            f"{place(path, node)}: imports {name}; only {files} may"
            for node, name in imports(path)
            if name in {"os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv"}
        ]
    report(problems)


def test_nothing_is_unpickled_and_no_text_is_run():
    modules = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    methods = {
        ("torch", "load"),
        ("yaml", "load"),
        ("yaml", "unsafe_load"),
        ("yaml", "full_load"),
        ("np", "load"),
        ("numpy", "load"),
    }
    problems = []
    for path in FILES:
        problems += [
            f"{place(path, node)}: imports {name}"
            for node, name in imports(path)
            if name.split(".")[0] in modules
        ]
        problems += [
            f"{place(path, node)}: imports {name}"
            for node, name in imports(path)
            if tuple(name.split(".")) in methods
        ]
        for node in ast.walk(tree_of(path)):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in {"eval", "exec", "compile", "__import__"}
            ):
                problems.append(f"{place(path, node)}: calls {node.func.id}()")
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and (node.value.id, node.attr) in methods
            ):
                problems.append(f"{place(path, node)}: uses {node.value.id}.{node.attr}")
            if (
                isinstance(node, ast.keyword)
                and node.arg == "trust_remote_code"
                and ast.unparse(node.value) != "False"
            ):
                problems.append(
                    f"{place(path, node.value)}: trust_remote_code={ast.unparse(node.value)}"
                )
    report(problems)


def test_no_module_has_a_name_that_says_nothing():
    report(
        [
            f"{place(path)}: {path.name} names no responsibility"
            for path in FILES
            if path.stem in SHAPELESS_NAMES
        ]
    )


def test_every_module_says_what_it_is_for():
    report(
        [
            f"{place(path)}: no module docstring"
            for path in FILES
            if not (ast.get_docstring(tree_of(path)) or "").strip()
        ]
    )


def test_every_file_can_be_read_at_a_sitting():
    """No file of the package has more than 350 lines."""
    lengths = {path: path.read_text(encoding="utf-8").count("\n") for path in FILES}
    report([f"{place(path)}: {lines} lines" for path, lines in lengths.items() if lines > 350])
