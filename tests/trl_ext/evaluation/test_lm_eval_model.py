"""lm-evaluation-harness on models of every kind: its scores are those of our own evaluation on the same rows."""

import json
import logging

import lm_eval
import pytest
from datasets import Dataset, DatasetDict
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing

from tests.kinds import ALL, saved
from trl_ext.evaluation.lm_eval_model import LatentReasoningLM
from trl_ext.latent.evaluation import evaluate_answers
from trl_ext.planner.evaluation import evaluate_plans
from trl_ext.tasks.evaluation import evaluate
from trl_ext.tasks.reward import final_answer, same_number
from unsloth_ext.common.text_model import TextModel


NEW = 8
OWN = TaskManager(include_defaults=False)  # reads none of lm-eval's thousands of files
ROWS = [
    {"prompt": f"{a}+{b}=", "completion": f"#{a + b}", "answer": str(a + b)} for a in range(1, 4) for b in range(1, 5)
]


@pytest.fixture(autouse=True)
def _no_report_of_the_environment(monkeypatch):
    """The harness calls pip for each: a second that changes no score."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    found = {}

    def get(method, peft=False):
        if (method, peft) not in found:
            folder = saved(method, peft, tmp_path_factory.mktemp("model"))
            found[method, peft] = TextModel.from_pretrained(str(folder), delimiter="#")
        return found[method, peft]

    return get


def written_task(right=None, **changes):
    """A task whose answers are written."""
    how = {
        "task": "sums",
        "custom_dataset": lambda **_: DatasetDict(test=Dataset.from_list(ROWS), train=Dataset.from_list(ROWS[:2])),
        "test_split": "test",
        "fewshot_split": "train",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{completion}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": [], "max_gen_toks": NEW, "do_sample": False},
        "process_results": lambda row, texts: {"acc": float(right(row, texts[0]))},
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    return how | changes


def scored(model, task, **how):
    out = lm_eval.simple_evaluate(
        model=model, tasks=[task], task_manager=OWN, log_samples=True, bootstrap_iters=0, **how
    )
    samples = sorted(out["samples"][task["task"]], key=lambda sample: sample["doc_id"])
    return out["results"][task["task"]]["acc,none"], [sample["resps"][0][0] for sample in samples], samples


def lenient(row, text):
    """Whether a random model's text begins with a digit of the answer, so that some are right."""
    return text[:1] in row["answer"] if text else False


@pytest.mark.parametrize("method, peft", ALL)
def test_it_writes_what_the_opened_model_writes(opened, method, peft):
    """In batches of other rows too."""
    model = opened(method, peft)
    want = []
    for row in ROWS:
        out = model.complete(**model.tokenize([row["prompt"]]), max_new_tokens=NEW, do_sample=False)
        want += model.decode(out)
    lm = LatentReasoningLM(model, batch_size=5)
    accuracy, texts, _ = scored(lm, written_task(lenient))
    assert texts == want and len(set(texts)) > 2
    assert accuracy == sum(lenient(row, text) for row, text in zip(ROWS, texts)) / len(ROWS)
    assert lm.costs["completions"] == len(ROWS) and lm.costs["forwards"] >= lm.costs["tokens"] > 0
    assert (lm.costs["latent"] > 0) == (method in ("hrpo", "latent", "planner")) and lm.costs["seconds"] > 0


@pytest.mark.parametrize("state", ["on", "zero", "off"])
def test_hrpo_scores_as_our_own_evaluation(opened, state):
    model = opened("hrpo")
    ours = evaluate(
        model.model, model.tokenizer, Dataset.from_list(ROWS), delimiter="#", max_new_tokens=NEW, thinking=state
    )

    def right(row, text):
        found = final_answer(text, "#")
        return found is not None and same_number(row["answer"], found)

    lm = LatentReasoningLM(model, state=state)
    accuracy, texts, _ = scored(lm, written_task(right))
    assert (accuracy, texts) == (ours.accuracy, ours.completions)
    assert lm.costs["tokens"] / len(ROWS) == ours.mean_length
    assert lm.costs["latent"] / lm.costs["tokens"] == ours.thinking_share


@pytest.mark.parametrize("state", ["on", "zero", "off"])
def test_latent_tokens_score_as_in_our_own_evaluation(opened, state):
    model = opened("latent")
    rows = [{**row, "question": row["prompt"]} for row in ROWS]
    ours = evaluate_answers(
        model.model, model.tokenizer, rows, answer_prompt="#", max_new_tokens=NEW, latents=state, batch_size=12
    )
    lm = LatentReasoningLM(model, state=state, batch_size=12)
    _, texts, _ = scored(lm, written_task(lenient))
    assert texts == ours.completions and lm.costs["forwards"] / len(ROWS) == ours.forward_passes


def test_plans_score_as_in_our_own_evaluation(opened):
    model = opened("planner")
    ours = evaluate_plans(model.model, model.tokenizer, Dataset.from_list(ROWS), max_new_tokens=NEW, show=99)
    _, texts, _ = scored(LatentReasoningLM(model), written_task(lenient))
    assert texts == [written for _, _, written, _ in ours.samples]


CHOICES = {
    "task": "choices",
    "output_type": "multiple_choice",
    "doc_to_choice": ["1", "2#", "#"],
    "doc_to_target": lambda row: int(row["answer"]) % 3,
    "process_results": None,
    "generation_kwargs": None,
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.mark.parametrize("method", ["concept", "latent", "planner", "plain"])
def test_a_task_of_choices_takes_the_likeliest(opened, method):
    """By the model's log-likelihood of each choice, row by row. 1e-4."""
    model = opened(method)
    accuracy, _, samples = scored(LatentReasoningLM(model, batch_size=5), written_task(**CHOICES))
    best = []
    for row, sample in zip(ROWS, samples, strict=True):
        context = model.tokenizer(row["prompt"])["input_ids"]
        found = [model.log_likelihood([context], [model.tokenizer(c)["input_ids"]])[0][0] for c in ("1", "2#", "#")]
        assert [float(value) for ((value, _),) in (s for s in sample["resps"])] == pytest.approx(found, abs=1e-4)
        best.append(max(range(3), key=found.__getitem__) == int(row["answer"]) % 3)
    assert accuracy == sum(best) / len(ROWS)


@pytest.mark.parametrize("method, state", [("hrpo", "on"), ("latent", "zero")])
def test_a_task_of_choices_that_has_no_meaning_is_refused_by_name(opened, method, state):
    with pytest.raises(
        ValueError, match=r"^choices: state='(on|zero)': a continuation that is given has no likelihood"
    ):
        scored(LatentReasoningLM(opened(method), state=state), written_task(**CHOICES))
    scored(LatentReasoningLM(opened(method), state="off"), written_task(**CHOICES))


PERPLEXITY = {
    "task": "texts",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{prompt}}{{completion}}",
    "process_results": lambda row, found: {"acc": found[0]},
    "generation_kwargs": None,
}


@pytest.mark.parametrize("method", ["concept", "plain"])
def test_whole_texts_have_a_likelihood(opened, method):
    model = opened(method)
    value, _, _ = scored(LatentReasoningLM(model), written_task(**PERPLEXITY))
    begin = model.tokenizer.bos_token_id if model.tokenizer.bos_token_id is not None else model.tokenizer.eos_token_id
    rows = [model.tokenizer(row["prompt"] + row["completion"])["input_ids"] for row in ROWS]
    want = [model.log_likelihood([[begin]], [row])[0][0] for row in rows]
    assert value == pytest.approx(sum(want) / len(ROWS), abs=1e-4)


@pytest.mark.parametrize("method", ["latent", "planner", "hrpo"])
def test_whole_texts_without_a_question_are_refused(opened, method):
    with pytest.raises(ValueError, match=r"^texts: "):
        scored(LatentReasoningLM(opened(method)), written_task(**PERPLEXITY))


@pytest.mark.parametrize("method", ["hrpo", "latent", "concept", "planner", "plain"])
def test_a_stop_string_ends_a_text(opened, method):
    model = opened(method)
    _, texts, _ = scored(LatentReasoningLM(model), written_task(lenient))
    stop = max(set("".join(texts)), key=lambda c: sum(text.find(c) > 0 for text in texts))
    lm = LatentReasoningLM(model)
    until = {"until": [stop], "max_gen_toks": NEW, "do_sample": False}
    _, cut, _ = scored(lm, written_task(lenient, generation_kwargs=until))
    assert cut == [text.partition(stop)[0] for text in texts] and any(stop in text for text in texts)
    assert lm.costs["tokens"] < NEW * len(ROWS)


def test_solved_examples_come_before_each_question(opened):
    model = opened("hrpo")
    _, texts, samples = scored(LatentReasoningLM(model), written_task(lenient), num_fewshot=1)
    prompts = [sample["arguments"][0][0] for sample in samples]
    assert all(prompt.endswith(row["prompt"]) and "#" in prompt for prompt, row in zip(prompts, ROWS))
    out = model.complete(**model.tokenize(prompts[:1]), max_new_tokens=NEW, do_sample=False)
    assert model.decode(out) == texts[:1]


def test_a_chat_template_is_used_and_begins_a_text_once(opened):
    model = opened("plain")
    model.tokenizer.bos_token = "<eos>" if "<eos>" in model.tokenizer.get_vocab() else model.tokenizer.eos_token
    model.tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}#"
    try:
        lm = LatentReasoningLM(model)
        seen = []
        encode = lm.tok_batch_encode
        lm.tok_batch_encode = lambda strings, **how: seen.append(encode(strings, **how)) or seen[-1]
        _, _, samples = scored(lm, written_task(lenient), apply_chat_template=True)
        ids, mask = seen[0]
        begins = [int(row[real.bool()][0]) for row, real in zip(ids, mask)]
        assert set(begins) == {model.tokenizer.bos_token_id}
        assert not (ids[mask.bool()] == model.tokenizer.bos_token_id).sum() > len(ids)
        assert samples[0]["arguments"][0][0].endswith("#")
    finally:
        model.tokenizer.chat_template = None


def test_a_tokenizer_that_ends_texts_does_not_move_the_continuation(opened):
    """`12+3=` and `15`: the likelihood is of the two digits, and no token that ends a text is in between."""
    model = opened("plain")
    lm = LatentReasoningLM(model)
    plain = lm._encode_pair("12+3=", "15")
    backend = model.tokenizer.backend_tokenizer
    before, ends = backend.post_processor, (model.tokenizer.eos_token, model.tokenizer.eos_token_id)
    backend.post_processor = TemplateProcessing(single=f"$A {ends[0]}", special_tokens=[ends])
    try:
        assert model.tokenizer("12+3=")["input_ids"][-1] == ends[1]
        assert lm._encode_pair("12+3=", "15") == plain
    finally:
        backend.post_processor = before


def test_sampling_is_passed_on(opened):
    """The same seed, the same texts; another temperature, others."""
    sampled = {"until": [], "max_gen_toks": NEW, "do_sample": True, "temperature": 1.5}
    lm = LatentReasoningLM(opened("hrpo"), batch_size=12)
    texts = []
    for how in (sampled, sampled, {**sampled, "temperature": 0.2}):
        texts.append(scored(lm, written_task(lenient, generation_kwargs=how), torch_random_seed=3)[1])
    assert texts[0] == texts[1] != texts[2]


def test_a_prompt_that_is_too_long_is_refused_and_not_cut(opened):
    rows = [{"prompt": "1+" * 200, "completion": "1", "answer": "1"}]
    data = DatasetDict(test=Dataset.from_list(rows))
    task = written_task(lenient, custom_dataset=lambda **_: data, fewshot_split=None)
    with pytest.raises(ValueError, match="prompt 0 has 400 tokens"):
        scored(LatentReasoningLM(opened("plain")), task)


def test_an_unknown_state_is_refused(opened):
    with pytest.raises(ValueError, match="state='off': a concept model has on"):
        LatentReasoningLM(opened("concept"), state="off")


def test_it_is_registered_by_name(tmp_path):
    """With what is saved in a run's record."""
    folder = saved("hrpo", True, tmp_path)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    out = lm_eval.simple_evaluate(
        model="latent-reasoning",
        model_args={"pretrained": str(folder), "state": "zero"},
        tasks=[written_task(lenient)],
        task_manager=OWN,
        limit=2,
        batch_size=2,
        bootstrap_iters=0,
    )
    assert out["config"]["model"] == "latent-reasoning" and out["n-samples"]["sums"]["effective"] == 2
    json.dumps(out["results"])
