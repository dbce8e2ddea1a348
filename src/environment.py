"""What a run stood on, for bug reports and a run's record: versions, commit, processor, memory, devices."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

# Name of the distribution -> name of the import; in the order of the report.
PACKAGES = {
    "torch": "torch",
    "lightning": "lightning",
    "transformers": "transformers",
    "torchmetrics": "torchmetrics",
    "webdataset": "webdataset",
    "open_clip_torch": "open_clip",
    "faiss-cpu": "faiss",
    "omegaconf": "omegaconf",
    "mlflow": "mlflow",
    "jsonargparse": "jsonargparse",
    "av": "av",
    "pillow": "PIL",
    "numpy": "numpy",
}


def describe(load: bool = False) -> dict[str, Any]:
    """The whole report as plain data; `load` also imports every package, to find the broken ones."""
    return {
        "mmrlhf": installed("mmrlhf"),
        "commit": commit(Path(__file__).parents[1]),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "cpus": usable_cpus(),
        "memory_gib": memory_gib(),
        "packages": {name: package(name, module, load) for name, module in PACKAGES.items()},
        "devices": devices(),
    }


def installed(distribution: str) -> str:
    """The installed version of a distribution, or words that say there is none.

    >>> installed("no-such-distribution")
    'not installed'
    """
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def package(distribution: str, module: str, load: bool) -> str:
    """The version of a package; with `load`, followed by what went wrong when it was imported.

    >>> package("no-such-distribution", "no_such_module", load=True)
    "not installed (broken: ModuleNotFoundError: No module named 'no_such_module')"
    """
    version = installed(distribution)
    if not load:
        return version
    try:
        importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 - whatever breaks an import is what the report is for
        return f"{version} (broken: {_one_line(error)})"
    return version


def commit(root: Path) -> str | None:
    """The commit of the checkout at `root`, with `-dirty` when files differ; None outside a checkout."""
    git = shutil.which("git")
    # Without this look, a package inside somebody else's repository would report that repository's commit.
    if git is None or not (root / ".git").exists():
        return None
    words = [git, "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603 - our own words
    return done.stdout.strip() or None


def usable_cpus() -> int:
    """How many processors this process may use, which on a cluster is fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gib() -> float | None:
    """The machine's memory in GiB; None where the system does not tell."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def devices() -> list[dict[str, Any]]:
    """The processor and every accelerator as torch sees them, or what keeps torch from looking."""
    try:
        torch = importlib.import_module("torch")
        return [_cpu(torch), *(_cuda(torch, i) for i in range(torch.cuda.device_count())), *_mps(torch)]
    except Exception as error:  # noqa: BLE001 - a broken driver is what the report is for
        return [{"device": "unknown", "broken": _one_line(error)}]


def _cpu(torch: ModuleType) -> dict[str, Any]:
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # newer than our oldest torch
    fast = [name for name in ("amx_bf16", "avx512_bf16", "bf16") if known.get(name)]
    return {
        "device": "cpu",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "precision": "32-true" + (f", bf16 ({', '.join(fast)})" if fast else ""),
    }


def _cuda(torch: ModuleType, index: int) -> dict[str, Any]:
    known = torch.cuda.get_device_properties(index)
    with torch.cuda.device(index):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return {
        "device": f"cuda:{index}",
        "name": known.name,
        "memory_gib": round(known.total_memory / 2**30, 1),
        "capability": f"{known.major}.{known.minor}",
        "driver": _nvidia_driver(),
        "runtime": torch.version.cuda or torch.version.hip,
        "precision": "32-true, 16-mixed" + (", bf16-mixed, bf16-true" if bf16 else ""),
    }


def _mps(torch: ModuleType) -> list[dict[str, Any]]:
    if not torch.backends.mps.is_available():
        return []
    return [{"device": "mps", "name": platform.machine(), "precision": "32-true, 16-mixed"}]


def _nvidia_driver() -> str | None:
    query = shutil.which("nvidia-smi")
    if query is None:
        return None
    words = [query, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)  # noqa: S603
    return done.stdout.split("\n")[0].strip() or None


def as_text(report: dict[str, Any]) -> str:
    """The report as aligned lines that can be pasted into an issue.

    >>> print(as_text({"python": "3.11", "commit": None, "devices": [{"device": "cpu", "name": "x"}]}))
    python  3.11
    commit  unknown
    cpu     name x
    """
    lines: dict[str, str] = {}
    for key, value in report.items():
        if isinstance(value, dict):
            lines |= {name: _word(inner) for name, inner in value.items()}
        elif isinstance(value, list):
            lines |= {row["device"]: _fields(row) for row in value}
        else:
            lines[key] = _word(value)
    width = max(map(len, lines)) + 2
    return "\n".join(f"{key:<{width}}{value}" for key, value in lines.items())


def _fields(row: dict[str, Any]) -> str:
    return "; ".join(f"{key} {_word(value)}" for key, value in row.items() if key != "device")


def _word(value: object) -> str:
    return "unknown" if value is None else str(value)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
