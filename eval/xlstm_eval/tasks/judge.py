"""A judge: a model behind an OpenAI-compatible endpoint that gives scores.

Only `chat/completions` is used, so servers such as vLLM, SGLang, llama.cpp and Ollama will do. The
key comes from an environment variable and goes nowhere but into the request's header.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xlstm_eval.records import EvalError
from xlstm_eval.suites import Judge

Message = dict[str, str]

PARSE_ATTEMPTS = 4
"""Replies that are asked for until one has a score."""
CALL_ATTEMPTS = 6
CALL_SECONDS = 600.0
"""Longest time for one reply: a judge may reason at length."""
CHECK_SECONDS = 300.0
"""Longest time for the first word: a server may have to load its model."""
LONGEST_WAIT = 30.0
BUSY = (408, 409, 425, 429)
SCORE = re.compile(
    r"^\W*score[^\w-]*?(\d+(?:\.\d+)?)(?:\s*/\s*10)?\W*$", re.IGNORECASE | re.MULTILINE
)
REMINDER = (
    "Your reply has no line with the score. Reply with that line alone, "
    "'Score: N' with N from 1 to 10."
)


@dataclass(frozen=True)
class Judgement:
    """A score from 1 to 10, and all that the judge said on the way to it, with its seeds."""

    key: str
    judge: str
    score: float
    seeds: Sequence[int]
    replies: Sequence[str]


def parse_score(reply: str) -> float | None:
    """Return the score of a reply's last line ``Score: N``; None where there is none in 1 to 10."""
    # What a reasoning model thinks may name scores that it then rejects.
    said = SCORE.findall(reply.rpartition("</think>")[2])
    score = float(said[-1]) if said else 0.0
    return score if 1 <= score <= 10 else None


class JudgeClient:
    """Asks the judge, and keeps its judgements in ``folder``, so that none is asked twice.

    ``sleep`` waits between attempts (tests give another). Safe to use from several threads.
    """

    def __init__(
        self,
        settings: Judge,
        seed: int,
        folder: Path | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.settings, self.seed = settings, seed
        self._sleep = sleep
        self._lock = threading.Lock()
        self._file = None if folder is None else folder / "judgements.jsonl"
        self._known = _read_judgements(self._file)
        # Redirects are refused: the key would go along to another server.
        self._opener = urllib.request.build_opener(_NoRedirect)

    def check(self) -> None:
        """Ask for one word, before hours of answers.

        Raises EvalError: it cannot be reached, or is silent.
        """
        asked = [{"role": "user", "content": "Reply with the word: ready"}]
        self._reply(asked, self.seed, first=True)

    def judge(self, messages: Sequence[Message]) -> Judgement:
        """Return the judgement that the messages ask for.

        Raises EvalError: the endpoint cannot be reached or refuses, or no reply has a score.
        """
        key = self._key(messages)
        if key in self._known:
            return self._known[key]
        talk, replies, seeds = list(messages), [], []
        for attempt in range(PARSE_ATTEMPTS):
            seeds.append(self.seed + attempt)
            replies.append(self._reply(talk, seeds[-1]))
            score = parse_score(replies[-1])
            if score is not None:
                return self._keep(Judgement(key, self.settings.model, score, seeds, replies))
            talk += [
                {"role": "assistant", "content": replies[-1]},
                {"role": "user", "content": REMINDER},
            ]
        raise EvalError(
            f"judge: {self.settings.model} gave no score in {PARSE_ATTEMPTS} replies. The last "
            f"begins: {replies[-1][:200]!r}. Take another judge, or raise max_tokens in "
            "judge.settings. What is judged already is kept."
        )

    def _key(self, messages: Sequence[Message]) -> str:
        asked = [self.settings.model, self.settings.settings, self.seed, list(messages)]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _keep(self, found: Judgement) -> Judgement:
        with self._lock:
            self._known[found.key] = found
            if self._file is not None:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                with self._file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(found)) + "\n")
        return found

    def _reply(self, messages: Sequence[Message], seed: int, first: bool = False) -> str:
        body = {
            "model": self.settings.model,
            "messages": list(messages),
            "seed": seed,
            **self.settings.settings,
        }
        # Null leaves a setting out: some servers refuse what they do not know.
        sent = {key: value for key, value in body.items() if value is not None}
        answer = self._call(json.dumps(sent).encode(), first)
        try:
            reply = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            shown = self._safe(json.dumps(answer))
            raise EvalError(
                f"judge: {self.settings.endpoint} answered without choices: {shown}"
            ) from None
        # Null where a reasoning model has used up its tokens before it said anything.
        return str(reply or "")

    def _call(self, body: bytes, first: bool) -> Any:
        """Send a request, again where the server is busy or cannot be reached.

        A server that is silent is not given another chance at its first reply: it may never answer.
        """
        seconds = CHECK_SECONDS if first else CALL_SECONDS
        for attempt in range(CALL_ATTEMPTS):
            wait = min(LONGEST_WAIT, 2.0**attempt)
            try:
                with self._opener.open(self._request(body), timeout=seconds) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                problem = f"answers {error.code} {error.reason}: {self._safe(_text_of(error))}"
                if error.code not in BUSY and error.code < 500:
                    raise EvalError(self._failed(problem)) from None
                wait = _seconds(error.headers.get("Retry-After")) or wait
            except (OSError, ValueError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                if first and isinstance(reason, TimeoutError):
                    silence = f"has not replied to one word in {seconds:g} s"
                    raise EvalError(self._failed(silence)) from None
                problem = f"cannot be reached or understood: {self._safe(str(reason))}"
            if attempt < CALL_ATTEMPTS - 1:
                self._sleep(min(wait, LONGEST_WAIT))
        raise EvalError(self._failed(problem))

    def _request(self, body: bytes) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        url = self.settings.endpoint.rstrip("/") + "/chat/completions"
        return urllib.request.Request(url, body, headers)

    @property
    def _api_key(self) -> str:
        return os.environ.get(self.settings.api_key_env, "").strip()

    def _failed(self, problem: str) -> str:
        name = self.settings.api_key_env
        hint = "" if self._api_key else f" The variable {name}, for an API key, is not set."
        return f"judge: {self.settings.endpoint} {problem}.{hint} Check evaluate.judge."

    def _safe(self, text: str) -> str:
        """Shorten what a server said, in one line and without the key that it may repeat."""
        if self._api_key:
            text = text.replace(self._api_key, "***")
        return " ".join(text.split())[:200]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *given: Any, **settings: Any) -> None:
        """Follow nothing: the redirect is then an error."""


def _text_of(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(2000).decode("utf-8", "replace")
    except OSError:
        return ""


def _seconds(header: str | None) -> float:
    try:
        return max(0.0, float(header or 0))
    except ValueError:  # a date, which is allowed as well
        return 0.0


def _read_judgements(file: Path | None) -> dict[str, Judgement]:
    if file is None or not file.is_file():
        return {}
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            entry = Judgement(**json.loads(line))
        except (ValueError, TypeError):  # torn by a kill
            continue
        found[entry.key] = entry
    return found
