"""Imports go down only: each room knows nothing of those above it, and no two modules know each other."""

import ast
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the ground up. What stands on one floor is apart, but for the modules of one room.
FLOORS = (
    ("kernels",), ("errors",), ("availability", "capture"), ("selection",), ("fused",), ("running",),
    ("ops", "config", "history"), ("checks",), ("pruner",), ("training",), ("train",), ("__init__",), ("bench",),
)  # fmt: skip
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules(root: Path) -> dict[str, Path]:
    """By their names, such as reprune_triton.selection.pool."""
    found = {}
    for top in ("reprune_triton", "kernels", "bench"):
        for path in (root / top).rglob("*.py"):
            parts = path.relative_to(root / top).with_suffix("").parts
            inside = top == "reprune_triton" and parts[0] in ("kernels", "bench")  # the symlinks
            if not inside and "suites" not in parts:
                full = ("reprune_triton", *(() if top == "reprune_triton" else (top,)), *parts)
                found[".".join(full).removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of ours that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}:{node.lineno} imports relatively"
            for alias in node.names:  # modules of a package, or what its __init__ has
                name = f"{node.module}.{alias.name}"
                found.add(name if name in known else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(known)


def room_of(module: str) -> str:
    return (module.split(".") + ["__init__"])[1]


def wrong_ways(root: Path) -> list[str]:
    known = modules(root)
    edges = {name: imports(path, known) for name, path in known.items()}
    found = []
    for name, targets in edges.items():
        room = room_of(name)
        for target in targets:
            other = room_of(target)
            if FLOOR[other] > FLOOR[room] or (FLOOR[other] == FLOOR[room] and other != room):
                found.append(f"{name} -> {target} goes up")
    for name in edges:  # circles, within a room above all
        seen, ahead = set(), [name]
        while ahead:
            for target in edges.get(ahead.pop(), ()):
                if target == name:
                    found.append(f"{name} is in a circle")
                    ahead = []
                    break
                if target not in seen:
                    seen.add(target)
                    ahead.append(target)
    return found


def test_imports_go_down():
    assert len(modules(ROOT)) > 60
    assert not wrong_ways(ROOT)


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("kernels/host.py", "from reprune_triton.errors import RepruneError", "host -> reprune_triton.errors goes up"),
        ("reprune_triton/selection/pool.py", "import reprune_triton.pruner", "pool -> reprune_triton.pruner goes up"),
        ("reprune_triton/fused/norm.py", "from reprune_triton.running import narrow", "running.narrow goes up"),
        ("reprune_triton/history.py", "from reprune_triton import config", "history -> reprune_triton.config goes up"),
        ("reprune_triton/selection/rng.py", "from reprune_triton.selection import event", "rng is in a circle"),
    ],
)
def test_a_planted_arrow_is_found(tmp_path, file, line, complaint):
    for path in modules(ROOT).values():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    with open(tmp_path / file, "a") as planted:
        planted.write(f"\n{line}\n")
    assert any(complaint in found for found in wrong_ways(tmp_path))
