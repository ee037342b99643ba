"""One OpenAI-compatible chat endpoint over HTTP: bounded concurrency, patience, a key that never shows."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from steerwell.data.errors import InputError

if TYPE_CHECKING:
    import httpx

LONGEST_WAIT = 60.0  # seconds, whatever a server's Retry-After asks for


@dataclass(frozen=True)
class Answer:
    """What the model said, and how long the request took (seconds, without waiting between tries).

    ``first_token`` are the likeliest first tokens with their log-probabilities (nats), where they were asked for.
    """

    text: str
    seconds: float
    first_token: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Failure:
    """Why there is no answer. ``unreachable``: no server answered at all."""

    reason: str
    unreachable: bool = False


class _Refused(Exception):
    """The endpoint serves no such request (key, address, model, log-probs): asking again is useless."""

    def __init__(self, why: str, mend: str) -> None:
        super().__init__(why)
        self.mend = mend


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, what to ask and how patiently. The key itself is never stored here.

    ``top_logprobs`` above 0 asks for that many of the likeliest first tokens, with their log-probabilities.
    """

    model: str
    base_url: str
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float = 0.0
    max_tokens: int = 512
    concurrency: int = 4
    retries: int = 4
    backoff: float = 1.0
    timeout: float = 60.0
    top_logprobs: int = 0

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings that change what the model says."""
        asked = {"logprobs": True, "top_logprobs": self.top_logprobs} if self.top_logprobs else {}
        return {"temperature": self.temperature, "max_tokens": self.max_tokens, **asked}

    def check(self) -> None:
        """Raise :class:`InputError` for an address that is none, or when OpenAI's own address has no key."""
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"{self.base_url!r} is no address", mend="Write http://HOST:PORT/v1.")
        if parts.hostname == "api.openai.com" and not self._key():
            raise InputError(
                f"no key for {parts.hostname}: {self.api_key_env} is not set",
                mend=f"Set {self.api_key_env}, or name your own server with base_url (--base-url).",
            )
        if self.concurrency < 1 or self.retries < 0:
            raise InputError("concurrency must be 1 or more and retries 0 or more", mend="Mend the settings.")

    def ask_all(self, prompts: Sequence[str]) -> list[Answer | Failure]:
        """One answer (or failure) per prompt, in order, with at most ``concurrency`` requests under way.

        Raises :class:`InputError` when the endpoint refuses the key, the address or the model, or answers without
        the log-probabilities that were asked for. On that and on Ctrl-C the requests under way are given up (the
        threads are daemons).
        """
        import httpx

        if not prompts:
            return []
        work: queue.SimpleQueue[int] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Answer | Failure | BaseException]] = queue.SimpleQueue()
        for i in range(len(prompts)):
            work.put(i)
        stop = threading.Event()
        answers: list[Answer | Failure] = [Failure("not asked")] * len(prompts)
        with httpx.Client(timeout=self.timeout) as client:

            def serve() -> None:
                while not stop.is_set():
                    try:
                        i = work.get_nowait()
                    except queue.Empty:
                        return
                    try:
                        done.put((i, self._ask(client, prompts[i], stop.wait)))
                    except BaseException as error:  # noqa: BLE001 (handed to the caller's thread, which raises it)
                        if isinstance(error, _Refused):
                            stop.set()  # at once: the next request must not go out with the same key
                        done.put((i, error))

            for _ in range(min(self.concurrency, len(prompts))):
                threading.Thread(target=serve, daemon=True).start()
            try:
                for _ in prompts:
                    i, result = done.get()
                    if isinstance(result, _Refused):
                        raise InputError(f"{self.base_url} {result}", mend=result.mend)
                    if isinstance(result, BaseException):
                        raise result
                    answers[i] = result
            finally:
                stop.set()
        return answers

    def _ask(self, client: httpx.Client, prompt: str, wait: Callable[[float], Any]) -> Answer | Failure:
        """One prompt, tried until it has an answer or patience ends. ``wait`` sleeps, and wakes on a stop."""
        import httpx

        failure = Failure("not asked")
        for attempt in range(self.retries + 1):
            pause = self.backoff * 2**attempt
            try:
                begin = time.perf_counter()
                response = client.post(
                    f"{self.base_url}/chat/completions",
                    json={
                        "model": self.model,
                        "messages": [{"role": "user", "content": prompt}],
                        **self.sampling,
                    },
                    headers=self._headers(),
                )
                seconds = time.perf_counter() - begin
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                text = self._safe(str(error) or type(error).__name__)
                failure = Failure(text, unreachable=isinstance(error, httpx.ConnectError))
            else:
                if response.status_code in (401, 403, 404):
                    raise _Refused(
                        f"refuses the requests: status {response.status_code}: {self._safe(response.text)}",
                        f"Check the key in {self.api_key_env}, the model's name and the address.",
                    )
                if response.status_code == 200:
                    return self._answer(response, seconds)
                failure = Failure(f"status {response.status_code}: {self._safe(response.text)}")
                if response.status_code not in (408, 409, 429) and response.status_code < 500:
                    return failure
                pause = _retry_after(response.headers.get("retry-after"), pause)
            if attempt < self.retries and wait(min(pause, LONGEST_WAIT)):
                break
        return failure

    def _answer(self, response: httpx.Response, seconds: float) -> Answer | Failure:
        try:
            choice = response.json()["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return Failure(f"the reply is no chat completion: {self._safe(response.text)}")
        if self.top_logprobs and reason != "content_filter":
            first = _first_token(choice)
            return Answer(text or "", seconds, first) if first else Failure("the model said nothing")
        if not isinstance(text, str) or not text.strip():
            return Failure(f"the reply is empty (finish reason {reason!r})")
        if reason == "content_filter":
            return Failure("the endpoint's content filter stopped the reply")
        return Answer(text, seconds)

    def _key(self) -> str:
        return os.environ.get(self.api_key_env, "").strip()

    def _headers(self) -> dict[str, str]:
        key = self._key()
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _safe(self, text: str) -> str:
        """A server's words in one short line, without the key (servers do quote it)."""
        key = self._key()
        line = " ".join((text.replace(key, "***") if key else text).split())
        return line[:200] or "no text"


def _first_token(choice: Any) -> tuple[tuple[str, float], ...]:
    """``logprobs.content[0].top_logprobs`` of a chat completion's choice, as (token, log-probability).

    Empty when the model ended at once. Raises when the server does not give log-probabilities at all.
    """
    try:
        tokens = choice["logprobs"]["content"]
        listed = tokens[0]["top_logprobs"] if tokens != [] else ()
        return tuple((str(one["token"]), float(one["logprob"])) for one in listed)
    except (KeyError, IndexError, TypeError, ValueError):
        raise _Refused(
            "returns no log-probabilities (choices[0].logprobs.content[0].top_logprobs)",
            "Take a server and a model that give them, or leave logprobs off.",
        ) from None


def _retry_after(header: str | None, otherwise: float) -> float:
    try:
        return max(0.0, float(header)) if header else otherwise
    except ValueError:  # a date: the ordinary pause will do
        return otherwise


__all__ = ["Answer", "Endpoint", "Failure"]
