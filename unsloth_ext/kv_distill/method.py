"""The record of KV distillation, which aligns a teacher's keys, values and attention with a student's."""

from ..common.method import Method


METHOD = Method(
    name="kv_distill",
    exports={
        "AttentionShape": "shapes",
        "HeadwiseMapProjector": "heads",
        "KVDimensionProjector": "heads",
        "MapProjectionAligner": "aligner",
        "SegmentTimeWarper": "time_warping",
        "StructuralKVLoss": "loss",
        "captured_kvq": "capture",
        "create_flat_aligner": "aligner",
        "create_reasoning_focused_warper": "time_warping",
        "create_structural_loss": "loss",
        "create_structured_aligner": "aligner",
    },
)
