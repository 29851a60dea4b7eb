"""The record of HRPO."""

from ..common.method import Command, TrainingMethod


METHOD = TrainingMethod(
    name="hrpo",
    about="HRPO: GRPO whose thinking tokens mix their embedding with a state made from the position before.",
    trainers={"HRPOTrainer": "HRPOConfig"},
    exports={
        "HRPOConfig": "classes",
        "HRPOTrainer": "classes",
        "ThinkingProjectionMonitor": "monitors",
    },
    commands=(
        Command(
            "train-hrpo",
            'HRPO: the embedded default on a CPU, Qwen2.5-1.5B on GSM8K with a GPU; ARGS="--overwrite --flag value"',
            "recipes/hrpo_gsm8k.py",
            configs="hrpo",
            vllm=True,
            trainer="HRPOTrainer",
            parent="GRPOTrainer",
            paper="2505.18454",
            what="GRPO whose thinking tokens mix their embedding with a state made from the position before",
            evidence="sums: 87.7% to 88.5% by mode, GRPO 88.8%: no gain; graphs: 61%, GRPO 44%; SmolLM2: 62%, GRPO 72%",
            data=("trl_ext.tasks.data:problem_reader",),
        ),
        Command(
            "train-hrpo-two-stage",
            'stage 1 with the projection frozen, stage 2 with it at 5e-5; ARGS="--output_dir mine"',
            "recipes/hrpo_two_stage.py",
            configs="hrpo",
        ),
        Command(
            "bench-hrpo",
            "step time, decode rate and memory against stock TRL and transformers",
            "benchmarks/bench_hrpo.py",
        ),
        Command(
            "bench-decoding",
            "decoding without ended rows, and with a compiled step, against plain decoding",
            "benchmarks/bench_decoding.py",
        ),
        Command(
            "bench-learning",
            "held-out accuracy over seeds: warm start, GRPO, HRPO in each mode",
            "benchmarks/bench_learning.py",
        ),
        Command(
            "bench-states",
            "what thinking states add on graphs, over seeds: HRPO with its states replaced, and GRPO",
            "benchmarks/bench_states.py",
        ),
    ),
    progress={"thinking/fraction": "thinking"},
    curves=(
        ("reward", "sampled reward"),
        ("accuracy", "held-out accuracy"),
        ("thinking/fraction", "thinking share of tokens"),
        ("thinking/embeds_ratio", "gate: mean a (token embedding)"),
        ("thinking/hidden_ratio", "gate: mean sqrt(1 - a^2) (thinking state)"),
        ("completions/mean_length", "completion length, tokens"),
        ("completions/delimiter_rate", "completions with the delimiter"),
        ("frac_reward_zero_std", "groups with one reward for all"),
        ("thinking/projection_mean_change", "projection: mean |W - W_0|"),
        ("thinking/projection_grad_norm", "projection: norm of its gradient"),
    ),
    gpu_check="gpu_hrpo.py",
)
