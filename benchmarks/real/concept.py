"""Concept tokens. The controls are LoRA on all layers, and on a model with so few layers that it costs the same."""

from typing import Any

from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from benchmarks.bench_concept import prune
from benchmarks.real.task import Task, completed
from trl_ext import ConceptConfig, ConceptTrainer, evaluate_concepts
from trl_ext.concept.config import PRESETS
from unsloth_ext.concept.accounting import cost, equal_depth


# As in bench_concept_pretrained, whose model is the same: 22 of the 30 layers run on concepts
LORA = {
    "use_concepts": False,
    "learning_rate": 5e-4,
    "n_shallow": 4,
    "n_deep": 4,
    "num_concepts": 512,
    "target_ratio": 4,
}
EQUAL_COST = "LoRA, layers of equal cost"
CONCEPTS: dict[str, dict[str, Any]] = {
    "concept tokens": {**LORA, **PRESETS["stable"], "use_concepts": True, "concept_learning_rate": 2e-3},
    EQUAL_COST: LORA,
    "LoRA, all layers": LORA,
}


def conceptual(task: Task, name: str) -> dict[str, Any]:
    """A model with concepts, also with random ones, or a control."""
    base = task.start()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    args = ConceptConfig(**(task.common(name, task.budget.steps) | CONCEPTS[name]), max_length=None)
    if name == EQUAL_COST:
        prune(model, equal_depth(model.config, args.online(model.config.num_hidden_layers), args.target_ratio))
    set_seed(task.seed)
    trainer = ConceptTrainer(
        model,
        args,
        train_dataset=completed(task.train),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    spent = task.trained(trainer)
    found = evaluate_concepts(
        trainer.model,
        tokenizer,
        completed(task.held_out),
        **task.decoding,
        completions_only=True,
    ).numbers()
    if not args.use_concepts:
        found["macs"] = cost(model.config).macs / cost(AutoConfig.from_pretrained(base)).macs
    return spent | found
