"""The record of KV compression, which keeps the most useful keys and values of a trace."""

from ..common.method import Method


METHOD = Method(
    name="kv_compression",
    about="KV compression: the keys and values that matter are kept, for KaVa and as a cache for `generate`.",
    exports={
        "CompressedCache": "cache",
        "CompressedKV": "compression",
        "KVScoring": "compression",
        "RKVCompressor": "compressor",
        "compress_kv": "compression",
        "compressed_trace": "trace",
    },
)
