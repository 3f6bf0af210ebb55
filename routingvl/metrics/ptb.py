"""Tokenisation of captions in the manner of the Penn Treebank, with Java or without.

Caption metrics count words, and published numbers count those of Stanford's PTBTokenizer (CoreNLP 3.4.1, which
pycocoevalcap brings as a jar for Java). :func:`tokenize_captions` runs the same jar or, where there is no Java, a
small Python tokenizer with the same conventions: lower case, ``'s`` and ``n't`` split off, hyphenated words whole,
punctuation dropped. The two agree on ordinary captions; docs/metrics.md says where they differ.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

TOKENIZERS = ("auto", "ptb", "python")
JAVA_TIMEOUT = 600  # seconds; the jar needs about 0.5 s to start and 1 s for 100,000 captions

# Tokens that COCO's evaluation drops. It names brackets in capitals too, but compares them with lower-cased tokens, so
# -lrb- and -rrb- do stay, and published numbers are computed that way.
DROPPED = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
_NOTHING = re.compile(r"\.+|-{1,4}")  # runs that the jar turns into dropped tokens

# Everything that the jar takes for the end of a line: one caption is one line of its input.
_LINE_BREAKS = re.compile("[\n\r\v\f\x85\u2028\u2029]+")

_UNICODE = str.maketrans(
    {
        **dict.fromkeys("“”„", '"'),
        **dict.fromkeys("‘’‛", "'"),
        **dict.fromkeys("–—", "--"),
        **{"…": "...", "½": "1/2", "¼": "1/4", "¾": "3/4", "£": "#", "€": "$", "¢": " cents ", "\xa0": " "},
    }
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

_ABBREVIATIONS = (
    "mr mrs ms dr st sgt capt gen lt col prof rev hon maj adm gov sen rep pres messrs jr sr inc co corp ltd bros ave"
    " blvd rd mt ft dept bldg univ assn vs etc al ph.d jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues"
    " wed thu thurs fri"
).split()
_WORD = r"[^\W_]+"
# The first pattern that fits at a position makes the token; what follows it is looked at afresh.
_TOKEN = re.compile(
    "|".join(
        (
            r"(?:https?://|www\.)\S*[\w/]",
            r"\w[\w.+-]*@\w+(?:\.\w+)+",
            r"[@#][A-Za-z]\w*",
            r"\b(?i:c\+\+|[cf]#)",  # of all names with signs, the jar knows these three
            # abbreviations keep their period: known ones, "no. 5", "u.s." and "p.m.", "J. Smith"
            rf"\b(?i:{'|'.join(map(re.escape, _ABBREVIATIONS))})\.(?!\w)",
            r"\b(?i:nos?)\.(?=\s*\d)",
            r"\b[^\W\d_]\.(?:[^\W\d_]\.)+(?!\w)(?:-\w+)*",
            r"\b[^\W\d_]\.(?=\s+\S)|\b[a-z]\.(?=\s*$)",
            # "2 1/2", "12:30", "1,000", "2.5" and "-5"; digits with letters, strokes or hyphens are words
            r"\d+ \d/\d\b|\d+(?:[.,:]\d+)+(?:-\w+)*|\.\d+|(?<!\w)-\d+\b|\+\d+(?:[.,:]\d+)*",
            # clitics: can't -> ca n't, cannot -> can not, dog's -> dog 's
            r"[^\W\d_]+(?=(?i:n't)\b)|(?i:n't)\b",
            r"\b(?i:can(?=not)|gon(?=na)|wan(?=na)|got(?=ta)|gim(?=me)|lem(?=me))(?=\w{2,3}(?![\w-]))",
            r"'(?i:s|m|d|ll|re|ve)\b",
            # apostrophes inside a word or for left-out letters
            r"'n'|'n\b|(?<!\w)'\d\ds?\b|(?<!\w)'(?i:em|til|cause)\b|(?<!\w)'(?i:t)(?=(?i:is|was)\b)",
            rf"\b(?i:[dlos])'(?!(?i:s|m|d|ll|re|ve)\b){_WORD}|\b(?i:[jy])'(?=\w)|\b(?i:ol)'|\b(?i:ma'am|c'mon)\b",
            # words; joined by hyphens, strokes, periods between letters, or an ampersand between capitals
            rf"{_WORD}(?:(?:[-/_]|\.(?=[^\W\d_])|(?<=[A-Z])&(?=[A-Z])){_WORD})*",
            r"[?!]+|\.+|-+|_+|``|''|\S",
        )
    )
)


class MetricUnavailable(RuntimeError):
    """A metric or tokenizer cannot run here; the message says why and what to do."""


def find_java() -> str | None:
    """Path of the ``java`` program, or None."""
    return shutil.which("java")


def java_for(name: str) -> str:
    """The same; raises MetricUnavailable, saying that ``name`` needs it, for None."""
    if (java := find_java()) is None:
        raise MetricUnavailable(f"{name} needs Java and no 'java' is on PATH; install a Java runtime (8 or newer)")
    return java


def run_java(name: str, arguments: Sequence[str], timeout: float, **options: Any) -> subprocess.CompletedProcess:
    """Run a Java program, called ``name`` in messages, to its end; its output is captured.

    Raises MetricUnavailable when there is no Java, or when it does not start or end in ``timeout`` seconds.
    """
    command = [java_for(name), *arguments]
    try:
        return subprocess.run(command, capture_output=True, timeout=timeout, check=False, **options)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MetricUnavailable(f"{name} did not run: {error}") from error


def cocoevalcap_folder() -> Path:
    """Folder of the installed pycocoevalcap, where its jars are.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("pycocoevalcap is not installed: pip install pycocoevalcap")
    return Path(next(iter(spec.submodule_search_locations)))


def _split(caption: str) -> Iterator[str]:
    for match in _TOKEN.finditer(caption.translate(_UNICODE)):
        token = match.group().lower()
        if token not in DROPPED and token != '"' and not _NOTHING.fullmatch(token):
            # the jar joins the parts of "2 1/2" by a no-break space
            yield _BRACKETS.get(token, token).replace(" ", "\xa0")


def tokenize_python(captions: Sequence[str]) -> list[str]:
    """Tokens of each caption, joined by single spaces, without Java."""
    return [" ".join(_split(_LINE_BREAKS.sub(" ", caption))) for caption in captions]


def tokenize_java(captions: Sequence[str]) -> list[str]:
    """The same by Stanford's PTBTokenizer.

    The jar reads from a pipe, so nothing is written anywhere; pycocoevalcap's wrapper writes into its own folder.

    Raises:
        MetricUnavailable: Java is missing, fails, or does not answer in :data:`JAVA_TIMEOUT` seconds.
    """
    jar = cocoevalcap_folder() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    command = ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    text = "".join(_LINE_BREAKS.sub(" ", caption) + "\n" for caption in captions)
    done = run_java("the PTB tokenizer", command, JAVA_TIMEOUT, input=text.encode(errors="replace"))
    lines = done.stdout.decode(errors="replace").split("\n")[:-1]
    if done.returncode != 0 or len(lines) != len(captions):
        reason = done.stderr.decode(errors="replace").strip()[-500:]
        counts = f"{len(lines)} lines for {len(captions)} captions (exit code {done.returncode})"
        raise MetricUnavailable(f"the PTB tokenizer gave {counts}. {reason}")
    return [" ".join(token for token in line.split(" ") if token and token not in DROPPED) for line in lines]


def tokenize_captions(captions: Sequence[str], tokenizer: str = "auto") -> tuple[list[str], str]:
    """Tokenise captions as COCO's evaluation does.

    Args:
        captions: any text; line breaks count as blanks.
        tokenizer: "ptb" (Stanford's, through Java), "python", or "auto": ptb where it runs, else python.

    Returns:
        The tokens of each caption joined by single spaces, and what made them: "ptb", "python", or
        "python (<why not ptb>)" where "auto" had to fall back.

    Raises:
        ValueError: ``tokenizer`` is unknown.
        MetricUnavailable: "ptb" was asked for and cannot run.
    """
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"tokenizer={tokenizer!r} is not one of {', '.join(map(repr, TOKENIZERS))}")
    if tokenizer == "python":
        return tokenize_python(captions), "python"
    try:
        return tokenize_java(captions), "ptb"
    except MetricUnavailable as error:
        if tokenizer == "ptb":
            raise
        return tokenize_python(captions), f"python ({error})"
