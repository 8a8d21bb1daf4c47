"""What answers are worth, and what becomes of verifiers that misbehave."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from nemo_hybrid.environments import Score, make
from nemo_hybrid.environments.pool import Failure, Job, Pool
from nemo_hybrid.errors import UserError

OWN = {"kind": "helpers.verifiers:Faulty"}
THOUGHT = "<think>4? No: 5.</think> "
VERDICTS: list[tuple[str, dict[str, Any], str, str, float]] = [
    ("exact", {}, "Paris", " Paris\n", 1),
    ("exact", {}, "Paris", "Paris.", 0),
    ("exact", {}, "Paris", "paris", 0),
    ("exact", {"ignore_case": True}, "Paris", "pARIS", 1),
    ("exact", {}, "New York", "New \n York", 1),
    ("exact", {}, "5", THOUGHT + "5", 1),
    ("exact", {}, "4", THOUGHT + "5", 0),
    ("exact", {"after": "####"}, "5", "4 #### 5", 1),
    ("exact", {"after": ""}, "a", "<think></think>a", 0),
    ("exact", {}, "", "", 1),
    ("choice", {}, "B", "B", 1),
    ("choice", {}, "b", "(B)", 1),
    ("choice", {}, "B", "Answer: B", 1),
    ("choice", {}, "B", "The answer is **B**.", 1),
    ("choice", {}, "B", "A is tempting, but the answer is (B). Not C.", 1),
    ("choice", {}, "B", r"So \boxed{B}, not A", 1),
    ("choice", {}, "B", r"\boxed{\text{(B)}}", 1),
    ("choice", {}, "C", "first A, then C", 1),
    ("choice", {}, "A", "I'm lost", 0),
    ("choice", {}, "A", "no letter", 0),
    ("choice", {}, "A", "Answer: Apple", 0),
    ("arithmetic", {}, "5", "5", 1),
    ("arithmetic", {}, "5", "2 + 3 = 5.", 1),
    ("arithmetic", {}, "5", "5 = 2 + 3", 0),
    ("arithmetic", {}, "-5", "it is -5", 1),
    ("arithmetic", {}, "5", "it is -5", 0),
    ("arithmetic", {}, "1234", "1,234", 1),
    ("arithmetic", {}, "0.5", "1/2", 1),
    ("arithmetic", {}, "5", "5.0", 1),
    ("arithmetic", {}, "5", "1/0", 0),
    ("arithmetic", {}, "5", "five", 0),
    ("arithmetic", {}, "5", THOUGHT + "5", 1),
    ("arithmetic", {}, "5", "50", 0),
    ("arithmetic", {"format_reward": 0.25}, "5", "5", 1.25),
    ("arithmetic", {"format_reward": 0.25}, "5", "4", 0.25),
    ("arithmetic", {"format_reward": 0.25}, "5", "it is 5", 1),
    ("regex", {"pattern": r"\d{3}"}, "", "abc123", 1),
    ("regex", {"pattern": r"\d{3}"}, "", "abc12", 0),
    ("regex", {"pattern": r"\d{3}", "whole": True}, "", "abc123", 0),
    ("regex", {"pattern": r"a.b", "whole": True}, "", "a\nb", 1),
    ("format", {}, "", "<think>why</think>because", 1),
    ("format", {}, "", "why</think>because", 1),
    ("format", {}, "", "<think>why because", 0),
    ("format", {}, "", "<think>why</think>", 0),
    ("format", {}, "", "<think>same</think>same", 0),
    ("format", {}, "", "<think>a</think>b</think>c", 0),
    ("format", {}, "", "<think>a<think>b</think>c", 0),
    ("format", {}, "", "a<think>b</think>c", 0),
]
MATH = [
    (r"\frac{1}{2}", r"so it is \boxed{0.5}", 1),
    ("$x^2$", r"\boxed{x \cdot x}", 1),
    (r"\(7\)", "The answer is 7", 1),
    ("7", r"\boxed{8}", 0),
    ("(1, 2)", r"\boxed{(1,2)}", 1),
    ("7", "I do not know", 0),
    (r"\boxed{12}", r"\boxed{12}", 1),
    ("0.333", r"\boxed{\frac13}", 0),
]


def test_verdicts() -> None:
    for kind, options, answer, text, expected in VERDICTS:
        score = make(kind, options).score({"answer": answer}, text, "stop")
        assert isinstance(score, Score)
        assert score.reward == expected, (kind, options, answer, text)
    cut = make("format", {}).score({}, "<think>why</think>because", "length")
    assert isinstance(cut, Score)
    assert cut.reward == 0
    parts = make("arithmetic", {"format_reward": 1.0}).score({"answer": 5}, "4", "stop")
    assert isinstance(parts, Score)
    assert parts.parts == {"right": 0, "format": 1}
    assert parts.extracted == "4"


@pytest.mark.slow  # imports sympy
def test_mathematics() -> None:
    pytest.importorskip("math_verify")
    with Pool({"math": {}}, 1, 60.0) as pool:
        found = pool.score([Job("math", {"answer": a}, text, "stop") for a, text, _ in MATH])
        for (answer, text, expected), score in zip(MATH, found, strict=True):
            assert isinstance(score, Score), (answer, score)
            assert score.reward == expected, (answer, text, score)
        (unread,) = pool.score([Job("math", {"answer": ""}, "7", "stop")])
        assert isinstance(unread, Failure)


FAULTS = {
    "spin": "took longer than",
    "deaf": "took longer than",
    "crash": "ended with status -11",
    "leave": "ended with status 0",
    "quit": "SystemExit: enough",
    "fail": "RuntimeError: a defect",
    "interrupt": "BaseException: no Exception",
    "leave_behind_and_crash": "its process",
    "listen": "its process took longer",
}
HARMLESS = ("none", "speak", "fork", "leave_behind")
DEADLINE_S = 1.5


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool({"own": OWN, "exact": {}}, 1, DEADLINE_S) as pool:
        yield pool


def job(fault: str = "none", text: str = "a", **row: Any) -> Job:
    return Job("own", {"answer": "a", "fault": fault, **row}, text, "stop")


def test_faults_are_failures_and_the_next_answer_is_judged(pool: Pool) -> None:
    """None of them is a zero."""
    for fault, why in FAULTS.items():
        failed, after = pool.score([job(fault), job()])
        assert isinstance(failed, Failure), fault
        assert failed.environment == "own"
        assert why in failed.why, (fault, failed)
        assert after == Score(1.0), (fault, after)


def test_what_harms_nobody(pool: Pool) -> None:
    for fault in HARMLESS:
        right, wrong, after = pool.score([job(fault), job(fault, "b"), job()])
        assert (right, wrong, after) == (Score(1.0), Score(0.0), Score(1.0)), fault


def test_rewards_that_are_none(pool: Pool) -> None:
    rewards = (math.nan, math.inf, None, "much", [1])
    for found in pool.score([job(reward=reward) for reward in rewards if reward == reward]):
        assert isinstance(found, Failure)
    assert pool.score([job(reward="0.5")]) == [Score(0.5)]


def test_what_is_left_behind_is_killed(tmp_path: Path) -> None:
    with Pool({"own": OWN}, 1, DEADLINE_S) as pool:
        pool.score([job("leave_behind")])
        process = pool._children[0]._process
        assert process is not None
        group = process.pid
        assert exists(group)
    while exists(group):
        time.sleep(0.01)


def exists(group: int) -> bool:
    """Whether any process of a group has not ended."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_thousand_exact_answers_take_little() -> None:
    """Of this process and the other, in time of the processor: within a second on any."""
    with Pool({"exact": {}}, 1, 60.0) as pool:
        jobs = [Job("exact", {"answer": "a"}, "ab"[i % 2], "stop") for i in range(1000)]
        before = time.process_time()
        found = pool.score(jobs)
        assert time.process_time() - before < 1
    assert [s.reward for s in found if isinstance(s, Score)] == [1.0, 0.0] * 500


class Service(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = body["response"]["output"][0]["content"][0]["text"]
        assert said == body["text"]
        if said == "broken":
            self.send_error(500)
            return
        answer = json.dumps({"reward": float(said == body["expected_answer"])}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


def test_a_service_judges() -> None:
    server = HTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/verify"
    with Pool({"service": {"kind": "http", "url": url}}, 1, 60.0) as pool:
        row = {"expected_answer": "yes"}
        found = pool.score([Job("service", row, text, "stop") for text in ("yes", "no", "broken")])
    server.shutdown()
    server.server_close()
    assert found[:2] == [Score(1.0), Score(0.0)]
    assert isinstance(found[2], Failure)
    assert "500" in found[2].why


@pytest.mark.parametrize(
    ("environments", "message"),
    [
        (
            {"exakt": {}},
            "environments.exakt: there is no kind 'exakt'; did you mean exact?; the kinds",
        ),
        (
            {"word.count": {}},
            "environments.word.count: there is no kind 'word.count'; the kinds are",
        ),
        ({"a": {"kind": "exact", "afer": ""}}, "environments.a: unknown option afer"),
        ({"regex": {"whole": 1}}, "environments.regex: whole: expected true or false, got 1"),
        ({"http": {}}, "environments.http: url must begin with http"),
        ({"m": {"kind": "no.such:Thing"}}, "environments.m: no.such:Thing cannot be made: Module"),
        ({"m": {"kind": "helpers.verifiers:Unmade"}}, "ValueError: no model of the judge"),
        ({"m": {"kind": "helpers.verifiers:Mute"}}, "has no method score(row, text, ended)"),
    ],
)
def test_environments_that_cannot_be_had(environments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Pool(environments, 1, 5.0)
    assert message in str(caught.value)


def test_a_class_is_imported_in_processes_of_its_own(pool: Pool) -> None:
    assert pool.fields == {"own": ["answer"], "exact": ["answer"]}
    assert "helpers.verifiers" not in sys.modules


def test_a_class_may_lie_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # as of nemo-hybrid
    monkeypatch.chdir(tmp_path)
    Path("lying_here.py").write_text(
        "class Right:\n    fields = ()\n\n    def score(self, row, text, ended):\n"
        "        return 2.0\n"
    )
    Path("json.py").write_text("raise OSError")  # hides no module of Python's
    with Pool({"own": {"kind": "lying_here:Right"}}, 1, 60.0) as pool:
        (score,) = pool.score([Job("own", {}, "", "stop")])
    assert isinstance(score, Score)
    assert score.reward == 2.0
