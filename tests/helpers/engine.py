"""A server of completions with token ids, as `generation.remote` asks one: our own generator behind
HTTP, with faults by name."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_hybrid.checkpoint.load import load
from nemo_hybrid.generation.batched import Generator, Request
from nemo_hybrid.model.hybrid import HybridLM

FAULTS = {
    "fails": "HTTP Error 503",
    "fails midway": "HTTP Error 503",
    "refuses": "HTTP Error 400: Bad Request: no such field",
    "moved": "HTTP Error 302",
    "hangs up": "Remote end closed connection",
    "other prompt": "it answers to other token ids",
    "unknown ids": "it answers with token ids that the model does not know",
    "no ids": "its answer is none with token ids and log-probabilities (KeyError('token_ids'))",
    "no log-probabilities": "its answer is none with token ids and log-probabilities (TypeError",
    "fewer log-probabilities": "its log-probabilities are not those of its tokens",
    "not finite": "its log-probabilities are not those of its tokens",
    "too long": "tokens ended by 'stop', where one ends at",
    "cut short": "its answer of 1 tokens ended by None, where one ends at",
    "endless": "it answers with more than 1,056,768 bytes",
    "too deep": "its answer is none with token ids and log-probabilities (RecursionError",
    "no JSON": "its answer is none with token ids and log-probabilities",
}
"""What is done wrong, and what `Remote` says of it."""


class Answered(NamedTuple):
    prompt: list[int]
    seed: int
    ids: list[int]


class FakeEngine(ThreadingHTTPServer):
    """``fault``: in ``bad`` samples, after ``good`` of them; or "silent": no answer before the end;
    or "stale": weights are not read again; or "still answering": what was computed with the former
    ones is kept. ``given``: the weights of each update; ``answered``: what was sampled with them.
    ``hold`` is called before a sample is drawn, with the number of updates at its request."""

    daemon_threads = False  # whoever closes it waits for them: torch must not end in one of them

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model: HybridLM | None = None
        self.fault: str | None = None
        self.good, self.bad, self.samples = 0, 1 << 30, 0
        self.given: list[dict[str, Tensor]] = []
        self.answered: list[list[Answered]] = []
        self.hold: Callable[[int], object] = lambda updates: None
        self.lock, self.closing = threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def served() -> Iterator[FakeEngine]:
    with FakeEngine() as engine:
        thread = threading.Thread(target=engine.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield engine
        finally:
            engine.closing.set()
            engine.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeEngine

    def do_POST(self) -> None:
        engine = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/completions":
            engine.hold(len(engine.given))
        with engine.lock:
            torch.set_num_threads(1)
            if self.path == "/collective_rpc":
                self._update(body)
                return self._say(200, b'{"results": [null]}')
            if self.path == "/reset_prefix_cache":
                said = {"success": engine.fault != "still answering"}
                return self._say(200, json.dumps(said).encode())
            engine.samples += 1
            wrong = engine.good < engine.samples <= engine.good + engine.bad
            fault = engine.fault if wrong else None
            answer = self._completion(body)
        self._answer(answer, fault)

    def log_message(self, *_: object) -> None:
        pass

    def _update(self, body: Any) -> None:
        engine = self.server
        assert body["method"] == "reload_weights"
        if engine.model is None or engine.fault != "stale":
            engine.model = load(Path(body["kwargs"]["weights_path"]))[0].eval()
        engine.given.append(engine.model.state_dict())
        engine.answered.append([])

    def _completion(self, body: Any) -> dict[str, Any]:
        assert body["temperature"] == body["top_p"] == body["repetition_penalty"] == 1
        assert body["min_p"] == body["presence_penalty"] == body["frequency_penalty"] == 0
        assert body["top_k"] == -1
        assert body["ignore_eos"]
        assert body["return_token_ids"]
        assert self.server.model is not None
        generator = Generator(self.server.model, 1, temperature=1.0, seed=body["seed"])
        stops = frozenset(body["stop_token_ids"])
        (found,) = generator.run([Request(0, body["prompt"], body["max_tokens"], (0,), stops)])
        answered = Answered(body["prompt"], body["seed"], [*found.ids])
        self.server.answered[-1].append(answered)
        return {
            "prompt_token_ids": body["prompt"],
            "token_ids": found.ids,
            "logprobs": {"token_logprobs": found.logprobs},
            "finish_reason": found.ended,
        }

    def do_GET(self) -> None:
        self._say(200, b"<html>")

    def _answer(self, choice: dict[str, Any], fault: str | None) -> None:
        if fault == "silent":
            self.server.closing.wait()
        if fault in ("hangs up", "silent"):
            return self.connection.close()
        if fault in ("fails", "refuses"):
            return self._say(503 if fault == "fails" else 400, b"no such field")
        if fault == "fails midway":
            return self._say(503, b"9\r\nno", Transfer_Encoding="chunked")
        if fault == "moved":
            return self._say(302, b"", Location="/page")
        logprobs = choice["logprobs"]["token_logprobs"]
        if fault == "other prompt":
            choice["prompt_token_ids"] = [*choice["prompt_token_ids"], 1]
        elif fault == "unknown ids":
            choice["token_ids"][0] = 1 << 20
        elif fault == "no ids":
            del choice["token_ids"]
        elif fault == "no log-probabilities":
            choice["logprobs"] = None
        elif fault == "fewer log-probabilities":
            del logprobs[-1]
        elif fault == "not finite":
            logprobs[0] = float("nan")
        elif fault == "too long":
            choice |= {"token_ids": [1] * 999, "finish_reason": "stop"}
            logprobs[:] = [-1.0] * 999
        elif fault == "cut short":
            choice |= {"token_ids": [1], "finish_reason": None}
            logprobs[:] = [-1.0]
        elif fault == "endless":
            choice["text"] = "x" * (2 << 20)
        content = json.dumps({"choices": [choice]})
        broken = {"no JSON": b"<html>", "too deep": b"[" * 900_000}
        self._say(200, broken.get(fault or "", content.encode()))

    def _say(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in (headers or {"Content-Length": str(len(content))}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)
