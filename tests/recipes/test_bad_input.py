"""A tour of what one can get wrong on every recipe's command line: each ends in one sentence and status 2."""

import os
import runpy
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.processes import fresh
from trl_ext.cli.user_errors import explained


ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
TRAIN = (
    "hrpo_gsm8k",
    "codi_gsm8k",
    "pccot_gsm8k",
    "kava_gsm8k",
    "lotus_gsm8k",
    "coconut_gsm8k",
    "kv_distill",
    "concept_v1",
    "concept_v2",
    "planner_executor",
    "latent_grpo",
)
STAGES = ("pretrain", "sft", "lora", "dpo", "ppo", "grpo", "spo", "distill", "reason")
LATENT, RL = TRAIN[1:6], ("ppo", "grpo", "spo")
EVERY = (*TRAIN, "eval_latent", "profile_alignment")
MINIMIND = tuple(f"minimind/{name}" for name in (*STAGES, "tokenizer", "chat", "report"))
CHECKPOINT = ("--checkpoint", "nowhere")

TRIES = [
    *((name, ["--seeed", "1"], "--seeed: there is no such flag") for name in (*EVERY, *MINIMIND)),
    *((name, ["--config", "none.yaml"], "none.yaml: ") for name in (*EVERY, "minimind/sft", "minimind/chat")),
    *((name, ["--config", "latin.yaml"], "latin.yaml, line 1: not UTF-8") for name in ("hrpo_gsm8k", "eval_latent")),
    *((name, ["--model_n", "X"], "--model_n: there is no such flag; did you mean --model_name") for name in TRAIN),
    *((name, ["--eval_size", "0"], "eval_size=0: must be at least 1") for name in TRAIN),
    *((name, ["--max_steps", "2.7"], "--max_steps: invalid int value: '2.7'") for name in TRAIN),
    *((name, ["--per_device_train_batch_size", "0"], "per_device_train_batch_size=0") for name in TRAIN),
    *((name, ["--resume_from_checkpoint", "true", "--output_dir", "new"], "") for name in TRAIN),
    *((name, ["--model_name", "tinyy"], "there is no folder tinyy in ") for name in TRAIN),
    *((name, ["--model_name", "large"], "large holds no model") for name in TRAIN[:2]),
    *(
        (name, ["--model_name", "some"], "does not say use_cpu: true; to train on the CPU: --use_cpu true --bf16 false")
        for name in (TRAIN[0], *TRAIN[6:])
    ),
    *((name, ["--model_name", ""], "name is empty") for name in LATENT),
    *((name, ["--learning_rate", "inf"], "learning_rate=inf: must be a finite number") for name in TRAIN[:2]),
    *((name, ["--config", "null.yaml"], "learning_rate: null is not a number") for name in (*TRAIN[:2], "concept_v1")),
    *((f"minimind/{name}", ["--learning_rate", "fast"], "invalid float value: 'fast'") for name in STAGES),
    *((name, ["--warm_start_seed", "-1"], "warm_start_seed=-1: must be at least 0") for name in TRAIN),
    *(
        (name, ["--num_train_epochs", "0", "--max_steps", "-1"], "num_train_epochs=0: nothing would be")
        for name in TRAIN
    ),
    *((name, ["--output_dir", ""], "output_dir='': name a folder") for name in (*TRAIN, "minimind/sft")),
    ("minimind/sft", ["--embedded_seed", "4294967296"], "embedded_seed=4294967296: at most 4294967295"),
    (
        "minimind/distill",
        ["--teacher_model_name_or_path", "runs/minimind/grpo/final", "--model_name", "large", "--dataset", "x.jsonl"],
        "--teacher_model_name_or_path runs/minimind/grpo/final: there is no",
    ),
    ("codi_gsm8k", ["--num_latents", "0"], "num_latents=0"),
    ("kava_gsm8k", ["--w_codi", "-1"], "w_codi=-1.0"),
    *((name, ["--preset", "nope"], "no preset 'nope'") for name in (*LATENT, "concept_v2")),
    *(
        (name, ["--eval_size", "10000000"], "10000000")
        for name in (*LATENT, "hrpo_gsm8k", "planner_executor", "latent_grpo")
    ),
    *((name, ["--dataset", "nowhere.jsonl"], "can only be used together") for name in LATENT),
    *((f"minimind/{name}", ["--num_generations", "0"], "num_generations=0: must be at least 1") for name in RL),
    ("hrpo_gsm8k", ["--dataset", "nonsense"], "only read the built-in tasks, tiny or reachability"),
    ("hrpo_gsm8k", ["--dataset", "reachability", "--model_name", "large"], "only the tiny model can read these graphs"),
    ("hrpo_gsm8k", ["--dataset", "reachability", "--train_size", "9"], "the reachability task makes its own rows"),
    ("hrpo_gsm8k", ["--dataset", "reachability", "--num_fewshot", "1"], "num_fewshot=1: must be 0 or more, and 0 for"),
    ("hrpo_gsm8k", ["--dataset", "reachability", "--eval_size", "20001"], "20001 held-out problems: choose 1 to 20000"),
    ("hrpo_gsm8k", ["--lora_r", "0", "--load_in_4bit", "true"], "lora_r=0 with load_in_4bit=True"),
    ("hrpo_gsm8k", ["--group_size", "7"], "num_generations"),
    ("hrpo_gsm8k", ["--recompute", "sometimes"], "recompute='sometimes'"),
    ("hrpo_gsm8k", ["--answer_delimiter", ""], "answer_delimiter=''"),
    ("hrpo_gsm8k", ["--max_prompt_length", "9"], "max_seq_length"),
    ("hrpo_gsm8k", ["--dataset_options", "[2]"], "a JSON object"),
    ("hrpo_gsm8k", ["--model_name", "smollm2", "--dataset", "none.jsonl"], "none.jsonl: there is no such file"),
    ("hrpo_gsm8k", ["--lr_residual_gate", "-1"], "lr_residual_gate=-1.0"),
    ("hrpo_gsm8k", ["--eval_strategy", "sometimes"], "--eval_strategy: invalid choice: 'sometimes'"),
    ("latent_grpo", ["--dataset", "nowhere.jsonl"], "the tiny model can only read the built-in equations"),
    ("latent_grpo", ["--answer_prompt", " "], "answer_prompt=' ': the reward looks for the answer after it"),
    ("latent_grpo", ["--thinking", "false"], "thinking=False: this recipe trains latent tokens"),
    ("latent_grpo", ["--beta", "0.1"], "beta=0.1: the reference model of the KL term would answer without latent"),
    ("latent_grpo", ["--codi_steps", "0"], "codi_steps=0: must be at least 1"),
    ("kv_distill", ["--kv_projection_mode", "round"], "kv_projection_mode='round'"),
    ("kv_distill", ["--ratio_map", "{"], "ratio_map='{': a JSON object"),
    ("kv_distill", ["--T_s", "1"], "T_s=1: must be at least 3"),
    ("concept_v1", ["--segmenter", "threshold"], "--segmenter: baselines set this themselves"),
    ("concept_v1", ["--baseline", "none"], "baseline='none'"),
    ("concept_v1", ["--resume_from_checkpoint", "latest"], "name one run with --baseline"),
    ("planner_executor", ["--facts", "100"], "facts=100: must be at most"),
    ("planner_executor", ["--types", "[{"], "types="),
    ("eval_latent", [], "required: --checkpoint"),
    ("eval_latent", [*CHECKPOINT, "--limit", "-55"], "limit=-55: must be at least 1"),
    ("eval_latent", [*CHECKPOINT, "--latents", "some"], "latents=some: choose from on"),
    ("eval_latent", [*CHECKPOINT, "--output", "latin.yaml"], "latin.yaml"),
    ("profile_alignment", ["--mode", "round"], "mode='round'"),
    ("profile_alignment", ["--batch_size", "0"], "batch_size=0: must be at least 1"),
    ("profile_alignment", ["--output", "latin.yaml"], "latin.yaml"),
    ("minimind/chat", ["--temperature", "-1"], "temperature=-1.0: must be at least 0"),
    ("minimind/chat", ["--max_new_tokens", "0"], "max_new_tokens=0: must be at least 1"),
    ("minimind/report", ["--run_dir", "empty"], "empty has no stage's summary.json"),
    ("minimind/lora", ["--lora_r", "0"], "lora_r=0: must be at least 1"),
    (
        "minimind/sft",
        ["--model_name", "runs/minimind/sft/final", "--dataset", "x.jsonl"],
        "run recipes/minimind/sft.py",
    ),
    ("minimind/pretrain", ["--tokenizer", "large"], "large has 7000 tokens, but --preset tiny has embeddings for 6400"),
    ("minimind/pretrain", ["--tokenizer", "large", "--preset", "nope"], "no MiniMind preset 'nope'"),
    (
        "minimind/grpo",
        ["--model_name", "large", "--reward_model", "r", "--num_generations", "4", "--per_device_eval_batch_size", "6"],
        "groups of num_generations=4",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the tries are made."""
    made = tmp_path_factory.mktemp("tries")
    (made / "latin.yaml").write_bytes("run_name: é".encode("latin-1"))
    (made / "some").mkdir()
    (made / "some" / "config.json").write_text("{}")
    (made / "null.yaml").write_text("learning_rate: null\noutput_dir: x\n")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(7000)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(made / "large")
    return made


@pytest.mark.parametrize("name, argv, said", TRIES, ids=[f"{name} {' '.join(argv)}" for name, argv, _ in TRIES])
def test_it_is_one_sentence(name, argv, said, folder, monkeypatch, capfd):
    script = RECIPES / f"{name}.py"
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(script), *argv])
    with pytest.raises(BaseException) as error:
        runpy.run_path(str(script), run_name="__main__")
    text, status = explained(error.value) or pytest.fail(f"a bug: {error.value!r}")
    assert status == 2 and said in text and "\n" not in text and len(text) < 400
    assert not capfd.readouterr().err
    assert not list(folder.glob("**/checkpoint-*"))


def test_as_a_process(folder):
    """From a relative path, as a person calls it: two lines at most, nothing but the sentence."""
    script = os.path.relpath(RECIPES / "eval_latent.py", folder)
    done = fresh(script, *CHECKPOINT, "--limit", "-55", cwd=folder)
    assert (done.returncode, done.stderr, done.stdout) == (2, "eval_latent.py: limit=-55: must be at least 1\n", "")
