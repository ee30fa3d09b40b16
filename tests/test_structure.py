"""What rots unless a machine looks: the direction of imports, the README's tree, the recipes, the size of things."""

import ast
import re
from dataclasses import MISSING, fields, is_dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Figure

import sparsemae
from sparsemae.cli import main, usage
from sparsemae.config import RECIPES, read_config, recipe_names
from sparsemae.jobs import JOBS, resolve, training_jobs
from sparsemae.options import StudyConfig
from sparsemae.recipe_parser import OPTIONAL_POSITIONAL

PACKAGE = ROOT / "sparsemae"
FILES = sorted(PACKAGE.rglob("*.py"))
STATEMENTS = {"the commit before the house was rebuilt (f31ab9b)": 6952, "right": 1423, "held": 916, "fast": 440,
              "own": 1734, "take": 1222, "better": 809}  # fmt: skip
"""The house has no more than were there before; then what each later issue added, counted when it landed."""
# Who may import whom, by first name below the package. What everybody may import imports nothing but itself.
LEAVES = {"limits", "renamed", "card", "files", "plain_yaml", "predictor", "processors", "terminal"}
ALLOWED = {
    "sparsity": {"runtime"},
    "options": set(),
    "data": {"options"},
    "models": {"options"},
    "training": {"sparsity", "data", "models", "options", "runtime"},
    "packing": set(),
    "runtime": {"packing", "data"},
    "costs": {"sparsity", "data", "models", "training", "tasks", "options", "config", "jobs"},
    "tasks": {"sparsity", "data", "models", "training", "costs", "options", "jobs", "packing"},
    "loading": {"packing", "runtime", "tasks"},
    "report": {"sparsity", "data", "models", "training", "tasks", "options"},
    "commands": {
        "sparsity",
        "data",
        "models",
        "training",
        "packing",
        "runtime",
        "tasks",
        "options",
        "loading",
        "report",
    },
    "study": {"sparsity", "tasks", "data", "commands", "benchmark", "runtime", "options", "config", "jobs"},
    "demo": {"study", "sparsity", "data", "tasks", "commands", "report", "benchmark", "runtime", "options", "config"},
    "benchmark": {"packing", "runtime", "sparsity", "data", "models", "training", "tasks", "options", "config", "jobs"},
    "config": {"plain_parser", "recipe_parser"},
    "plain_parser": set(),
    "recipe_parser": set(),
    "jobs": {"options"},
    "cli": {"config", "jobs", "__version__"},
    "__main__": {"cli"},
    "__init__": set(),
} | {leaf: set() for leaf in LEAVES}
WITHOUT_TORCH = ("options/", "limits.py", "renamed.py", "card.py", "files.py", "plain_yaml.py", "predictor.py",
                 "terminal.py", "config.py", "plain_parser.py", "jobs.py", "cli.py", "tasks/__init__.py", "runtime/",
                 "data/images.py", "tasks/class_figures.py", "commands/evaluate.py", "data/sources.py", "data/draws.py",
                 "data/inputs.py", "commands/predict.py", "commands/web.py")  # fmt: skip


def imported(file: Path) -> set[str]:
    """Modules below `sparsemae` that a file imports, in functions too, but for type checkers alone."""
    names: set[str] = set()
    tree = ast.parse(file.read_text())
    unseen = {id(n) for node in ast.walk(tree) if _for_type_checkers(node) for n in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "sparsemae"}


def _for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def module_of(file: Path) -> str:
    return ".".join(("sparsemae", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def imported_files(file: Path) -> set[str]:
    """Modules of this package that stand behind a file's imports: ``a.b.name`` is ``a.b`` where name is no module."""
    modules = {module_of(f) for f in FILES}
    found = {name if name in modules else name.rpartition(".")[0] for name in imported(file)}
    return (found & modules) - {module_of(file), "sparsemae"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_one_way(file: Path) -> None:
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    rooms = {name.split(".")[1] for name in imported(file) if "." in name}
    names = set(dir(sparsemae)) | {"load"}  # public names, which are lazy
    assert rooms - {room} - LEAVES - names <= ALLOWED[room]


@pytest.mark.holds("house.4")
def test_no_two_files_import_each_other() -> None:
    graph = {module_of(file): imported_files(file) for file in FILES}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_a_cycle_would_be_found() -> None:
    graph = {module_of(file): imported_files(file) for file in FILES}
    assert "sparsemae.sparsity.pattern" in graph["sparsemae.sparsity.linear"]
    with pytest.raises(CycleError):
        tuple(TopologicalSorter(graph | {"sparsemae.sparsity.pattern": {"sparsemae.sparsity.linear"}}).static_order())


@pytest.mark.holds("house.4")
def test_the_package_has_not_grown(figure: Figure) -> None:
    trees = {file: ast.parse(file.read_text()) for file in FILES}
    statements = sum(isinstance(node, ast.stmt) for tree in trees.values() for node in ast.walk(tree))
    figure(f"{statements:,} statements, {sum(STATEMENTS.values()):,} allowed")
    assert statements <= sum(STATEMENTS.values())
    for file in FILES:
        lines = file.read_text().splitlines()
        assert len(lines) <= 400, file
        assert max(map(len, lines), default=0) <= 120, file
        assert "description[" not in file.read_text(), file


@pytest.mark.holds("house.4")
@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_what_is_public_has_a_docstring(file: Path) -> None:
    tree = ast.parse(file.read_text())
    assert ast.get_docstring(tree) or not tree.body, "the file"
    kinds = ast.FunctionDef | ast.ClassDef
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    scopes: list[ast.Module | ast.ClassDef] = [tree, *classes]
    for scope in scopes:
        overrides = isinstance(scope, ast.ClassDef) and scope.bases
        for node in scope.body:
            if isinstance(node, kinds) and not node.name.startswith("_") and not overrides:
                assert ast.get_docstring(node), f"{file}: {node.name}"


@pytest.mark.parametrize("file", [f for f in FILES if str(f.relative_to(PACKAGE)).startswith(WITHOUT_TORCH)],
                         ids=lambda file: str(file.relative_to(PACKAGE)))  # fmt: skip
def test_these_do_not_import_torch(file: Path) -> None:
    top = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    roots = {name.name for node in top if isinstance(node, ast.Import) for name in node.names}
    roots |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
    assert not {root.split(".")[0] for root in roots} & {"torch", "timm", "torchvision", "lightning_fabric"}


def test_public_names_exist() -> None:
    for name in dir(sparsemae):
        assert getattr(sparsemae, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sparsemae.nothing  # noqa: B018


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_parse_and_have_a_header(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text()
    assert all(f"# {word}:" in text for word in ("Command", "Cost", "Result"))
    kind = next(kind for job, kind in {**training_jobs(), "study": StudyConfig}.items() if job in name)
    config: Any = read_config(kind, ["--config", name])
    assert config.out == yaml.safe_load(text)["out"]


def test_the_readmes_tree_is_the_tree() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    block = re.search(r"```text\nsparsemae/\n(.*?)```", text, re.DOTALL)
    assert block is not None
    there = {str(f.relative_to(PACKAGE)) for f in FILES if f.name != "__init__.py"}
    folder, named = "", set()
    for line in block[1].splitlines():
        if match := re.match(r"  (\w+)/", line):
            folder = match[1] + "/"
        elif not line.startswith("    "):
            folder = ""
        named |= {folder + name for name in re.findall(r"\w+\.py", line)}
    assert named == there, named ^ there


@pytest.mark.parametrize("job", JOBS)
def test_help_describes_every_option(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert job in usage()
    with pytest.raises(SystemExit) as exit_:
        main([job, "--help-all"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    undocumented = re.findall(r"^  (--\S+ \S+)\s+\((?:type|required)", text, re.MULTILINE)
    assert not undocumented
    kind: Any = resolve(JOBS[job].options)
    required = {f.name: "x" for f in fields(kind) if f.default is f.default_factory is MISSING}
    positional = {*required, OPTIONAL_POSITIONAL}
    missing = [name for name in option_names(kind(**required)) if name not in positional and f"--{name} " not in text]
    assert not missing


def option_names(options: Any, prefix: str = "") -> list[str]:
    """Dotted names of all options, those of nested ones included."""
    nested = {f.name: getattr(options, f.name) for f in fields(options)}
    names = [option_names(value, f"{prefix}{name}.") if is_dataclass(value) else [prefix + name]
             for name, value in nested.items()]  # fmt: skip
    return list(chain.from_iterable(names))
