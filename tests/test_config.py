"""Configs: strict keys, exact round trips, and every shipped model file."""

import pytest

from kimi_mm.config import BackboneConfig, ConfigError, GQAConfig, KDAConfig, ModelConfig, MoEConfig
from kimi_mm.training.recipe import load_recipe, recipes_root

MODELS = sorted((recipes_root() / "models").glob("*.yaml"))
RECIPES = sorted(p for p in recipes_root().glob("*/*.yaml") if p.parent.name not in ("models", "chains"))


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_model_files_round_trip(path, tmp_path):
    config = ModelConfig.from_yaml(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(config.to_yaml())
    assert ModelConfig.from_yaml(copy) == config


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_recipe_loads_at_both_sizes(path):
    name = f"{path.parent.name}/{path.stem}"
    for debug in (False, True):
        recipe, config = load_recipe(name, debug=debug)
        assert recipe.stage
        assert config.name


def test_unknown_key_names_file_and_nearest_key(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("backbone: {hiden_size: 3}\n")
    with pytest.raises(ConfigError, match=r"model\.yaml\.backbone: unknown key 'hiden_size'.*'hidden_size'"):
        ModelConfig.from_yaml(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backbone": {"hidden_size": "big"}}, "expected int"),
        ({"backbone": {"trunk": ["kda/moe"]}}, "needs the section 'kda'"),
        ({"backbone": {"trunk": ["rnn/dense"]}}, "is not 'mixer/mlp'"),
        ({"backbone": {"vocab_size": 5}}, "differs from vocab"),
        ({"audio": {"encoder": {"block_size": 7}}}, "multiple of pooling"),
        ({"name": 3}, "expected str"),
        ({"backbone": []}, "expected a mapping"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(values)


def test_parts_check_themselves():
    with pytest.raises(ConfigError, match="gate_lower_bound"):
        KDAConfig(gate_lower_bound=-6.0)
    with pytest.raises(ConfigError, match="num_experts_per_token"):
        MoEConfig(num_experts=2, num_experts_per_token=3)
    with pytest.raises(ConfigError, match="audio_head"):
        BackboneConfig(audio_branch=("gqa/dense",), gqa=GQAConfig())


def test_overrides_and_their_errors():
    recipe, _ = load_recipe("asr/nano", overrides=["optim.lr=1e-4", "steps=7", "speech.folders=[a, b]"])
    assert (recipe.optim.lr, recipe.steps, recipe.speech.folders) == (1e-4, 7, ("a", "b"))
    with pytest.raises(ConfigError, match="unknown key 'stepz'"):
        load_recipe("asr/nano", overrides=["stepz=7"])
    with pytest.raises(ConfigError, match="key=value"):
        load_recipe("asr/nano", overrides=["steps"])
    with pytest.raises(ConfigError, match="not found"):
        load_recipe("asr/none")
