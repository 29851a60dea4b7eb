"""The last stage: talk to the model. Tokens are printed as they are generated, with a KV cache.

    python recipes/minimind/chat.py [--model_name FOLDER] [--say "What is 7+5-3?" "And 2+2?" ...] [--field value ...]

Without --say it reads what you type, until an empty line.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from trl_ext.cli.user_errors import in_sentences


in_sentences()

from trl_ext.common.config_checks import at_least
from trl_ext.minimind.chat import Dialogue
from trl_ext.minimind.stage import FolderArguments, load_model, parse


@dataclass
class Arguments(FolderArguments):
    flags_title = "Dialogue"

    model_name: str = field(default="", metadata={"help": "Hub id or folder of the model to talk to."})
    say: list[str] | None = field(default=None, metadata={"help": "User turns, instead of typing them."})
    system: str | None = field(default=None, metadata={"help": "The system message."})
    max_new_tokens: int = field(default=256, metadata={"help": "Maximum number of tokens of an answer."})
    temperature: float = field(default=0.0, metadata={"help": "Sampling temperature; 0: always the most likely token."})

    def __post_init__(self) -> None:
        at_least(self, max_new_tokens=1, temperature=0)


def typed() -> Iterator[str]:
    while text := input("> ").strip():
        yield text


def main() -> None:
    (stage,) = parse(__file__, Arguments)
    dialogue = Dialogue(*load_model(stage.model_name), stage.max_new_tokens, stage.temperature, stage.system)
    for text in stage.say or (typed() if sys.stdin.isatty() else filter(None, map(str.strip, sys.stdin))):
        print(f"user: {text}\nassistant: ", end="", flush=True)
        dialogue.say(text, stream=True)


if __name__ == "__main__":
    main()
