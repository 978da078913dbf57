"""No import goes up a floor, and floors have no cycles (DESIGN: "the floors, imports only go down")."""

import ast
from pathlib import Path

import bitgrain

ROOT = Path(bitgrain.__file__).parent
FLOORS = [
    {"errors", "progress"},
    {"kernels"},
    {"numerics"},
    {"solvers", "transforms", "runtime", "tuning", "training"},
    {"recipes"},
    {"models", "checkpoints", "calibration", "demo"},
    {"pipeline", "evaluation", "search"},
    {"api", "hf", "qat", "report"},
    {"cli"},
]
FLOOR_OF = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Dotted bitgrain modules that a file imports anywhere, also inside functions."""
    package = ("bitgrain", *path.relative_to(ROOT).with_suffix("").parts)[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return {name for name in found if name == "bitgrain" or name.startswith("bitgrain.")}


SOURCES = [path for path in sorted(ROOT.rglob("*.py")) if path.parent != ROOT or path.stem in FLOOR_OF]


def rooms_imported(path: Path) -> set[str]:
    rooms = {name.split(".")[1] for name in imports_of(path) if "." in name}
    return {room for room in rooms if room in FLOOR_OF}


def test_every_room_has_a_floor():
    rooms = {path.name.removesuffix(".py") for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert rooms - {"__init__", "__pycache__", "__main__", "py.typed"} <= set(FLOOR_OF)


def test_imports_only_go_down():
    upward = [
        f"{path.relative_to(ROOT)} imports {room}"
        for path in SOURCES
        for room in rooms_imported(path)
        if FLOOR_OF[room] > FLOOR_OF[room_of(path)]
    ]
    assert upward == []


def test_rooms_on_one_floor_have_no_cycle():
    edges = {(room_of(path), room) for path in SOURCES for room in rooms_imported(path) if room != room_of(path)}
    level = {(a, b) for a, b in edges if FLOOR_OF[a] == FLOOR_OF[b]}
    assert not {(a, b) for a, b in level if (b, a) in level}
