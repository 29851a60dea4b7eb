"""HRPOTrainer on Unsloth's generated trainer: modes, ratio, metrics, resume, config, and what must be refused."""

from tests import unsloth_on_cpu  # noqa: F401 - before all else


# isort: split
import json
import math
import pickle
import sys
import tempfile
from pathlib import Path

import torch
import trl
from safetensors.torch import load_file

from tests import tiny
from tests.trl_ext.hrpo import setups
from tests.unsloth_scripts import hrpo_losses
from tests.unsloth_scripts.fast_forward import load, saved
from tests.unsloth_scripts.grpo import pad_is_rare
from trl_ext import HRPOConfig, HRPOTrainer
from unsloth_ext import FastThinkingModel, ThinkingConfig, backbone_of, drop_thinking


FOLDER = saved(pad_is_rare(tiny.model("qwen3")))


def fast_model(source: str = "projection", family: str | None = None):
    folder = FOLDER if family is None else saved(pad_is_rare(tiny.model(family)))
    torch.manual_seed(0)
    model = load_thinking(folder, source)
    model = FastThinkingModel.get_peft_model(model, r=4)
    tiny.loud_gates(backbone_of(model))
    return model


def load_thinking(folder, source):
    return FastThinkingModel.from_pretrained(
        folder,
        max_seq_length=128,
        dtype=torch.float32,
        load_in_4bit=False,
        device_map="cpu",
        thinking=ThinkingConfig(thinking_source=source),
    )[0]


def trainer_of(model=None, *, config_class=HRPOConfig, trainer_class=HRPOTrainer, out=None, **changes):
    args = setups.arguments(
        config_class, out or tempfile.mkdtemp(), **{"optim": "adamw_torch", "max_steps": 2, **changes}
    )
    extra = {"peft_config": changes.pop("peft_config")} if "peft_config" in changes else {}
    return trainer_class(
        model=model or fast_model(changes.get("thinking_source", "projection")),
        reward_funcs=setups.reward_digits,
        args=args,
        train_dataset=setups.prompts(),
        processing_class=tiny.tokenizer(),
        **extra,
    )


def hrpo(model=None, **changes):
    # Unsloth takes a sampled pad token for padding: at this temperature none is sampled
    return trainer_of(model, **{"answer_delimiter": "#", "temperature": 0.5, **changes})


def mode(source: str, recompute: str, **changes) -> dict:
    trainer = hrpo(thinking_source=source, recompute=recompute, jacobi_iterations=12, **changes)
    before = setups.parameters(trainer)
    trainer.train()
    after = setups.parameters(trainer)
    moved = [name for name in after if not torch.equal(before[name], after[name])]
    folder = Path(tempfile.mkdtemp())
    trainer.save_model(str(folder))
    tensors = load_file(folder / "adapter_model.safetensors")
    first = trainer.state.log_history[0]
    return {
        "finite": all(math.isfinite(x) for x in setups.losses(trainer)),
        "losses": setups.losses(trainer),
        "ratio": [entry.get("thinking/ratio_deviation") for entry in trainer.state.log_history[:-1]],
        "moved": {part: any(part in name for name in moved) for part in ("lora_B", "gate_r", "Lambda", "projection")},
        "logged": sorted(first),
        "fraction": first["thinking/fraction"],
        "ratios": [first["thinking/embeds_ratio"], first["thinking/hidden_ratio"]],
        "saved": sorted({part for name in tensors for part in name.split(".") if part.startswith("thinking_")}),
        "thinking": json.loads((folder / "latent_reasoning.json").read_text())["settings"],
        "kl": first.get("kl"),
    }


def blind() -> float:
    """The ratio when training does not get the states: shows that the check can fail."""
    trainer = hrpo(recompute="frozen")
    trainer.model.train()
    inputs = trainer._prepare_inputs([row for row in trainer.train_dataset.select(range(2)) for _ in range(4)])
    trainer.current_gradient_accumulation_steps = 1
    inputs["thinking_mask"] = torch.zeros_like(inputs["thinking_mask"])
    trainer.compute_loss(trainer.model, inputs)
    return trainer._metrics["train"]["thinking/ratio_deviation"][-1]


def resumed() -> dict:
    common = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "num_iterations": 2,
        "beta": 0.05,
    }
    out = tempfile.mkdtemp()
    whole = hrpo(out=out, **common)
    whole.train()
    result = {"files": sorted({f.suffix for f in Path(out, "checkpoint-2").iterdir()})}
    for step in (2, 3):  # 3 lies inside a generation cycle
        torch.manual_seed(1234)
        again = hrpo(out=out, **common)
        again.train(resume_from_checkpoint=f"{out}/checkpoint-{step}")
        a, b = setups.parameters(whole), setups.parameters(again)
        result[f"parameters {step}"] = max((a[name] - b[name]).abs().max().item() for name in a)
        result[f"losses {step}"] = setups.losses(whole)[step:] == setups.losses(again)[step:]
    return result


def feature_off() -> dict:
    """Every loss and parameter of `thinking=False` and of the parent."""
    runs = []
    for config_class, trainer_class, extra in (
        (trl.GRPOConfig, trl.GRPOTrainer, {}),
        (HRPOConfig, HRPOTrainer, {"thinking": False}),
    ):
        torch.manual_seed(0)
        from unsloth import FastLanguageModel

        model = FastLanguageModel.get_peft_model(
            FastLanguageModel.from_pretrained(
                FOLDER, max_seq_length=128, dtype=torch.float32, load_in_4bit=False, device_map="cpu"
            )[0],
            r=4,
        )
        every = {f.name: f.default for f in HRPOConfig.__dataclass_fields__.values() if f.name in SAME_DEFAULTS}
        trainer = trainer_of(
            model, config_class=config_class, trainer_class=trainer_class, **{**every, **extra, "max_steps": 3}
        )
        trainer.train()
        runs.append((setups.losses(trainer), setups.parameters(trainer)))
    (a, x), (b, y) = runs
    return {
        "losses": a == b,
        "parameters": x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x),
        "n": len(a),
    }


# Defaults in which Unsloth's config differs from TRL's and that matter here
SAME_DEFAULTS = (
    "gradient_accumulation_steps",
    "warmup_steps",
    "weight_decay",
    "seed",
    "lr_scheduler_type",
    "max_grad_norm",
    "beta",
)


def config() -> dict:
    from transformers import HfArgumentParser

    made = HRPOConfig("out", lr_thinking_projection=5e-5, use_cpu=True)
    parsed = HfArgumentParser(HRPOConfig).parse_args_into_dataclasses(
        ["--output_dir", "out", "--lr_thinking_projection", "5e-5", "--use_cpu"]
    )[0]
    (by_trl,) = trl.TrlParser(HRPOConfig).parse_args_and_config(
        ["--output_dir", "out", "--lr_thinking_projection", "5e-5", "--use_cpu"]
    )
    again = pickle.loads(pickle.dumps(made))
    text = json.loads(made.to_json_string())

    def refused(**changes):
        try:
            HRPOConfig("out", use_cpu=True, **changes)
        except (ValueError, TypeError) as error:
            return str(error)

    return {
        "parsed": parsed.to_dict() | {"logging_dir": 0} == made.to_dict() | {"logging_dir": 0},
        "by_trl": by_trl.to_dict() == made.to_dict(),
        "pickled": again.to_dict() == made.to_dict() and type(again) is HRPOConfig,
        "json": [text["recompute"], text["lr_thinking_projection"], text["unsloth_grpo_mini_batch"]],
        "values": {
            name: getattr(made, name)
            for name in (
                "learning_rate",
                "optim",
                "seed",
                "loss_type",
                "epsilon_high",
                "beta",
                "weight_decay",
                "bf16",
                "unsloth_num_chunks",
                "unsloth_logit_chunk_multiplier",
                "unsloth_grpo_mini_batch",
            )
        },
        "is_unsloths": isinstance(made, trl.GRPOConfig),
        "checks": {
            "ours": refused(recompute="nonsense"),
            "unsloths": refused(temperature=11.0),
            "mini_batch": refused(unsloth_grpo_mini_batch=1000),
            "unknown": refused(no_such_field=1),
        },
        "reentrant": made.gradient_checkpointing_kwargs,
        "small_batch": HRPOConfig(
            "out", use_cpu=True, per_device_train_batch_size=3, num_generations=4
        ).per_device_train_batch_size,
    }


def refusals() -> dict:
    said = {}

    def expect(name, action, kind=RuntimeError):
        try:
            action()
            said[name] = "nothing"
        except kind as error:
            said[name] = str(error)

    class Stale(HRPOTrainer):
        pass

    live = trl.GRPOTrainer
    trl.GRPOTrainer = type("Newer", (live,), {})
    expect("stale", lambda: hrpo())
    trl.GRPOTrainer = live
    trainer = hrpo()
    trainer.compute_loss = lambda *_, **__: None
    expect("bypassed", trainer._check_live)
    trainer.__class__ = type("Other", (HRPOTrainer,), {})
    trainer._losses_seen, trainer.compute_loss = False, lambda *_, **__: torch.zeros((), requires_grad=True)
    expect("training step", trainer.train)
    expect("path", lambda: trainer_of(FOLDER), ValueError)
    expect("not unsloth's", lambda: trainer_of(tiny.model("qwen3")), ValueError)
    return said


def references() -> dict:
    """What is said of an adapter, new or trained before, that is held to its reference."""
    from trl_ext.hrpo import unsloth

    said, warn = {}, unsloth.logger.warning
    heard: list[str] = []
    unsloth.logger.warning = heard.append
    for name, trained, beta in (("new", False, 0.05), ("trained", True, 0.05), ("free", True, 0.0)):
        model = fast_model()
        if trained:
            next(p for n, p in model.named_parameters() if "lora_B" in n).data[0, 0] = 0.1
        hrpo(model, beta=beta)
        said[name] = [*heard]
        heard.clear()
    unsloth.logger.warning = warn
    return said


def plain_model() -> dict:
    """A model without thinking modules, and a `peft_config`, which Unsloth's trainer would ignore."""
    trainer = HRPOTrainer(
        drop_thinking(load(FOLDER)),
        setups.reward_digits,
        setups.arguments(HRPOConfig, tempfile.mkdtemp(), answer_delimiter="#", max_steps=2, temperature=0.5),
        train_dataset=setups.prompts(),
        processing_class=tiny.tokenizer(),
        peft_config=setups.lora(),
    )
    trainer.train()
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    return {
        "ratio": trainer.state.log_history[0]["thinking/ratio_deviation"],
        "only_adapter": all("lora_" in n or "modules_to_save" in n for n in trained),
        "thinking": sum("thinking" in n for n in trained),
    }


def evaluated() -> dict:
    trainer = hrpo(max_steps=1)
    trainer.args.per_device_eval_batch_size = 8
    return {k: v for k, v in trainer.evaluate(setups.prompts(8)).items() if "thinking" in k or k == "eval_loss"}


PARTS = {
    "modes": lambda: {f"{s} {m}": mode(s, m) for s, m in hrpo_losses.MODES},
    "iterations": lambda: mode("projection", "rollout", num_iterations=2, beta=0.05, max_steps=4),
    "accumulation": lambda: mode(
        "projection", "jacobi", gradient_accumulation_steps=2, steps_per_generation=4, max_steps=2
    ),
    "mini_batch": lambda: mode("projection", "rollout", unsloth_grpo_mini_batch=2),
    "losses": hrpo_losses.report,
    "blind": blind,
    "resumed": resumed,
    "feature_off": feature_off,
    "config": config,
    "refusals": refusals,
    "references": references,
    "plain_model": plain_model,
    "evaluated": evaluated,
}


if __name__ == "__main__":
    report = {"parent": f"{trl.GRPOTrainer.__module__}.{trl.GRPOTrainer.__name__}"}
    report["mro"] = [cls.__name__ for cls in HRPOTrainer.__mro__[:6]]
    for part in sys.argv[1:] or PARTS:
        report[part] = PARTS[part]()
    print(json.dumps(report, default=str))
