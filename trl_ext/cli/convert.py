"""`latent-reasoning convert CHECKPOINT OUTPUT`: one folder with all weights, for serving, or for other programs.

An adapter is merged into its base. The modules of the method are kept, unless --plain leaves them out.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from ..common.run_folder import PROGRAM, writable_folder
from .command_line import CommandLine
from .console import PlainConsole


def parser() -> CommandLine:
    """The parser of this command."""
    made = CommandLine(prog=f"{PROGRAM} convert", description=__doc__)
    made.add_argument("checkpoint", help="a folder or hub id: an adapter or a whole model of any kind")
    made.add_argument("output", help="a new folder")
    made.add_switch("--plain", "leave the modules of the method out (HRPO): a plain model, which every program reads")
    made.add_argument(
        "--dtype", help="such as bfloat16 (default: that of the weights; HRPO: float32 on a CPU, bfloat16 on a GPU)"
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Write the folder. Return 0.

    Raises:
        ValueError: there is no such model, the output folder holds something, or this kind of model has no plain form.
    """
    flags = parser().parse_args(argv)
    folder = Path(flags.output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds something already; name a new folder")
    from peft import PeftModel

    from unsloth_ext.common.model_card import read_card, results_in, trained_by, with_results, write_copy_card
    from unsloth_ext.common.settings_file import method_of
    from unsloth_ext.common.text_model import TextModel

    card = read_card(Path(flags.checkpoint, "README.md"))  # before anything is written
    opened = TextModel.from_pretrained(flags.checkpoint, **({"dtype": flags.dtype} if flags.dtype else {}))
    method = opened.method
    if flags.plain and method is not None and not method.drop:
        raise ValueError(f"--plain: a {opened.kind} model without its {method.what} is another model; leave it out")
    model = opened.model.merge_and_unload() if isinstance(opened.model, PeftModel) else opened.model
    if flags.plain and method is not None:
        model = method.drop_function()(model)
    writable_folder(str(folder), "OUTPUT")
    model.save_pretrained(folder)
    opened.tokenizer.save_pretrained(folder)
    # Delimiter and answer prompt, for evaluation; the pictures of the card
    for file in (Path(flags.checkpoint, name) for name in ("training_args.json", "curves.png", "eval.png")):
        if file.is_file():
            shutil.copy(file, folder)
    if card is not None:
        left, settings = method_of(model.config)
        if left is None and method is not None and results_in(card):
            card = with_results(card, "")  # they are of the model that thinks
        if left is not None:
            by: str | None = left.name
        else:  # an ordinary model: its card names the training
            by = trained_by(card) if method is None else method.name.upper()
        if by is None:
            (folder / "README.md").write_text(card)
        else:
            write_copy_card(folder, model, card, by, settings)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    kind = "plain" if flags.plain else opened.kind
    PlainConsole().print(f"Written: {folder}, a {kind} model of {model.num_parameters():,} parameters, {size:.1f} MB")
    return 0
