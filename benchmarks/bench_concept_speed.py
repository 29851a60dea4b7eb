"""Wall time of reading and writing 512, 2,048 and 4,096 tokens: with concepts, without, and with fewer layers.

    make bench-concept                     # with the other parts
    python -m benchmarks.bench_concept_speed --lengths 4096

The model has 28 layers with random weights, 4 of them on either side of the concepts, and one concept for every 4
tokens (a fixed stride). It is compared with the same model without concepts, and with a model of as many layers as
cost the same. All are measured in turn, in one process. Writes benchmarks/results/concept_speed_<device>.json.
"""

import copy

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3Config

from benchmarks import setups
from trl_ext.cli.command_line import CommandLine
from trl_ext.cli.console import PlainConsole
from trl_ext.cli.user_errors import in_sentences
from unsloth_ext import OnlineConceptConfig, attach_concepts
from unsloth_ext.concept.accounting import cost, equal_depth


RATIO = 4


def config(layers: int) -> Qwen3Config:
    """On a GPU the shape of Qwen3-0.6B, on a CPU a smaller one."""
    width, inner, heads, kv, vocab = (1024, 3072, 16, 8, 151936) if setups.CUDA else (384, 1152, 6, 3, 8192)
    return Qwen3Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=128 if setups.CUDA else 64,
        vocab_size=vocab,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


def model(layers: int, concepts: OnlineConceptConfig | None = None) -> torch.nn.Module:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if setups.CUDA else torch.float32
    net = AutoModelForCausalLM.from_config(config(layers), dtype=dtype).to("cuda" if setups.CUDA else "cpu")
    if concepts is not None:
        attach_concepts(net, concepts)
    return net.eval()


@torch.no_grad()
def read(net: torch.nn.Module, ids: torch.Tensor):
    """The cache after reading a text."""
    return net(ids, use_cache=True, logits_to_keep=1).past_key_values


@torch.no_grad()
def write(net: torch.nn.Module, cache: object, tokens: torch.Tensor) -> None:
    """Write tokens one by one."""
    for token in tokens.T:
        net(token[:, None], past_key_values=cache, use_cache=True)


def num_bytes(cache: object) -> int:
    if isinstance(cache, DynamicCache):
        return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    return cache.num_bytes()


def main() -> None:
    parser = CommandLine(description=__doc__.split("\n\n")[0])
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 2048, 4096])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new", type=int, default=32, help="number of tokens to write; a multiple of 4")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    concepts = OnlineConceptConfig(4, 20, 4, num_concepts=4096, segmenter="fixed", stride=RATIO)
    fewer = equal_depth(config(28), concepts, RATIO)
    nets = {"without concepts": model(28), "concepts": model(28, concepts), f"{fewer} layers": model(fewer)}
    results = {}
    for length in options.lengths:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(10, 8000, (options.batch, length + options.new), generator=generator)
        ids = ids.to(nets["concepts"].device)
        caches: dict[str, object] = {}

        def reading(name: str, net: torch.nn.Module):
            caches[name] = read(net, ids[:, :length])

        times = setups.interleaved(
            {name: lambda name=name, net=net: reading(name, net) for name, net in nets.items()}, options.repeats
        )
        held = {name: num_bytes(cache) for name, cache in caches.items()}
        # Every repetition writes to a copy of the cache, which would grow otherwise
        pending = {name: [copy.deepcopy(cache) for _ in range(options.repeats + 1)] for name, cache in caches.items()}
        more = ids[:, length:]
        writing = setups.interleaved(
            {name: lambda name=name, net=net: write(net, pending[name].pop(), more) for name, net in nets.items()},
            options.repeats,
        )
        whole = cost(config(28), None, tokens=length)
        results[str(length)] = {
            name: {
                "read_ms": min(times[name]) * 1000,
                "write_ms_per_token": min(writing[name]) * 1000 / options.new,
                "read_speedup": setups.quotient(times["without concepts"], times[name]),
                "write_speedup": setups.quotient(writing["without concepts"], writing[name]),
                "kv_bytes": held[name],
                "macs": (
                    cost(config(28), concepts, RATIO, length).macs
                    if name == "concepts"
                    else cost(net.config, None, tokens=length).macs
                )
                / whole.macs,
            }
            for name, net in nets.items()
        }
        table = Table(title=f"{length} tokens read, {options.new} written, batch {options.batch}", title_justify="left")
        for head in ("", "read ms", "ms/token", "read x", "write x", "KV MB", "MACs"):
            table.add_column(head, justify="right" if head else "left", no_wrap=True)
        for name, r in results[str(length)].items():
            table.add_row(
                name,
                f"{r['read_ms']:.0f}",
                f"{r['write_ms_per_token']:.1f}",
                f"{r['read_speedup']['median']:.2f}",
                f"{r['write_speedup']['median']:.2f}",
                f"{r['kv_bytes'] / 2**20:.1f}",
                f"{r['macs']:.0%}",
            )
        PlainConsole().print(table)
    path = setups.write(
        "concept_speed",
        {
            "command": "make bench-concept",
            "batch": options.batch,
            "new": options.new,
            "repeats": options.repeats,
            "results": results,
        },
    )
    setups.write_table(path, page)
    print(path)


def page(found: dict) -> str:
    """The table of benchmarks/results/concept_speed_<device>.md."""
    lines = [
        "# Speed of concept tokens",
        "",
        "How many times as fast as the same model of 28 layers without concepts. 20 of the layers read concepts, one for "
        "every 4 tokens; the other rows are a model with as many layers as cost the same. Random weights.",
        f"Median of {found['repeats']} rounds (lowest to highest); {found['new']} tokens written, batch {found['batch']}.",
        "",
        "| tokens read | | reading | writing | keys, values | multiplications |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for length, rows in found["results"].items():
        whole = rows["without concepts"]["kv_bytes"]
        for name, r in rows.items():
            if name != "without concepts":
                lines.append(
                    f"| {length} | {name} | {setups.quotient_text(r['read_speedup'])} | "
                    f"{setups.quotient_text(r['write_speedup'])} | "
                    f"{r['kv_bytes'] / whole:.0%} | {r['macs']:.0%} |"
                )
    return "\n".join(lines)


TABLES = {"concept_speed": page}


if __name__ == "__main__":
    in_sentences()
    main()
