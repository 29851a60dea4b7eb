"""The record of MiniMind: a small language model through every stage."""

from ..common.method import Command, TrainingMethod


METHOD = TrainingMethod(
    name="minimind",
    about="MiniMind: a small language model through every stage, from its tokenizer to a dialogue.",
    exports={"load_minimind_data": "data"},
    commands=(
        Command(
            name="minimind",
            about="a small language model through every stage, from its tokenizer to a dialogue; "
            "ARGS=\"--overwrite --dpo '--beta 0.2'\"",
            scripts=("recipes/minimind/all.py",),
        ),
        Command(
            name="minimind-gpu",
            about="the same at the published size, with MiniMind's files in dataset/",
            scripts=("recipes/minimind/all.py",),
            arguments=("--published",),
        ),
        Command(
            name="chat",
            about="talk to what `make minimind` has left: ARGS=\"--say 'What is 7+5-3?'\"",
            scripts=("recipes/minimind/chat.py",),
        ),
        Command(
            name="bench-minimind",
            about="MiniMind's stages over seeds, each against its control; PPO, GRPO, CISPO and SPO at equal generated "
            "tokens",
            scripts=("benchmarks/bench_minimind.py",),
        ),
    ),
    gpu_check="gpu_minimind.py",
    gpu_check_needs_stock=True,
)
