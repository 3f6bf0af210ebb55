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
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from routingvl.metrics.ptb import MetricUnavailable, cocoevalcap_folder, java_for, run_java

METEOR_TIMEOUT = 1800  # seconds; it starts in about 8 s and scores some hundred captions a second
SPICE_TIMEOUT = 7200  # seconds; it parses every sentence, about an hour for 5,000 images

Captions = Mapping[int, str]
References = Mapping[int, Sequence[str]]


def meteor(captions: Captions, references: References, timeout: float = METEOR_TIMEOUT) -> tuple[float, list[float]]:
    """METEOR 1.5 of the set, and of each image in the order of ``captions``, all in [0, 1].

    Args:
        captions: {image_id: tokenised caption}.
        references: {image_id: tokenised references}.
        timeout: seconds after which the program is ended.

    Raises:
        MetricUnavailable: no Java, or the program fails or runs out of time.
    """
    folder = cocoevalcap_folder() / "meteor"
    command = [java_for("METEOR"), "-jar", "-Xmx2G", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    # Errors go to a file, not a pipe: nobody reads while the program runs, and a full pipe would stop it.
    with tempfile.TemporaryFile() as errors:
        pipes = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": errors,
            "encoding": "utf-8",
            "errors": "replace",
        }
        try:
            program = subprocess.Popen(command, cwd=folder, **pipes)
        except OSError as error:
            raise MetricUnavailable(f"METEOR did not start: {error}") from error
        timer, end = threading.Timer(timeout, program.kill), time.monotonic() + timeout
        timer.daemon = True
        timer.start()
        try:
            return _ask_meteor(program, captions, references)
        except (OSError, EOFError):  # the program has ended
            if time.monotonic() >= end:
                raise MetricUnavailable(f"METEOR did not finish in {timeout:g} s") from None
            code = program.wait()
            errors.seek(0)
            raise _stopped("METEOR", code, errors.read()) from None
        finally:
            timer.cancel()
            program.kill()
            with contextlib.suppress(OSError):  # closing flushes, to a program that is gone
                program.communicate()


def _ask_meteor(program: subprocess.Popen, captions: Captions, references: References) -> tuple[float, list[float]]:
    def answer_to(*fields: str) -> str:
        # three strokes separate the fields of a request, so the text may not have any
        program.stdin.write(" ||| ".join(field.replace("|||", " ") for field in fields) + "\n")
        program.stdin.flush()
        return next_answer()

    def next_answer() -> str:
        if not (answer := program.stdout.readline()):
            raise EOFError
        return answer.strip()

    statistics = [answer_to("SCORE", *references[image_id], caption) for image_id, caption in captions.items()]
    answer = answer_to("EVAL", *statistics)
    scores = []
    try:
        for _ in statistics:
            scores.append(float(answer))
            answer = next_answer()
        return float(answer), scores
    except ValueError:
        raise MetricUnavailable(f"METEOR answered {answer[:200]!r} in place of a score") from None


def _stopped(metric: str, code: int, errors: bytes) -> MetricUnavailable:
    reason = errors.decode(errors="replace").strip()
    return MetricUnavailable(f"{metric} stopped with exit code {code}: {reason[-300:] or 'no message'}")


def spice(captions: Captions, references: References, timeout: float = SPICE_TIMEOUT) -> tuple[float, list[float]]:
    """SPICE of the set (the mean), and of each image in the order of ``captions``, all in [0, 1].

    Arguments as for :func:`meteor`.

    Raises:
        MetricUnavailable: no Java, no download, or the program fails or runs out of time.
    """
    java_for("SPICE")
    folder = cocoevalcap_folder() / "spice"
    parts = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
    absent = [part for part in parts if not (folder / "lib" / part).is_file()]
    if absent:
        raise MetricUnavailable(
            f"SPICE needs {' and '.join(absent)} in {folder / 'lib'}; they are in stanford-corenlp-full-2015-12-09.zip"
            " (384 MB, nlp.stanford.edu), which is not downloaded for you"
        )
    items = [{"image_id": item, "test": text, "refs": list(references[item])} for item, text in captions.items()]
    with tempfile.TemporaryDirectory(prefix="spice-") as scratch:
        request, answer = Path(scratch, "captions.json"), Path(scratch, "scores.json")
        request.write_text(json.dumps(items), encoding="utf-8")
        command = ["-jar", "-Xmx8G", "spice-1.0.jar", str(request), "-out", str(answer), "-subset", "-silent"]
        done = run_java("SPICE", command, timeout, cwd=folder)
        if done.returncode != 0 or not answer.is_file():
            raise _stopped("SPICE", done.returncode, done.stderr)
        try:
            rows = json.loads(answer.read_text(encoding="utf-8"))
            by_id = {row["image_id"]: row["scores"]["All"]["f"] for row in rows}
            scores = [float("nan" if by_id[image_id] is None else by_id[image_id]) for image_id in captions]
        except (ValueError, TypeError, KeyError) as error:
            raise MetricUnavailable(
                f"SPICE wrote no scores of these images ({type(error).__name__}: {error})"
            ) from error
    return math.fsum(scores) / len(scores), scores
