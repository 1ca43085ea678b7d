"""What this machine has, as far as multistep cares: `examine` gives a dictionary, `table` the same for people.

A container's share of cores and memory counts, not the whole machine's.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from importlib import metadata, util
from pathlib import Path
from typing import Any

import multistep
from multistep.report.words import size

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "scikit-learn",
    "scipy",
    "numpy",
    "pydantic",
)
_EXTRAS = {
    "serve": ("fastapi", "uvicorn", "prometheus-client", "httptools")
}  # when the package's own metadata cannot be read
_IMPORTED_AS = {"scikit-learn": "sklearn", "prometheus-client": "prometheus_client"}
_HUB = "https://huggingface.co"


def examine(hub_timeout_s: float = 3.0, disk: Path = Path()) -> dict[str, Any]:
    """All facts. Imports torch; waits at most `hub_timeout_s` for the hub, not at all under HF_HUB_OFFLINE=1."""
    return {
        "multistep": multistep.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "memory": _memory(),
        "disk": {"folder": str(disk.resolve()), "free_bytes": shutil.disk_usage(disk).free},
        "torch": _torch(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "optional": _optional(),
        "hub": _hub(hub_timeout_s),
    }


def table(facts: Mapping[str, Any]) -> str:
    """A line a fact, for people."""
    cpu, memory, torch, hub = facts["cpu"], facts["memory"], facts["torch"], facts["hub"]
    gpus = [f"{g['name']}, {size(g['memory_bytes'])}, bf16 {_yes(g['bf16'])}" for g in torch.get("gpus", ())]
    rows = [
        ["multistep", facts["multistep"]],
        ["Python", f"{facts['python']} on {facts['system']}"],
        ["CPU", cpu["name"]],
        ["cores", f"{cpu['usable']:g} usable of {cpu['logical']}"],
        ["CPU can", " ".join(cpu["flags"]) or "nothing that matters here"],
        ["bf16 on the CPU", cpu["bf16"]],
        ["memory", f"{size(memory['available_bytes'])} free of {size(memory['total_bytes'])}"],
        ["disk", f"{size(facts['disk']['free_bytes'])} free in {facts['disk']['folder']}"],
        ["torch", f"{torch['version']}, {torch['threads']} threads" if torch["installed"] else torch["problem"]],
        ["GPU", "; ".join(gpus) or torch.get("other") or "none"],
        ["packages", ", ".join(f"{k} {v or 'missing'}" for k, v in facts["packages"].items())],
        *[[f"optional: {name}", _part(part)] for name, part in facts["optional"].items()],
        ["model hub", f"{hub['address']}: {hub['state']}" + (f" ({hub['why']})" if hub["why"] else "")],
    ]
    return "\n".join(f"{what:<16}  {found}" for what, found in rows)


def _cpu() -> dict[str, Any]:
    text = _read("/proc/cpuinfo")
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    present = set(found[1].split()) if found else set()
    name = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    flags = [flag for flag in _FLAGS if flag in present]
    bf16 = {"amx_bf16": "in hardware (AMX)", "avx512_bf16": "in hardware (AVX-512)", "bf16": "in hardware"}
    return {
        "name": name[1] if name else platform.processor() or platform.machine(),
        "logical": os.cpu_count() or 1,
        "usable": _usable_cores(),
        "flags": flags,
        "bf16": next((words for flag, words in bf16.items() if flag in flags), "not in hardware"),
    }


def _usable_cores() -> float:
    """The cores this process may use: its affinity, and its container's quota if that is less."""
    cores = float(len(os.sched_getaffinity(0))) if "sched_getaffinity" in dir(os) else float(os.cpu_count() or 1)
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, round(int(quota[0]) / int(quota[1]), 2))
    return cores


def _memory() -> dict[str, int]:
    text = _read("/proc/meminfo")
    kib = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    if "MemTotal" not in kib:
        page = os.sysconf("SC_PAGE_SIZE") if "sysconf" in dir(os) else 0
        total = page * os.sysconf("SC_PHYS_PAGES") if page else 0
        return {"total_bytes": total, "available_bytes": total}
    total, available = kib["MemTotal"] * 1024, kib.get("MemAvailable", kib["MemFree"]) * 1024
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit() and int(limit) < total:
        used = _read("/sys/fs/cgroup/memory.current").strip()
        total = int(limit)
        available = min(available, total - int(used) if used.isdigit() else total)
    return {"total_bytes": total, "available_bytes": max(0, available)}


def _torch() -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        return {"installed": False, "problem": f"cannot be imported: {str(error).splitlines()[0]}"}
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            bf16 = found.major >= 8 or torch.version.hip is not None
            gpus.append({"name": found.name, "memory_bytes": found.total_memory, "bf16": bf16})
    other = "Apple (mps)" if torch.backends.mps.is_available() else ""
    version, threads = str(torch.__version__), torch.get_num_threads()
    return {"installed": True, "version": version, "threads": threads, "gpus": gpus, "other": other}


def _optional() -> dict[str, dict[str, Any]]:
    """The extras of this package: whether all their modules are here, and what to type if not."""
    parts = {}
    for extra, packages in sorted(_extras().items()):
        missing = [p for p in packages if util.find_spec(_IMPORTED_AS.get(p, p.replace("-", "_"))) is None]
        install = f'pip install "multistep[{extra}]"'
        parts[extra] = {"installed": not missing, "missing": missing, "install": install}
    return parts


def _extras() -> dict[str, tuple[str, ...]]:
    try:
        lines = metadata.requires("multistep") or []
    except metadata.PackageNotFoundError:
        return dict(_EXTRAS)
    extras: dict[str, tuple[str, ...]] = {}
    for line in lines:
        named = re.match(r"([A-Za-z0-9._-]+).*;.*extra\s*==\s*['\"]([\w-]+)['\"]", line)
        if named and named[2] != "dev":
            extras[named[2]] = (*extras.get(named[2], ()), named[1])
    return extras or dict(_EXTRAS)


def _hub(timeout_s: float) -> dict[str, Any]:
    """Whether the model hub answers. HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean to its own client."""
    address = (os.environ.get("HF_ENDPOINT") or _HUB).rstrip("/")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return {"address": address, "state": "not asked", "reachable": False, "why": "HF_HUB_OFFLINE is set"}
    answer = ["no answer in time"]
    # A thread, because looking up a name has no time limit of its own.
    asking = threading.Thread(target=_ask, args=(address, timeout_s, answer), daemon=True)
    asking.start()
    asking.join(timeout_s)
    why = answer[0]
    state = "not reachable" if why else "reachable"
    return {"address": address, "state": state, "reachable": not why, "why": why}


def _ask(address: str, timeout_s: float, answer: list[str]) -> None:
    """Leaves '' in `answer` when the hub answers, else what went wrong."""
    try:
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=timeout_s):
            answer[0] = ""
    except urllib.error.HTTPError as error:
        refused = error.code in (403, 407) or error.code >= 500
        answer[0] = f"HTTP {error.code}" if refused else ""
    except urllib.error.URLError as error:
        answer[0] = _line(error.reason)
    except (OSError, ValueError) as error:
        answer[0] = _line(error)


def _line(error: object) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _part(part: Mapping[str, Any]) -> str:
    return "installed" if part["installed"] else f"missing {', '.join(part['missing'])}: {part['install']}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
