"""When the next length comes, and that texts are cut until then."""

import pytest
import torch

from trl_ext.planner.curriculum import LengthCurriculum

from . import setups


def test_it_moves_when_the_last_bucket_is_cheap_or_its_time_is_over():
    course = LengthCurriculum([64, 128], threshold=1.0, share=0.5)
    assert course.length == 64 and course.bucket == slice(0, 64)
    course.update(30.0, 10.0, 1, 100)  # 3 nats
    course.update(0.0, 0.0, 2, 100)  # no text went so far
    assert course.nll == 3.0 and course.length == 64
    for step in range(3, 20):
        course.update(5.0, 10.0, step, 100)  # 0.5: the average falls below 1 at 0.5 + 2.5 * 0.9^k
        if course.length != 64:
            break
    assert step == 3 + 15 and course.length == 128 and course.bucket == slice(64, 128) and course.nll.isinf()
    for step in range(19, 60):
        course.update(30.0, 10.0, step, 100)
        if course.length != 128:
            break
    assert step == 18 + 25 and course.length is None and course.bucket == slice(0, 0)
    course.update(0.0, 0.0, 99, 100)
    assert course.length is None


def test_state_is_what_a_checkpoint_needs():
    course, other = (LengthCurriculum([64, 128], 1.0, 0.5) for _ in range(2))
    course.update(30.0, 10.0, 1, 8)
    course.update(30.0, 10.0, 2, 8)
    other.load_state_dict(course.state_dict())
    assert other.length == course.length == 128 and other.since == 2


@pytest.mark.parametrize("training", ["soft", "hard_em"])
@pytest.mark.parametrize("mode", ["generate", "reconstruct"])
def test_texts_are_cut_while_training_and_not_in_evaluation(tmp_path, training, mode):
    trainer = setups.trainer(
        tmp_path,
        mode=mode,
        training=training,
        length_curriculum=[2, 3],
        length_curriculum_nll=0.0,
        z_dropout=0.5,
        length_curriculum_share=1.0,
    )
    widths = []
    inner = trainer.compute_loss

    def seen(model, inputs, *args, **kwargs):
        widths.append((model.training, inputs["input_ids"].shape[1], inputs["plan_input_ids"].shape[1]))
        return inner(model, inputs, *args, **kwargs)

    trainer.compute_loss = seen
    trainer.train()
    assert [text for _, text, _ in widths] == [2, 2, 3, 3] and setups.logged(trainer, "planner/length") == [2, 2, 3, 3]
    assert all((read == text) == (mode == "reconstruct") for _, text, read in widths)
    assert trainer.planner_state["curriculum"].length is None
    trainer.evaluate()
    assert widths[-1][:2] == (False, 9 if mode == "generate" else 13)


@pytest.mark.parametrize("z_dropout", [0.0, 0.5])
def test_the_bucket_is_the_executors_on_texts_that_go_so_far(tmp_path, monkeypatch, z_dropout):
    """1e-5: the NLL of the last positions of the current length, tokens alike, null plans aside."""
    from trl_ext.planner import trainer as module

    nulls = []
    inner = module.executor_prefix
    monkeypatch.setattr(
        module, "executor_prefix", lambda net, plans, null=None: nulls.append(null) or inner(net, plans, null)
    )
    trainer = setups.trainer(tmp_path, length_curriculum=[6], length_curriculum_nll=1e-3, max_steps=1)
    kept = []
    trainer._executor_nll = lambda *args, inner=trainer._executor_nll: kept.append((inner(*args), args)) or kept[-1][0]
    trainer.planner_state["curriculum"].share = 2.0
    trainer.args.z_dropout = z_dropout
    trainer.train()
    ((nll, (_, inputs, _, scored)),) = kept
    assert nll.shape[1] == inputs["input_ids"].shape[1] <= 6
    planned = torch.ones_like(scored) if nulls[0] is None else ~nulls[0][:, None].expand_as(scored)
    assert planned.any() and (z_dropout == 0) == planned.all()
    wanted = nll[planned].sum() / (scored & planned).sum()
    assert abs(trainer.planner_state["curriculum"].nll - wanted) <= 1e-5
    assert torch.isfinite(nll).all()
