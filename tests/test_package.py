"""The house itself: what importing costs, the `kernels/` hazard, and the doors between the rooms."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env}, timeout=300
    )


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.slow
def test_a_transformers_model_imports_from_the_repository_root():
    """A package called `kernels` on the path would be taken for Hugging Face's and break this import."""
    done = python("from transformers import BertModel, LlamaForCausalLM; print(BertModel.__name__)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "BertModel"


def test_import_pulls_in_nothing_heavy():
    heavy = ["torch", "transformers", "sentence_transformers", "peft", "matplotlib", "triton", "datasets", "pandas"]
    heavy += ["numba", "pyarrow", "torch_geometric"]
    done = python(
        "import sys, ragkit, ragkit.config, ragkit.runs, ragkit.evaluation, ragkit.prompts;"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_public_names_resolve():
    done = python("import ragkit; [getattr(ragkit, n) for n in ragkit.__all__]; print(len(ragkit.__all__))")
    assert done.returncode == 0, done.stderr


# Lower rooms first. A module may import from its own room and from rooms before it.
ROOMS = [
    ["ragkit_kernels"],
    [
        "ragkit.lazy",
        "ragkit.optional",
        "ragkit.files",
        "ragkit.json_lines",
        "ragkit.sampling",
        "ragkit.units",
        "ragkit.small_world",
    ],
    [
        "ragkit.setting_types",
        "ragkit.settings",
        "ragkit.base_config",
        "ragkit.lsr_config",
        "ragkit.ralt_config",
        "ragkit.gfm_config",
        "ragkit.config",
        "ragkit.presets",
        "ragkit.run_text",
    ],
    ["ragkit.notes", "ragkit.runs", "ragkit.run_state", "ragkit.tables", "ragkit.threads"],
    [
        "ragkit.processes",
        "ragkit.run_opening",
        "ragkit.trained_part",
        "ragkit.holding_out",
        "ragkit.best",
        "ragkit.train_result",
        "ragkit.run_callback",
        "ragkit.not_finite",
        "ragkit.engine",
    ],
    ["ragkit.prompts", "ragkit.metrics", "ragkit.intervals", "ragkit.evaluation", "ragkit.plots"],
    ["ragkit.rag", "ragkit.graph"],
    ["ragkit.tuning", "ragkit.gfm", "ragkit.federated"],
    [
        "ragkit.compat",
        "ragkit.console",
        "ragkit.inputs",
        "ragkit.resuming",
        "ragkit.gfm_commands",
        "ragkit.commands",
        "ragkit.jobs",
        "ragkit.job_search",
        "ragkit.job_commands",
        "ragkit.job_log",
        "ragkit.job_process",
        "ragkit.dev",
        "ragkit.estimate",
        "ragkit.widgets",
        "ragkit.quickstart_graph",
        "ragkit.quickstart",
        "ragkit.__main__",
    ],
]


def room(module: str) -> int | None:
    for level, names in enumerate(ROOMS):
        if any(module == n or module.startswith(n + ".") for n in names):
            return level
    return None


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules() -> list[tuple[str, Path]]:
    out = []
    for base, package in ((ROOT, "ragkit"), (ROOT / "kernels", "ragkit_kernels")):
        for path in sorted((base / package).rglob("*.py")):
            name = ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
            out.append((name, path))
    return out


def test_arrows_point_one_way():
    wrong = []
    for name, path in modules():
        here = room(name)
        for target in imports(path):
            there = room(target)
            if here is not None and there is not None and there > here:
                wrong.append(f"{name} -> {target}")
            if name.startswith("ragkit_kernels") and target.split(".")[0] == "ragkit":
                wrong.append(f"{name} -> {target}")
            if name.startswith("ragkit.") and target.split(".")[0] == "triton":
                wrong.append(f"{name} -> {target}")
    assert wrong == []


def test_every_module_belongs_to_a_room():
    assert [n for n, _ in modules() if n != "ragkit" and room(n) is None] == []


@pytest.mark.slow
def test_a_wheel_holds_the_shipped_data_and_both_packages(tmp_path):
    """An editable install finds its data in the checkout; a wheel must bring it."""
    source = tmp_path / "source"
    for name in ("ragkit", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("ragkit-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    tracked = [p.relative_to(ROOT) for p in (ROOT / "ragkit").rglob("*") if p.is_file()]
    tracked += [
        p.relative_to(ROOT / "kernels") for p in (ROOT / "kernels" / "ragkit_kernels").rglob("*") if p.is_file()
    ]
    compiled = (".pyc", ".nbi", ".nbc")  # of Python and numba
    assert {p.as_posix() for p in tracked if p.suffix not in compiled} <= held
