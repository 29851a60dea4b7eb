"""Run the official code of SIM-CoT on tiny random models, and write what it computes as golden tensors.

    python -m tests.golden.official_sim_cot --sim-cot CHECKOUT

The files beside this script were made with InternLM/SIM-CoT at f3ae967 (Apache-2.0), with transformers 4.46.2, which its
Coconut pins (its CODI 4.52.4), PEFT 0.21, datasets 4.8 and torch 2.13 on a CPU, where the autocast that it asks for is off.
These are CODI and Coconut, each with a decoder: `CODI` with `use_decoder` and `CoconutGPT_Same_Word_Embedding` with
`v1_aug`, as its scripts set them. The classes are called as they are. From outside

- `get_steps` and `pad_steps` of CODI are given the ids of `<<`, `>>`, end and pad in this vocabulary, because those of
  GPT-2 and Llama are written into the code;
- both cross-entropies also keep what they return;
- batches of CODI are put together here, as `preprocess` does with `remove_eos`, because that is a function inside `train`;
- batches of Coconut come from its dataset and collator for explained steps, which its `run.py` imports, but does not call.

A file has the weights of a model (`w.model.*`) and of a decoder (`w.decoder.*`), which both methods begin with, of CODI's
projection (`w.prj.*`), and several cases, such as `codi.whole` or `coconut.2`, the stage of Coconut. Of each case it has

- `in.*`, int16: the ids and masks that the official forward gets, and `in.targets.K` (B, L): what the decoder writes from
  the latent tokens of step K, -100 elsewhere;
- `out.step_losses` (G): the loss of each step that some row has, of CODI a mean over its tokens, of Coconut their sum;
- `out.step_loss`: the mean of these, of Coconut over rows too, as it is added to the loss;
- `out.main_loss`: the rest of Coconut's loss;
- `grad.model.*`, `grad.prj.*` and `grad.decoder.*` of `out.step_loss`, for the cases of `GRADIENTS`.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.golden.official_stages import MODELS as LARGER
from tests.golden.official_stages import PINNED, module


HERE = Path(__file__).parent
# As in GPT-2's vocabulary, "<<" is one token after a space and another one elsewhere. Coconut pads steps with token 0
VOCABULARY = ["!", "<eos>", "<<", " <<", ">>", *"0123456789+-*=# \n"]
EOS, START, SPACED_START, END = range(1, 5)
PAD, BOT, EOT = range(len(VOCABULARY), len(VOCABULARY) + 3)  # CODI's pad is Coconut's <latent>
MODELS = {
    "gpt2": LARGER["gpt2"] | {"n_positions": 48, "n_inner": 16},
    "llama": LARGER["llama"] | {"intermediate_size": 16},
}
LATENTS = 2  # of CODI, which writes one more step
STEPS, PER_STEP = 3, 2  # of Coconut
# The trace of CODI lacks the last step: it has 5, 3, 1 and no steps here
WHOLE: list[dict[str, Any]] = [
    {"question": "1+2=", "steps": ["<<1+2=3>>", "<<3*3=9>>", "<<9>>", "<<8>>", "<<7>>", "<<7>>"], "answer": "7"},
    {"question": "4+4=", "steps": ["<<4+4=8>>", "<<8-1>>", "<<7-6=1>>", "<<1>>"], "answer": "1"},
    {"question": "9-3=", "steps": ["<<6>>", "<<6>>"], "answer": "6"},
    {"question": "0*8=", "steps": ["<<0>>"], "answer": "0"},
]
CODI_ROWS = {
    "whole": WHOLE,
    "cut": [WHOLE[2], WHOLE[0], WHOLE[1], WHOLE[3]],  # the first row has the shortest steps
    "padded": [
        {"question": "12+3*2=", "steps": ["<<12+3=15>>", "<<15*2>>", "<<30>>"], "answer": "30"},
        {"question": "7-5=", "steps": ["<<7-5=2>>", "<<2>>", "<<2>>"], "answer": "2"},
    ],
}
COCONUT_ROWS: list[dict[str, Any]] = [
    {"question": "1+2=", "steps": ["<<1+2=3>>"], "answer": "3"},
    {"question": "12+22*5=", "steps": ["<<110>>", "<<12+1>>", "<<9>>", "<<1-0=1>>", "<<1>>"], "answer": "122"},
    {"question": "8-3-1=", "steps": ["<<8-3=5>>", "<<5-1=4>>", "<<4>>"], "answer": "4"},
]
STAGES = (2, STEPS, STEPS + 1)  # in the last one no step is written
CASES = [*(f"codi.{rows}" for rows in CODI_ROWS), *(f"coconut.{stage}" for stage in STAGES)]
GRADIENTS = ("codi.whole", f"coconut.{STAGES[-1]}")


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of characters and of the marks of a step, without a pad token."""
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="!"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?<<|>>|[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def untrained(kind: str) -> PreTrainedModel:
    """A model of `MODELS`, of any version of transformers."""
    ends = {"vocab_size": len(VOCABULARY), "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": None}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **MODELS[kind], **ends))


class Kept(nn.CrossEntropyLoss):
    """A cross-entropy that keeps its labels and what it returns, as it was then: Coconut changes it in place."""

    calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = super().forward(logits, labels)
        self.calls.append((labels, found.clone()))
        return found


def codi_batch(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What the official `preprocess` and collator make of rows. An answer begins after "#"."""
    of = tokenizer()
    questions = [of(row["question"])["input_ids"] for row in rows]
    answers = [[*of("#" + row["answer"])["input_ids"], EOS] for row in rows]
    traces = [of(" ".join(row["steps"][:-1]))["input_ids"] for row in rows]

    def padded(found: list[list[int]], pad: int, side: str = "right") -> torch.Tensor:
        return pad_sequence([torch.tensor(ids) for ids in found], True, pad, side)

    asked = padded([[*ids, BOT] for ids in questions], PAD, "left")
    taught = [[*x, *y, *z] for x, y, z in zip(questions, traces, answers, strict=True)]
    silent = [[*[-100] * len(x), *ids[len(x) :]] for x, ids in zip(questions, taught, strict=True)]
    said = [[EOT, *ids] for ids in answers]
    return {
        "encoder_input_ids": asked,
        "encoder_attention_mask": asked != PAD,
        "decoder_input_ids": padded(said, PAD),
        "labels": padded(said, -100),
        "ref_input_ids": padded(taught, PAD),
        "ref_labels": padded(silent, -100),
        "model_answer_position": torch.tensor([2 for _ in rows]),
        "ref_answer_position": torch.tensor([len(x) - len(y) + 1 for x, y in zip(taught, answers, strict=True)]),
    }


def official_codi(file: Path, kind: str) -> nn.Module:
    """The official CODI with random weights: a model without LoRA, a decoder and a projection."""
    code = module(file)
    marks = {"start_ids": (START, SPACED_START), "end_id": END, "eot_id": EOS, "pad_id": PAD, "stop_ids": (EOS, PAD)}
    with tempfile.TemporaryDirectory() as parent:
        folder = str(Path(parent, kind))  # the official code asks the name what kind of model it is
        untrained(kind).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        training = code.TrainingArguments(
            parent, use_cpu=True, use_lora=False, num_latent=LATENTS, use_prj=True, prj_dim=16, print_loss=False
        )
        found = code.CODI(code.ModelArguments(folder, use_decoder=True), training, None).float()
    steps, pads = code.get_steps, code.pad_steps
    code.get_steps = lambda ids, count, **_: steps(ids, count, **marks)
    code.pad_steps = lambda ids, **_: pads(ids, pad_id=PAD)
    found.loss_fct = Kept(ignore_index=-100)
    with torch.no_grad():
        for weight in found.parameters():
            weight.normal_(std=0.3) if weight.dim() > 1 else weight.add_(torch.randn_like(weight), alpha=0.1)
    return found


def coconut_batch(data: ModuleType, stage: int) -> dict[str, torch.Tensor]:
    """The batch that the official dataset and collator make of `COCONUT_ROWS` in a stage."""
    of = tokenizer()
    of.pad_token = of.eos_token
    settings = SimpleNamespace(
        max_latent_stage=STEPS, c_thought=PER_STEP, pad_latent_to_max=True, uniform_prob=0.0, no_cot=False
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        file.write_text(json.dumps(COCONUT_ROWS))
        rows = data.get_dataset(str(file), of)
        staged = data.get_cot_with_explainable_latent_dataset(stage, rows, settings, BOT, PAD, EOT)
        batch = data.MyExplainableCollator(of, latent_id=PAD, label_pad_token_id=-100)(list(staged))
    return {name: batch[name] for name in batch if name != "idx"}


def gradients(loss: torch.Tensor, parts: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Those of all parameters of the parts that the loss depends on."""
    named = {f"grad.{part}.{name}": x for part, found in parts.items() for name, x in found.named_parameters()}
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    return {name: x for name, x in zip(named, found, strict=True) if x is not None}


def run(case: str, codi: nn.Module, code: dict[str, ModuleType]) -> dict[str, torch.Tensor]:
    """The tensors of a case."""
    Kept.calls = []
    method, which = case.split(".")
    parts = {"model": codi.codi, "decoder": codi.decoder}
    if method == "codi":
        batch = codi_batch(CODI_ROWS[which])
        out = codi(**batch)
        calls, skip = Kept.calls[:-2], 0  # the last ones are of the student's answer and of the teacher
        rows, added, found = 1, out["explain_loss"], {}
        parts |= {"prj": codi.prj}
    else:
        batch = coconut_batch(code["coconut_data"], int(which))
        settings = SimpleNamespace(max_latent_stage=STEPS, training_method="full", explain_mode="v1_aug")
        of = tokenizer()
        model = code["coconut"].CoconutGPT_Same_Word_Embedding(
            codi.codi, codi.decoder, of, PAD, BOT, EOT, EOS, START, PER_STEP, settings
        )
        out = model(**batch)
        (_, main), *calls = Kept.calls
        skip = PER_STEP - 1  # labels at latent tokens
        rows, added, found = len(batch["labels"]), out.loss - main, {"out.main_loss": main}
    losses = torch.stack([value for _, value in calls])
    loss = losses.mean() / rows
    torch.testing.assert_close(loss, added)
    found |= {"out.step_loss": loss, "out.step_losses": losses}
    if case in GRADIENTS:
        found |= gradients(loss, parts)
    shape = len(batch["labels"]), -1
    inputs = batch | {f"targets.{k}": labels.view(shape)[:, skip:] for k, (labels, _) in enumerate(calls)}
    found |= {f"in.{name}": x.short() for name, x in inputs.items()}
    return {f"{case}.{name}": x.detach().clone().contiguous() for name, x in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sim-cot", type=Path, required=True, help="a checkout of InternLM/SIM-CoT")
    checkout = parser.parse_args().sim_cot
    if transformers.__version__ != PINNED:
        parser.error(f"transformers {transformers.__version__}: put {PINNED}, which Coconut needs, on PYTHONPATH")
    code = {
        "coconut": module(checkout / "Coconut" / "coconut.py"),
        "coconut_data": module(checkout / "Coconut" / "dataset.py"),
    }
    code["coconut"].CrossEntropyLoss = Kept
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    commit = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    config = {"transformers": transformers.__version__, "torch": torch.__version__, "sim-cot": commit}
    for kind in MODELS:
        torch.manual_seed(0)
        codi = official_codi(checkout / "CODI" / "src" / "model.py", kind)
        parts = {"model": codi.codi, "decoder": codi.decoder, "prj": codi.prj}
        tensors = {
            f"w.{part}.{name}": x.detach().clone() for part in parts for name, x in parts[part].named_parameters()
        }
        for case in CASES:
            tensors |= run(case, codi, code)
        save_file(tensors, HERE / f"official_sim_cot_{kind}.safetensors", metadata={"config": json.dumps(config)})


if __name__ == "__main__":
    main()
