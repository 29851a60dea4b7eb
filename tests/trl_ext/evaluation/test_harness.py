"""Tasks of lm-evaluation-harness in `latent-reasoning eval`: a user's YAML files, which need no hub."""

import json
import shutil

import pytest
import yaml

from tests.kinds import saved
from tests.marks import slow
from trl_ext.evaluation import command, compare


ROWS = [
    {"question": f"{a}+{b}=", "answer": str(a + b), "choices": ["3", "5", "7"]} for a, b in ((1, 2), (2, 3), (3, 4))
]
COMMON = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}", "num_fewshot": 0}
WRITTEN = {
    "task": "written_sums",
    "output_type": "generate_until",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": [";"], "max_gen_toks": 6, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
CHOSEN = {
    "task": "chosen_sums",
    "output_type": "multiple_choice",
    "doc_to_target": "{{choices.index(answer)}}",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture
def tasks(tmp_path):
    """A folder with two tasks."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for task in (WRITTEN, CHOSEN):
        made = {**COMMON, **task, "dataset_kwargs": {"data_files": {"test": str(file)}}}
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(made))
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {method: str(saved(method, True, tmp_path_factory.mktemp(method))) for method in ("hrpo", "concept")}


def run(folder, out, tasks, *flags):
    assert command.main([folder, "--include_path", tasks, "--output", str(out), *flags]) == 0
    return json.loads((out / "eval.json").read_text())


def test_texts_and_choices_are_scored_and_saved(folders, tasks, tmp_path, capsys):
    """Concepts have likelihoods. The figures are those of the texts and choices that are saved."""
    found = run(folders["concept"], tmp_path, tasks, "--tasks", "written_sums", "chosen_sums")
    assert found["results"] == [] and not (tmp_path / "eval.png").exists()
    rows = {row["task"]: row for row in found["harness"]}
    assert [rows[name]["metric"] for name in ("written_sums", "chosen_sums")] == ["exact_match", "acc"]
    for name, row in rows.items():
        lines = [json.loads(line) for line in (tmp_path / f"samples_{name}_on.jsonl").read_text().splitlines()]
        assert [line["doc"]["question"] for line in lines] == [x["question"] for x in ROWS]
        if name == "written_sums":
            right = [float(line["filtered_resps"][0] == line["doc"]["answer"]) for line in lines]
        else:
            scores = [[choice[0][0] for choice in line["resps"]] for line in lines]
            right = [float(x.index(max(x)) == line["target"]) for x, line in zip(scores, lines, strict=True)]
        assert row["scores"] == right and row["value"] == pytest.approx(sum(right) / 3) and row["n"] == 3
    assert "tasks of lm-evaluation-harness" in capsys.readouterr().out


def test_states_without_a_likelihood_are_left_out_or_refused(folders, tasks, tmp_path):
    """By default HRPO's choices are those of plain decoding; asked for by name, thinking is refused."""
    found = run(folders["hrpo"], tmp_path, tasks, "--tasks", "written_sums", "chosen_sums")
    states = [(row["task"], row["state"]) for row in found["harness"]]
    assert sorted(states) == [("chosen_sums", "off"), ("written_sums", "off"), ("written_sums", "on")]
    with pytest.raises(ValueError, match="--tasks chosen_sums with latent steps 'on': "):
        run(folders["hrpo"], tmp_path, tasks, "--tasks", "chosen_sums", "--states", "on")


def test_a_system_prompt_comes_first(folders, tasks, tmp_path):
    folder = shutil.copytree(folders["hrpo"], tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }};{% endfor %}")
    flags = ["--tasks", "written_sums", "--states", "on"]
    for prompt, first in ((["--system_prompt", "8"], "8;1+2=;"), ([], "1+2=;")):
        run(str(folder), tmp_path, tasks, *flags, *prompt)
        line = json.loads((tmp_path / "samples_written_sums_on.jsonl").read_text().splitlines()[0])
        assert line["arguments"][0][0] == first


def test_two_evaluations_are_compared(folders, tasks, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    names = []
    for name in ("a", "b"):
        out = tmp_path / name
        out.mkdir()
        found = run(folders["hrpo"], out, tasks, "--tasks", "written_sums", "sums", "--held_out", "4")
        scores = [0.0, 1.0, 1.0] if name == "a" else [1.0, 1.0, 0.0]
        for row in found["harness"]:
            row.update(scores=scores, value=2 / 3)
        (out / "eval.json").write_text(json.dumps(found))
        names.append(str(out))
    capsys.readouterr()
    assert compare.main(names) == 0
    cells = [[cell.strip() for cell in line.split("│")[1:5]] for line in capsys.readouterr().out.splitlines()]
    assert ["written_sums (exact_match, none)", "3", "66.7%", "66.7%"] in cells and "sums" in [x[0] for x in cells if x]


@pytest.mark.parametrize(
    "flags, said",
    [
        slow(  # reads the thousands of files of the harness's own tasks
            ["--tasks", "writen_sums"],
            "--tasks writen_sums: there is no such task; did you mean written_sums?; ours are",
        ),
        (["--tasks", "written_sums", "--samples", "4"], "--samples 4: written_sums has its own in its YAML file"),
        (["--tasks", "written_sums", "--max_new_tokens", "4"], "--max_new_tokens 4: written_sums has its own in"),
        (["--tasks", "written_sums", "--include_path", "nowhere"], "--include_path nowhere: there is no such folder"),
    ],
)
def test_what_is_not_there_is_named(folders, tasks, tmp_path, flags, said):
    with pytest.raises(ValueError) as error:
        command.main([folders["hrpo"], "--include_path", tasks, "--output", str(tmp_path), *flags])
    assert str(error.value).startswith(said)


def test_a_task_without_its_data_is_named(folders, tasks, tmp_path):
    (tmp_path / "tasks" / "rows.jsonl").unlink()
    with pytest.raises(ValueError, match="--tasks written_sums: cannot be loaded: "):
        run(folders["hrpo"], tmp_path, tasks, "--tasks", "written_sums")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"metric_list": [{"metric": "exact_mach", "aggregation": "mean"}]}, "knows no metric 'exact_mach'"),
        ({"metric_list": [{"metric": "exact_match", "aggregation": "men"}]}, "the aggregation of 'exact_match'"),
        ({"num_fewshot": 3}, r"3 examples before each question \(num_fewshot\), and it has 2"),
        ({"generation_kwargs": {"until": 5}}, "until=5 in generation_kwargs: must be a text or a list of texts"),
        (
            {"generation_kwargs": {"max_gen_toks": "many"}},
            "max_gen_toks='many' in generation_kwargs: must be at least 1",
        ),
        ({"test_split": "tests"}, "cannot be loaded: KeyError: 'tests'"),
    ],
)
def test_a_wrong_task_is_told_before_it_runs(folders, tasks, tmp_path, change, said):
    file = tmp_path / "tasks" / "written_sums.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"--tasks written_sums: .*{said}"):
        run(folders["hrpo"], tmp_path, tasks, "--tasks", "written_sums")


def test_a_question_is_not_among_its_own_examples(folders, tasks, tmp_path):
    """The harness shows rows of the test split where a task names none for it."""
    run(folders["hrpo"], tmp_path, tasks, "--tasks", "written_sums", "--states", "on", "--num_fewshot", "2")
    lines = [json.loads(line) for line in (tmp_path / "samples_written_sums_on.jsonl").read_text().splitlines()]
    for line in lines:
        assert sorted(row["question"] for row in ROWS if row["question"] in line["arguments"][0][0]) == sorted(
            row["question"] for row in ROWS
        )
        assert line["arguments"][0][0].count(line["doc"]["question"]) == 1


@pytest.mark.parametrize(
    "text, said", [("task: mine\n x: [1", "mapping values"), ("task: mine\ninclude: no.yaml", "No such file")]
)
def test_a_file_that_cannot_be_read_is_told(folders, tasks, tmp_path, text, said):
    (tmp_path / "tasks" / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"--include_path .*mine.yaml cannot be read as a task: .*{said}"):
        run(folders["hrpo"], tmp_path, tasks, "--tasks", "mine")


def test_a_stop_that_a_tokenizer_cannot_spell_is_cut_afterwards(folders, tasks, tmp_path):
    """transformers cannot search a line break in the texts of a character tokenizer that has none."""
    file = tmp_path / "tasks" / "written_sums.yaml"
    task = yaml.safe_load(file.read_text())
    task["generation_kwargs"]["until"] = ["\n", "1"]
    file.write_text(yaml.safe_dump(task | {"task": "written/sums"}))
    run(folders["hrpo"], tmp_path, tasks, "--tasks", "written/sums", "--states", "on")
    lines = [json.loads(line) for line in (tmp_path / "samples_written_sums_on.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and not any("1" in line["filtered_resps"][0] for line in lines)
