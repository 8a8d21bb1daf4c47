"""`push` against a stub of the hub's HTTP interface."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nemo_hybrid.checkpoint.manifest import CheckpointError
from nemo_hybrid.commands.push import files_of
from nemo_hybrid.errors import UserError

CHECKPOINT = next(
    (Path(__file__).parents[1] / "fixtures" / "last_version" / "run" / "checkpoints").glob("step_*")
)


class Hub(ThreadingHTTPServer):
    """What it was sent: repositories, and the files of the last commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.made: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.refuses = False


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        self.server.stored[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        body, place = self._body(), f"http://{self.headers['Host']}"
        if self.server.refuses:
            self._answer({"error": "You don't have the rights to create a model"}, 403)
        elif self.path == "/api/validate-yaml":  # of the card's head
            self._answer({"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            self._answer({"url": f"{place}/me/mine"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            self._answer(
                {
                    "files": [
                        {
                            "path": f["path"],
                            "uploadMode": mode[f["path"].endswith(".safetensors")],
                            "shouldIgnore": False,
                        }
                        for f in files
                    ]
                }
            )
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._answer(
                {
                    "transfer": "basic",
                    "objects": [
                        {
                            **o,
                            "authenticated": True,
                            "actions": {
                                "upload": {"href": f"{place}/upload/{o['oid']}", "header": {}}
                            },
                        }
                        for o in json.loads(body)["objects"]
                    ],
                }
            )
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    self.server.messages.append(value["summary"])
                elif line["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[value["path"]] = self.server.stored[value["oid"]]
            self._answer(
                {"commitUrl": f"{place}/me/mine/commit/abc", "commitOid": "abc", "success": True}
            )
        else:
            self._answer({"error": self.path}, 404)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def push(*words: str, endpoint: str, **env: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the library reads its variables when it is imported."""
    given = {
        "HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_of_a_test", "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "nemo_hybrid", "push", *words],
        env={**os.environ, **given, **env}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_checkpoint_arrives_without_the_state_of_training(hub: Hub, tmp_path: Path) -> None:
    checkpoint = tmp_path / "mine"
    shutil.copytree(CHECKPOINT, checkpoint)
    words = ["--from", str(checkpoint), "--repo", "me/mine", "--message", "first"]
    done = push(*words, endpoint=f"http://127.0.0.1:{hub.server_port}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("/me/mine/commit/abc")
    (made,) = hub.made
    assert (made["name"], made["organization"]) == ("mine", "me")
    assert made.get("private") is True or made.get("visibility") == "private"  # by versions
    assert hub.messages == ["first"]
    card = hub.files.pop("README.md").decode()
    assert card.startswith("---\n")
    assert "time_step_min" in card
    assert "declared for 262,144 tokens" in card
    assert "sequences of 32 tokens" in card
    wanted = {p.name for p in checkpoint.iterdir() if "optimizer" not in p.name}
    wanted -= {"rank-00000.safetensors", "rank-00001.safetensors", "run_state.json", "run.yaml"}
    assert hub.files.keys() == wanted - {"manifest.json"}
    assert all((checkpoint / name).read_bytes() == b for name, b in hub.files.items())
    assert any(hashlib.sha256(b).hexdigest() in hub.stored for b in hub.files.values())

    # What is refused is one line.
    hub.refuses = True
    done = push(*words, endpoint=f"http://127.0.0.1:{hub.server_port}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: http://127.0.0.1:{hub.server_port} refuses me/mine: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "http://127.0.0.1:9 cannot be reached"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set: unset it"),
    ],
)
def test_what_cannot_be_reached(changes: dict[str, str], said: str) -> None:
    words = ["--from", str(CHECKPOINT), "--repo", "me/mine"]
    done = push(*words, endpoint="http://127.0.0.1:9", **changes)
    assert done.returncode == 2
    assert f"error: {said}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_file_is_not_sent(tmp_path: Path) -> None:
    shutil.copytree(CHECKPOINT, tmp_path / "mine")
    weights = next((tmp_path / "mine").glob("model-*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=weights.name):
        files_of(tmp_path / "mine")
    with pytest.raises(UserError, match=r"holds no config\.json"):
        files_of(tmp_path)
