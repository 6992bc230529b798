"""The page's files, read once: what was there at the start is served, and nothing outside the folder."""

from __future__ import annotations

from hashlib import blake2s
from pathlib import Path
from typing import Final, NamedTuple

TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
    ".txt": "text/plain; charset=utf-8",
}
FOLDER: Final = Path(__file__).with_name("web")
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class PageFile(NamedTuple):
    """One file with its content type and entity tag."""

    content: bytes
    media_type: str
    tag: str


def page_files(folder: Path = FOLDER) -> dict[str, PageFile]:
    """Return the files of a folder by their path in it, such as "index.html"; those of unknown types and dot
    files are not served.
    """
    files: dict[str, PageFile] = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        name = path.relative_to(folder)
        if path.suffix not in TYPES or not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        content = path.read_bytes()
        tag = f'"{blake2s(content, digest_size=8).hexdigest()}"'
        files[name.as_posix()] = PageFile(content, TYPES[path.suffix], tag)
    return files
