"""The package's modules import downwards only, as docs/design.md says; every rule here reads the source, and names file and line."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "parallama"

# Layers from the bottom up, and their modules in order: a module imports only modules named before it. `cli` stands for every module of the
# folder; its files may import one another.
LAYERS: dict[str, tuple[str, ...]] = {
    "pure": (
        *("errors", "flags", "host", "child", "elf", "versions", "plugins", "faults"),
        *("model_files", "manifest"),
        *(
            "topology",
            "heads",
            "families",
            "features",
            "rope",
            "spec",
            "safetensors_header",
            "weight_files",
            "gguf_header",
            "config_checks",
        ),
        *("configs", "plan", "kinds", "buckets", "cost", "collectives", "train_collectives", "train_cost", "hlo", "onednn"),
        *("hardware", "picture", "forecast", "forecast_view", "tolerance", "corpus"),
    ),
    "device": (
        "backends",
        "mesh",
        "ops",
        "loops",
        "products",
        "last_positions",
        "program",
        "cache",
        "block_attention",
        "attention",
        "rotary",
        "loss",
        "tensor_source",
        "finite",
        "replicas",
        "shard",
        "reshard",
        "stream",
    ),
    "model": (
        *("locate", "tokenizer_files", "checkpoint", "gguf_file", "weight_writer", "export", "config_json", "loading"),
        *("sampling", "scoring", "steps", "points", "metrics", "reference"),
    ),
    "use": (
        *("generate", "text", "chat_template", "llm", "chat", "audit", "contents", "inspection", "inspection_view"),
        *("modules", "gradients", "validation", "verification", "selftest", "doctor", "train"),
        *("scorer", "harness", "evaluation"),
    ),
    "face": ("api", "__init__", "bench", "cli", "__main__"),
}
FOLDERS = ("bench", "cli", "train")
# Imports against the order, each inside a function, with the reason for it.
EXCEPTIONS: dict[tuple[str, str], str] = {}
# Of the folders' files those that are pure, too.
PURE_FILES = {
    f"train/{name}" for name in ("options", "layout", "schedule", "settings", "records", "packing", "disk", "manifest", "logs", "report")
}
XLA_MODULES = {"backends", "mesh", "ops", "loops", "program", "bench/recipe"}  # the last is what torch-xla's users write today
ENVIRONMENT_MODULES = {"backends"}
HEAVY = {"torch", "torch_xla", "transformers", "jax"}
SHAPELESS_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "config"}

ROW = {module: row for row, module in enumerate(module for modules in LAYERS.values() for module in modules)}
FILES = sorted(SOURCE.rglob("*.py"))


def row_name(path: Path) -> str:
    """The row of the table that a file belongs to: `plan`, or `cli` for `cli/generate.py`."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return parts[0]


def place(path: Path, node: ast.AST | None = None) -> str:
    return f"{path.relative_to(SOURCE.parents[1])}:{getattr(node, 'lineno', 1)}"


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """Every import of a file, at any depth, with the absolute dotted name of what is imported (`parallama.plan.make_plan`)."""
    package = ("parallama", *path.relative_to(SOURCE).parent.parts)
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            for alias in node.names:
                yield node, ".".join((*base, *(node.module or "").split("."), alias.name)).replace("..", ".")


def own_imports(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """The rows of the table that a file imports."""
    for node, name in imports(path):
        package, *rest = name.split(".")
        if package == "parallama":
            first = rest[0] if rest else "__init__"
            is_module = (SOURCE / f"{first}.py").exists() or (SOURCE / first / "__init__.py").exists()
            yield node, first if is_module or first in ROW else "__init__"


def lines_on_import(path: Path) -> set[int]:
    """The lines of the imports that run when the file is imported: outside functions and `if TYPE_CHECKING:`."""
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


def test_there_is_something_to_read():
    assert {path.stem for path in FILES} >= set(LAYERS["pure"])


def test_every_module_stands_in_the_table_and_every_row_has_a_module():
    rows = {row_name(path) for path in FILES}
    problems = [f"{place(path)}: module {row_name(path)!r} is in no row of LAYERS" for path in FILES if row_name(path) not in ROW]
    report(problems + [f"LAYERS names {name!r}, which is no module" for name in sorted(set(ROW) - rows)])


def test_a_module_imports_only_from_earlier_rows():
    problems = []
    for path in FILES:
        own = row_name(path)
        for node, other in own_imports(path):
            allowed = other in ROW and own in ROW and (ROW[other] < ROW[own] or (own == other and own in FOLDERS))
            if not allowed and (own, other) not in EXCEPTIONS:
                problems.append(f"{place(path, node)}: {own} imports {other}, which LAYERS does not put before it")
    report(problems)


def test_the_exceptions_to_the_order_are_needed_and_inside_functions():
    problems = []
    for (own, other), reason in EXCEPTIONS.items():
        found = [(path, node) for path in FILES if row_name(path) == own for node, name in own_imports(path) if name == other]
        if not found:
            problems.append(f"EXCEPTIONS allows {own} to import {other} ({reason}), which it does not")
        problems += [
            f"{place(path, node)}: {own} imports {other} on import" for path, node in found if node.lineno in lines_on_import(path)
        ]
    report(problems)


def test_pure_modules_import_no_torch_anywhere():
    report(
        [
            f"{place(path, node)}: pure module {path.stem} imports {name}"
            for path in FILES
            if row_name(path) in LAYERS["pure"] or path.relative_to(SOURCE).with_suffix("").as_posix() in PURE_FILES
            for node, name in imports(path)
            if name.split(".")[0] in HEAVY
        ]
    )


def test_only_the_modules_named_here_import_torch_xla():
    report(
        [
            f"{place(path, node)}: imports {name}; only {', '.join(sorted(XLA_MODULES))} may"
            for path in FILES
            for node, name in imports(path)
            if name.split(".")[0] in {"torch_xla", "_XLAC"} and path.relative_to(SOURCE).with_suffix("").as_posix() not in XLA_MODULES
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
    """`--help` does not import torch: no module that the command line imports on import does."""
    waiting, seen, problems = ["__init__", "__main__", "cli"], set(), []
    while waiting:
        row = waiting.pop()
        if row in seen:
            continue
        seen.add(row)
        for path in (path for path in FILES if row_name(path) == row):
            on_import = lines_on_import(path)
            problems += [
                f"{place(path, node)}: imports {name} on import, and --help reaches it"
                for node, name in imports(path)
                if node.lineno in on_import and name.split(".")[0] in HEAVY
            ]
            waiting += [other for node, other in own_imports(path) if node.lineno in on_import]
    report(problems)


def test_only_backends_reads_and_writes_environment_variables():
    problems = []
    for path in FILES:
        if row_name(path) in ENVIRONMENT_MODULES:
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv", "putenv", "unsetenv"}:
                problems.append(f"{place(path, node)}: uses os.{node.attr}; only backends may")
        problems += [
            f"{place(path, node)}: imports {name}; only backends may"
            for node, name in imports(path)
            if name in {"os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv"}
        ]
    report(problems)


def test_nothing_is_unpickled_and_no_text_is_run():
    modules = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    methods = {("torch", "load"), ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load"), ("np", "load"), ("numpy", "load")}
    problems = []
    for path in FILES:
        problems += [f"{place(path, node)}: imports {name}" for node, name in imports(path) if name.split(".")[0] in modules]
        problems += [f"{place(path, node)}: imports {name}" for node, name in imports(path) if tuple(name.split(".")) in methods]
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec", "compile", "__import__"}:
                problems.append(f"{place(path, node)}: calls {node.func.id}()")
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (node.value.id, node.attr) in methods:
                problems.append(f"{place(path, node)}: uses {node.value.id}.{node.attr}")
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) != "False":
                problems.append(f"{place(path, node.value)}: trust_remote_code={ast.unparse(node.value)}")
    report(problems)


def test_no_module_has_a_name_that_says_nothing():
    report([f"{place(path)}: {path.name} names no responsibility" for path in FILES if path.stem in SHAPELESS_NAMES])


def test_every_module_says_what_it_is_for():
    report([f"{place(path)}: no module docstring" for path in FILES if not (ast.get_docstring(tree_of(path)) or "").strip()])
