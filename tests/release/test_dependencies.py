"""What our packages import is what the project says that it needs: nothing comes along by chance."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

TOP = Path(__file__).parent.parent.parent
OURS = {"kvferry_client", "kvferry_daemon", "kvferry_proto"}
ENGINES = {"sglang", "vllm"}  # they load us, not the other way round
PARTS = {"pydantic_core": "pydantic", "opentelemetry": "opentelemetry-sdk"}  # they come in one
DISTRIBUTIONS = packages_distributions()


def imported(root: str) -> dict[str, Path]:
    """Each package that is not ours or Python's, with a file that imports it."""
    found: dict[str, Path] = {}
    for path in sorted((TOP / root).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [one.name for one in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in names:
                found.setdefault(name.partition(".")[0], path)
    return {
        n: p for n, p in found.items() if n not in OURS | ENGINES | set(sys.stdlib_module_names)
    }


def named(requirements: list[str]) -> set[str]:
    """The projects of requirements, as the index writes them."""
    return {plain(re.split(r"[\[<>=!;, ]", one)[0]) for one in requirements} - {"kvferry"}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def projects_of(module: str) -> set[str]:
    return {plain(one) for one in [PARTS.get(module, module), *DISTRIBUTIONS.get(module, [])]}


def test_all_that_is_imported_is_asked_for() -> None:
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    extras = {k: v for k, v in project["optional-dependencies"].items() if k not in ("dev", "docs")}
    base = named(project["dependencies"])
    everything = base | {one for extra in extras.values() for one in named(extra)}
    for root in ("client", "daemon", "proto"):
        for module, path in imported(root).items():
            allowed = base if root == "proto" else everything
            assert projects_of(module) & allowed, f"{path} imports {module}, which nobody asks for"


def test_all_that_is_asked_for_is_imported() -> None:
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    used = {
        one
        for root in ("client", "daemon", "proto")
        for m in imported(root)
        for one in projects_of(m)
    }
    assert named(project["dependencies"]) <= used
