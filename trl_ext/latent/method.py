"""The record of latent tokens: CODI, PCCoT and KaVa."""

from ..common.method import Command, TrainingMethod


METHOD = TrainingMethod(
    name="latent",
    about="CODI, PCCoT, KaVa: a student answers after a few latent tokens instead of written steps.",
    trainers={"CODITrainer": "CODIConfig", "PCCoTTrainer": "PCCoTConfig", "KAVATrainer": "KAVAConfig"},
    exports={
        "CODIConfig": "methods",
        "CODILoss": "loss_modules",
        "CODITrainer": "methods",
        "KAVAConfig": "methods",
        "KAVALoss": "loss_modules",
        "KAVATrainer": "methods",
        "KVDistillationLoss": "loss_modules",
        "LatentReasoningModule": "loss_modules",
        "PCCoTConfig": "methods",
        "PCCoTTrainer": "methods",
        "RKVCompressor": "loss_modules",
    },
    commands=(
        Command(
            "train-codi",
            'CODI: the embedded default on a CPU, GPT-2 on GSM8K-Aug with a GPU; MODEL=folder, ARGS="--flag value"',
            "recipes/codi_gsm8k.py",
            configs="codi",
        ),
        Command(
            "train-pccot",
            "PCCoT: the embedded default on a CPU, GPT-2 on GSM8K-Aug with a GPU",
            "recipes/pccot_gsm8k.py",
            configs="pccot",
        ),
        Command(
            "train-kava",
            "KaVa: the embedded default on a CPU, Qwen2.5-0.5B on GSM8K-Aug with a GPU",
            "recipes/kava_gsm8k.py",
            configs="kava",
        ),
        Command(
            "eval-latent",
            'a closer look at latent tokens: ARGS="--checkpoint runs/kava_tiny/final"',
            "recipes/eval_latent.py",
        ),
        Command(
            "bench-latent",
            "held-out accuracy over seeds: SFT with and without steps, pause tokens, CODI, PCCoT, KaVa",
            "benchmarks/bench_latent.py",
        ),
        Command(
            "bench-kv-compression",
            "scoring, redundancy, steps, latent tokens and decoding against what one would use instead",
            "benchmarks/bench_kv_compression.py",
        ),
    ),
    progress={"loss/ce_student": "student", "loss/ce_teacher": "teacher", "loss/codi": "codi", "loss/kv": "kv"},
    curves=(
        ("accuracy", "held-out accuracy, latent tokens"),
        ("loss", "loss"),
        ("loss/ce_student", "student: cross-entropy"),
        ("loss/ce_teacher", "teacher: cross-entropy"),
        ("loss/codi", "L_CODI: hidden states"),
        ("loss/kv", "L_KV: keys and values"),
    ),
    gpu_check="gpu_latent.py",
)
