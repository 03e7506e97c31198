"""`kimi-mm plan`, and what it says to bad arguments."""

import pytest


def test_training_and_running(kimi):
    spread = kimi("plan", "1b4-a0.4b", "--gpus", "1,8", "--memory")
    assert spread.code == 0
    assert spread.out.startswith("1.43 G parameters, 0.40 G of them active")
    assert spread.out.count("\n| 8 | ") == 2
    alone = kimi("plan", "text/nano")
    assert "| weights, int4 | 0.01 |" in alone.out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["giga"], "giga"),
        (["nano", "--gpus", "many"], "many"),
        (["nano", "--gpus", "8", "--expert", "3"], "expert=3"),
        (["nano", "--gpus", "8", "--device", "Z80"], "Z80"),
        (["nano", "--product-share", "2"], "product-share"),
    ],
)
def test_bad_arguments(kimi, arguments, named):
    result = kimi("plan", *arguments)
    assert result.code in (1, 2)
    assert [named in line for line in result.complaints] == [True]


@pytest.mark.parametrize("name", ["kimi-linear-48b-a3b", "moonshotai/Kimi-Linear-48B-A3B-Base"])
def test_published_models_go_by_name(kimi, name):
    said = kimi("plan", name)
    assert said.code == 0
    assert said.out.startswith("49.12 G parameters, 3.48 G of them active")
