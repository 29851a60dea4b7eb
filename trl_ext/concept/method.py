"""The record of concept tokens."""

from ..common.method import Command, TrainingMethod


METHOD = TrainingMethod(
    name="concept",
    about="Concept tokens: middle layers read discrete concepts that the model makes of its own tokens.",
    trainers={"ConceptTrainer": "ConceptConfig"},
    exports={
        "ConceptConfig": "config",
        "ConceptTrainer": "trainer",
        "evaluate_concepts": "evaluation",
        "ratio_loss": "losses",
    },
    commands=(
        Command(
            "train-concept",
            "concept tokens, compressed online: the embedded default on a CPU, Qwen3-0.6B on GSM8K with a GPU; "
            "MODEL=smollm2",
            "recipes/concept_v2.py",
            configs="concept",
            trainer="ConceptTrainer",
            parent="SFTTrainer",
            what="middle layers read discrete concepts made of the model's own tokens",
            evidence="all texts kept at half the cost; on SmolLM2 not free",
            data=("trl_ext.tasks.data:problem_reader",),
        ),
        Command(
            "train-concept-v1",
            "the baselines of concept tokens: plain LoRA, and a concept for every N tokens",
            "recipes/concept_v1.py",
        ),
        Command(
            "bench-concept",
            "concept tokens over seeds: what is kept; wall time",
            "benchmarks/bench_concept.py",
            "benchmarks/bench_concept_speed.py",
        ),
        Command(
            "bench-concept-pretrained",
            'concept tokens on SmolLM2-135M; ARGS="--dataset train.jsonl --eval_dataset test.jsonl"',
            "benchmarks/bench_concept_pretrained.py",
        ),
    ),
    progress={"loss/ce": "ce", "concept/ratio": "ratio", "concept/perplexity": "perplexity"},
    curves=(
        ("accuracy", "held-out accuracy"),
        ("loss/ce", "cross-entropy"),
        ("concept/ratio", "tokens for each concept, in training"),
        ("concept/probability", "mean probability of a concept"),
        ("concept/perplexity", "perplexity of the codewords"),
        ("loss/usage", "KL(use of the codewords || uniform)"),
    ),
    gpu_check="gpu_concept.py",
)
