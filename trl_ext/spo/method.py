"""The record of SPO."""

from ..common.method import TrainingMethod


METHOD = TrainingMethod(
    name="spo",
    about="SPO: one completion a prompt is compared with the prompt's tracked expected reward.",
    trainers={"SPOTrainer": "SPOConfig"},
    exports={"AutoAdaptiveValueTracker": "tracker", "SPOConfig": "config", "SPOTrainer": "trainer"},
)
