"""Run the official code of Coconut and LOTUS on tiny random models, and write what it computes as golden tensors.

    python -m tests.golden.official_stages --coconut CHECKOUT --lotus CHECKOUT

The files beside this script were made with facebookresearch/coconut at 27273cb and yingfan-bot/lotus at eb77e2f, both MIT,
with transformers 4.46.2, which both pin, datasets 4.8 and torch 2.13 on a CPU. Their datasets, collators and models are
called as their training loops call them, and nothing is replaced. One thing is added: the base model copies the embeddings
that LOTUS passes to it, because LOTUS writes into them afterwards, and autograd refuses that in float32 on Llama.

A file has the weights (`w.*`) of one model and several cases, such as `coconut.ragged.2`: method, rows and stage. Of each
case it has

- `in.input_ids`, `in.attention_mask`, `in.labels` (B, L), int16, as the official collator pads them;
- `mid.latents`, the latent inputs (B, M, d) of Coconut, or (T, B, M, d) of each of LOTUS' iterations, without the first
  pass, in which all are the embedding;
- `out.loss`, and of LOTUS its parts `out.main_loss` and `out.intermediate_loss`;
- `out.logits` (N, V) that predict the tokens of the answers, row after row;
- `grad.*` of every parameter, for ragged rows.
"""

import argparse
import importlib.util
import json
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast


HERE = Path(__file__).parent
PINNED = "4.46.2"  # of transformers; later versions have other caches
VOCABULARY = ["<eos>", "<bot>", "<latent>", "<eot>", *"0123456789+-*=# \n"]
EOS, BOT, LATENT, EOT = range(4)
# Small, because the gradients of each case are kept
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_positions": 64,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_inner": 32,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "llama": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    },
}
STEPS = 3  # that become latent
PER_STEP = {"coconut": 2, "lotus": 4}
# Every character is a token, and each step ends with a line break. Steps of "ragged" have 2 to 4 tokens, of "long" up to 9
ROWS: dict[str, list[dict[str, Any]]] = {
    "ragged": [
        {"question": "1+2=", "steps": ["1+2", "3"], "answer": "3"},
        {"question": "12+22*5=", "steps": ["110", "+12", "9", "1-0", "122"], "answer": "122"},
        {"question": "8-3-1=", "steps": ["5", "5-1", "04"], "answer": "4"},
    ],
    "equal": [
        {"question": "1+2+3=", "steps": ["3", "3+3", "6", "06"], "answer": "06"},
        {"question": "9-4*2=", "steps": ["8", "9-8", "1", "01"], "answer": "01"},
    ],
    "long": [
        {"question": "1+2+3=", "steps": ["1+2=3", "3+3=6", "6"], "answer": "6"},
        {"question": "12+30-9=", "steps": ["12+30=42", "42-9=33"], "answer": "33"},
    ],
}
# Method, rows and stage. After the stages of latent steps Coconut has one in which no step is written
CASES = [
    *(("coconut", "ragged", stage) for stage in (1, 2, 3, 4)),
    ("coconut", "equal", 2),
    ("coconut", "long", 2),
    *(("lotus", "ragged", stage) for stage in (1, 2, 3)),
    ("lotus", "equal", 2),
    ("lotus", "long", 2),
]


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of characters. Pads are end tokens, as in the official runs."""
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    special = ["<bot>", "<latent>", "<eot>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", additional_special_tokens=special
    )


def untrained(kind: str) -> PreTrainedModel:
    """A model of `MODELS`, of any version of transformers."""
    ends = {"vocab_size": len(VOCABULARY), "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **MODELS[kind], **ends))


def module(file: Path) -> ModuleType:
    """A Python file as a module: both repositories have a `dataset.py`."""
    spec = importlib.util.spec_from_file_location(f"{file.parent.name}_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def official_batch(data: ModuleType, rows: list[dict[str, Any]], stage: int, per_step: int) -> dict[str, Any]:
    """The batch that the official dataset and collator make of rows in a stage."""
    of = tokenizer()
    of.padding_side = "right"
    settings = SimpleNamespace(
        max_latent_stage=STEPS, c_thought=per_step, pad_latent_to_max=True, uniform_prob=0.0, no_cot=False
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        file.write_text(json.dumps(rows))
        tokenized = data.get_dataset(str(file), of)
        staged = data.get_cot_latent_dataset(stage, tokenized, settings, BOT, LATENT, EOT)
        batch = data.MyCollator(of, latent_id=LATENT, label_pad_token_id=-100)(list(staged))
    return {name: batch[name] for name in batch if name not in ("idx", "answer_labels")}


def answer_logits(logits: torch.Tensor, batch: dict[str, Any], rows: list[dict[str, Any]]) -> torch.Tensor:
    """Those (N, V) of the last positions (B, S, V) of a batch that predict answers."""
    length = batch["input_ids"].shape[1]
    skipped, found = length - logits.shape[1], []
    for row, mask, said in zip(rows, batch["attention_mask"], logits, strict=True):
        end, count = int(mask.nonzero().max()) + 1 - skipped, len("### " + row["answer"]) + 1  # the end token
        found.append(said[end - count - 1 : end - 1])
    return torch.cat(found)


def run(base: PreTrainedModel, official: dict[str, ModuleType], method: str, rows: str, stage: int) -> dict:
    """The tensors of a case."""
    batch = official_batch(official[f"{method}_data"], ROWS[rows], stage, PER_STEP[method])
    seen: list[torch.Tensor] = []

    def copied(_: Any, args: tuple, inputs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        inputs["inputs_embeds"] = inputs["inputs_embeds"].clone()
        seen.append(inputs["inputs_embeds"].detach())
        return args, inputs

    ids = batch["input_ids"]
    if method == "coconut":
        model = official[method].Coconut(base, LATENT, BOT, EOT, EOS)
        out = model(**batch)
        latents = out.inputs_embeds[ids == LATENT].unflatten(0, (len(ids), -1))
        parts = {"loss": out.loss}
    else:
        # As args/gsm8k_lotus_gpt2.yaml: read after the last iteration, as many iterations as the stage
        model = official[method].Lotus(
            base,
            LATENT,
            BOT,
            EOT,
            EOS,
            pad_token_id=EOS,
            c_thought=PER_STEP[method],
            intermediate_loss_weight=0.05,
            intermediate_loss_after_loop=True,
        )
        hook = base.base_model.register_forward_pre_hook(copied, with_kwargs=True)
        out = model.train()(**batch, n_looped_iters=stage)
        hook.remove()
        # The question, <bot> and the embeddings, the iterations over <bot> and latents, the answer
        latents = torch.stack(seen[2:-1])[:, :, 1:]
        parts = {name: getattr(out, name) for name in ("loss", "main_loss", "intermediate_loss")}
    case = {f"in.{name}": batch[name].short() for name in ("input_ids", "attention_mask", "labels")}
    case |= {"mid.latents": latents, "out.logits": answer_logits(out.logits, batch, ROWS[rows])}
    case |= {f"out.{name}": value for name, value in parts.items()}
    if rows == "ragged":
        base.zero_grad()
        out.loss.backward()
        case |= {f"grad.{name}": weight.grad for name, weight in base.named_parameters()}
    return {f"{method}.{rows}.{stage}.{name}": x.detach().clone().contiguous() for name, x in case.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coconut", type=Path, required=True, help="a checkout of facebookresearch/coconut")
    parser.add_argument("--lotus", type=Path, required=True, help="a checkout of yingfan-bot/lotus")
    asked = parser.parse_args()
    if transformers.__version__ != PINNED:
        parser.error(
            f"transformers {transformers.__version__}: put {PINNED}, which both repositories need, on PYTHONPATH"
        )
    official = {
        "coconut": module(asked.coconut / "coconut.py"),
        "coconut_data": module(asked.coconut / "dataset.py"),
        "lotus": module(asked.lotus / "scripts" / "lotus.py"),
        "lotus_data": module(asked.lotus / "scripts" / "dataset.py"),
    }
    config = {"transformers": transformers.__version__, "torch": torch.__version__}
    for name in ("coconut", "lotus"):
        command = ["git", "-C", str(getattr(asked, name)), "rev-parse", "HEAD"]
        config[name] = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    for kind in MODELS:
        torch.manual_seed(0)
        base = untrained(kind).train()
        with torch.no_grad():
            for weight in base.parameters():
                weight.normal_(std=0.3) if weight.dim() > 1 else weight.add_(torch.randn_like(weight), alpha=0.1)
        tensors = {f"w.{name}": weight.detach().clone() for name, weight in base.named_parameters()}
        for case in CASES:
            tensors |= run(base, official, *case)
        save_file(tensors, HERE / f"official_stages_{kind}.safetensors", metadata={"config": json.dumps(config)})


if __name__ == "__main__":
    main()
