"""The house rules that imports must keep: see the layers in docs/design.md."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"errors"},
    {"processes", "streams", "units", "problems"},
    {"registry"},
    {"document", "graphs"},
    {"sections"},
    {"scenario", "data"},
    {"network", "learning", "devices", "recorder"},
    {"results"},
    {"flower", "report"},
    {"executors"},
    {"simulation"},
    {"output"},
    {"runner"},
    {"sweep", "whatif", "verify", "wrapped"},
    {"cli", "app"},
    {"__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
HOMES = {
    "torch": {"data", "learning", "flower", "executors", "strategies", "verify"},
    "simpy": {"network", "flower", "simulation", "verify"},
    "flwr": {"flower", "executors", "app", "wrapped", "strategies"},
    "yaml": {"document"},
    "typer": {"cli"},
}
PACKAGES = ("fedsim", "topologies", "strategies")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


PUBLIC = {
    "flwr.app",
    "flwr.clientapp",
    "flwr.clientapp.mod",
    "flwr.clientapp.typing",
    "flwr.serverapp",
    "flwr.serverapp.strategy",
}


def room_of(path):
    """Return the room a file belongs to: a folder or module of fedsim, or a package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "fedsim" and parts[1:] != ("__init__",) else parts[0]


def imports_of(path):
    """Yield the modules that a file imports, those for type checkers included."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards_only(path):
    room = room_of(path)
    for module in imports_of(path):
        package, _, rest = module.partition(".")
        if package in HOMES:
            assert room in HOMES[package], f"{module} has no place in {room}"
        if package != "fedsim" or not rest or room == "fedsim":
            continue
        assert room not in ("topologies", "strategies"), f"{room} imports {module}"
        target = rest.split(".")[0]
        if target != room and target in RANK:
            assert RANK[target] < RANK[room], f"{room} imports {module}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_topologies_know_neither_flower_nor_torch(path):
    room = room_of(path)
    used = {module.partition(".")[0] for module in imports_of(path)}
    if room == "topologies":
        assert not used & {"flwr", "torch", "simpy", "strategies"}
    if room == "fedsim" or room in RANK:
        assert "strategies" not in used, "fedsim reaches strategies by the registry only"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_of_flower_are_in_one_module(path):
    """Of a package: what a new release of Flower moves is mended in one place."""
    tree = ast.parse(path.read_text("utf-8"))
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    whole = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    assert not [name for name in whole if name.partition(".")[0] == "flwr"]
    found = {node.module for node in froms if node.module.partition(".")[0] == "flwr"}
    inner = {
        alias.name for node in froms if node.module == "flwr.serverapp" for alias in node.names
    }
    if path not in (ROOT / "fedsim/flower/compat.py", ROOT / "strategies/compat.py"):
        assert found <= PUBLIC, f"{found - PUBLIC}: import it in the package's compat.py"
        assert inner <= {"Grid", "ServerApp", "strategy"}


def test_every_room_has_a_layer():
    rooms = {room_of(path) for path in FILES} - {"fedsim", "topologies", "strategies"}
    assert rooms <= set(RANK), rooms - set(RANK)
