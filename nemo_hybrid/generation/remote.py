"""Rollouts by a server that has a copy of the weights: OpenAI's interface of completions, with
token ids in and out and log-probabilities, and weights read from a directory, as vLLM offers them.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, build_opener
from urllib.request import Request as Call

from nemo_hybrid.errors import UserError
from nemo_hybrid.generation.batched import Request, Rollout
from nemo_hybrid.generation.sampling import stream

_TRIES = 3
_SHOWN = 200
_MOST = 1 << 20
_MOST_OF_TOKEN = 1 << 10
"""Bytes that an answer may have, and as many more for each token of it and of its prompt."""
_ROUNDING = 1e-3  # by which a log-probability may exceed 0
_PLAIN = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "ignore_eos": True,
}
"""The model's own distribution, and no end but at the ids that are named: what is not said, vLLM
takes from the model's generation_config.json and tokenizer."""


class _Here(HTTPRedirectHandler):
    """Follows no redirection: the library would drop what is asked, and take a page for success."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Remote:
    """Generates as `batched.Generator` does at temperature 1, by the server at ``url``, which is
    asked for ``slots`` samples at once, with ``timeout_s`` for each. Its seeds are those of the
    samples; whether it draws the same numbers again is its own affair."""

    def __init__(self, url: str, slots: int, seed: int, timeout_s: float, vocab_size: int) -> None:
        self._url, self._slots, self._seed = url.rstrip("/"), slots, seed
        self._timeout_s, self._vocab_size = timeout_s, vocab_size
        self._open = build_opener(_Here).open

    def update(self, directory: Path) -> None:
        """Have the server read the weights of a Hugging Face directory, and forget what it computed
        with others. Raises UserError where it does not."""
        weights = {"weights_path": str(directory.absolute())}
        self._ask("/collective_rpc", {"method": "reload_weights", "kwargs": weights})
        said = self._ask("/reset_prefix_cache", {})
        if b"false" in said:  # vLLM tells it by {"success": false} alone
            raise self._error("it still answers, and so keeps what it computed with other weights")

    def run(self, requests: Iterable[Request]) -> Iterator[Rollout]:
        """The samples of all requests, which are asked for from now on, whether or not somebody
        waits for them. Raises UserError for answers that are none, behind which no more are asked
        for."""
        wanted = [(r, number, Future[Rollout]()) for r in requests for number in r.samples]
        waiting = deque(wanted)

        def ask() -> None:
            with suppress(IndexError):
                while True:
                    request, number, found = waiting.popleft()
                    try:
                        found.set_result(self._sample(request, number))
                    except Exception as error:
                        waiting.clear()
                        found.set_exception(error)

        for _ in wanted[: self._slots]:  # no pool: Python waits for its threads at its end
            Thread(target=ask, name="engine", daemon=True).start()
        return (found.result() for *_, found in wanted)

    def _sample(self, request: Request, number: int) -> Rollout:
        body = {
            "prompt": list(request.ids),
            "max_tokens": request.most,
            "stop_token_ids": sorted(request.stops),
            **_PLAIN,
            "logprobs": 1,
            "return_token_ids": True,
            "seed": stream(self._seed, request.prompt, number) % 2**31,
        }
        tokens = len(request.ids) + request.most
        said = self._ask("/v1/completions", body, _MOST + tokens * _MOST_OF_TOKEN)
        try:
            choice = json.loads(said)["choices"][0]
            found = Rollout(
                request, number, choice["token_ids"], choice["logprobs"]["token_logprobs"]
            )
            prompt_ids, ended = choice["prompt_token_ids"], choice["finish_reason"]
            found.chosen.extend([True] * len(found.ids))
            why = self._wrong(found, prompt_ids, ended)
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            shown = said[:_SHOWN].decode(errors="replace")
            why = f"its answer is none with token ids and log-probabilities ({error!r}): {shown}"
        if why:
            raise self._error(f"prompt {request.prompt}: {why}")
        return found

    def _wrong(self, found: Rollout, prompt_ids: Any, ended: Any) -> str | None:
        """Why an answer is not of the tokens, or not as they were asked for."""
        if prompt_ids != list(found.request.ids):
            return f"it answers to other token ids ({prompt_ids}) than {list(found.request.ids)}"
        if not all(type(i) is int and 0 <= i < self._vocab_size for i in found.ids):
            return f"it answers with token ids that the model does not know: {found.ids}"
        finite = all(-math.inf < x < _ROUNDING for x in found.logprobs)
        if len(found.logprobs) != len(found.ids) or not finite:
            return "its log-probabilities are not those of its tokens"
        inner = found.request.stops & {*found.ids[:-1]}
        if not ended or ended != found.ended or inner or len(found.ids) > found.request.most:
            return (
                f"its answer of {len(found.ids)} tokens ended by {ended!r}, where one ends at "
                f"{found.request.most} or at one of {sorted(found.request.stops)}"
            )
        return None

    def _ask(self, path: str, body: Any, most: int = _MOST) -> bytes:
        """What the server answers, asked again where it fails at once. Raises UserError, also where
        it answers with more than so many bytes."""
        content = json.dumps(body).encode()
        why = ""
        for _ in range(_TRIES):
            call = Call(self._url + path, content, {"Content-Type": "application/json"})
            try:
                with self._open(call, timeout=self._timeout_s) as answer:
                    said: bytes = answer.read(most + 1)
                if len(said) <= most:
                    return said
                why = f"it answers with more than {most:,} bytes, more than was asked for can take"
                break
            except HTTPError as error:
                why = str(error)
                with suppress(OSError, HTTPException):  # it may fail there, too
                    why += f": {error.read(_SHOWN).decode(errors='replace')}"
                if error.code < 500:  # asking again would not help
                    break
            except (OSError, HTTPException) as error:
                why = str(error) or repr(error)
                if "timed out" in why:  # it was waited for long enough
                    break
        raise self._error(f"{path}: {why}")

    def _error(self, why: str) -> UserError:
        return UserError(
            f"rollout.engine {self._url}: {why}. It has to serve this model with its tokenizer "
            "(docs/rl.md); the same command goes on from the last step"
        )
