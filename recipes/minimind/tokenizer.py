"""Stage 1: a byte-level BPE tokenizer from any text.

    python recipes/minimind/tokenizer.py [--dataset pretrain.jsonl] [--vocab_size 6400]

Held-out metric: mean bytes of text per token.
"""

import time
from dataclasses import dataclass, field

from trl_ext.cli.user_errors import in_sentences


in_sentences()


from trl_ext.cli.console import PlainConsole
from trl_ext.cli.report import write_summary
from trl_ext.common.run_folder import begin, finished, lock, writable_folder
from trl_ext.minimind.provenance import remember
from trl_ext.minimind.stage import DataStageArguments, parse, show
from unsloth_ext import train_tokenizer


@dataclass
class Arguments(DataStageArguments):
    vocab_size: int = field(
        default=6400, metadata={"help": "Number of tokens, including three special tokens and 256 bytes."}
    )
    output_dir: str = field(
        default="runs/minimind/tokenizer", metadata={"help": "Folder where the tokenizer is saved."}
    )


def bytes_per_token(tokenizer, rows) -> float:
    texts = list(rows["text"])
    return sum(len(text.encode()) for text in texts) / sum(len(ids) for ids in tokenizer(texts)["input_ids"])


def main() -> None:
    (stage,) = parse(__file__, Arguments)
    started, folder = time.time(), writable_folder(stage.output_dir, "--output_dir")
    lock(folder)
    console = PlainConsole()
    console.print(f"Run {begin(folder, stage.overwrite)} in {folder}")
    remember(folder, stage.made_from)
    train, held_out = stage.load("pretrain", "pretrain")
    tokenizer = train_tokenizer((row["text"] for row in train), stage.vocab_size)
    tokenizer.save_pretrained(folder / "final")
    before, after = {"bytes per token": 1.0}, {"bytes per token": bytes_per_token(tokenizer, held_out)}
    show("tokenizer", before, after, console)
    write_summary(
        folder, stage="tokenizer", before=before, after=after, steps=0, seconds=round(time.time() - started, 1)
    )
    finished(folder, 0)
    console.print(f"Written: {folder / 'final'}, {folder / 'summary.json'}")


if __name__ == "__main__":
    main()
