"""Local folders that stand in for the hub repositories which TRL's own tests load: same names, tiny random contents."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Cohere2Config,
    Gemma2Config,
    Glm4MoeConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)


SMALL = {
    "hidden_size": 8,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "output_router_logits": True,
    "head_dim": 4,
}
CAUSAL = {
    "tiny-Qwen2ForCausalLM-2.5": Qwen2Config(**SMALL),
    "small-Qwen2ForCausalLM-2.5": Qwen2Config(**{**SMALL, "hidden_size": 32}),
    "tiny-Qwen3ForCausalLM": Qwen3Config(**SMALL, head_dim=4),
    "tiny-LlamaForCausalLM-3.2": LlamaConfig(**SMALL),
    "tiny-MistralForCausalLM-0.2": MistralConfig(**SMALL),
    "tiny-Gemma2ForCausalLM": Gemma2Config(**SMALL, head_dim=4),
    "tiny-Cohere2ForCausalLM": Cohere2Config(**SMALL, logit_scale=0.125),
    "tiny-Qwen3MoeForCausalLM": Qwen3MoeConfig(**SMALL, **MOE),
    "tiny-GptOssForCausalLM": GptOssConfig(**SMALL, **MOE),
    "tiny-Glm4MoeForCausalLM": Glm4MoeConfig(**SMALL, **MOE),
}
REWARD = {
    "tiny-Qwen2ForSequenceClassification-2.5": Qwen2Config(**SMALL, num_labels=1, pad_token_id=0),
    "tiny-Qwen3ForSequenceClassification": Qwen3Config(**SMALL, head_dim=4, num_labels=1, pad_token_id=0),
    "tiny-LlamaForSequenceClassification-3.2": LlamaConfig(**SMALL, num_labels=1, pad_token_id=0),
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LINES = [
    ("Beautiful is better than", " ugly."),
    ("Explicit is", " better than implicit."),
    ("Simple is better", " than complex."),
    ("Complex", " is better than complicated."),
    ("Flat is better than", " nested."),
    ("Sparse is better", " than dense."),
    ("Readability", " counts."),
    ("Special cases aren't special", " enough to break the rules."),
    ("Although practicality beats", " purity."),
    ("Errors should never", " pass silently."),
    ("Unless explicitly", " silenced."),
    ("In the face of ambiguity,", " refuse the temptation to guess."),
    ("There should be one-- and preferably", " only one --obvious way to do it."),
    ("Now is better", " than never."),
    ("If the implementation is hard to explain,", " it's a bad idea."),
    ("Namespaces are one honking great idea", " -- let's do more of those!"),
    ("Although never is often", " better than *right* now."),
]


def tokenizer() -> PreTrainedTokenizerFast:
    pieces = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def make(folder: Path) -> None:
    """Everything below `folder/trl-internal-testing`."""
    root = folder / "trl-internal-testing"
    for names, auto in ((CAUSAL, AutoModelForCausalLM), (REWARD, AutoModelForSequenceClassification)):
        for name, config in names.items():
            torch.manual_seed(0)
            config.eos_token_id, config.pad_token_id, config.bos_token_id = 2, 0, None
            auto.from_config(config).save_pretrained(root / name)
            tokenizer().save_pretrained(root / name)
    zen = root / "zen"
    zen.mkdir(parents=True)
    kinds = {
        "standard_prompt_only": lambda p, _: {"prompt": p},
        "conversational_prompt_only": lambda p, _: {"prompt": [says("user", p)]},
        "standard_prompt_completion": lambda p, c: {"prompt": p, "completion": c},
        "conversational_prompt_completion": lambda p, c: {
            "prompt": [says("user", p)],
            "completion": [says("assistant", c)],
        },
        "standard_language_modeling": lambda p, c: {"text": p + c},
        "conversational_language_modeling": lambda p, c: {"messages": [says("user", p), says("assistant", c)]},
    }
    lines = ["---", "configs:"]
    for kind, shape in kinds.items():
        lines += [f"- config_name: {kind}", "  data_files:"]
        for split, rows in (("train", LINES), ("test", LINES[:2])):
            file = zen / f"{kind}-{split}.jsonl"
            file.write_text("".join(json.dumps(shape(*row)) + "\n" for row in rows))
            lines += [f"  - split: {split}", f"    path: {file.name}"]
    (zen / "README.md").write_text("\n".join([*lines, "---", ""]))
