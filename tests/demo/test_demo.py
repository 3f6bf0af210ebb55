"""The embedded demo: fairness of its search, resuming, the report, and one small run of everything."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from routingvl.config import ConfigError
from routingvl.demo.backbones import BackboneConfig, build_backbones
from routingvl.demo.document import Document, Sample, markdown_table
from routingvl.demo.jobs import ResultStore, run_jobs, run_names
from routingvl.demo.main import DemoOptions, prepare_folder, rates_of, run, write_data
from routingvl.demo.report import at_best_rate
from routingvl.demo.search import (
    COMMITTED,
    against_none,
    at_the_edge,
    best_rates,
    load_search,
    search,
    summarise,
    variant_of,
    write_search,
)
from routingvl.demo.shapes import ShapesConfig
from routingvl.demo.variants import QUICK_VARIANTS, SCORES, VARIANTS, DemoSettings, Job, Variant, settings_to_dict
from routingvl.kernels import ROUTINGS

TINY = DemoSettings(
    data=ShapesConfig(
        train_images=150, val_images=12, test_images=12, train_questions=400, val_questions=42, test_questions=42
    ),
    backbones=BackboneConfig(
        width=32, mlp_width=32, vision_layers=1, text_layers=1, examples=120, vision_steps=2, mlm_steps=2, lm_steps=2
    ),
    rank=4,
    steps={"caption": 4, "vqa": 4},
    batch={"caption": 8, "vqa": 8},
    validations=2,
    rates={"caption": (1e-2,), "vqa": (3e-3,)},
    max_rates=1,
)
NONE, MUL = Variant("caption", "lora", "none"), Variant("caption", "lora", "mul")


def record_of(job: Job, validation: float, test: float) -> dict:
    """A finished job's record as the search sees it, with a made-up score."""
    scores = {"caption": {"CIDEr": test, "BLEU-4": test / 10, "exact": 0.5}, "vqa": {"accuracy": test}}
    return {
        "key": f"{job}",
        **asdict(job),
        "validation": validation,
        "test": scores[job.variant.task],
        "curve": [(1, validation)],
        "seconds": {"train": 1.0, "evaluate": 1.0, "all": 2.0},
        "trainable": 10,
        "total": 100,
        "predictions": {},
    }


def tiny_search(variants=VARIANTS, settings=TINY) -> dict:
    """A search result with one made-up run a variant."""
    runs = [record_of(Job(variant, settings.rates[variant.task][0], 0), 1.0, 1.0) for variant in variants]
    return {"settings": settings_to_dict(settings), "environment": fake_environment(), "runs": runs}


def fake_environment() -> dict:
    hardware = {"cpus": 2, "platform": "test"}
    return {"time": "now", "python": "3", "packages": {"torch": "2"}, "hardware": hardware, "git": None}


class FakeTraining:
    """Stands in for training: the validation score of a job is a function of the job; counts what was asked for."""

    def __init__(self, score) -> None:
        self.score = score
        self.jobs: list[Job] = []

    def __call__(self, jobs):
        self.jobs += [job for job in jobs if job not in self.jobs]
        return [record_of(job, self.score(job), self.score(job)) for job in jobs]


def peak_at(rates):
    """A score that falls off, in ratio, around the best rate of each routing function."""
    return lambda job: 10 - abs(job.lr / rates[job.variant.routing] - 1)


SETTINGS = replace(TINY, rates={"caption": (5e-3, 1e-2, 2e-2), "vqa": (3e-3,)}, max_rates=5, seeds=(0, 1, 2))


def test_search_gives_every_variant_the_same_rates_and_seeds():
    training = FakeTraining(peak_at({"none": 1e-2, "mul": 1e-2}))
    records = search(SETTINGS, training, [NONE, MUL])
    for variant in (NONE, MUL):
        tried = sorted((r["lr"], r["seed"]) for r in records if variant_of(r) == variant)
        assert tried == [(5e-3, 0), (1e-2, 0), (1e-2, 1), (1e-2, 2), (2e-2, 0)]


def test_a_best_rate_on_the_edge_widens_the_grid_for_all():
    training = FakeTraining(peak_at({"none": 4e-2, "mul": 1e-2}))
    records = search(SETTINGS, training, [NONE, MUL])
    rates = {variant: {r["lr"] for r in records if variant_of(r) == variant} for variant in (NONE, MUL)}
    assert rates[NONE] == rates[MUL] == {5e-3, 1e-2, 2e-2, 4e-2, 8e-2}
    assert best_rates(records) == {NONE: 4e-2, MUL: 1e-2}


def test_a_best_rate_on_the_edge_is_reported():
    runs = [record_of(Job(NONE, lr, 0), lr, 0) for lr in (5e-3, 1e-2, 2e-2)]
    runs += [record_of(Job(MUL, lr, 0), -abs(lr - 1e-2), 0) for lr in (5e-3, 1e-2, 2e-2)]
    assert at_the_edge(runs) == [NONE]


def test_the_grid_stops_growing_at_max_rates():
    training = FakeTraining(peak_at({"none": 1.0, "mul": 1.0}))
    search(SETTINGS, training, [NONE, MUL])
    assert len({job.lr for job in training.jobs}) == SETTINGS.max_rates


def test_a_blind_variant_grows_no_grid():
    blind = Variant("caption", "lora", "none", prefix=False)
    training = FakeTraining(peak_at({"none": 1.0, "mul": 1e-2}))
    search(SETTINGS, training, [blind, MUL])
    assert {job.lr for job in training.jobs} == set(SETTINGS.rates["caption"])


def test_the_rate_is_chosen_on_validation_not_on_test():
    good_on_validation = record_of(Job(MUL, 1e-2, 0), validation=2.0, test=1.0)
    good_on_test = record_of(Job(MUL, 2e-2, 0), validation=1.0, test=9.0)
    assert best_rates([good_on_test, good_on_validation]) == {MUL: 1e-2}


def test_summary_and_comparison_by_hand():
    runs = [record_of(Job(NONE, 1e-2, seed), 1.0, score) for seed, score in enumerate((4.0, 5.0, 6.0))]
    runs += [record_of(Job(MUL, 1e-2, seed), 1.0, score) for seed, score in enumerate((7.0, 8.0, 6.0))]
    found = summarise(runs, ("CIDEr",))
    assert found[NONE]["mean"]["CIDEr"] == 5
    assert found[NONE]["std"]["CIDEr"] == pytest.approx(1)
    assert str(against_none(MUL, found)) == "+40.0 %, ranges overlap"
    assert against_none(NONE, found) is None
    runs[-1]["test"]["CIDEr"] = 9.0
    assert str(against_none(MUL, summarise(runs, ("CIDEr",)))) == "+60.0 %, ranges apart"
    assert str(against_none(MUL, summarise([runs[0], runs[3]], ("CIDEr",)))) == "+75.0 %, one seed"


def test_a_result_store_survives_a_torn_last_line(tmp_path):
    path = tmp_path / "results.jsonl"
    store = ResultStore(path)
    store.add({"key": "a", "value": 1})
    with path.open("a") as file:
        file.write('{"key": "b", "val')
    again = ResultStore(path)
    assert list(again.records) == ["a"]
    again.add({"key": "c", "value": 2})
    assert list(ResultStore(path).records) == ["a", "c"]


def test_the_key_of_a_job_depends_on_what_decides_its_numbers():
    job = Job(MUL, 1e-2, 0)
    same = Job(Variant("caption", "lora", "mul"), 1e-2, 0)
    others = [Job(NONE, 1e-2, 0), Job(MUL, 2e-2, 0), Job(MUL, 1e-2, 1), Job(replace(MUL, prefix=False), 1e-2, 0)]
    keys = {other.key(TINY) for other in others}
    keys |= {job.key(replace(TINY, steps={"caption": 5, "vqa": 4})), job.key(replace(TINY, data=ShapesConfig(seed=3)))}
    assert job.key(TINY) == same.key(TINY)
    assert len(keys | {job.key(TINY)}) == 7


def test_a_variant_that_no_search_has_tried_gets_the_default_rate():
    found = [record_of(Job(NONE, 4e-2, 0), 1.0, 1.0)]
    assert rates_of({"runs": found}, SETTINGS, [NONE, MUL]) == {NONE: 4e-2, MUL: 1e-2}


def test_every_routing_function_is_a_variant_of_each_task():
    for task in SCORES:
        assert {variant.routing for variant in VARIANTS if variant.task == task} == set(ROUTINGS)


def test_run_folders_are_named_for_people():
    blind = replace(NONE, prefix=False)
    jobs = [Job(MUL, 1e-2, 0), Job(blind, 1e-2, 1), Job(NONE, 1e-2, 0), Job(NONE, 2e-2, 0)]
    assert list(run_names(jobs).values()) == [
        "caption-lora-mul-seed0",
        "caption-lora-none-noprefix-seed1",
        "caption-lora-none-lr0.01-seed0",
        "caption-lora-none-lr0.02-seed0",
    ]


def test_a_missing_search_result_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"search\.json is missing"):
        load_search(tmp_path / "search.json")


def test_search_file_holds_every_run_once(tmp_path):
    record = record_of(Job(MUL, 1e-2, 0), 1.0, 2.0)
    write_search(tmp_path / "search.json", [record, record], TINY, {"vit": {"parameters": 1}})
    content = load_search(tmp_path / "search.json")
    assert [run["test"] for run in content["runs"]] == [record["test"]]
    assert content["settings"] == settings_to_dict(TINY)
    assert content["environment"]["packages"]["torch"]


def test_options_exclude_each_other():
    with pytest.raises(ConfigError, match="quick"):
        DemoOptions(quick=True, full=True)
    with pytest.raises(ConfigError, match="workers"):
        DemoOptions(workers=0)


def test_a_folder_that_no_demo_made_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="no demo made it"):
        prepare_folder(tmp_path, fresh=True)
    assert (tmp_path / "thesis.tex").exists()


def test_fresh_empties_a_demo_folder(tmp_path):
    prepare_folder(tmp_path / "demo", fresh=False)
    (tmp_path / "demo" / "results.jsonl").touch()
    prepare_folder(tmp_path / "demo", fresh=False)
    assert (tmp_path / "demo" / "results.jsonl").exists()
    prepare_folder(tmp_path / "demo", fresh=True)
    assert not (tmp_path / "demo" / "results.jsonl").exists()


def test_document_escapes_html_and_lines_up_markdown(tmp_path):
    document = Document("a < b")
    document.table(["name", "value"], [["x & y", "1.5"], ["z", "10"]])
    document.samples([Sample("picture", b"png", [("said", "<b>", False)])])
    document.write_html(tmp_path / "report.html")
    document.write_markdown(tmp_path / "report.md")
    html = (tmp_path / "report.html").read_text()
    assert "a &lt; b" in html
    assert "x &amp; y" in html
    assert "&lt;b&gt;" in html
    assert 'src="data:image/png;base64,cG5n"' in html
    assert (tmp_path / "figures" / "sample-00.png").read_bytes() == b"png"
    assert markdown_table(["n", "value"], [["a", "1.5"], ["b", "10"]]).splitlines()[2] == "| a |   1.5 |"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The quick demo with tiny settings, run through once: its folder and what it said."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    said: list[str] = []
    run(DemoOptions(output=str(folder), quick=True), TINY, committed=tiny_search(), say=said.append)
    return folder, said


def test_the_whole_demo_runs_small(finished):
    folder, said = finished
    records = list(ResultStore(folder / "results.jsonl").records.values())
    assert {variant_of(record) for record in records} == set(QUICK_VARIANTS)
    for record in records:
        score = SCORES[record["variant"]["task"]]
        assert 0 <= record["test"][score] <= 100
        assert 0 <= record["shuffled"][score] <= 100
        assert [step for step, _ in record["curve"]] == [2, 4]
        assert record["predictions"]
        assert 0 < record["trainable"] < record["total"]
    assert any(str(folder / "report.html") in line for line in said)


def test_the_report_is_self_contained_and_shows_every_variant(finished):
    folder, _ = finished
    html = (folder / "report.html").read_text()
    assert "http://" not in html
    assert "https://" not in html
    assert html.count("data:image/png;base64,") >= 3
    markdown = (folder / "report.md").read_text()
    for variant in QUICK_VARIANTS:
        assert f"| {variant.title}" in markdown
    for name in ("scores", "curves"):
        assert (folder / "figures" / f"{name}.png").stat().st_size > 1000


def test_run_folders_hold_the_runs(finished):
    folder, _ = finished
    found = {path.name for path in (folder / "runs").iterdir() if (path / "config.yaml").is_file()}
    assert found == {Job(variant, 1e-2, 0).name(with_rate=False) for variant in QUICK_VARIANTS}


def test_a_function_without_a_committed_search_is_shown_without_one(finished):
    folder, _ = finished
    searched = [variant for variant in QUICK_VARIANTS if variant.routing == "none"]
    run(DemoOptions(output=str(folder), quick=True), TINY, committed=tiny_search(searched), say=lambda line: None)
    report = (folder / "report.md").read_text()
    assert "has not tried Captioning, Adapter mul at 0.01; VQA, LoRA mul at 0.003." in report
    rows = [[cell.strip() for cell in line.split("|")] for line in report.splitlines() if line.startswith("| LoRA mul")]
    assert [("no search yet" in row) for row in rows if "0.003" in row] == [True]


def test_a_second_run_uses_what_is_finished(finished):
    folder, _ = finished
    before = (folder / "results.jsonl").read_bytes()
    said: list[str] = []
    run(DemoOptions(output=str(folder), quick=True), TINY, committed=tiny_search(), say=said.append)
    assert (folder / "results.jsonl").read_bytes() == before
    assert any("4 of 4 runs are already" in line for line in said)


def test_an_interrupted_demo_trains_only_what_is_missing(finished, tmp_path):
    folder, _ = finished
    rows = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_text("".join(rows[:3]))
    store = ResultStore(tmp_path / "results.jsonl")
    lost = json.loads(rows[3])
    jobs = [Job(variant_of(json.loads(row)), json.loads(row)["lr"], json.loads(row)["seed"]) for row in rows]
    records = run_jobs(jobs, TINY, folder, store, workers=1, say=lambda line: None)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 4
    # Trained again, the lost run comes out the same: settings and seed decide everything.
    assert records[3]["test"] == lost["test"]
    assert records[3]["losses"] == lost["losses"]


def test_a_failing_run_is_named_and_the_others_are_kept(finished, tmp_path):
    folder, _ = finished
    broken = replace(TINY, rank=0)
    store = ResultStore(tmp_path / "results.jsonl")
    with pytest.raises((RuntimeError, ConfigError), match="rank"):
        run_jobs([Job(MUL, 1e-2, 0)], broken, folder, store, workers=1, say=lambda line: None)
    assert not store.records


needs_committed = pytest.mark.skipif(not COMMITTED.is_file(), reason="no committed search")


@needs_committed
def test_the_committed_search_is_fair_and_of_these_settings():
    content = load_search()
    settings = DemoSettings()
    assert content["settings"] == settings_to_dict(settings)
    best = best_rates(content["runs"])
    searched = {variant.routing for variant in best}  # a function may be newer than the search
    assert set(best) == {variant for variant in VARIANTS if variant.routing in searched}
    tried = {v: {r["lr"] for r in content["runs"] if variant_of(r) == v and r["seed"] == 0} for v in best}
    for task in SCORES:
        grids = {frozenset(rates) for variant, rates in tried.items() if variant.task == task}
        assert len(grids) == 1
    for variant, lr in best.items():
        seeds = {r["seed"] for r in content["runs"] if variant_of(r) == variant and r["lr"] == lr}
        assert seeds == set(settings.seeds)


@needs_committed
def test_the_committed_search_shows_the_gain_of_mul():
    found = summarise(load_search()["runs"], ("CIDEr",))
    for method in ("lora", "adapter"):
        assert against_none(Variant("caption", method, "mul"), found).gain > 0


@pytest.mark.slow
@needs_committed
def test_mul_beats_no_routing_in_captioning(tmp_path):
    """The one claim about quality that a test makes: adapters, each at its own best rate, in fewer steps."""
    settings = replace(
        DemoSettings(),
        data=ShapesConfig(train_images=2000, train_questions=700, val_images=60, test_images=150),
        backbones=BackboneConfig(examples=4000, vision_steps=300, mlm_steps=1, lm_steps=150),
        steps={"caption": 150, "vqa": 1},
        validations=1,
    )
    variants = [Variant("caption", "adapter", routing) for routing in ("none", "mul")]
    jobs = [Job(variant, lr, 0) for variant, lr in rates_of(load_search(), settings, variants).items()]
    write_data(tmp_path, settings.data)
    build_backbones(tmp_path / "backbones", settings.backbones)
    store = ResultStore(tmp_path / "results.jsonl")
    none, mul = run_jobs(jobs, settings, tmp_path, store, workers=2, say=lambda line: None)
    assert mul["test"]["CIDEr"] > none["test"]["CIDEr"]


def test_full_report_takes_one_record_a_variant():
    runs = [record_of(Job(MUL, lr, seed), lr, seed) for lr, seed in ((1e-2, 0), (2e-2, 0), (2e-2, 1), (2e-2, 2))]
    assert at_best_rate(runs)[MUL]["lr"] == 2e-2
    assert at_best_rate(runs)[MUL]["seed"] == 0
