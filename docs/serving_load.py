"""Clients of a server that ask again and again, of whom a third hang up in mid-answer.

    pip install locust
    make serve
    locust -f docs/serving_load.py --headless -u 100 -r 100 -t 60s --host http://127.0.0.1:8000

At the end it says how long those who stayed waited for whole answers, and fails where one waited
more than three times the median, where a request failed, or where pages were not given back.
"""

import json
import random
import time
import urllib.request

from locust import HttpUser, between, events, task

WORDS = ("the", "note", "of", "baker", "says", "that", "red", "fox", "has", "a", "key", "stone")
PATIENCE = 12  # seconds that some of those who leave wait at most
SECONDS = 30  # within which all pages are to be back


class Client(HttpUser):
    """Streams answers of different lengths to prompts of different lengths."""

    wait_time = between(0, 0.5)

    def body(self) -> dict:
        """A prompt of 5 to 60 words, and 16 to 96 tokens to come."""
        words = random.choices(WORDS, k=random.randint(5, 60))
        return {"prompt": " ".join(words), "max_tokens": random.randint(16, 96), "stream": True}

    @task(2)
    def stay(self) -> None:
        """Read a stream to its end."""
        begun, last = time.perf_counter(), b""
        with self.client.post(
            "/v1/completions", json=self.body(), stream=True, catch_response=True, name="stay"
        ) as answer:
            for line in answer.iter_lines():
                last = line or last
            if answer.status_code != 200 or last != b"data: [DONE]":
                answer.failure(f"status {answer.status_code}, and {last!r} at the end")
            # Locust's own clock stops with the first bytes.
            answer.request_meta["response_time"] = 1e3 * (time.perf_counter() - begun)

    @task(1)
    def leave(self) -> None:
        """Hang up after a few pieces of a stream, or while waiting for the first one."""
        with self.client.post(
            "/v1/completions", json=self.body(), stream=True, catch_response=True, name="leave",
            timeout=random.uniform(0.05, PATIENCE),
        ) as answer:  # fmt: skip
            if answer.error is None:
                pieces = answer.iter_lines()
                for _ in range(random.randint(0, 6)):
                    next(pieces, None)
                answer.close()
            answer.success()


@events.quitting.add_listener
def judge(environment, **_) -> None:
    """Compare the slowest with the median, and wait until all pages are free."""
    stay = environment.stats.get("stay", "POST")
    left = environment.stats.get("leave", "POST").num_requests
    ratio = stay.max_response_time / max(stay.median_response_time, 1)
    print(
        f"{stay.num_requests} stayed, {left} left; who stayed waited {stay.median_response_time} ms"
        f" in the median, {ratio:.1f} times as long at most"
    )
    held = _held(environment.host)
    print(f"{held} requests or pages are held {SECONDS} s later at most")
    failed = ratio > 3 or held > 0 or environment.stats.total.num_failures > 0
    environment.process_exit_code = int(failed)


def _held(host: str) -> int:
    """Requests and pages that the server still holds once it has had time to give them back."""
    for _ in range(SECONDS):
        with urllib.request.urlopen(f"{host}/pool.json") as answer:
            pool = json.load(answer)
        held = pool["running"] + pool["queued"] + pool["held_pages"]
        if not held:
            break
        time.sleep(1)
    return held
