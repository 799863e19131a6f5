"""Which code this is. Standard library alone: it is asked before anything else is imported."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _git(*words: str) -> str | None:
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def commit() -> str:
    """The commit, with "+changes" where the tree has some; "unknown" where neither git nor D2IT_COMMIT names it."""
    # D2IT_COMMIT: of a copy without its git folder, as on a machine that only measures.
    name = os.environ.get("D2IT_COMMIT") or _git("rev-parse", "--short", "HEAD") or "unknown"
    # Results are written while others are measured; they are no change of what is measured.
    changes = _git("status", "--porcelain", "--", ":!benchmarks/results", ":!docs", ":!README.md")
    return name + ("+changes" if changes else "")


def source_hash() -> str:
    """Of everything that is measured: names the code where git is absent or the tree has changes."""
    digest = hashlib.sha256()
    for folder, pattern in (("kernels", "*.py"), ("csrc", "*"), ("d2it", "**/*.py"), ("benchmarks", "**/*.py")):
        for path in sorted((ROOT / folder).glob(pattern)):
            if path.is_file():
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]
