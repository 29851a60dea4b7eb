"""`latent-reasoning eval`, as a user runs it."""

import importlib.util
import json
import shutil

import pytest

from tests.kinds import saved
from tests.processes import fresh
from trl_ext.cli.console import PlainConsole
from trl_ext.evaluation import command, tasks
from trl_ext.evaluation.results import result_of
from trl_ext.tasks import arithmetic, equations
from trl_ext.tasks.evaluation import evaluate
from unsloth_ext.common.text_model import TextModel


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}

    def get(method):
        if method not in found:
            found[method] = saved(method, True, tmp_path_factory.mktemp(method))
        return found[method]

    return get


FILES = {
    "gsm8k": [{"question": "1+1?", "answer": "so <<1+1=2>>2 #### 2"}, {"question": "1+2?", "answer": "#### 3"}],
    "gsm_hard": [{"input": "1+1?", "target": 2.0, "code": ""}, {"input": "1+2?", "target": 3}],
    "svamp": [
        {"ID": "a", "Body": "One", "Question": "1+1?", "Answer": 2.0},
        {"question_concat": "1+2?", "Answer": "3"},
    ],
    "multiarith": [{"iIndex": 0, "sQuestion": " 1+1? ", "lSolutions": [2.0]}, {"question": "1+2?", "final_ans": "3"}],
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", FILES)
def test_published_files_are_read(tmp_path, name):
    rows = tasks.read_questions(name, write(tmp_path / "x.jsonl", FILES[name]))
    assert [row["answer"] for row in rows] == ["2", "3"]
    assert [row["question"] for row in rows] == ["One. 1+1?" if name == "svamp" else "1+1?", "1+2?"]
    plain = tasks.read_questions(name, write(tmp_path / "y.jsonl", [{"question": "1+1?", "answer": "2.5"}]))
    assert plain == [{"question": "1+1?", "answer": "2.5", "solution": ""}]


@pytest.mark.parametrize(
    "row, said",
    [
        ({"q": "x", "a": "1"}, "line 2: has the columns q, a, which are not those of svamp"),
        ({"question": "x", "answer": "one"}, "line 2: there is not exactly one number in the answer 'one'"),
        ({"question": " ", "answer": "1"}, "line 2: the question is empty or not a text"),
        ({"question": "x", "answer": [3]}, "line 2: there is not exactly one number in the answer"),
        ({"Body": None, "Question": "x?", "Answer": 3}, "line 2: the question is empty or not a text: None"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, said):
    with pytest.raises(ValueError, match=said):
        tasks.read_questions("svamp", write(tmp_path / "x.jsonl", [FILES["svamp"][0], row]))


@pytest.mark.parametrize("found", [[1, 2], [], {"a": 1}, True])
def test_what_is_not_one_number_is_no_answer(tmp_path, found):
    rows = [{"sQuestion": "x", "lSolutions": found}]
    with pytest.raises(ValueError, match="line 1: there is not exactly one number in the answer"):
        tasks.read_questions("multiarith", write(tmp_path / "x.jsonl", rows))


@pytest.mark.parametrize(
    "number, plain",
    [
        (1e-7, "0.0000001"),
        (1.5e-05, "0.000015"),
        (1e20, "100000000000000000000"),
        ("1,000.50", "1000.5"),
        ("15.0", "15"),
        (20, "20"),
    ],
)
def test_numbers_are_written_out(tmp_path, number, plain):
    """math-verify does not read 1e-07."""
    (row,) = tasks.read_questions("gsm_hard", write(tmp_path / "x.jsonl", [{"input": "x", "target": number}]))
    assert row["answer"] == plain


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--seed", "1" + "0" * 30], "--seed 1000000"),
        (["--answer_delimiter", ""], "--answer_delimiter ''"),
        (["--states", "on", "--ablations"], "--states and --ablations: give one of them"),
        (["--max_new_tokens", "100000"], "sums: answers of up to 100000 tokens, and the model has 256 positions"),
        (["--tasks", "gsm8k", "--data", "gsm8k=a", "gsm8k=b"], "--data gsm8k=b: gsm8k has a file already, a"),
        (["--tasks", "gsm8k"], "--tasks gsm8k: its file is yours: --data gsm8k=FILE"),
        (["--data", "gsm8k=x.jsonl"], "--data gsm8k=x.jsonl: gsm8k is not among --tasks"),
        (["--tasks", "gsm8k", "--data", "gsm8k"], "--data gsm8k: write TASK=FILE"),
        (["--tasks", "svamp", "--data", "swamp=x"], "--data swamp=x: swamp reads no file; did you mean svamp?"),
        (["--states", "of"], "--states of: a hrpo model has on, zero, shuffle, noise, interpolate, off"),
        (["--samples", "0"], "samples=0: must be at least 1"),
        (["--temperature", "0"], "temperature=0"),
        (["--num_fewshot", "2"], "--num_fewshot 2: sums has no solved examples"),
        (["--system_prompt", "Add."], "--system_prompt: "),
    ],
)
def test_wrong_flags(folders, flags, said):
    with pytest.raises(ValueError) as error:
        command.main([str(folders("hrpo")), *flags])
    assert str(error.value).startswith(said)


def test_the_embedded_task_scores_as_our_own_evaluation(tmp_path, folders, capsys):
    """Also what is written: a table, JSON, a picture and the texts."""
    folder = folders("hrpo")
    assert command.main([str(folder), "--held_out", "12", "--ablations", "--output", str(tmp_path)]) == 0
    opened = TextModel.from_pretrained(str(folder))
    rows = arithmetic.as_dataset(arithmetic.split_problems(12, 0)[1])
    found = json.loads((tmp_path / "eval.json").read_text())
    assert [result["state"] for result in found["results"]] == [*opened.states]
    for result in found["results"]:
        if result["state"] not in ("on", "zero", "off"):  # random, or of another row of the batch
            continue
        ours = evaluate(opened.model, opened.tokenizer, rows, max_new_tokens=36, thinking=result["state"])
        lines = (tmp_path / f"samples_sums_{result['state']}.jsonl").read_text().splitlines()
        assert [json.loads(line)["texts"] for line in lines] == [[text] for text in ours.completions]
        assert (result["accuracy"], result["tokens"]) == (ours.accuracy, ours.mean_length)
        assert (result["low"], result["high"], result["n"]) == (ours.low, ours.high, 12)
    assert (tmp_path / "eval.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "accuracy (95% interval)" in printed and printed.count("│ sums ") == 12


def test_all_right_is_drawn_too(tmp_path, folders, monkeypatch):
    """Rounding must leave no bar below zero: at 634 of the first 2,000 numbers of questions it did."""
    monkeypatch.setattr(tasks.EvaluationTask, "is_right", lambda *_: True)
    command.main([str(folders("plain")), "--held_out", "4", "--max_new_tokens", "2", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "eval.json").read_text())["results"][0]
    assert found["accuracy"] == found["high"] == 1 and (tmp_path / "eval.png").exists()


OTHERS = [(method, state) for method in ("latent", "hrpo") for state in ("shuffle", "interpolate")]


@pytest.mark.parametrize("how", [["--batch_size", "1"], [], ["--samples", "3", "--temperature", "1e-6"]])
@pytest.mark.parametrize("method, state", [*OTHERS, ("planner", "shuffle")])
def test_each_text_gets_another_questions_latent_steps(tmp_path, folders, method, state, how):
    """Also alone in a batch, and with several texts for each question, which stand side by side."""
    flags = ["--tasks", "sums", "--held_out", "6", "--max_new_tokens", "12", "--states", "on", state, *how]
    command.main([str(folders(method)), *flags, "--output", str(tmp_path)])
    lines = [(tmp_path / f"samples_sums_{name}.jsonl").read_text().splitlines() for name in ("on", state)]
    plain, changed = ([text for line in some for text in json.loads(line)["texts"]] for some in lines)
    assert sum(a == b for a, b in zip(plain, changed, strict=True)) <= len(plain) / 6


def test_one_question_has_no_other(folders, tmp_path):
    with pytest.raises(ValueError, match="it takes the latent steps of another question, and there is one"):
        command.main([str(folders("latent")), "--held_out", "1", "--states", "shuffle", "--output", str(tmp_path)])


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"answer_delimiter": 5}'])
def test_a_damaged_record_of_the_training_is_named(tmp_path, text):
    folder = saved("plain", False, tmp_path)
    (folder / "training_args.json").write_text(text)
    with pytest.raises(ValueError, match=r"training_args\.json (is damaged|is not JSON|holds no JSON object)"):
        command.main([str(folder)])


def test_latent_models_answer_the_embedded_equations(tmp_path, folders):
    command.main([str(folders("latent")), "--held_out", "4", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "eval.json").read_text())["results"]
    assert [(result["task"], result["state"]) for result in results] == [("equations", "on"), ("equations", "off")]
    asked = [json.loads(line) for line in (tmp_path / "samples_equations_on.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in asked] == [row["question"] for row in equations.split(4, 0)[1]]


@pytest.mark.parametrize("method", ["hrpo", "latent", "concept", "planner", "plain"])
def test_a_users_file_is_asked_of_every_kind(tmp_path, folders, method):
    """With prompts as in training: a question alone for latent tokens, a line otherwise."""
    file = write(tmp_path / "x.jsonl", [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(4)])
    flags = ["--tasks", "gsm8k", "--data", f"gsm8k={file}", "--samples", "4", "--max_new_tokens", "4", "--limit", "3"]
    assert command.main([str(folders(method)), *flags, "--output", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "eval.json").read_text())["results"]
    assert results[0]["n"] == 3 and results[0]["samples"] == 4 and [*results[0]["pass_at"]] == ["1", "2", "4"]
    lines = (tmp_path / "out" / "samples_gsm8k_on.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    assert row["prompt"] == ("0+1=" if method == "latent" else "0+1=\n") and len(row["texts"]) == len(row["right"]) == 4


def test_prompts_of_a_chat_model_are_those_of_training(tmp_path, folders):
    opened = TextModel.from_pretrained(str(folders("plain")))
    opened.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    file = write(tmp_path / "x.jsonl", FILES["gsm8k"])
    task = tasks.file_task("gsm8k", file, opened, {}, examples=1)
    (row,) = task.rows
    assert (
        row["prompt"].startswith("[system]Solve the problem step by step.") and "write #### followed" in row["prompt"]
    )
    assert row["prompt"].endswith("[user]1+1?[assistant]so 2\n#### 2[user]1+2?[assistant]") and row["answer"] == "3"
    for system_prompt, start in (("", "[user]1+1?"), ("Add.", "[system]Add.[user]1+1?")):
        (row,) = tasks.file_task("gsm8k", file, opened, {}, examples=1, system_prompt=system_prompt).rows
        assert row["prompt"].startswith(start)
    with pytest.raises(ValueError, match="num_fewshot=2 leaves none to ask"):
        tasks.file_task("gsm8k", file, opened, {}, examples=2)


@pytest.mark.parametrize(
    "method, template, task, said",
    [
        ("plain", False, "gsm8k", "has no chat template; leave it out"),
        ("latent", True, "gsm8k", "reads one question and answers it; leave it out"),
        ("concept", True, "facts", "facts has none; leave it out"),
        ("plain", True, "gsm8k", None),
        ("plain", True, "sums", None),
    ],
)
def test_a_system_prompt_is_given_or_refused(tmp_path, folders, method, template, task, said):
    """It also comes into the prompts of the harness's tasks, see test_harness.py."""
    folder = shutil.copytree(folders(method), tmp_path / "model")
    if template:
        (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }};{% endfor %}")
    flags = ["--system_prompt", "8", "--tasks", task, "--output", str(tmp_path), "--max_new_tokens", "2"]
    flags += ["--data", f"gsm8k={write(tmp_path / 'x.jsonl', FILES['gsm8k'])}"] if task == "gsm8k" else []
    if said:
        with pytest.raises(ValueError, match=f"--system_prompt: .*{said}"):
            command.main([str(folder), *flags])
    else:
        command.main([str(folder), *flags])
        line = json.loads((tmp_path / f"samples_{task}_on.jsonl").read_text().splitlines()[0])
        assert line["prompt"] == f"8;{line['question']};"


def test_latent_models_take_no_examples(tmp_path, folders):
    opened = TextModel.from_pretrained(str(folders("latent")))
    file = write(tmp_path / "x.jsonl", FILES["gsm8k"])
    with pytest.raises(ValueError, match="num_fewshot=1: a latent model reads one question"):
        tasks.file_task("gsm8k", file, opened, {}, examples=1)
    task = tasks.file_task("gsm8k", file, opened, {"answer_prompt": "Answer: "})
    assert task.marker == "Answer:" and [row["prompt"] for row in task.rows] == ["1+1?", "1+2?"]


def test_the_command_in_a_process_of_its_own(tmp_path, folders):
    flags = ["--held_out", "3", "--max_new_tokens", "3", "--output", tmp_path]
    done = fresh("-m", "trl_ext", "eval", folders("plain"), *flags)
    assert done.returncode == 0, done.stderr
    assert "│ sums │ on " in done.stdout and "fatal" not in done.stderr
    done = fresh("-m", "trl_ext", "eval", tmp_path / "nothing")
    assert done.returncode == 2 and "nothing" in done.stderr.splitlines()[-1]


def test_an_evaluation_without_the_harness_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'latent-reasoning-trl\[eval\]'"):
        command.main(["."])


def test_the_table_fits_into_a_terminal(monkeypatch, capsys):
    """Eighty columns."""
    monkeypatch.setenv("COLUMNS", "80")
    costs = {"completions": 2000, "tokens": 99000, "forwards": 99000, "latent": 60000, "seconds": 99.0}
    rows = [{"question": "1", "prompt": "1", "answer": "1"}] * 1000
    task = tasks.EvaluationTask("multiarith", rows, "#", True, 8)
    results = [result_of(task, "interpolate", [["#1", "#2"]] * 1000, costs)]
    command.show(PlainConsole(), "x", results)
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines()[1:-1])
    interval = f"50.0% ({results[0].low:.1%} to {results[0].high:.1%})"
    for word in ("multiarith", "interpolate", "1000", interval, "100.0%", "49.5", "60.6%", "49.50"):
        assert f" {word} " in printed, word
