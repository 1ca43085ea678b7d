"""What runs and bundles need of the file system: one writer in a folder, nothing foreign in a new run's way, damage in a line. No torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from multistep.types import UserError

_LOCK = ".lock"
_OURS = ("model", "states", "config.yaml", "tokenizer*")  # a run replaces these, or reads them as its own


# ---------------------------------------------------------------------------------------------- a run's folder


def check_new(folder: Path) -> None:
    """Raises UserError where a run that begins in `folder` would replace what is there, or take it for its own."""
    found = next((path.name for pattern in _OURS for path in sorted(folder.glob(pattern))), None)
    if found is not None:
        raise UserError(
            f"{folder}: {found} is there but no journal.jsonl: a run that begins there would replace it. Choose another folder, "
            f"or take {found} away."
        )


@contextmanager
def working_in(folder: Path, make: bool = False) -> Iterator[None]:
    """Nobody else works in `folder` meanwhile, in this process or another; the system itself lets go of what a killed one held.

    `make`: the folder is made where it is not there, and goes again where nothing came into it. A folder that is not there, may not be
    written, or lies on a file system without locks is not held. Raises UserError where somebody works there.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()] if make else []
    path = folder / _LOCK
    file = None
    try:
        file = _held(path, make)
        yield
    finally:
        if file is not None:
            _let_go(path, file)
        for empty in made:  # the innermost first
            with suppress(OSError):
                empty.rmdir()


def _held(path: Path, make: bool) -> int | None:
    """The lock's file, open and locked; None where there can be no lock."""
    while True:
        if make:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            if make:  # whoever was here took the empty folder away
                continue
            return None
        except OSError:
            return None
        free = _lock(file)
        if free and _is_still(path, file):
            return file
        os.close(file)
        if free is None:  # nobody can hold it here
            with suppress(OSError):
                path.unlink()
            return None
        if not free:
            raise UserError(f"{path.parent}: another process works in that folder. Wait for its end, or stop it.")


def _is_still(path: Path, file: int) -> bool:
    """Whether what was opened is what others open now: who lets go takes the file away."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt

    def _lock(file: int) -> bool | None:
        """Whether it is ours now; None where there are no locks."""
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _let_go(path: Path, file: int) -> None:
        os.close(file)
        with suppress(OSError):  # another has it open already
            path.unlink()

else:

    def _lock(file: int) -> bool | None:
        """Whether it is ours now; None where there are no locks."""
        try:
            import fcntl
        except ImportError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return None
        return True

    def _let_go(path: Path, file: int) -> None:
        with suppress(OSError):
            path.unlink()
        os.close(file)


# ---------------------------------------------------------------------------------------------- files


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What goes wrong inside is a ValueError that names the file: safetensors and tokenizers raise Exceptions of their own."""
    try:
        yield
    except (UserError, OSError, MemoryError):  # which say enough
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise ValueError(f"{path.name}: {reason}") from None


def read_info(folder: Path) -> dict[str, Any]:
    """What the multistep.json of a bundle says. Raises UserError where it is damaged."""
    path = folder / "multistep.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path}: the bundle is damaged, this is no JSON object. Make it again with: multistep fit.")
    return found
