"""The house rules: imports go down only, importing is cheap, files and functions keep their size."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import everlong
from everlong.report.readme import generated

ROOT = Path(everlong.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LEVELS = [
    {"shapes", "config", "files", "machine", "numerics", "tokenizer"},
    {"state"},
    {"ops"},
    {"mixers"},
    {"models"},
    {"checkpoints", "laws", "laws_transforms"},
    {"train", "tasks", "bench"},
    {"report"},
    {"compare"},
    {"cli"},
]


def level(parts):
    return next(i for i, names in enumerate(LEVELS) if parts[0].removesuffix(".py") in names)


def imports(path):
    """(module path below everlong, line) of every relative import."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                if module or alias.name != "__version__":  # the version is the package's own
                    yield (module or [alias.name]), node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    own = path.relative_to(ROOT).parts
    if own == ("__init__.py",):
        return
    for target, line in imports(path):
        assert level(target) <= level(own), f"{'/'.join(own)}:{line} imports upwards, from {'.'.join(target)}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path):
    text = path.read_text()
    limit = 600 if {"native", "triton"} & set(path.parts) else 400
    assert text.count("\n") <= limit, f"{path.name} has {text.count(chr(10))} lines, at most {limit}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.body[0].lineno + 1  # a list of documented options is not counted
            assert length <= 50 or "native" in path.parts, f"{path.name}:{node.name} has {length} lines, at most 50"


def test_importing_costs_torch_and_nothing_else():
    code = "import sys, torch; before = set(sys.modules); import everlong; print(*(set(sys.modules) - before))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {name.split(".")[0] for name in out} == {"everlong"}, out


def test_the_core_loads_no_optional_library():
    code = (
        "import sys, everlong; everlong.LanguageModel, everlong.load, everlong.generate;"
        "from everlong.config import find, mixer_names; [find(n) for n in mixer_names()];"
        "print(*{'transformers', 'triton', 'plotly', 'rich', 'typer'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_help_is_fast_and_loads_no_torch():
    code = "import sys; from everlong import cli; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )


def test_the_readme_is_up_to_date():
    readme = Path(__file__).parent.parent / "README.md"  # beside the tests, wherever everlong is installed
    assert generated(readme.read_text()) == readme.read_text(), "run `make docs`"
