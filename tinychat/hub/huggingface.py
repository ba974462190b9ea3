"""Models from the Hugging Face Hub. `huggingface_hub` does the work (HF_ENDPOINT, HF_TOKEN, HF_HOME and
resuming included); here is decided which files: safetensors or one GGUF, never a pickle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinychat.base.errors import CheckpointError, DownloadError, ModelNotFoundError, TinychatError
from tinychat.base.files import MAX_TEXT, read_text
from tinychat.formats import gguf_parts
from tinychat.hub.aliases import Source
from tinychat.hub.licenses import TEXTS, has_terms
from tinychat.hub.resuming import LARGEST, fetch
from tinychat.hub.transfer import check_room, disk_errors, sha256_of, watched

SETTINGS = re.compile(
    r"[\w.-]+\.(json|jinja)|additional_chat_templates/[\w.-]+\.jinja|tokenizer[\w.-]*|README\.md|LICENSE[\w.-]*"
    r"|\d_Pooling/config\.json"  # how an embedding model makes one vector of a text
)
WEIGHTS = (".safetensors", ".gguf")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Where a repo has several GGUF files: 4 bits first, then what is larger, then what loses more.
GGUF_ORDER = (
    "q4_k_m", "q4_0", "q4_1", "q4_k_s", "iq4_xs", "iq4_nl", "mxfp4", "q5_k_m", "q5_k_s", "q6_k", "q8_0",
    "q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "bf16", "f16",
)  # fmt: skip


def from_hf(source: Source, staging: Path) -> dict:
    """Download a repo's model into `staging`; returns what a manifest says of it."""
    import huggingface_hub as hub

    repo, revision, wanted = _split(source)
    with _errors(repo, revision):
        info = hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
    sizes = {s.rfilename: s.size or 0 for s in info.siblings or []}
    files = choose_files(repo, list(sizes), wanted)
    terms = _terms(repo, info)
    if "license" in terms:
        files += sorted(n for n in sizes if TEXTS.fullmatch(n) and n not in files)
    _check_config(repo, info.sha, files, staging)
    weights = sum(sizes[f] for f in files)
    check_room(staging, int(weights * 1.02), weights)
    with _errors(repo), _no_bars(), watched(repo, staging, weights):
        for s in info.siblings or []:
            if s.rfilename in files and s.rfilename.endswith(WEIGHTS) and (s.size or 0) <= LARGEST:
                digest = s.lfs.sha256 if s.lfs else str(info.sha)
                fetch(repo, info.sha, s.rfilename, s.size or 0, digest, staging)
        if rest := [f for f in files if not (staging / f).is_file()]:
            patterns = [_literal(f) for f in rest]
            hub.snapshot_download(repo, revision=info.sha, local_dir=staging, allow_patterns=patterns)
    digests = _verified(repo, info, files, staging)
    facts: dict[str, Any] = {"source": f"hf:{repo}@{info.sha}", "size": weights} | terms
    ggufs = [f for f in files if f.endswith(".gguf")]
    for name in ggufs:  # the manifest's file and its other parts are directly in the model's folder
        if "/" in name:
            (staging / name).rename(staging / Path(name).name)
            digests[Path(name).name] = digests.pop(name)
    facts["hashes"] = {name: digest for name, digest in digests.items() if "/" not in name}
    if ggufs:
        first = Path(ggufs[0]).name
        facts |= {"file": first, "sha256": digests[first]}
    return facts


def _terms(repo: str, info: Any) -> dict[str, str]:
    """Licence and where to read it, where it is one with terms: what a manifest says of it."""
    card = info.card_data or {}
    license, gated = card.get("license"), bool(info.gated)
    license = ", ".join(map(str, license)) if isinstance(license, list) else license
    if not has_terms(license, gated):
        return {}
    link = card.get("license_link")
    page = f"https://huggingface.co/{repo}"
    return {
        "license": str(card.get("license_name") or license or "gated"),
        "license_link": link if isinstance(link, str) and link.startswith("https://") else page,
    }


def _verified(repo: str, info: Any, files: list[str], staging: Path) -> dict[str, str]:
    """sha256 of every weight file, which must have the size and the hash that the Hub's metadata promises."""
    found = {}
    for s in info.siblings or []:
        if s.rfilename not in files or not s.rfilename.endswith(WEIGHTS):
            continue
        file = staging / s.rfilename
        whole = file.is_file() and (s.size is None or file.stat().st_size == s.size)
        digest = found[s.rfilename] = sha256_of(file) if whole else ""
        if not whole or (s.lfs and digest != s.lfs.sha256):
            file.unlink(missing_ok=True)
            raise DownloadError(
                f"{s.rfilename} from {repo} is damaged: its {'hash' if whole else 'size'} is wrong.",
                "Pull it again; if it stays so, another network may help.",
            )
    return found


def cached(source: Source) -> Path | None:
    """The model in Hugging Face's own cache, complete, or None. No network."""
    repo, revision, wanted = _split(source)
    try:
        import huggingface_hub as hub

        root = Path(
            hub.snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=["*.json"])
        )
        files = choose_files(repo, [str(f.relative_to(root)) for f in root.rglob("*") if f.is_file()], wanted)
    except (TinychatError, OSError, ValueError, ImportError):
        return None
    except Exception as e:  # huggingface_hub's own "not in the cache"
        if type(e).__module__.startswith("huggingface_hub"):
            return None
        raise
    ggufs = [f for f in files if f.endswith(".gguf")]
    if ggufs:
        return root / ggufs[0]
    index, tensors = root / "model.safetensors.index.json", {f for f in files if f.endswith(".safetensors")}
    names = {"model.safetensors"}
    try:
        if not names <= tensors and index.is_file():
            names = set(json.loads(read_text(index, MAX_TEXT))["weight_map"].values())
        elif len(tensors) == 1:
            names = tensors  # by whatever name, as old AutoGPTQ repos have it
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    whole = names <= set(files) and (root / "config.json").is_file()
    return root if whole and ((root / "tokenizer.json").is_file() or _is_head(root)) else None


def _is_head(root: Path) -> bool:
    from tinychat.formats.eagle import is_head
    from tinychat.formats.tensors import read_json

    try:
        return is_head(read_json(root / "config.json") or {})
    except TinychatError:
        return False


def choose_files(repo: str, names: list[str], wanted: str | None = None) -> list[str]:
    """The files of a repo to download: one GGUF with all its parts, or the safetensors of its top folder with
    their settings.

    Raises ModelNotFoundError where `wanted` is not there, CheckpointError where there is nothing but pickles,
    or a part is missing.
    """
    ggufs = sorted(n for n in names if n.endswith(".gguf"))
    if wanted is not None:
        if wanted not in names:
            known = ", ".join(ggufs[:6]) or "none"
            raise ModelNotFoundError(f"{repo} has no file {wanted}.", f"Its GGUF files: {known}")
        return _with_parts(repo, wanted, names)
    top = [n for n in names if "/" not in n]
    # consolidated.safetensors is a second copy of the same weights in Mistral's own layout
    tensors = [n for n in top if n.endswith(".safetensors") and not n.startswith("consolidated")]
    if tensors and "config.json" in top:
        settings = (n for n in names if SETTINGS.fullmatch(n) and not n.endswith(PICKLES))
        return sorted({*tensors, *settings})
    models = [n for n in ggufs if "mmproj" not in n and gguf_parts.names(n)[0] == n]
    models.sort(key=lambda n: gguf_parts.model_of(n) is not None)  # of one kind a whole file first
    for kind in GGUF_ORDER:
        for name in models:
            if re.search(rf"(?<![a-z0-9]){kind}(?![a-z0-9_])", Path(name).name.lower()):
                return _with_parts(repo, name, names)
    if models:
        return _with_parts(repo, models[0], names)
    if any(n.endswith(PICKLES) for n in names):
        raise CheckpointError(
            f"{repo} holds its weights only as pickles, which can run any code when opened.",
            "Look for a version with *.safetensors or .gguf files.",
        )
    raise CheckpointError(
        f"{repo} holds no model that tinychat reads.", "It needs *.safetensors or a .gguf file."
    )


def _with_parts(repo: str, name: str, names: list[str]) -> list[str]:
    """The file, and the others if it is a part of a model. Raises CheckpointError where one is missing."""
    parts, there = gguf_parts.names(name), set(names)
    missing = next((part for part in parts if part not in there), None)
    if missing is not None:
        raise CheckpointError(
            f"{repo} lacks {missing}, one of the {len(parts)} parts of {gguf_parts.model_of(name)}.",
            "Choose another file or repository.",
        )
    return parts


def _split(source: Source) -> tuple[str, str | None, str | None]:
    """OWNER/REPO, the revision and the file in it, if they are named."""
    owner, name, *file = source.where.split("/")
    name, _, revision = name.partition("@")
    return f"{owner}/{name}", revision or None, "/".join(file) or None


def _literal(name: str) -> str:
    """`name` as a pattern that matches only itself."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def _check_config(repo: str, revision: str | None, files: list[str], staging: Path) -> None:
    """Refuse what cannot run before gigabytes are fetched."""
    if "config.json" not in files:
        return
    import huggingface_hub as hub

    from tinychat.formats.eagle import check_settings, is_head
    from tinychat.formats.hf import read_config
    from tinychat.formats.quantization import read_quantization

    with _errors(repo), _no_bars():
        path = Path(hub.hf_hub_download(repo, "config.json", revision=revision, local_dir=staging))
    try:
        config = json.loads(read_text(path))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as e:
        raise CheckpointError(f"config.json of {repo} is damaged: {e}.", "Choose another repository.") from e
    if is_head(config):
        check_settings(config)
        return
    read_config(config)
    read_quantization(path.parent, config)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Switch huggingface_hub's own bars off for a while: they write names of a stranger's files."""
    from huggingface_hub import utils

    were_off = utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            utils.enable_progress_bars()


class _errors:  # noqa: N801
    """huggingface_hub's errors in two lines."""

    def __init__(self, repo: str, revision: str | None = None):
        self._repo, self._revision = repo, revision

    def __enter__(self):
        return self

    def __exit__(self, kind, e, _):
        if e is None or not isinstance(e, Exception) or isinstance(e, TinychatError):
            return
        from huggingface_hub import errors as hf

        repo, first = self._repo, (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        if isinstance(e, hf.GatedRepoError):
            todo = f"Accept its terms on its page, then set HF_TOKEN ({repo} on huggingface.co)."
            raise DownloadError(f"{repo} asks for a login and its terms to be accepted.", todo) from e
        if isinstance(e, hf.RevisionNotFoundError):
            raise ModelNotFoundError(
                f"{repo} has no revision {self._revision}.", "Name a branch, a tag or a commit of it."
            ) from e
        status = getattr(getattr(e, "response", None), "status_code", None)
        if status == 429:
            raise DownloadError(
                f"Hugging Face asks for patience: too many requests for {repo}.",
                "Try again in some minutes; with HF_TOKEN set the limit is higher.",
            ) from e
        if isinstance(e, hf.RepositoryNotFoundError):
            raise ModelNotFoundError(
                f"Hugging Face has no repository {repo}, or it is private.",
                "Check the name, or set HF_TOKEN. Known names: tinychat list --all",
            ) from e
        if (
            isinstance(e, OSError)
            and e.errno is not None
            and not isinstance(e, ConnectionError | TimeoutError)
        ):
            with disk_errors(Path(e.filename or ".")):
                raise e
        raise DownloadError(
            f"{repo} cannot be downloaded: {first}.", "Check the network (and HF_ENDPOINT) and try again."
        ) from e
