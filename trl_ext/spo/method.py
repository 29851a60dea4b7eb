"""The record of SPO."""

from ..common.method import Command, TrainingMethod


METHOD = TrainingMethod(
    name="spo",
    about="SPO: one completion a prompt is compared with the prompt's tracked expected reward.",
    trainers={"SPOTrainer": "SPOConfig"},
    exports={"AutoAdaptiveValueTracker": "tracker", "SPOConfig": "config", "SPOTrainer": "trainer"},
    commands=(
        Command(
            "train-spo",
            "SPO: one completion a prompt; the embedded default of MiniMind's stages",
            "recipes/minimind/spo.py",
            trainer="SPOTrainer",
            parent="GRPOTrainer",
            paper="2509.13232",
            what="one completion a prompt, against the prompt's tracked expected reward",
            evidence="70%, GRPO 63%",
            data=("trl_ext.minimind.data:row_reader", "rl"),
        ),
    ),
)
