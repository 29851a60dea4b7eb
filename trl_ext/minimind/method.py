"""The record of MiniMind: a small language model through every stage."""

from ..common.method import Command, TrainingMethod


METHOD = TrainingMethod(
    name="minimind",
    about="MiniMind: a small language model goes through every stage, from its tokenizer to a dialogue.",
    exports={"load_minimind_data": "data"},
    commands=(
        Command(
            "minimind",
            "a small language model through every stage, from its tokenizer to a dialogue; "
            "ARGS=\"--overwrite --dpo '--beta 0.2'\"",
            "recipes/minimind/all.py",
        ),
        Command(
            "minimind-gpu",
            "the same at the published size, with MiniMind's files in dataset/",
            "recipes/minimind/all.py",
            arguments=("--published",),
        ),
        Command(
            "chat",
            "talk to what `make minimind` has left: ARGS=\"--say 'What is 7+5-3?'\"",
            "recipes/minimind/chat.py",
        ),
        Command(
            "bench-minimind",
            "MiniMind's stages over seeds, each against its control; PPO, GRPO, CISPO and SPO at equal generated "
            "tokens",
            "benchmarks/bench_minimind.py",
        ),
    ),
    gpu_check="gpu_minimind.py",
    gpu_check_needs_stock=True,
)
