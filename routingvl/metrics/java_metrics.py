"""METEOR and SPICE, which exist as Java programs only (jars that pycocoevalcap brings; SPICE needs a further download).

Each is one call that takes tokenised captions and either returns scores or raises :class:`MetricUnavailable` with the
reason. Programs run in the foreground under a time limit, are always ended, and write in temporary folders only.
"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from routingvl.metrics.ptb import cocoevalcap_folder, find_java

METEOR_TIMEOUT = 1800  # seconds; it starts in about 8 s and scores some hundred captions a second
SPICE_TIMEOUT = 7200  # seconds; it parses every sentence, about an hour for 5,000 images

Captions = Mapping[int, str]
References = Mapping[int, Sequence[str]]


class MetricUnavailable(RuntimeError):
    """A metric cannot run here; the message says why and what to do."""


def _require_java(metric: str) -> str:
    java = find_java()
    if java is None:
        raise MetricUnavailable(f"{metric} needs Java and no 'java' is on PATH; install a Java runtime (8 or newer)")
    return java


class _Meteor:
    """The running METEOR program: one request line in, one answer line out."""

    def __init__(self, java: str, timeout: float) -> None:
        folder = cocoevalcap_folder() / "meteor"
        command = [java, "-jar", "-Xmx2G", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
        # A file, not a pipe: nobody reads it while the program runs, and a full pipe would stop the program.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        self._process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )
        self._expired = threading.Event()
        self._timeout = timeout
        self._timer = threading.Timer(timeout, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def _expire(self) -> None:
        self._expired.set()
        self._process.kill()

    def __enter__(self) -> _Meteor:
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        with contextlib.suppress(OSError):  # closing flushes, to a program that is gone
            self._process.stdin.close()
        self._errors.close()

    def send(self, line: str) -> None:
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._failure() from None

    def receive(self) -> str:
        answer = self._process.stdout.readline().decode()
        if not answer:
            raise self._failure()
        return answer.strip()

    def receive_number(self) -> float:
        answer = self.receive()
        try:
            return float(answer)
        except ValueError:
            raise MetricUnavailable(f"METEOR answered {answer[:200]!r} in place of a score") from None

    def _failure(self) -> MetricUnavailable:
        if self._expired.is_set():
            return MetricUnavailable(f"METEOR did not finish in {self._timeout:g} s")
        code = self._process.wait()
        self._errors.seek(0)
        reason = self._errors.read().decode(errors="replace").strip()
        return MetricUnavailable(f"METEOR stopped with exit code {code}: {reason[-300:] or 'no message'}")


def meteor(captions: Captions, references: References, timeout: float = METEOR_TIMEOUT) -> tuple[float, list[float]]:
    """METEOR 1.5 of the set, and of each image in the order of ``captions``, all in [0, 1].

    Args:
        captions: {image_id: tokenised caption}.
        references: {image_id: tokenised references}.
        timeout: seconds after which the program is ended.

    Raises:
        MetricUnavailable: no Java, or the program fails or runs out of time.
    """
    java = _require_java("METEOR")
    try:
        program = _Meteor(java, timeout)
    except OSError as error:
        raise MetricUnavailable(f"METEOR did not start: {error}") from error
    with program:
        statistics = []
        for image_id, caption in captions.items():
            # three strokes separate the fields of a request, so the text may not have any
            fields = [text.replace("|||", " ") for text in (*references[image_id], caption)]
            program.send(" ||| ".join(("SCORE", *fields)))
            statistics.append(program.receive())
        program.send(" ||| ".join(("EVAL", *statistics)))
        scores = [program.receive_number() for _ in statistics]
        return program.receive_number(), scores


def spice(captions: Captions, references: References, timeout: float = SPICE_TIMEOUT) -> tuple[float, list[float]]:
    """SPICE of the set (the mean), and of each image in the order of ``captions``, all in [0, 1].

    Arguments as for :func:`meteor`.

    Raises:
        MetricUnavailable: no Java, no download, or the program fails or runs out of time.
    """
    java = _require_java("SPICE")
    folder = cocoevalcap_folder() / "spice"
    parts = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
    absent = [part for part in parts if not (folder / "lib" / part).is_file()]
    if absent:
        raise MetricUnavailable(
            f"SPICE needs {' and '.join(absent)} in {folder / 'lib'}; they are in stanford-corenlp-full-2015-12-09.zip"
            " (384 MB, nlp.stanford.edu), which is not downloaded for you"
        )
    with tempfile.TemporaryDirectory(prefix="spice-") as scratch:
        rows = _run_spice(java, folder, Path(scratch), captions, references, timeout)
    by_id = {row["image_id"]: row["scores"]["All"]["f"] for row in rows}
    scores = [float("nan") if by_id[image_id] is None else float(by_id[image_id]) for image_id in captions]
    return math.fsum(scores) / len(scores), scores


def _run_spice(
    java: str, folder: Path, scratch: Path, captions: Captions, references: References, timeout: float
) -> list[dict]:
    request, answer = scratch / "captions.json", scratch / "scores.json"
    items = [{"image_id": item, "test": text, "refs": list(references[item])} for item, text in captions.items()]
    request.write_text(json.dumps(items), encoding="utf-8")
    command = [java, "-jar", "-Xmx8G", "spice-1.0.jar", str(request), "-out", str(answer), "-subset", "-silent"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=timeout, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MetricUnavailable(f"SPICE did not run: {error}") from error
    if done.returncode != 0 or not answer.is_file():
        reason = done.stderr.decode(errors="replace").strip()
        raise MetricUnavailable(f"SPICE stopped with exit code {done.returncode}: {reason[-300:] or 'no message'}")
    return json.loads(answer.read_text(encoding="utf-8"))
