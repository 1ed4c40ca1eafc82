"""The house rules: imports go down only, importing is cheap, files and functions keep their size."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import everlong
from everlong import numerics
from everlong.ops import native
from everlong.report.readme import generated

ROOT = Path(everlong.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
CPP = sorted(path for path in ROOT.rglob("*") if path.suffix in (".cpp", ".h"))
LEVELS = [
    {"shapes", "arguments", "kinds", "config", "files", "machine", "numerics", "tokenizer"},
    {"state"},
    {"call"},
    {"ops"},
    {"mixers"},
    {"feedforward"},
    {"blocks"},
    {"models"},
    {"generation"},
    {"laws_aliasing"},
    {"checkpoints", "laws", "laws_isolation", "laws_precision", "laws_transforms"},
    {"train", "tasks", "bench"},
    {"report"},
    {"compare"},
    {"cli"},
]


def level(parts):
    return next(i for i, names in enumerate(LEVELS) if parts[0].removesuffix(".py") in names)


def imports(path):
    """(module path below everlong, line) of every import of the package's own modules, relative or not."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            absolute = [alias.name.split(".") for alias in node.names]
            yield from ((module[1:], node.lineno) for module in absolute if module[0] == "everlong" and module[1:])
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == "everlong":
            module = node.module.split(".")[1:]
            yield from ((module or [alias.name], node.lineno) for alias in node.names if alias.name != "__version__")
        elif isinstance(node, ast.ImportFrom) and node.level:
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


def lines_allowed(path, root=ROOT):
    """Of a file, wherever the checkout lies: kernels are longer."""
    return 600 if {"native", "triton"} & set(path.relative_to(root).parts) else 400


def python_functions(text):
    """(name, lines); a list of documented options is not counted."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.end_lineno - node.body[0].lineno + 1


def cpp_functions(text):
    """(first line, lines) of what stands between ``) {`` and its closing brace; what is inside counts for the outer."""
    depth, begin, blocks = 0, None, []
    for number, line in enumerate(text.split("\n")):
        code = re.sub(r'"(\\.|[^"\\])*"|\'.\'|//.*', "", line)
        if begin is None and re.search(r"\)( const| noexcept| override)* \{$", code):
            begin, blocks = number, depth
        depth += code.count("{") - code.count("}")
        if begin is not None and depth <= blocks and "}" in code:
            yield text.split("\n")[begin].strip(), number - begin + 1
            begin = None


@pytest.mark.parametrize("path", [*FILES, *CPP], ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path):
    text, limit = path.read_text(), lines_allowed(path)
    assert text.count("\n") <= limit, f"{path.name} has {text.count(chr(10))} lines, at most {limit}"
    for name, length in (cpp_functions if path in CPP else python_functions)(text):
        assert length <= 50, f"{path.name}: {name} has {length} lines, at most 50"


def test_limits_do_not_depend_on_where_the_checkout_lies():
    root = Path("/home/native/triton/everlong")
    assert lines_allowed(root / "cli.py", root) == 400
    assert lines_allowed(root / "ops" / "native" / "vec.h", root) == 600


def test_absolute_imports_and_long_kernels_are_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("test_house.ROOT", tmp_path)
    path = tmp_path / "report" / "odd.py"
    path.parent.mkdir()
    path.write_text("import everlong.cli\nfrom everlong.compare.run import Run\nfrom everlong import files\n")
    assert [target for target, _ in imports(path)] == [["cli"], ["compare", "run"], ["files"]]
    body = "  if (x) {\n    y();\n  }\n" * 30
    text = (
        f"namespace ev {{\nstruct A {{\n  int f() const {{ return 1; }}\n}};\nint g(int x,\n      int y) {{\n{body}}}\n"
    )
    assert list(cpp_functions(text)) == [("int y) {", 92)]


@pytest.mark.parametrize("path", sorted((ROOT / "ops").glob("*.py")), ids=lambda p: p.stem)
def test_the_rows_of_a_table_are_different_functions(path):
    """A form that is its own reference proves nothing."""
    table = getattr(importlib.import_module(f"everlong.ops.{path.stem}"), "TABLE", ())
    assert len({row.run for row in table}) == len(table), [row.name for row in table]


COMPARE = {"assert_close": 2, "same": 3, "isclose": 2}  # arguments before the tolerance


def own_tolerances(text):
    """Lines whose comparison brings a tolerance of its own: a number, or a float that the file names for it."""
    tree = ast.parse(text)
    floats = (ast.Constant, ast.Dict, ast.Tuple, ast.List)
    own = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, floats)
        for target in node.targets
        if isinstance(target, ast.Name) and any(_small(part) for part in ast.walk(node.value))
    }
    helpers = {
        node.name: [argument.arg for argument in node.args.args].index("tolerance")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and "tolerance" in [argument.arg for argument in node.args.args]
    }
    first = {**COMPARE, **helpers}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        torches = name == "assert_close" and "testing" in ast.unparse(node.func) and "atol" not in ast.unparse(node)
        named = [k.value for k in node.keywords if k.arg in ("atol", "rtol", "tolerance", "rel")]
        given = [*node.args[first[name] :], *named] if name in first else named
        parts = [part for argument in given for part in ast.walk(argument)]
        if name == "allclose" or torches or any(_small(p) or getattr(p, "id", "") in own for p in parts):
            yield node.lineno


def _small(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, float) and 0 < node.value < 0.5


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("test_*.py")), ids=lambda p: p.stem)
def test_tolerances_are_those_of_the_table(path):
    for line in own_tolerances(path.read_text()):
        raise AssertionError(f"{path.name}:{line} compares within a tolerance of its own; take one of numerics.BOUNDS")


def test_own_tolerances_are_found():
    text = """LIMIT = {"a": 1e-3}
def compare(a, b, tolerance): ...
torch.allclose(a, b)
numerics.assert_close(a, b, "x", 1e-5)
numerics.assert_close(a, b, "x", LIMIT["a"])
torch.testing.assert_close(a, b)
compare(a, b, 10 * 1e-4)
x == pytest.approx(y, rel=1e-4)
laws.same(a, b, "x", tolerance=0.01 if c else 0.1)
"""
    fine = 'numerics.assert_close(a, b, "x", numerics.BOUNDS["fp32 scan"])\nnumerics.assert_close(a, b, "x")\n'
    assert sorted(own_tolerances(text)) == list(range(3, 10)) and not list(own_tolerances(fine))


def test_the_table_of_bounds_is_documented():
    page = (Path(__file__).parent.parent / "docs" / "numerics.md").read_text()
    for name, bound in numerics.BOUNDS.items():
        assert f"| {name} | {bound:g} |" in page, f"docs/numerics.md does not say what {name!r} is"


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


@pytest.mark.skipif(native.MISSING is not None, reason="the table says what is native: make it where kernels are built")
def test_the_readme_is_up_to_date():
    readme = Path(__file__).parent.parent / "README.md"  # beside the tests, wherever everlong is installed
    assert generated(readme.read_text()) == readme.read_text(), "run `make docs`"
