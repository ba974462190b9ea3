"""Getting bytes over HTTP: pages, and large files that go on where they stopped."""

from __future__ import annotations

import base64
import errno
import http.client
import netrc
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from tinychat.base import locations
from tinychat.base.errors import DownloadError, TinychatError
from tinychat.base.machine import human_bytes

CHUNK = 1 << 20
ATTEMPTS = 5  # without a single new byte in between
WAIT_S = 0.5  # before the second attempt, doubled each time
_RETRIED = (408, 429, 500, 502, 503, 504)


def public_url(url: str) -> str:
    """`url` without user and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


class Client:
    """Plain GET with the certificates, proxy and credentials that pip would use."""

    def __init__(
        self,
        *,
        cert: str | None = None,
        client_cert: str | None = None,
        proxy: str | None = None,
        trusted_hosts: tuple[str, ...] = (),
        timeout: float = 30,
    ):
        self.timeout = timeout
        self._trusted = trusted_hosts
        proxies = urllib.request.ProxyHandler({"http": proxy, "https": proxy} if proxy else None)
        self._opener = urllib.request.build_opener(
            proxies, urllib.request.HTTPSHandler(context=tls_context(cert, client_cert))
        )
        self._unchecked = urllib.request.build_opener(
            proxies, urllib.request.HTTPSHandler(context=ssl._create_unverified_context())
        )

    def open(self, url: str, headers: dict[str, str]):
        """The response. Raises what urllib raises."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https", "file"):
            raise DownloadError(f"{public_url(url)} cannot be downloaded.", "Use an http or https address.")
        request = urllib.request.Request(public_url(url), headers={"User-Agent": "tinychat", **headers})
        credentials = _credentials(parts)
        if credentials:
            token = base64.b64encode(":".join(credentials).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {token}")
        trusted = parts.hostname in self._trusted or parts.netloc in self._trusted
        return (self._unchecked if trusted else self._opener).open(request, timeout=self.timeout)

    def get(self, url: str, *, accept: str, limit: int) -> tuple[bytes, http.client.HTTPMessage, str]:
        """A whole page: (body, headers, final address). Raises DownloadError."""

        def once():
            with self.open(url, {"Accept": accept, "Accept-Encoding": "identity"}) as response:
                body = response.read(limit + 1)
                if len(body) > limit:
                    raise DownloadError(f"{public_url(url)} is absurdly long.", "Check pip's index-url.")
                return body, response.headers, response.geturl()

        return _retry(url, lambda _: once(), lambda: False)

    def fetch(
        self, url: str, part: Path, *, size: int | None, progress: Callable[[int, int | None], None]
    ) -> bool:
        """Download into `part`, going on after the bytes that are there. Returns whether it did go on.

        size: bytes promised by the index, if any. progress(done, total) is called for each chunk.
        Raises DownloadError; then what has arrived stays in `part`, except when the disk is full.
        """
        before = -1
        resumed = False

        def grew() -> bool:
            nonlocal before
            now = part.stat().st_size if part.exists() else 0
            grown, before = now > before, now
            return grown

        def once(attempt: int) -> None:
            nonlocal resumed
            have = part.stat().st_size if part.exists() else 0
            if size is not None and have > size:
                part.unlink()
                have = 0
            if size is not None and have == size:
                resumed = True
                return
            resumed |= self._fetch_rest(url, part, have, size, progress)

        grew()
        try:
            _retry(url, once, grew)
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            part.unlink(missing_ok=True)
            raise disk_full(part.parent) from e
        return resumed

    def _fetch_rest(self, url: str, part: Path, have: int, size: int | None, progress: Callable) -> bool:
        """One attempt, from byte `have` on if the server can. Returns whether it went on."""
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        try:
            response = self.open(url, headers)
        except urllib.error.HTTPError as e:
            if e.code != 416:
                raise
            part.unlink(missing_ok=True)  # the part is as long as the file or longer: not our file
            raise ConnectionError("the server refuses to go on after the bytes that are here") from e
        with response:
            goes_on = have > 0 and getattr(response, "status", 200) == 206
            if goes_on and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                raise ConnectionError("the server sent another part of the file")
            done = have if goes_on else 0
            length = response.headers.get("Content-Length")
            total = size if size is not None else done + int(length) if length else None
            with part.open("ab" if goes_on else "wb") as out:
                progress(done, total)
                while chunk := response.read(CHUNK):
                    done += len(chunk)
                    if total is not None and done > total:
                        raise DownloadError(f"{public_url(url)} is longer than promised.", "Try again later.")
                    out.write(chunk)
                    progress(done, total)
        if total is not None and done < total:
            raise ConnectionError(f"the connection ended after {done} of {total} bytes")
        return goes_on


def _retry(url: str, once: Callable[[int], object], grew: Callable[[], bool]):
    """Call `once` until it succeeds, ATTEMPTS times without progress in between."""
    attempt = 0
    while True:
        try:
            return once(attempt)
        except TinychatError:
            raise
        except urllib.error.HTTPError as e:
            error: Exception = e
            e.close()
            if e.code not in _RETRIED:
                todo = "Check the address, or the login that pip is set up with."
                raise DownloadError(f"{public_url(url)} answers {e.code} {e.reason}.", todo) from e
        except urllib.error.URLError as e:
            error = e
            if isinstance(e.reason, ssl.SSLCertVerificationError):
                host, why = urlsplit(url).hostname, e.reason.verify_message
                raise DownloadError(
                    f"The certificate of {host} cannot be verified: {why}.",
                    "Set PIP_CERT (or SSL_CERT_FILE) to your network's certificate file.",
                ) from e
        except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as e:
            error = e
        attempt = 1 if grew() else attempt + 1
        if attempt >= ATTEMPTS:
            reason = getattr(error, "reason", None) or error
            raise DownloadError(
                f"{public_url(url)} cannot be reached: {reason}.",
                "Check the network and try again; what has arrived is kept.",
            ) from error
        time.sleep(WAIT_S * 2 ** (attempt - 1))


def disk_full(folder: Path, needed: int | None = None) -> DownloadError:
    """The disk that holds `folder` has no room."""
    need = f" ({human_bytes(needed)} needed)" if needed else ""
    return DownloadError(
        f"The disk with {folder} is full{need}.", "Free some space, or set TINYCHAT_HOME to another disk."
    )


def tls_context(cert: str | None = None, client_cert: str | None = None) -> ssl.SSLContext:
    """How servers are verified: by a certificate file that is given or in the environment, else as the system
    does. Raises DownloadError for a file that cannot be read.
    """
    cert = cert or os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    context = ssl.create_default_context()
    try:
        if cert:
            path = locations.written(cert)
            if path.is_dir():
                context.load_verify_locations(capath=path)
            else:
                context.load_verify_locations(cafile=path)
        elif not context.cert_store_stats()["x509_ca"]:  # a Python without the system's certificates
            import certifi

            context.load_verify_locations(certifi.where())
        if client_cert:
            context.load_cert_chain(locations.written(client_cert))
    except ImportError:
        pass
    except OSError as e:
        raise DownloadError(
            f"The certificate file {cert or client_cert} cannot be read: {e.strerror or e}.",
            "Correct PIP_CERT, REQUESTS_CA_BUNDLE or pip's cert setting.",
        ) from e
    return context


def _credentials(parts) -> tuple[str, str] | None:
    if parts.username:
        return unquote(parts.username), unquote(parts.password or "")
    if parts.scheme == "file" or not parts.hostname:
        return None
    try:
        found = netrc.netrc().authenticators(parts.hostname)
    except (OSError, netrc.NetrcParseError):
        return None
    return (found[0], found[2] or "") if found else None
