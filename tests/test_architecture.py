"""The package has no circles: a module imports only what its row allows; each big library has one door."""

import ast
from pathlib import Path

import bigmodel_course

ROOT = Path(bigmodel_course.__file__).parent

ALLOWED: dict[str, set[str]] = {  # module -> the package's modules it may import, each of them above it
    "costs.arguments": set(),
    "costs.layers": {"costs.arguments"},
    "costs.training": {"costs.arguments"},
    "costs.optimization": {"costs.arguments"},
    "costs": {"costs.layers", "costs.training", "costs.optimization"},
    "schedules": set(),
    "metrics": set(),
    "checks": set(),
    "plotting": set(),
    "show": set(),
    "passport": set(),
    "optim_rules": set(),
    "optim_compiled": {"optim_rules"},
    "optim": {"schedules", "optim_rules", "optim_compiled"},
    "data": set(),
    "models": {"costs"},
    "checkpoint": set(),
    "training": {"data", "checkpoint"},
    "recipe": {"data", "models", "optim", "schedules", "training"},
    "compression.bits": set(),
    "compression.arithmetic": set(),
    "compression.huffman": {"compression.bits"},
    "compression.contexts": {"compression.arithmetic"},
    "compression.sharing": set(),
    "compression.container": {"compression.bits", "compression.huffman", "compression.contexts", "compression.sharing"},
    "compression.pruning": {"models"},
    "compression.distillation": set(),
    "compression.teaching": {"data", "models", "optim", "schedules"},
    "compression.pipeline": {
        "models",
        "optim",
        "schedules",
        "compression.container",
        "compression.distillation",
        "compression.pruning",
        "compression.sharing",
        "compression.teaching",
    },
    "compression.calibration": set(),
    "compression.quantization": set(),
    "compression.quantized_layers": {"compression.calibration", "compression.quantization"},
}
NO_TORCH = {"costs", "schedules"}  # and what is inside them
ONE_DOOR = {"matplotlib": "plotting", "onnx": "deployment.export", "onnxruntime": "deployment.runtime"}


def modules() -> dict[str, ast.Module]:
    """Every module by its name; a package is one of them where its __init__ says what is public."""
    trees = {path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")}
    found = {".".join(path.with_suffix("").parts): tree for path, tree in trees.items() if path.name != "__init__.py"}
    faces = {path.parent: tree for path, tree in trees.items() if path.name == "__init__.py" and has_all(tree)}
    return found | {".".join(path.parts): tree for path, tree in faces.items()}


def has_all(tree: ast.Module) -> bool:
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    return any(getattr(target, "id", "") == "__all__" for node in assigned for target in node.targets)


def imports(tree: ast.Module) -> set[str]:
    """Every module named by an import, as a dotted name; `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(names: set[str], known: set[str]) -> set[str]:
    return {name.removeprefix("bigmodel_course.") for name in names} & known


def test_imports_follow_the_table():
    found = modules()
    course = {name for name in found if not name.startswith("exercises.")}
    assert course == ALLOWED.keys()
    for name in course:
        used = own(imports(found[name]), set(found))
        assert used <= ALLOWED[name], f"{name} must not import {used - ALLOWED[name]}"


def test_the_table_has_no_circle():
    above: set[str] = set()
    for name, allowed in ALLOWED.items():
        assert allowed <= above, f"{name} stands above {allowed - above}"
        above.add(name)


def test_only_exercises_import_checks_and_nothing_imports_exercises():
    for name, tree in modules().items():
        used = own(imports(tree), set(modules()))
        assert not any(module.startswith("exercises.") for module in used), name
        assert "checks" not in used or name.startswith("exercises."), name


def test_arithmetic_needs_no_torch_and_each_big_library_has_one_door():
    for name, tree in modules().items():
        tops = {module.split(".")[0] for module in imports(tree)}
        assert not (name.split(".")[0] in NO_TORCH and "torch" in tops), f"{name} imports torch"
        for library, door in ONE_DOOR.items():
            assert library not in tops or name == door, f"{name} imports {library}; only {door} may"


def test_no_module_is_long_and_each_says_what_is_public():
    for name, tree in modules().items():
        lines = max(node.end_lineno for node in ast.walk(tree) if hasattr(node, "end_lineno"))
        limit = 360 if name.startswith("exercises.") else 300  # an exercise is mostly hints
        assert lines <= limit, f"{name} has {lines} lines"
        assert ast.get_docstring(tree), name
        assert has_all(tree), name
