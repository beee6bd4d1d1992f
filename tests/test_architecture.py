"""The layers, the absence of cycles, who may name torch.distributed: held by walking the syntax trees."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {
    "library.errors": 0, "library.log": 0, "library.randomness": 0, "library.startup": 0, "library.leaving": 0,
    "library.config": 1,
    "library.models": 2, "networks": 2, "library.files": 2,
    "library.data": 3, "library.flow": 3, "library.optim": 3,
    "library.adapters": 4, "library.cache": 4, "library.distributed": 4,
    "library.train": 5, "library.preflight": 5, "library.report": 5,
    "flux_train_network": 6, "tools": 6,
}  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path
    for pattern in ("library/**/*.py", "networks/**/*.py", "tools/*.py", "flux_train_network.py")
    for path in sorted(ROOT.glob(pattern))
}


def layer(module: str) -> int:
    return max((len(name), level) for name, level in LAYERS.items() if f"{module}.".startswith(f"{name}."))[1]


@cache
def imports(module: str) -> frozenset[str]:
    """Modules of ours that `module` imports at run time, function-level imports counted."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{module}: relative import"
            found.update(
                full if (full := f"{node.module}.{alias.name}") in FILES else node.module
                for alias in node.names
            )
    return frozenset(name for name in found if name in FILES and name not in ("library", "networks"))


def test_every_module_belongs_to_a_layer():
    unplaced = [m for m in FILES if m != "library" and not any(f"{m}.".startswith(f"{n}.") for n in LAYERS)]
    assert not unplaced


def test_imports_never_climb():
    climbing = [
        f"{module} (layer {layer(module)}) imports {other} (layer {layer(other)})"
        for module in FILES
        if module != "library"
        for other in imports(module)
        if layer(other) > layer(module)
    ]
    assert not climbing


def test_networks_do_not_know_the_models():
    assert not [
        m for m in FILES if m.startswith("networks") for o in imports(m) if o.startswith("library.models")
    ]


def test_no_cycles_and_short_chains():
    @cache
    def depth(module: str, path: tuple[str, ...] = ()) -> int:
        assert module not in path, f"cycle: {' -> '.join((*path, module))}"
        return 1 + max((depth(other, (*path, module)) for other in imports(module)), default=0)

    # A tool may build on another; what users run is counted.
    deepest = max((depth(module), module) for module in FILES if not module.startswith("tools."))
    assert deepest[0] <= 14, deepest


@pytest.mark.parametrize("word", ["torch.distributed", "DistributedDataParallel", "deepspeed"])
def test_only_the_distributed_package_knows_ranks(word: str):
    users = {
        module
        for module, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.ImportFrom) and (node.module or "").startswith(word))
        or (isinstance(node, ast.Import) and any(alias.name.startswith(word) for alias in node.names))
    }
    assert all(module.startswith("library.distributed") for module in users), users


def test_config_imports_nothing_heavy():
    heavy = {"torch", "numpy", "PIL", "transformers", "safetensors"}
    for module, path in FILES.items():
        if module.startswith("library.config"):
            names = {
                (node.module or "").split(".")[0]
                if isinstance(node, ast.ImportFrom)
                else alias.name.split(".")[0]
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Import | ast.ImportFrom)
                for alias in node.names
            }
            assert not names & heavy, f"{module} imports {names & heavy}"


def test_files_stay_readable():
    long = {m: n for m, p in FILES.items() if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long
