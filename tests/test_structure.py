"""What rots unless a machine looks: the direction of imports, the README's tree and commands, the recipes."""

import ast
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import sparsemae
from sparsemae.cli import JOBS, main, usage
from sparsemae.config import RECIPES, read_config, recipe_names

PACKAGE = ROOT / "sparsemae"
# Who may import whom, by first name below the package. Modules at the top are leaves but for `config`.
ALLOWED = {
    "sparsity": set(),
    "limits": set(),
    "data": {"limits"},
    "models": {"limits"},
    "config": set(),
    "training": {"sparsity", "data", "models", "limits"},
    "packing": set(),
    "runtime": {"packing"},
    "tasks": {"sparsity", "data", "models", "training", "packing", "runtime", "limits"},
    "report": {"sparsity", "data", "models", "training"},
    "demo": {"sparsity", "data", "models", "tasks", "report", "runtime", "stages", "demo_segment"},
    "demo_segment": {"sparsity", "tasks", "stages"},
    "stages": {"config"},
    "benchmark": {"packing", "runtime", "sparsity", "data", "training", "tasks", "config"},
    "plan": {"sparsity", "data", "models", "training", "tasks", "config"},
    "cli": {"config", "__version__"},
    "__init__": set(),
}


def imported(file: Path) -> set[str]:
    """Names below `sparsemae` that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "sparsemae" else {module}
    return {name.split(".")[1] for name in names if name.startswith("sparsemae.")}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_one_way(file: Path) -> None:
    part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert imported(file) - {part} <= ALLOWED[part]


def test_runtime_sees_the_torch_free_half_of_packing_only() -> None:
    sources = "".join(file.read_text() for file in (PACKAGE / "runtime").glob("*.py"))
    assert set(re.findall(r"sparsemae\.packing\.(\w+)", sources)) <= {"codec", "format", "metadata"}
    for file in ("codec", "format", "metadata"):
        assert "torch" not in re.findall(r"import (\w+)", (PACKAGE / f"packing/{file}.py").read_text())


def test_importing_the_package_and_its_command_line_loads_no_torch() -> None:
    code = (
        "import sys, sparsemae, sparsemae.cli; assert 'torch' not in sys.modules; "
        "sparsemae.NMPattern; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist() -> None:
    for name in dir(sparsemae):
        assert getattr(sparsemae, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sparsemae.nothing  # noqa: B018


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_parse_and_have_a_header(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text()
    assert all(f"# {word}:" in text for word in ("Command", "Cost", "Result"))
    job = next(job for job in ("pretrain", "finetune", "segment") if job in name)
    kind = getattr(import_module(JOBS[job].module), JOBS[job].config)
    config = read_config(kind, ["--config", name])
    assert config.out == yaml.safe_load(text)["out"]


def readme_commands() -> list[str]:
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_the_readmes_commands_are_understood() -> None:
    commands = readme_commands()
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    seen = {"make": 0, "sparsemae": 0}
    for command in commands:
        words = shlex.split(command, comments=True)
        if words[0] == "make":
            assert words[1] in targets, command
        elif words[0] == "sparsemae":
            job = JOBS[words[1]]
            read_config(getattr(import_module(job.module), job.config), words[2:])
        seen[words[0]] = seen.get(words[0], 0) + 1
    assert seen["make"] >= 2
    assert seen["sparsemae"] >= 4


def test_the_readmes_tree_is_the_tree() -> None:
    block = re.search(r"```text\nsparsemae/\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    listed = set(re.findall(r"[\w/]+\.py", block[1]))
    there = {str(f.relative_to(PACKAGE)) for f in PACKAGE.rglob("*.py") if f.name != "__init__.py"}
    folder, named = "", set()
    for line in block[1].splitlines():
        if match := re.match(r"  (\w+)/", line):
            folder = match[1] + "/"
        elif not line.startswith("    "):
            folder = ""
        named |= {folder + name for name in re.findall(r"\w+\.py", line)}
    assert named == there, (named ^ there, listed)


def test_files_are_short() -> None:
    long = {str(f): n for f in PACKAGE.rglob("*.py") if (n := len(f.read_text().splitlines())) > 400}
    assert not long


@pytest.mark.parametrize("job", JOBS)
def test_help_describes_every_option(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert job in usage()
    with pytest.raises(SystemExit) as exit_:
        main([job, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    undocumented = re.findall(r"^  (--\S+ \S+)\s+\((?:type|required)", text, re.MULTILINE)
    assert not undocumented


def test_what_the_readme_shows_is_there() -> None:
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target
    tables = [
        re.search(r"<!-- table of make results -->\n(.*?)<!-- end -->", (ROOT / file).read_text(), re.DOTALL)
        for file in ("README.md", "docs/results.md")
    ]
    assert all(table is not None and "SparseMAE" in table[1] for table in tables)
    assert tables[0][1] == tables[1][1]
