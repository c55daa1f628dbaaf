"""Write files and folders by rename, so that others see them whole or not at all."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path


def replace_directory(source: Path, final: Path) -> None:
    """Rename a complete directory into place; a directory that was there is removed afterwards."""
    old = final.parent / f".{final.name}.{uuid.uuid4().hex[:12]}.old"
    if final.exists():
        final.rename(old)
    source.rename(final)
    shutil.rmtree(old, ignore_errors=True)
