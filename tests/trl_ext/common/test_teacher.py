"""Teachers are loaded frozen, and only those that read the student's tokens are taken."""

import pytest
import torch

from tests import tiny
from trl_ext.common.teacher import check_vocabularies, load_teacher


CPU = torch.device("cpu")


def test_a_tokenizer_that_is_given_is_the_teachers():
    """Also of a model whose name is no folder here, which would otherwise be asked of the hub."""
    teacher = tiny.model()
    teacher.config._name_or_path = "us/teacher"
    check_vocabularies(tiny.tokenizer(()), teacher, tiny.tokenizer(()))
    with pytest.raises(ValueError, match="have different vocabularies"):
        check_vocabularies(tiny.tokenizer(("1#", "##")), teacher, tiny.tokenizer(("##", "1#")))


def test_it_is_frozen_in_its_own_dtype(tmp_path):
    """By name, in bfloat16 unless asked for otherwise; keywords beside a model are refused."""
    tiny.model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    own = load_teacher(str(tmp_path), None, False, CPU)
    asked = load_teacher(str(tmp_path), {"dtype": "float32"}, False, CPU)
    assert own.dtype == torch.bfloat16 and asked.dtype == torch.float32
    made = load_teacher(tiny.model().train(), None, False, CPU)
    for teacher in (own, asked, made):
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    with pytest.raises(ValueError, match="teacher_model_init_kwargs"):
        load_teacher(tiny.model(), {"dtype": "float32"}, False, CPU)
