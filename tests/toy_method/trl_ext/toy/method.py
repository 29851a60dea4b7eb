"""The record of the toy method on the training side."""

from ..common.method import Command, TrainingMethod


METHOD = TrainingMethod(
    name="toy",
    about="Toy: SFT of a model whose input embeddings are shifted by a learned vector.",
    trainers={"ToyTrainer": "ToyConfig"},
    exports={"ToyConfig": "trainer", "ToyTrainer": "trainer"},
    commands=(
        Command(
            "train-toy",
            "the toy method",
            "recipes/toy.py",
            configs="toy",
        ),
    ),
    progress={"toy/norm": "shift"},
    curves=(("loss", "loss"), ("toy/norm", "norm of the shift")),
)
