"""The documentation against the code: links resolve, paths and names exist, commands parse, snippets import.

Wording is free. Each check is a function from a page's text to a list of complaints, so that one test can plant a
fault of every kind and see it found.
"""

import argparse
import ast
import importlib
import importlib.util
import json
import math
import re
import shlex
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from routingvl.benchmarks.tables import Line
from routingvl.cli import COMMANDS
from routingvl.config import ConfigError
from routingvl.config.schema import RunConfig, flatten, known_keys
from routingvl.demo.search import load_search, summarise
from routingvl.demo.variants import Variant
from routingvl.kernels.routing import routing_table

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/NOTES.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
FOLDERS = ("kernels", "routingvl", "benchmarks", "configs", "docs", "examples", "tests", ".ci")
SUFFIXES = ("py", "md", "yaml", "sh", "txt", "json", "jsonl", "png")
WRITTEN = {"benchmarks/results/gpu"}  # by a program, so it need not be there
NOT_OURS = {"torch", "transformers", "peft", "accelerate", "pytest"}  # modules that `python -m` runs beside ours


# ---------------------------------------------------------------------------------------------------- what a page has


def fences(text: str, languages: tuple[str, ...]) -> Iterator[str]:
    """The contents of the fenced blocks in one of these languages."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language in languages:
            yield block


def prose(text: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def inline_code(text: str) -> list[str]:
    """What stands between single backticks outside of fenced blocks, line breaks as blanks."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(text))]


def command_lines(text: str) -> list[str]:
    """The lines of indented blocks and shell fences, continued lines joined, and the commands in backticks."""
    blocks = [*fences(text, ("sh", "bash", "")), *re.findall(r"^    \S.*(?:\n    .*)*", prose(text), re.MULTILINE)]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return lines + [code for code in inline_code(text) if " " in code]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)).strip().lower()
        slug = name = plain.replace(" ", "-")
        number = 0
        while slug in found:
            number += 1
            slug = f"{name}-{number}"
        found.add(slug)
    return found


# --------------------------------------------------------------------------------------------------------- the checks


def link_problems(page: Path, text: str) -> list[str]:
    """Links to files or anchors that are not there; other sites are not asked."""
    problems = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        file = page.parent / target if target else page
        if not file.exists():
            problems.append(f"link to {target}")
        elif anchor and anchor not in anchors(text if file == page else file.read_text(encoding="utf-8")):
            problems.append(f"link to {link}: no such heading")
    return problems


def path_problems(page: Path, text: str) -> list[str]:
    """Paths of the repository in backticks that do not exist, and file names that no file has."""
    problems = []
    for code in inline_code(text):
        for word in code.split():
            word, _, test = word.rstrip(",:;").partition("::")
            if not re.fullmatch(r"[\w./-]+", word):
                continue
            if "/" in word and word.split("/")[0] in FOLDERS:
                missing = not (ROOT / word).exists()
            else:
                places = (ROOT, *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_dir()))
                missing = re.fullmatch(r"\w+\.(py|sh)", word) and not any((place / word).exists() for place in places)
            if test and (ROOT / word).is_file() and f"def {test}(" not in (ROOT / word).read_text(encoding="utf-8"):
                problems.append(f"{word} has no {test}")
            if missing and word.rstrip("/") not in WRITTEN:
                problems.append(f"path {word}")
    return problems


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute that can be reached from one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def name_problems(page: Path, text: str) -> list[str]:
    """Dotted names of the package in backticks, alone or called, that cannot be reached."""
    names = {
        match[1] for code in inline_code(text) if (match := re.fullmatch(r"(routingvl(?:\.\w+)+)(?:\(.*\))?", code))
    }
    return [f"name {name}" for name in sorted(names) if not resolves(name)]


class Parsed(Exception):
    """A command accepted its arguments; nothing has run yet."""


def parse_only(run: Callable[[list[str]], object], args: list[str]) -> None:
    """Call a program's entry point up to the point where its arguments are parsed; ValueError if they are not."""
    parsers = (argparse.ArgumentParser,)

    def stop_after(parse):
        def parse_args(self, args=None, namespace=None, **kwargs):
            parse(self, args, namespace, **kwargs)
            raise Parsed

        return parse_args

    def error(self, message):
        raise ConfigError(message)

    with pytest.MonkeyPatch.context() as patch:
        for parser in parsers:
            patch.setattr(parser, "parse_args", stop_after(parser.parse_args))
        patch.setattr(argparse.ArgumentParser, "error", error)
        with pytest.raises(Parsed):
            run(args)


def arguments(line: str) -> list[str]:
    """The words of a command line; brackets around what may be left out are dropped."""
    return shlex.split(re.sub(r"\[(-[^]]*)\]", r"\1", line), comments=True)


def command_problems(page: Path, text: str) -> list[str]:
    """Commands that do not exist or do not take the arguments shown: routingvl, python -m, python FILE, make."""
    problems = []
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in command_lines(text):
        line = re.sub(r"^(?:[A-Z_]+=\S+ +)+", "", line)
        words = arguments(line) if re.match(r"(routingvl|make|\S*python3?|accelerate) ", line) else []
        if words[:1] == ["accelerate"]:
            words = ["python", *words[2:]]
        match words:
            case ["routingvl", command, *rest] if re.fullmatch(r"[a-z][a-z-]*", command):
                problem = run_problem(command, rest)
            case ["make", *rest]:
                unknown = [word for word in rest if "=" not in word and word not in targets]
                problem = f"no target {unknown}" if unknown else None
            case [_, "-m", module, *rest] if module.split(".")[0] not in {*NOT_OURS, "venv", "pip"}:
                problem = module_problem(module, rest)
            case [python, file, *_] if python.endswith(("python", "python3")) and file.endswith(".py"):
                problem = None if (ROOT / file).is_file() else f"no file {file}"
            case _:
                continue
        if problem:
            problems.append(f"{line}: {problem}")
    return problems


def run_problem(command: str, rest: list[str]) -> str | None:
    """Why ``routingvl command`` would refuse these arguments, or None."""
    if command not in COMMANDS:
        return "no such command"
    keys = {word.removeprefix("--").partition("=")[0] for word in rest if re.match(r"--\w+\.", word)}
    if keys - set(known_keys()):
        return f"no setting {sorted(keys - set(known_keys()))}"
    if not rest:
        return None  # mentioned, not shown
    # What is looked up in the folder of a run, which is not there: the settings of a finished run, the run to resume.
    from_folder = r"--resume$" if command in ("train", "cache-features") else r"--\w+\."
    own = list(rest)
    for index in reversed([i for i, word in enumerate(own) if re.match(from_folder, word)]):
        del own[index : index + (1 if "=" in own[index] else 2)]
    module = importlib.import_module(f"routingvl.commands.{COMMANDS[command][0]}")
    return entry_problem(module.run, own)


def module_problem(name: str, rest: list[str]) -> str | None:
    """Why ``python -m name`` would refuse these arguments, or None."""
    if name.split(".")[0] in ("benchmarks", "kernels"):
        name = f"routingvl.{name}"
    if name == "routingvl":
        return run_problem(rest[0], rest[1:]) if rest else None
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return str(error)
    return entry_problem(module.main, rest)


def entry_problem(run: Callable[[list[str]], object], args: list[str]) -> str | None:
    """Why an entry point would refuse these arguments, or None; a lone "..." stands for arguments left out."""
    if "..." in args:
        return None
    try:
        parse_only(run, args)
    except ValueError as error:
        return str(error)
    except SystemExit as error:  # --help and the like end a program with 0
        return f"exit status {error.code}" if error.code else None
    return None


def snippet_problems(page: Path, text: str) -> list[str]:
    """Python snippets that do not compile, and imports of theirs that fail."""
    problems = []
    for block in fences(text, ("python",)):
        try:
            tree = ast.parse(textwrap.dedent(block))
        except SyntaxError as error:
            problems.append(f"snippet: {error}")
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            problems += [f"snippet imports {name}" for name in names if not resolves(name)]
    return problems


def setting_problems(page: Path, text: str) -> list[str]:
    """Settings in backticks, alone or with a value, that do not exist."""
    parts = "|".join(sorted({key.split(".")[0] for key in known_keys() if "." in key}))
    named = {
        match[1]
        for code in inline_code(text)
        if (match := re.fullmatch(rf"(?:--)?((?:{parts})\.\w+)(?:[ =:].*)?", code))
        and match[1].partition(".")[2] not in (*SUFFIXES, "log")  # train.log is a file
    }
    return [f"setting {key}" for key in sorted(named - set(known_keys()))]


def source_problems(page: Path, text: str) -> list[str]:
    """Paths of the repository that a program's comments and docstrings name, and full names in their references."""
    folders = "|".join(map(re.escape, FOLDERS))
    paths = re.findall(rf"(?<![\w./-])((?:{folders})/[\w./-]+\.(?:{'|'.join(SUFFIXES)}))\b", text)
    names = re.findall(r":\w+:`~?(routingvl(?:\.\w+)+)`", text)
    # A name in capitals stands for any file there.
    missing = [path for path in sorted(set(paths)) if not Path(path).stem.isupper() and not (ROOT / path).exists()]
    return [f"path {path}" for path in missing] + [f"name {name}" for name in sorted(set(names)) if not resolves(name)]


CHECKS = (
    link_problems,
    path_problems,
    name_problems,
    command_problems,
    snippet_problems,
    setting_problems,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page, check):
    assert check(page, page.read_text(encoding="utf-8")) == []


def sources() -> list[Path]:
    """The programs of the repository whose comments and docstrings are checked."""
    found = [
        path for folder in FOLDERS for pattern in ("*.py", "*.sh", "*.yaml") for path in (ROOT / folder).rglob(pattern)
    ]
    return [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / ".ci" / "run", *found]


def test_sources_name_what_exists():
    texts = {path: path.read_text(encoding="utf-8") for path in sources() if path != Path(__file__).resolve()}
    problems = {str(path.relative_to(ROOT)): source_problems(path, text) for path, text in texts.items()}
    assert {path: found for path, found in problems.items() if found} == {}


FAULTS = {
    "a link to [nothing](no-such-page.md)": link_problems,
    "a link to [no heading](docs/notation.md#no-such-heading)": link_problems,
    "# A heading\n\nand [another](#not-it)": link_problems,
    "`kernels/no_such_file.py`": path_problems,
    "`no_such_file.py`": path_problems,
    "`tests/test_docs.py::test_no_such_thing`": path_problems,
    "`routingvl.kernels.no_such_name`": name_problems,
    "`routingvl fly`": command_problems,
    "    routingvl evaluate runs/x --no-such-flag": command_problems,
    "    routingvl evaluate --split test": command_problems,  # no run
    "    routingvl train --train.no_such_setting 3": command_problems,
    "    routingvl train --config vqa-lora \\\n        --train.lr high": command_problems,
    "```sh\nroutingvl demo --slow\n```": command_problems,
    "`python -m benchmarks.no_such_module`": command_problems,
    "    python -m benchmarks.run --no-such-flag": command_problems,
    "    make no-such-target": command_problems,
    "    python examples/no_such_example.py": command_problems,
    "```python\nx = = 1\n```": snippet_problems,
    "```python\nfrom routingvl import no_such_name\n```": snippet_problems,
    "```python\nimport no_such_package\n```": snippet_problems,
    "`train.no_such_setting`": setting_problems,
    "`--model.no_such_setting 3`": setting_problems,
    "see tests/no_such_test.py": source_problems,
    "see :func:`~routingvl.kernels.no_such_name`": source_problems,
}


@pytest.mark.parametrize("text", FAULTS)
def test_each_check_finds_a_planted_fault(text):
    assert len(FAULTS[text](ROOT / "README.md", text)) == 1


def test_what_is_right_passes():
    text = """
# A heading: `code`, and more

[here](#a-heading-code-and-more), `kernels/routing.py`, `routingvl.kernels.ROUTINGS`, `train.lr`, `train.compile=true`

    ROUTINGVL_BACKEND=eager routingvl train --config vqa-lora --train.lr 1e-4 --routing.layers '[8, 9]'
    routingvl evaluate runs/x --split test --eval.num_beams 3      # a comment
    accelerate launch -m routingvl train --config ...
    python -m benchmarks.run --suite cpu

```python
from routingvl import inject
```
"""
    assert [problem for check in CHECKS for problem in check(ROOT / "README.md", text)] == []


# ----------------------------------------------------------------------------------------------- tables from the code


def test_the_routing_table_is_the_codes():
    found = re.search(r"<!-- routing table.*?-->\n(.*?)\n<!-- end", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None
    # A function that was added and is not published yet may be missing here; what stands here has to be true.
    shown, rows = found[1].splitlines(), routing_table().splitlines()
    assert len(shown) >= 7
    assert [row for row in rows if row in shown] == shown


DEMO_LINES = {
    "captioning, LoRA, CIDEr": ("caption", "lora", True),
    "captioning, Adapter, CIDEr": ("caption", "adapter", True),
    "VQA, LoRA, accuracy %": ("vqa", "lora", True),
    "captioning, LoRA, no visual prefix, CIDEr": ("caption", "lora", False),
}
SPEED_LINES = {
    "speed of a 768-wide LoRA layer, Intel Xeon": Line("", "cpu_layers", "linear_lora_m2040"),
    "speed of a 768-wide LoRA layer, AMD EPYC": Line("", "cpu_layers_amd", "linear_lora_m2040"),
}


def test_the_results_in_the_readme_are_the_committed_ones():
    table = (ROOT / "README.md").read_text().split("<!-- end of the study -->")[1].split("\n## ")[0]
    lines = [
        [cell.strip(" *") for cell in line.split("|")[1:-1]] for line in re.findall(r"^\|.*$", table, re.MULTILINE)
    ]
    (_, *routings), _, *rows = lines
    expected = {}
    found = summarise(load_search()["runs"], ("CIDEr", "accuracy"))
    for label, (task, method, prefix) in DEMO_LINES.items():
        score, digits = ("CIDEr", 2) if task == "caption" else ("accuracy", 1)
        variants = [found.get(Variant(task, method, name, prefix)) for name in routings]
        expected[label] = [
            f"{one['mean'][score]:.{digits}f} ± {one['std'][score]:.{digits}f}" if one else "" for one in variants
        ]
    for label, line in SPEED_LINES.items():
        expected[label] = [f"{line.values()[name]:.2f}" for name in routings]
    assert {label: [cell.removesuffix(" (blind)") for cell in cells] for label, *cells in rows} == expected


def test_the_documented_settings_are_the_schemas():
    text = (ROOT / "docs" / "configuration.md").read_text()
    documented = dict(re.findall(r"^\| `([\w.]+)` \| (.+?) \|", text, re.MULTILINE))
    defaults = flatten(RunConfig())
    assert set(documented) == set(known_keys()) == set(defaults)
    assert documented == {key: json.dumps(value) for key, value in defaults.items()}


def test_the_reliability_table_names_tests_that_are_there():
    """Each row has its test, and no file of tests is left out."""
    table = re.findall(r"^\|.*\|$", (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"), re.MULTILINE)
    rows = [row for row in table if row.count("|") == 4 and not row.startswith(("| fault", "|---", "| **"))]
    named = [re.findall(r"`(test_\w+\.py)::(test_\w+)`", row) for row in rows]
    assert len(rows) > 40
    assert [row for row, tests in zip(rows, named, strict=True) if not tests] == []
    folder = ROOT / "tests" / "reliability"
    for file, test in {pair for tests in named for pair in tests}:
        assert f"def {test}(" in (folder / file).read_text(encoding="utf-8"), f"{file}::{test}"
    assert {file for tests in named for file, _ in tests} == {path.name for path in folder.glob("test_*.py")}


def test_the_example_runs(monkeypatch, capsys):
    path = ROOT / "examples" / "own_training_loop.py"
    spec = importlib.util.spec_from_file_location("own_training_loop", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "STEPS", 40)
    assert example.final_loss("mul") < math.log(example.CLASSES)
    assert "parameters trained" in capsys.readouterr().out
