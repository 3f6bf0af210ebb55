"""The study's parts on made-up data: splits, questions, arms, search, resuming, tables. Nothing is downloaded."""

import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from tiny import small_roberta, write_backbones, write_data

from examples.study import data, report, run
from examples.study.arms import ARMS, STUDIES, Arm, Job, Study, find_arm
from examples.study.rows import COMMITTED, Rows, best_rate, read_rows, results, study_table
from examples.study.run import Runner, check, main, make_runner
from routingvl import VisualContext, inject

TAGS = tuple("red round large old flat bright soft thin".split())
STUDY = Study(
    "tags", "made up", "%", "classify", "accuracy", "roberta", rates=(0.1, 0.2, 0.3), steps=2, batch=4, arms=()
)


@pytest.fixture(scope="module")
def concepts() -> list[data.Concept]:
    drawn = random.Random(0)
    return [data.Concept(f"{n:05x}", f"thing {n}", frozenset(drawn.sample(TAGS, 2))) for n in range(400)]


# ------------------------------------------------------------------------------------------------------------- the data


def test_no_concept_is_in_two_splits(concepts, tmp_path):
    for kind, writer in data.WRITERS.items():
        (tmp_path / kind).mkdir()
        writer(concepts, tmp_path / kind)
    found = defaultdict(set)
    for split in data.SPLITS:
        lines = (tmp_path / "tags" / f"{split}.jsonl").read_text().splitlines()
        captions = json.loads((tmp_path / "captions" / f"captions_{split}_karpathy.json").read_text())
        pictures = [json.loads(line)["image"] for line in lines] + [image["file_name"] for image in captions["images"]]
        for picture in pictures:
            found[Path(picture).stem].add(split)
        assert pictures
    assert len(found) == len(concepts)
    assert {len(splits) for splits in found.values()} == {1}


def test_neither_question_nor_picture_tells_the_answer(concepts):
    for split in data.SPLITS:
        asked = data.questions(concepts, split, set(TAGS))
        assert len({(tag, concept.code) for tag, concept, _ in asked}) == len(asked) > 50
        assert all((tag in concept.tags) is answer for tag, concept, answer in asked)
        for part in (0, 1):
            yes, no = (Counter(row[part] for row in asked if row[2] is answer) for answer in (True, False))
            assert yes == no


def test_questions_that_cannot_be_balanced_are_an_error():
    every = [data.Concept(f"{n:05x}", "thing", frozenset(["red"])) for n in range(50)]
    with pytest.raises(ValueError, match="no exchange"):
        data.questions(every, "train", {"red"})


def test_rare_tags_are_not_asked_about(concepts):
    rare = data.Concept("00000", "thing", frozenset(["rare"]))
    assert data.asked_tags([*concepts, rare]) == set(TAGS)


# ------------------------------------------------------------------------------------------------------------- the arms


def test_names_are_unique_and_studies_name_arms_that_are_there():
    names = [arm.name for arm in ARMS]
    assert len(set(names)) == len(names)
    assert {name for study in STUDIES for name in study.arms} <= set(names)


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_each_arm_trains_something(arm, tmp_path):
    for study in STUDIES:
        config = study.config(Job(arm, 1e-3, 1), tmp_path)
        assert (config.train.lr, config.train.seed, config.model.visual_prefix) == (1e-3, 1, arm.prefix)
    context = VisualContext()
    model = small_roberta()
    inject(model, arm.config(), context)
    ids, width = torch.randint(3, 48, (2, 5)), model.config.hidden_size
    with context.bind(torch.randn(2, 1, width)):
        model(input_ids=ids).last_hidden_state.sum().backward()
    assert any(
        p.grad is not None and p.grad.abs().sum() > 0
        for n, p in model.named_parameters()
        if "lora" in n or "sampler" in n
    )


def test_a_key_tells_apart_what_decides_a_run():
    study, job = STUDIES[0], Job(ARMS[0], 1e-3, 0)
    others = [Job(ARMS[1], 1e-3, 0), Job(ARMS[0], 1e-2, 0), Job(ARMS[0], 1e-3, 1)]
    keys = {
        study.key(job, "a"),
        study.key(job, "b"),
        STUDIES[1].key(job, "a"),
        *(study.key(one, "a") for one in others),
    }
    assert len(keys) == 6
    assert study.key(job, "a") == study.key(Job(Arm("x", "X", ARMS[0].routing), 1e-3, 0), "a")


# ---------------------------------------------------------------------------------------------- search, rows and tables


class Trials:
    """Scores by arm, rate and seed in place of training; it counts what was asked for, and may be interrupted."""

    def __init__(self, last: int = 1000) -> None:
        self.trained, self.tested, self.last = [], [], last

    def train(self, job: Job) -> dict:
        if len(self.trained) == self.last:
            raise KeyboardInterrupt
        self.trained.append(job)
        best = {"lora-none": 0.2, "lora-mul": 0.3}[job.arm.name]
        return {"validation": 70 - 100 * abs(job.lr - best), "trainable": 1234}

    def test(self, job: Job) -> dict:
        self.tested.append(job)
        made_with = {"git": {"commit": 40 * "a", "dirty": False}, "versions": {"torch": "2", "transformers": "5"}}
        made_with["machine"] = "Linux"
        return {**made_with, "test": 60.0 + 10 * (job.arm.name == "lora-mul") + job.seed, "shuffled": 50.0}

    def search(self, path: Path, study: Study = STUDY) -> Rows:
        rows = Rows(path)
        Runner(study, rows, "data", self.train, self.test, lambda line: None).search(
            [find_arm("lora-none"), find_arm("lora-mul")], study.seeds
        )
        return rows


def test_the_search_tests_the_chosen_rate_once_and_the_first_seed_comes_first(tmp_path):
    trials = Trials()
    trials.search(tmp_path / "rows.jsonl")
    assert [(job.arm.name, job.lr, job.seed) for job in trials.tested] == [
        (arm, lr, seed) for seed in (0, 1, 2) for arm, lr in (("lora-none", 0.2), ("lora-mul", 0.3))
    ]
    assert [job.seed for job in trials.trained] == [0] * 6 + [1, 1, 2, 2]


def test_a_stopped_search_goes_on_and_ends_the_same(tmp_path):
    whole = Trials().search(tmp_path / "whole.jsonl")
    stopped, rest = Trials(last=4), Trials()
    with pytest.raises(KeyboardInterrupt):
        stopped.search(tmp_path / "rows.jsonl")
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"kind": "run", "key": "cut o')
    rest.search(tmp_path / "rows.jsonl")
    assert len(stopped.trained) + len(rest.trained) == 10

    def timeless(rows):
        return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]

    assert timeless(read_rows(tmp_path / "rows.jsonl")) == timeless(whole.known.values())


def test_the_best_rate_is_chosen_by_validation():
    rows = [{"lr": 3.0, "validation": 1.0, "test": 9}, {"lr": 2.0, "validation": 5.0}, {"lr": 1.0, "validation": 5.0}]
    assert best_rate(rows) == 1.0


def test_the_table_has_mean_and_spread(tmp_path):
    rows = list(Trials().search(tmp_path / "rows.jsonl").known.values())
    table = study_table(rows, STUDY).splitlines()
    assert table[2:] == [
        "| LoRA none | 1,234 | 0.2 | 61.0 ± 1.0 | 50.0 ± 0.0 |  | 3 | 0.0 |",
        "| LoRA mul | 1,234 | 0.3 (edge) | 71.0 ± 1.0 | 50.0 ± 0.0 | +10.0, ranges apart | 3 | 0.0 |",
    ]
    assert results([row | {"key": "of other settings"} for row in rows], STUDY) == []
    other = Job(find_arm("lora-mul"), 0.2, 0)  # was best before the grid grew
    old = {"kind": "test", "lr": 0.2, "test": 1.0, "key": STUDY.key(other, rows[0]["data"])}
    assert study_table([*rows, rows[-1] | old], STUDY).splitlines() == table


@pytest.mark.parametrize(("moved", "fine"), [(0, True), (2.5, True), (6, False)])
def test_check_compares_with_the_committed_spread(tmp_path, moved, fine):
    rows = list(Trials().search(tmp_path / "rows.jsonl").known.values())
    lines, again = [], Trials()
    runner = Runner(
        STUDY, Rows(tmp_path / "new.jsonl"), "data", again.train, lambda job: {"test": 70 + moved}, lines.append
    )
    (found,) = (result for result in results(rows, STUDY) if result.arm.name == "lora-mul")
    assert check(runner, found) is fine
    assert ("equal" if moved == 0 else "outside" if not fine else "within") in lines[0]
    assert again.trained == [Job(find_arm("lora-mul"), 0.3, 0)]


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        (["adapter-add"], ["tags adapter-add"]),  # captions have none of it
        (["lora-mul", "lora-none"], ["tags lora-none", "tags lora-mul", "captions lora-none", "captions lora-mul"]),
    ],
)
def test_check_makes_what_is_committed_of_an_arm(tmp_path, monkeypatch, capsys, asked, made):
    tests, prepared = {}, []
    for study in STUDIES:
        tests |= {(study.name, result.arm.name): result.tests[0] for result in results(read_rows(COMMITTED), study)}

    def runner(study, work, rows, runs):
        def test(job):
            return tests[study.name, job.arm.name]

        return Runner(study, rows, "data", lambda job: {}, test)

    monkeypatch.setattr(run, "make_runner", runner)
    monkeypatch.setattr(run, "prepare_all", lambda work, names: prepared.extend(names))
    assert main([str(tmp_path), "--check", *asked]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("-lr")[0] for line in lines] == made
    assert all(line.endswith(": equal") for line in lines)
    assert prepared == list(dict.fromkeys(one.split()[0] for one in made))


def test_check_of_an_arm_without_results_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="has no result of adapter-mul-bare for tags, captions"):
        main([str(tmp_path), "--check", "adapter-mul-bare"])


def test_the_pages_hold_the_committed_rows():
    for page, text in report.pages(read_rows(COMMITTED)).items():
        assert page.read_text(encoding="utf-8") == text, "run python -m examples.study.report"


def test_the_readme_has_the_routing_functions_side_by_side(tmp_path):
    rows = list(Trials().search(tmp_path / "rows.jsonl").known.values())
    assert report.method_lines(rows, STUDY, "LoRA", "lora") == [
        "| made up, LoRA, % | 61.0 ± 1.0 |  | 71.0 ± 1.0 |" + "  |" * (len(report.COLUMNS) - 3),
        "| with another's picture | 50.0 ± 0.0 |  | 50.0 ± 0.0 |" + "  |" * (len(report.COLUMNS) - 3),
    ]
    assert report.method_lines(rows, STUDY, "Adapter", "adapter") == []


def test_the_pages_are_written_between_their_marks(tmp_path):
    rows = list(Trials().search(tmp_path / "rows.jsonl", STUDIES[0]).known.values())
    readme, study = report.pages(rows).values()
    assert "over 3 seeds" in readme
    assert f"| {STUDIES[0].title}, LoRA, accuracy % | 61.0 ± 1.0 |" in readme
    assert "Made with aaaaaaa; torch 2, transformers 5; Linux." in study
    without = (page.read_text(encoding="utf-8") for page in (report.ROOT / "README.md", report.ROOT / "docs/study.md"))
    for text, before in zip((readme, study), without, strict=True):
        assert report.BLOCK.sub("", text) == report.BLOCK.sub("", before) != text


def test_wrong_arguments_end_the_program(capsys):
    with pytest.raises(SystemExit):
        main(["work", "--arms", "lora-sum"])
    assert "lora-sum" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- a run, really made


def test_a_run_is_trained_and_tested_and_repeats(tmp_path):
    write_backbones(tmp_path)
    write_data(tmp_path / "coco")
    (tmp_path / "images").mkdir()
    (tmp_path / "coco/val2014").rename(tmp_path / "images/val2014")
    (tmp_path / "study/tags").mkdir(parents=True)
    (tmp_path / "vit").rename(tmp_path / "study/vit")
    for split in data.SPLITS:
        (tmp_path / f"coco/{split}.jsonl").rename(tmp_path / f"study/tags/{split}.jsonl")
    job, made = Job(find_arm("lora-mul"), 1e-2, 0), []
    for number in (1, 2):
        runner = make_runner(STUDY, tmp_path, Rows(tmp_path / f"rows{number}.jsonl"), f"runs{number}")
        made.append((runner.train(job), runner.test(job)))
    assert made[0] == made[1]
    run, test = made[0]
    assert run["steps"] == STUDY.steps
    assert run["trainable"] > 0
    assert 0 <= test["shuffled"] <= 100
    assert test["n"] == 2 * 5  # two questions about each of the test pictures
