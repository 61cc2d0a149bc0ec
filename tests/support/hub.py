"""A Hugging Face hub of our own, as much of it as huggingface_hub's downloads ask for.

The real clients (`huggingface_hub` 1.x and 2.x) are pointed here with HF_ENDPOINT.  What they ask, by version:

- `GET /api/models/REPO` or `/api/models/REPO/revision/REV`: `sha` and `siblings` (snapshot_download).
- `GET /api/models/REPO/tree/REV?recursive=True`: the listing (2.x; 1.x only for large repositories).
- `HEAD` and `GET /REPO/resolve/REV/FILE`: ETag, X-Repo-Commit, and for large (LFS) files X-Linked-Size and
  X-Linked-Etag, whose value becomes the name of the blob: the sha256 of the content.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from urllib.parse import quote

from tests.support.hub_http import Answer, RangeServer

# From this size on a file counts as LFS, as on the real hub where weights always do.
LFS_SIZE = 1024 * 1024


@dataclass(frozen=True)
class HubFile:
    """A file in a repository with the digest that the client takes as the blob's name."""

    name: str
    data: bytes

    @property
    def is_lfs(self) -> bool:
        return len(self.data) >= LFS_SIZE

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def git_sha1(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def blob(self) -> str:
        return self.sha256 if self.is_lfs else self.git_sha1


@dataclass
class Commit:
    """An immutable state of a repository."""

    sha: str
    files: dict[str, HubFile]
    # Computed once: hashing 24 MB in every HEAD would only slow the race down.
    blobs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.blobs = {name: file.blob for name, file in self.files.items()}


class Hub(RangeServer):
    """A hub with one repository, `repo`, whose branch `main` can move."""

    def __init__(self, files: dict[str, bytes], repo: str = "acme/model") -> None:
        super().__init__()
        self.repo = repo
        self.commits: dict[str, Commit] = {}
        self.main = self.commit(files)

    def commit(self, files: dict[str, bytes]) -> Commit:
        """Add a commit; `hub.main = commit` moves the branch."""
        listing = "\n".join(f"{name} {hashlib.sha1(data).hexdigest()}" for name, data in sorted(files.items()))
        sha = hashlib.sha1(f"{len(self.commits)}\n{listing}".encode()).hexdigest()
        commit = Commit(sha, {name: HubFile(name, data) for name, data in files.items()})
        self.commits[sha] = commit
        return commit

    @property
    def cache_name(self) -> str:
        """The directory of the repository in a client's cache."""
        return "models--" + self.repo.replace("/", "--")

    def environment(self, home: Path, name: str = "client") -> dict[str, str]:
        """The environment of a client whose cache is below `home`; `name` comes back in its requests' agent."""
        # Only what a process needs: a proxy, a token or an HF_ variable of the machine would change the test.
        kept = {key: os.environ[key] for key in ("PATH", "LANG", "TMPDIR") if key in os.environ}
        return {
            **kept,
            "HOME": str(home),
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_USER_AGENT_ORIGIN": name,
            "DO_NOT_TRACK": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def answer(self, path: str, query: str) -> Answer | None:
        api = f"/api/models/{self.repo}"
        if path == api:
            return self._info("main")
        if path.startswith(f"{api}/revision/"):
            return self._info(path.removeprefix(f"{api}/revision/"))
        if path.startswith(f"{api}/tree/"):
            return self._tree(path.removeprefix(f"{api}/tree/"))
        if path.startswith(f"/{self.repo}/resolve/"):
            revision, _, name = path.removeprefix(f"/{self.repo}/resolve/").partition("/")
            return self._resolve(revision, name)
        return _error("RepoNotFound", "Repository not found")

    def _find(self, revision: str) -> Commit | None:
        return self.main if revision == "main" else self.commits.get(revision)

    def _info(self, revision: str) -> Answer:
        commit = self._find(revision)
        if commit is None:
            return _error("RevisionNotFound", f"Invalid rev id: {revision}")
        return _json(
            {
                "_id": "0" * 24,
                "id": self.repo,
                "modelId": self.repo,
                "author": self.repo.partition("/")[0],
                "sha": commit.sha,
                "lastModified": "2024-01-01T00:00:00.000Z",
                "createdAt": "2024-01-01T00:00:00.000Z",
                "private": False,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [{"rfilename": name} for name in commit.files],
            }
        )

    def _tree(self, revision: str) -> Answer:
        commit = self._find(revision.partition("/")[0])
        if commit is None:
            return _error("RevisionNotFound", f"Invalid rev id: {revision}")
        entries: list[dict[str, object]] = []
        for name, file in commit.files.items():
            entry: dict[str, object] = {
                "type": "file",
                "oid": file.git_sha1,
                "size": len(file.data),
                "path": name,
            }
            if file.is_lfs:
                entry["lfs"] = {"oid": commit.blobs[name], "size": len(file.data), "pointerSize": 134}
            entries.append(entry)
        return _json(entries)

    def _resolve(self, revision: str, name: str) -> Answer:
        commit = self._find(revision)
        if commit is None:
            return _error("RevisionNotFound", f"Invalid rev id: {revision}")
        file = commit.files.get(name)
        if file is None:
            return _error("EntryNotFound", f"Entry not found: {name}", ("X-Repo-Commit", commit.sha))
        blob = commit.blobs[name]
        headers = [
            ("X-Repo-Commit", commit.sha),
            ("Content-Type", "application/octet-stream"),
            ("Content-Disposition", f"attachment; filename*=UTF-8''{quote(name)}; filename=\"{name}\";"),
        ]
        if file.is_lfs:
            headers += [("X-Linked-Size", str(len(file.data))), ("X-Linked-Etag", f'"{blob}"')]
        return Answer(file.data, etag=blob, headers=tuple(headers))


def _json(value: object) -> Answer:
    return Answer(json.dumps(value).encode(), headers=(("Content-Type", "application/json; charset=utf-8"),))


def _error(code: str, message: str, *headers: tuple[str, str]) -> Answer:
    """A refusal as the real hub words it: the client decides by X-Error-Code."""
    return Answer(
        json.dumps({"error": message}).encode(),
        headers=(("X-Error-Code", code), ("X-Error-Message", message), ("Content-Type", "application/json"), *headers),
        status=HTTPStatus.NOT_FOUND,
    )
