"""The digest of the native sources: a library that was built from others is not used.

``setup.py`` writes it into ``build.json`` and runs this file alone, so it imports nothing of the
package.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

# What each library is built of, below the root of a checkout.
PARTS = {
    "cpu": ("CMakeLists.txt", "cmake", "csrc/common", "csrc/host", "csrc/cpu"),
    "cuda": ("CMakeLists.txt", "cmake", "csrc/common", "csrc/host", "csrc/cuda"),
}


def digest(root: Path, library: str) -> str:
    """SHA-256 over the names and contents of the files that a library is built of.

    Args:
        root: a checkout.
        library: "cpu" or "cuda".
    """
    total = sha256()
    for part in PARTS[library]:
        path = root / part
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for file in files:
            content = file.read_bytes()
            total.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode())
            total.update(content)
    return total.hexdigest()
