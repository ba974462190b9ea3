"""Weight files of a repository, fetched so that a download goes on where it ended, whoever ended it.

`huggingface_hub` knows addresses and logins and does the transfer. Its own downloads go on within one process
alone: a file that is not whole is deleted when that ends.
"""

from __future__ import annotations

import os
from pathlib import Path

from tinychat.base.errors import CheckpointError

LARGEST = 50e9  # bytes of a file that the Hub gives in one piece


def fetch(repo: str, revision: str | None, name: str, size: int, digest: str, staging: Path) -> None:
    """Put a file of a repo into `staging`. digest: of its content or its revision, so that a part of another
    file is not taken for the beginning of this one. Raises what huggingface_hub raises, OSError, and
    CheckpointError for a name that leads elsewhere.
    """
    import huggingface_hub as hub
    from huggingface_hub.file_download import http_get

    target = staging / name
    if not target.resolve().is_relative_to(staging.resolve()):
        raise CheckpointError(f"{repo} has a file that would lie elsewhere.", "Choose another repository.")
    if target.is_file() and target.stat().st_size == size:
        return
    parts = parts_in(staging)
    parts.mkdir(parents=True, exist_ok=True)
    part = parts / f"{digest[:40]}-{target.name[-80:]}"
    with part.open("ab") as out:
        url, headers = hub.hf_hub_url(repo, name, revision=revision), hub.utils.build_hf_headers()
        http_get(url, out, resume_size=out.tell(), headers=headers, displayed_filename=target.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, target)


def parts_in(staging: Path) -> Path:
    """Folder of what is not whole yet."""
    return staging / ".cache" / "huggingface" / "parts"
