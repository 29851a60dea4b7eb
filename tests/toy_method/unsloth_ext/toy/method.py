"""The record of the toy method on the model side."""

from ..common.method import Method


METHOD = Method(
    name="toy",
    exports={"ToyModel": "shift", "ToySettings": "shift", "attach_toy": "shift", "with_toy_modules": "shift"},
    what="shift",
    key="toy",
    settings="ToySettings",
    attribute="toy_settings",
    modules=("toy_shift",),
    attach="attach_toy",
    loader="ToyModel",
    about="It adds a learned vector to every input embedding.",
    dropped="the vector: what is left reads its embeddings as they are",
    example="""\
from unsloth_ext import ToyModel

model = ToyModel.from_pretrained({where})
print(model.generate("1+2="))""",
    refused_arguments=("inputs_embeds",),
)
