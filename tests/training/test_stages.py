"""Every stage over two processes: the losses of one process under DDP and FSDP2, and going on with another number."""

import shutil

import pytest

from tests.training import spread
from tests.training.processes import together
from tests.training.test_parallel import assert_same

STAGES = [
    "tokenizer",
    "asr",
    "vision",
    "vision/nano-joint",
    "vocoder",
    "detokenizer",
    "speech",
    "joint",
    "pretrain",
    "sft",
]
LORA = ("lora={rank: 2}", "weights=fp32")


@pytest.mark.parametrize(
    ("stage", "overrides"), [*((stage, ()) for stage in STAGES), ("sft", LORA)], ids=[*STAGES, "sft with LoRA"]
)
def test_same_losses_as_one_process(stage, overrides, tmp_path):
    """Step 1 on one process and the others on two, under DDP; steps 1 to 3 on two, with FSDP2, and the last on one."""
    recipe = stage if "/" in stage else f"{stage}/nano"
    alone, begun, fresh = tmp_path / "alone", tmp_path / "begun", tmp_path / "fresh"
    want = spread.losses(alone, *spread.PAIR, "stop_after=1", *overrides, recipe=recipe)
    shutil.copytree(alone, begun)
    want += spread.losses(alone, *spread.PAIR, *overrides, recipe=recipe)
    expert = 2 if stage == "pretrain" else 1  # whose micro-batches do not all reach the same experts' layers
    for ddp, fsdp in together(2, spread.stage, recipe, begun, fresh, expert, *overrides):
        assert_same(ddp, want[1:])
        assert_same(fsdp, want[:3])
    assert_same(spread.losses(fresh, *spread.PAIR, *overrides, recipe=recipe), want[3:])


def test_what_a_stage_cannot_is_said(tmp_path):
    """Experts and rows can be shared only where there are some."""
    asked = {
        ("vocoder/nano", "parallel={expert: 2}"): "stage 'vocoder' trains no experts",
        ("tokenizer/nano", "parallel={expert: 2}"): "stage 'tokenizer' trains no experts",
        ("asr/nano", "parallel={context: 2}"): "only the text stage cuts its rows",
    }
    for messages in together(2, spread.refusals, tmp_path, list(asked)):
        for message, named in zip(messages, asked.values(), strict=True):
            assert named in message
