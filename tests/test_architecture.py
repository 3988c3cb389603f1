"""The package has no circles: a module imports only what its row allows; each big library has one door."""

import ast
from functools import cache
from pathlib import Path

import bigmodel_course

ROOT = Path(bigmodel_course.__file__).parent

ALLOWED: dict[str, set[str]] = {  # module -> the package's modules it may import, each of them above it
    "files": set(),
    "forkserver": set(),
    "costs.arguments": set(),
    "costs.layers": {"costs.arguments"},
    "costs.training": {"costs.arguments"},
    "costs.optimization": {"costs.arguments"},
    "costs.memory": {"costs.arguments", "costs.training"},
    "costs.step_memory": {"costs.arguments", "costs.layers", "costs.memory"},
    "costs.communication": {"costs.arguments"},
    "costs.transformers": {"costs.arguments"},
    "costs.clusters": {"costs.arguments", "costs.transformers"},
    "costs.sharding": {"costs.arguments", "costs.transformers"},
    "costs.pipeline": {"costs.arguments", "costs.layers"},
    "costs.planning": {
        "costs.arguments",
        "costs.clusters",
        "costs.pipeline",
        "costs.sharding",
        "costs.transformers",
    },
    "costs.transfer": {"costs.arguments", "costs.layers"},
    "costs.adapters": {"costs.arguments", "costs.layers", "costs.training"},
    "costs.tensor_parallel": {"costs.arguments", "costs.communication", "costs.layers"},
    "costs.mesh": {"costs.arguments", "costs.communication", "costs.layers", "costs.pipeline", "costs.tensor_parallel"},
    "costs.published": {"costs.clusters", "costs.planning", "costs.transformers"},
    "costs": {
        "costs.memory",
        "costs.published",
        "costs.step_memory",
        "costs.mesh",
        "costs.tensor_parallel",
        "costs.adapters",
        "costs.transfer",
        "costs.pipeline",
        "costs.communication",
        "costs.clusters",
        "costs.sharding",
        "costs.planning",
        "costs.transformers",
        "costs.layers",
        "costs.training",
        "costs.optimization",
    },
    "schedules": set(),
    "metrics": set(),
    "checks": set(),
    "plotting": set(),
    "classroom.wire": set(),
    "classroom.student": {"classroom.wire"},
    "classroom.stand_in": {"forkserver", "classroom.student", "classroom.wire"},
    "classroom.sets": set(),
    "classroom.judge": {"checks"},
    "classroom.grading": {"checks", "classroom.sets", "classroom.stand_in"},
    "classroom.exam": set(),
    "classroom.progress": set(),
    "show": set(),
    "passport": {"files"},
    "optim_rules": set(),
    "optim_compiled": {"optim_rules"},
    "optim": {"schedules", "optim_rules", "optim_compiled"},
    "data": set(),
    "corpus": {"files"},
    "models": {"costs"},
    "growth": {"models"},
    "loss_scale": set(),
    "checkpoint": set(),
    "cache": {"checkpoint"},
    "memory": set(),
    "training": {"data", "checkpoint"},
    "simulate": {"costs", "costs.arguments"},
    "recipe": {"cache", "corpus", "data", "models", "optim", "schedules", "training"},
    "compression.bits": set(),
    "compression.arithmetic": set(),
    "compression.huffman": {"compression.bits"},
    "compression.contexts": {"compression.arithmetic"},
    "compression.sharing": set(),
    "compression.container": {
        "files",
        "compression.bits",
        "compression.huffman",
        "compression.contexts",
        "compression.sharing",
    },
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
    "distributed.agreement": set(),
    "distributed.rank": {"distributed.agreement"},
    "distributed.processes": {"forkserver", "distributed.rank"},
    "distributed.failures": {"distributed.agreement", "distributed.rank", "distributed.processes"},
    "distributed.launch": {"distributed.rank", "distributed.processes", "distributed.failures"},
    "distributed.team": set(),
    "distributed.ring": {"distributed.team"},
    "distributed.collectives": {"costs", "distributed.ring", "distributed.team"},
    "distributed.sharded": {"distributed.collectives"},
    "distributed.sharded_checkpoint": {"checkpoint", "files", "distributed.sharded"},
    "distributed.averaging": set(),
    "distributed.data_parallel": {"costs", "data", "distributed.averaging"},
    "distributed.batch_norm": set(),
    "distributed.activations": set(),
    "distributed.pipeline_schedules": set(),
    "distributed.pipeline_stages": {"costs", "models"},
    "distributed.pipeline": {"distributed.pipeline_schedules"},
    "transfer.weights": set(),
    "transfer.photographs": set(),
    "transfer.rendered": {"data"},
    "transfer.finetune": {"cache"},
    "transfer.vision": {"costs", "data", "optim", "schedules", "training", "transfer.rendered", "transfer.weights"},
    "transfer.encoder": {"costs"},
    "transfer.lora": set(),
    "transfer.adapter_files": {"files", "transfer.lora"},
    "transfer.text": {"corpus", "costs", "data", "optim", "schedules", "transfer.weights", "transfer.encoder"},
    "transfer.recipe": {
        "data",
        "optim",
        "schedules",
        "training",
        "transfer.encoder",
        "transfer.lora",
        "transfer.text",
    },
    "distributed.regions": set(),
    "distributed.vocabulary": {"distributed.regions"},
    "distributed.tensor_parallel": {"models", "distributed.regions", "distributed.vocabulary"},
    "distributed.traffic": {"costs"},
    "distributed.hybrid": {
        "costs",
        "models",
        "distributed.averaging",
        "distributed.pipeline",
        "distributed.pipeline_schedules",
        "distributed.pipeline_stages",
        "distributed.tensor_parallel",
        "distributed.vocabulary",
    },
    "train": {
        "corpus",
        "distributed.launch",
        "distributed.sharded",
        "distributed.sharded_checkpoint",
        "growth",
        "loss_scale",
        "models",
        "optim",
        "schedules",
    },
    "deployment.graph": set(),
    "deployment.tracing": {"deployment.graph"},
    "deployment.export": {"files", "deployment.graph", "deployment.tracing"},
    "deployment.runtime": {"deployment.export"},
    "deployment.quantized": {"deployment.export", "deployment.graph"},
    "deployment.cluster_app": set(),
    "deployment.cluster_console": set(),
    "deployment.cluster_process": set(),
    "deployment.cluster": {
        "models",
        "deployment.cluster_process",
        "deployment.export",
        "distributed.pipeline_stages",
    },
    "deployment.batching": set(),
    "deployment.lifetime": set(),
    "deployment.load": set(),
    "deployment.service_schemas": set(),
    "deployment.service_settings": set(),
    "deployment.service_gate": {"deployment.service_settings"},
    "deployment.service_worker": {"deployment.service_gate", "deployment.service_settings"},
    "deployment.served_models": {"deployment.runtime"},
    "deployment.service_metrics": {"deployment.served_models"},
    "deployment.service_app": {
        "deployment.batching",
        "deployment.served_models",
        "deployment.service_gate",
        "deployment.service_metrics",
        "deployment.service_schemas",
        "deployment.service_settings",
    },
    "deployment.service": {
        "deployment.lifetime",
        "deployment.service_app",
        "deployment.service_settings",
        "deployment.service_worker",
    },
    "deployment.sealed": {"deployment.served_models"},
    "deployment.service_replica": {
        "deployment.lifetime",
        "deployment.sealed",
        "deployment.served_models",
        "deployment.service_app",
        "deployment.service_settings",
        "deployment.service_worker",
    },
    "deployment.balancer": set(),
    "deployment.supervision": {"deployment.lifetime"},
    "deployment.doctor": {"deployment.balancer", "deployment.lifetime", "deployment.supervision"},
    "deployment.machinery": {"deployment.balancer", "deployment.supervision"},
    "deployment.traffic": set(),
    "deployment.replicas": {
        "deployment.machinery",
        "deployment.sealed",
        "deployment.served_models",
        "deployment.service_settings",
    },
}
NO_TORCH = {"costs", "schedules"}  # and what is inside them
ONE_DOOR = {
    "matplotlib": {"plotting"},
    "huggingface_hub": {"transfer.weights"},
    "nbgrader": {"classroom.grading"},
    "onnx": {"deployment.graph", "deployment.export"},
    "onnxruntime": {"deployment.runtime", "deployment.quantized", "deployment.cluster_app"},
    "ray": {"deployment.cluster_app", "deployment.cluster_console"},
}


@cache
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


def test_only_exercises_and_the_classroom_import_checks_and_nothing_imports_exercises():
    for name, tree in modules().items():
        used = own(imports(tree), set(modules()))
        assert not any(module.startswith("exercises.") for module in used), name
        assert "checks" not in used or name.startswith(("exercises.", "classroom.")), name


def test_arithmetic_needs_no_torch_and_each_big_library_has_one_door():
    for name, tree in modules().items():
        tops = {module.split(".")[0] for module in imports(tree)}
        assert not (name.split(".")[0] in NO_TORCH and "torch" in tops), f"{name} imports torch"
        for library, doors in ONE_DOOR.items():
            assert library not in tops or name in doors, f"{name} imports {library}; only {', '.join(doors)} may"


def test_no_module_is_long_and_each_says_what_is_public():
    for name, tree in modules().items():
        lines = max(node.end_lineno for node in ast.walk(tree) if hasattr(node, "end_lineno"))
        limit = 360 if name.startswith("exercises.") else 300  # an exercise is mostly hints
        assert lines <= limit, f"{name} has {lines} lines"
        assert ast.get_docstring(tree), name
        assert has_all(tree), name
