"""The configurations for a GPU as they are shipped, trained, resumed and opened. In place of a model on the hub there is a
small one in a folder, which has no rows to spare for the tokens that methods add."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, Qwen2Config, Qwen3Config

from tests import tiny
from tests.marks import slow
from unsloth_ext import (
    ConceptModel,
    FastThinkingModel,
    LatentConfig,
    LatentModel,
    PlannerExecutorModel,
    attach_latent,
)


RECIPES = Path(__file__).parents[2] / "recipes"
SHORT = [
    "--eval_size",
    "4",
    "--eval_every",
    "2",
    "--eval_batch",
    "4",
    "--save_steps",
    "2",
    "--use_cpu",
    "true",
    "--gradient_accumulation_steps",
    "1",
    "--per_device_train_batch_size",
    "4",
    "--disable_tqdm",
    "true",
    "--dataset",
    "train.jsonl",
    "--eval_dataset",
    "test.jsonl",
    "--output_dir",
    "out",
]
CONFIGS = {
    # file: recipe, model, more flags, what opens the result
    "hrpo": ("hrpo_gsm8k", Qwen2Config, ["--max_completion_length", "8", "--dry_run_rows", "4"], FastThinkingModel),
    "codi": ("codi_gsm8k", GPT2Config, [], LatentModel),
    "pccot": ("pccot_gsm8k", GPT2Config, [], LatentModel),
    "kava": ("kava_gsm8k", Qwen2Config, [], LatentModel),
    "lotus": ("lotus_gsm8k", GPT2Config, [], LatentModel),
    "coconut": ("coconut_gsm8k", GPT2Config, [], LatentModel),
    "latent_grpo": (
        "latent_grpo",
        GPT2Config,
        ["--max_completion_length", "8", "--dry_run_rows", "4", "--num_generations", "2"],
        LatentModel,
    ),
    "kv_distill": ("kv_distill", Qwen2Config, ["--teacher_model_name_or_path", "teacher"], AutoModelForCausalLM),
    "concept": ("concept_v2", Qwen3Config, ["--num_concepts", "256"], ConceptModel),
    "planner": ("planner_executor", Qwen3Config, [], PlannerExecutorModel),
}


def save(folder, kind, layers, width):
    tokenizer = tiny.tokenizer(())
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}"
    if kind is GPT2Config:
        config = kind(n_embd=width, n_layer=layers, n_head=4, n_positions=1024)
    else:
        config = kind(
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id = len(tokenizer), 1, 1, 0
    tiny.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def thinking(folder):
    """Give the model in a folder latent tokens."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    attach_latent(model, tokenizer, LatentConfig(num_latents=2))
    LatentModel(model, tokenizer).save_pretrained(folder)


def write_rows():
    """Rows to train on and to hold out, in this folder."""
    for file, first in (("train", 10), ("test", 40)):
        rows = []
        for a in range(first, first + 16):
            steps = f"add.\n<<{a}+3={a + 3}>> and <<{a + 3}*1={a + 3}>>\n#### {a + 3}"
            rows.append({"question": f"{a} apples and 3. all?", "answer": steps})
        Path(f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "name", [slow(name) if name in ("kava", "coconut", "concept", "planner") else name for name in CONFIGS]
)
def test_it_trains_is_resumed_and_opens(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    recipe, kind, more, loader = CONFIGS[name]
    save("model", kind, 10 if kind is Qwen3Config else 2, 32)
    save("teacher", kind, 3, 48)
    if name == "latent_grpo":
        thinking("model")
    write_rows()

    def run(*argv):
        config = RECIPES / "configs" / f"{name}_gsm8k.yaml"
        given = ["--config", config, "--model_name", "model", *SHORT, *more, *argv]
        monkeypatch.setattr(sys, "argv", [f"{recipe}.py", *map(str, given)])
        runpy.run_path(str(RECIPES / f"{recipe}.py"), run_name="__main__")

    run("--max_steps", "2")
    run("--max_steps", "4", "--resume_from_checkpoint", "latest")
    assert json.loads(Path("out/summary.json").read_text())["steps"] == 4
    opened = loader.from_pretrained("out/final")
    if name not in ("hrpo", "kv_distill"):
        assert isinstance(opened.generate("1+2=", max_new_tokens=2), str)
    assert AutoTokenizer.from_pretrained("out/final")
