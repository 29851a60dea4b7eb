"""`latent-reasoning chat CHECKPOINT`: talk to a model of any kind.

With a chat template the whole dialogue is kept. Without one, and for models with latent tokens or a planner, which read one
question, each turn stands alone. Type an empty line to leave.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ..common.config_checks import at_least
from ..common.run_folder import PROGRAM
from .command_line import CommandLine
from .console import PlainConsole


def parser() -> CommandLine:
    """The parser of this command."""
    made = CommandLine(prog=f"{PROGRAM} chat", description=__doc__)
    made.add_argument("checkpoint", help="a folder or hub id: an adapter or a whole model of any kind")
    made.add_argument("--say", nargs="+", help="your turns, instead of typing them")
    made.add_argument("--system", help="the system message, for models with a chat template")
    made.add_argument(
        "--state", default="on", help="what is done to the latent steps (docs/evaluation.md; default: on)"
    )
    made.add_argument("--max_new_tokens", type=int, help="longest answer in tokens (default: 256, or what is left)")
    made.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (default: 0)")
    made.add_argument("--answer_delimiter", help="the text that ends the thinking (default: that of the training)")
    made.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    return made


def typed() -> Iterator[str]:
    """Turns from the keyboard, until an empty line or the end of the input."""
    while sys.stdin.isatty():
        try:
            text = input("> ").strip()
        except EOFError:
            return
        if not text:
            return
        yield text
    yield from filter(None, map(str.strip, sys.stdin))


def main(argv: Sequence[str] | None = None) -> int:
    """Answer each turn. Return 0."""
    flags = parser().parse_args(argv)
    at_least(flags, max_new_tokens=1, temperature=0)
    from transformers import set_seed

    from unsloth_ext.common.text_model import TextModel

    model = TextModel.from_pretrained(flags.checkpoint, delimiter=flags.answer_delimiter).to_accelerator()
    if flags.state not in model.states:
        raise ValueError(f"--state {flags.state}: a {model.kind} model has {', '.join(model.states)}")
    remembers = bool(model.tokenizer.chat_template) and model.kind not in ("latent", "planner")
    if flags.system and not remembers:
        raise ValueError(f"--system: this {model.kind} model reads one text at a time; leave it out")
    how: dict[str, Any] = (
        {"do_sample": False} if not flags.temperature else {"do_sample": True, "top_k": 0, "top_p": 1.0}
    )
    if model.kind == "hrpo" or flags.temperature:  # of soft embeddings in greedy decoding too
        how["temperature"] = flags.temperature or 1.0
    set_seed(flags.seed)
    console = PlainConsole()
    messages = [{"role": "system", "content": flags.system}] if flags.system else []
    for text in flags.say or typed():
        prompt = text
        if remembers:
            messages.append({"role": "user", "content": text})
            prompt = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        asked = model.tokenize([prompt])
        new = flags.max_new_tokens or min(256, max(1, model.room(asked["input_ids"].shape[1])))
        written = model.complete(**asked, state=flags.state, max_new_tokens=new, **how)
        answer = model.decode(written)[0]
        messages.append({"role": "assistant", "content": answer})
        console.print(f"user: {text}\n{model.kind}: {answer}")
        steps = f", {int(written.latent)} of them latent" if written.latent.any() else ""
        console.print(f"({int(written.lengths)} tokens, {int(written.forwards)} forward passes{steps})", style="dim")
    return 0
