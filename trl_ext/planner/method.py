"""The record of planner and executor."""

from ..common.method import Command, TrainingMethod


# Metrics of the monitors, drawn in a separate picture
MONITOR_CURVES = (
    ("monitor/delta_nll_null", "NLL without a plan, minus under it"),
    ("monitor/delta_nll_random", "NLL of a random plan, minus under its own"),
    ("monitor/delta_nll_shuffled", "NLL of another text's plan, minus under its own"),
    ("em/margin", "best plan's margin over the second"),
    ("em/flip_rate", "plans that changed in an E-step"),
    ("em/staleness", "nats that a new plan is better"),
    ("monitor/cos", "cos(expected, chosen codeword)"),
    ("monitor/l2", "L2 between them"),
    ("monitor/planner_grad_norm", "gradient that reaches the plans"),
)

METHOD = TrainingMethod(
    name="planner",
    about="Planner and executor: a model plans in typed concepts, and writes the text from the plan alone.",
    trainers={"PlannerExecutorTrainer": "PlannerExecutorConfig"},
    exports={
        "GradientNorm": "monitors",
        "PlannerExecutorConfig": "config",
        "PlannerExecutorTrainer": "trainer",
        "PlannerMonitorCallback": "monitor_callback",
        "PlannerQuotaController": "quota",
        "advise": "diagnostics",
        "commitment_loss": "losses",
        "cosine_and_l2": "monitors",
        "delta_nll": "monitors",
        "entropy_and_max_prob": "monitors",
        "evaluate_plans": "evaluation",
        "flip_rate": "monitors",
        "loss_eos": "losses",
        "nll_by_bucket": "monitors",
        "staleness_gap": "monitors",
        "top1_margin": "monitors",
    },
    commands=(
        Command(
            "train-planner",
            "planner and executor: the embedded default on a CPU, Qwen3-0.6B on GSM8K with a GPU",
            "recipes/planner_executor.py",
            configs="planner",
            trainer="PlannerExecutorTrainer",
            parent="SFTTrainer",
            what="a plan in typed concepts, and a text written from the plan alone",
            evidence="100% of unseen facts, 0% from random plans",
            data=("trl_ext.tasks.data:problem_reader",),
        ),
        Command(
            "bench-planner",
            "planner and executor over seeds and switches, and what the monitors cost",
            "benchmarks/bench_planner.py",
            "benchmarks/bench_monitors.py",
        ),
    ),
    progress={"loss/executor": "executor", "loss/planner": "planner"},
    curves=(
        ("accuracy", "held-out texts written exactly"),
        ("loss/executor", "executor: cross-entropy"),
        ("loss/planner", "planner: cross-entropy on the best plan"),
        ("loss/commitment", "1 - cos(expected, chosen codeword)"),
        ("loss/usage", "KL(use of the concepts || uniform)"),
        ("loss/quota", "quota"),
    ),
    gpu_check="gpu_planner.py",
)
