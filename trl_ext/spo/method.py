"""The record of SPO."""

from ..common.method import TrainingMethod


METHOD = TrainingMethod(
    name="spo",
    about="SPO: policy optimization with one completion a prompt and a value that is tracked for each prompt.",
    trainers={"SPOTrainer": "SPOConfig"},
    exports={"AutoAdaptiveValueTracker": "tracker", "SPOConfig": "config", "SPOTrainer": "trainer"},
)
