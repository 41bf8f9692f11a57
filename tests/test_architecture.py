"""Who may import whom, held by reading the imports."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "bgcbench"
# A part may import the parts named with it, and itself.
ALLOWED = {
    "errors": set(),
    "specs": {"errors"},
    "measure": {"errors", "specs"},
    "theory": {"errors", "specs"},
    "kernels": set(),
    "convs": {"errors", "specs", "measure", "theory", "kernels"},
    "factories": {"errors"},
    "models": {"errors", "specs", "factories"},
    "data": {"errors", "specs", "factories"},
    "conversion": {"errors", "specs", "measure", "theory", "convs", "models", "results"},
    "planning": {"errors", "specs", "measure", "theory", "convs", "conversion", "deployment", "results"},
    "training": {"errors", "specs", "measure", "convs", "data", "results"},
    "locks": set(),
    "results": {"errors", "specs", "locks", "measure", "theory"},
    "report": {"errors", "specs", "measure", "theory", "results"},
    "plots": {"errors", "specs", "theory", "results"},
    "deployment": {"errors", "specs", "measure", "convs", "conversion", "results"},
    "experiments": {
        "deployment",
        "errors",
        "specs",
        "measure",
        "theory",
        "convs",
        "models",
        "data",
        "conversion",
        "planning",
        "training",
        "results",
    },
    "interrupts": set(),
    "cli": {
        "deployment",
        "errors",
        "specs",
        "measure",
        "theory",
        "training",
        "experiments",
        "results",
        "report",
        "plots",
        "interrupts",
    },
    "profiling": {"errors", "experiments", "models", "report", "results"},
    "__main__": {"cli"},
    "__init__": {"conversion", "convs", "data", "deployment", "errors", "models", "planning", "profiling", "specs"},
}
MONOPOLIES = {
    "triton": {"kernels"},
    "torchvision": {"models", "data"},
    "timm": {"models"},
    "typer": {"cli"},
    "rich": {"cli", "report"},
    "jinja2": {"report"},
    "matplotlib": {"plots"},
    "PIL": {"data"},
    "sklearn": {"data"},
    "psutil": {"measure"},
    "safetensors": {"models"},
    "onnx": {"deployment"},
    "onnxruntime": {"measure"},
}


def modules() -> list[tuple[str, Path]]:
    return [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in sorted(PACKAGE.rglob("*.py"))]


@functools.cache
def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_a_part_imports_only_what_stands_below_it() -> None:
    for part, path in modules():
        own = {name.split(".")[1] for name in imports(path) if name.startswith("bgcbench.")}
        # "import bgcbench" itself is for the version only.
        assert own <= ALLOWED[part] | {part, "__version__"}, path


def test_third_party_packages_stay_in_their_places() -> None:
    for part, path in modules():
        for name in {name.split(".")[0] for name in imports(path)}:
            assert part in MONOPOLIES.get(name, {part}), path


def test_only_the_command_line_and_the_report_print() -> None:
    for part, path in modules():
        calls = [n.func.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)
                 and isinstance(n.func, ast.Name)]  # fmt: skip
        assert "print" not in calls or part in ("cli", "report"), path


# Where everything that a result file holds is read by field; relative to the checkout.
TYPED = ("bgcbench/cli", "bgcbench/experiments", "bgcbench/report", "bgcbench/plots", "benchmarks")
# What may be subscripted by a string there, by file or folder, and why: no row of a result is.
SUBSCRIPTED = {
    "run.py": {"parsed": "options by parameter"},
    "training.py": {"given": "options that were typed", "found": "what a checkpoint says of its network"},
    "export_run.py": {"stored": "what a checkpoint holds"},
    "options.py": {"about": "what is declared of an option", "made": "what is concluded for it"},
    "profile.py": {"WORKLOAD": "the paper's layer"},
    "network_run.py": {"params": "parameters of a row to be made"},
    "train_run.py": {"settings": "what a run sets, before it is a type"},
    "transfer.py": {"CLASSES": "by data set", "there": "options that images stand for", "found": "the same"},
    "transfer_run.py": {"found": "fields of a row to be made"},
    "plots": {
        "look": "matplotlib's options",
        "looks": "by label",
        "LOOKS": "by label",
        "look_of": "the same",
        "FORMATS": "by suffix",
        "attributes": "of an SVG element",
    },
    "claims.py": {"phases": "by phase", "median_s": "seconds by algorithm", "images_per_s": "rates by pipeline"},
    "files.py": {"median_s": "seconds by algorithm"},
    "agree_with_torch.py": {"medians": "seconds by tool"},
    "bgc_forms.py": {"found": "what the tuner remembers of a layer"},
    "bring_home.py": {"config": "a run's options", "content": "a file that is kept as it is but for two fields"},
    "facts.py": {"source": "the commit, as pack writes it"},
    "plan_ranks.py": {"checkpoint": "torch's"},
    "page_faults.py": {"late": "counts by state of the memory"},
    "transfer_efficientnet_lite.py": {"meta": "torchvision's"},
    "pack.py": {"here": "the commit", "packed": "the commit, as it was packed", "source": "the same"},
}
# Where getattr() may be called by a name, and why.
GETATTR = {"table.py": "columns of rows", "compare.py": "what two documents must have in common"}


def subject(node: ast.expr) -> str:
    """The last name in an expression: "look" of look[...], picture.look[...] and look(...)[...]."""
    match node:
        case ast.Subscript(value=inner) | ast.Call(func=inner):
            return subject(inner)
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return name
    return ast.unparse(node)


@pytest.mark.parametrize("folder", TYPED)
def test_no_row_is_subscripted_by_a_string(folder: str) -> None:
    """Rows and documents are typed: what they hold is read by name."""
    for path in sorted((PACKAGE.parent / folder).rglob("*.py")):
        named = SUBSCRIPTED.get(path.parent.name, SUBSCRIPTED.get(path.name, {}))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                is_named = not isinstance(node.slice.value, str) or subject(node) in named
                assert is_named, f"{path}: {ast.unparse(node)}"
            drawn = path.parent.name in ("report", "plots")
            if drawn and isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "getattr" or path.name in GETATTR, f"{path}: {ast.unparse(node)}"


WITHOUT_TORCH = [
    ["--help"], ["profile", "--help"], ["--version"], ["profile", "--groups", "x"], ["profile", "--groups", "3"],
    ["show", "--table1"], ["show", "missing.json"], ["compare", "a.json", "b.json"], ["report", "no.json"],
    ["profile", "--nonsense"],
    ["profile", "--resume", "missing.json"], ["train", "--help"], ["train", "wrn_10_2"],
    ["train", "wrn_10_2", "--data", "cifar10"],
    ["train", "wrn_10_2", "--data", "./no"], ["train", "--resume", "missing.json"],
    ["transfer", "--help"], ["transfer", "resnet50", "--data", "imagenet"], ["transfer", "resnet50", "--init", "x"],
    ["transfer", "wrn_10_2", "--data", "digits"], ["transfer", "--preset", "table3"],
    ["transfer", "gone.pt", "--data", "digits"], ["transfer", "README.md", "--data", "digits", "--lr", "-1"],
    ["transfer", "resnet50", "--data", "imagenet", "--weights", "gone.pth"],
    ["profile", "--out", "/dev/null/x.json"], ["convert", "wrn_10_1"],
    ["convert", "wrn_10_1", "-o", "/dev/null/x.pt"],
    ["export", "--help"], ["export", "gone.pt", "--to", "onnx", "-o", "x.onnx"],
    ["export", "README.md", "--to", "onnx", "-o", "x.pt"],
]  # fmt: skip


def test_torch_is_not_imported_before_a_device_is_needed() -> None:
    code = """
import json, sys
from bgcbench.cli import main
for words in json.loads(sys.argv[1]):
    main(words)
    if {"torch", "numpy"} & sys.modules.keys():
        sys.exit(f"{words} imports what takes seconds")
"""
    done = subprocess.run([sys.executable, "-c", code, json.dumps(WITHOUT_TORCH)], capture_output=True, text=True,
                          check=False, cwd=PACKAGE.parent, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_parts_that_the_readme_names_are_there_after_importing_the_package() -> None:
    code = "import bgcbench; print(bgcbench.calibration.reestimate_norms.__name__, 'calibration' in dir(bgcbench))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "reestimate_norms True\n", done.stderr
