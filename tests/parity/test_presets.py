"""Every preset's parameter count, and how parameters begin: as transformers has it."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import modelzoo
from modelzoo import registry
from tests.parity import cases
from tests.parity.make_fixtures import unallocated
from tests.parity.pairs import stored_tensors
from tests.zoo import COUNTS

PRESETS = [(preset, family) for family in registry.FAMILIES.values() for preset in family.presets]


@pytest.mark.parametrize(("preset", "family"), PRESETS, ids=lambda value: getattr(value, "model_type", value))
def test_parameter_counts(preset, family):
    """Parameters, tied ones once, and the buffers that files keep; also as recorded for `make test`."""
    recorded = json.loads(COUNTS.read_text(encoding="utf-8"))[preset]
    for cls in family.classes:
        config = modelzoo.get_config(preset)
        want = sum(tensor.numel() for tensor in stored_tensors(unallocated(cls.__name__, config)).values())
        assert modelzoo.num_params(cls(config)) == want, cls.__name__
        assert recorded[cls.__name__] == want, f"{cls.__name__}: python -m tests.parity.make_fixtures"


@cases.every_class()
def test_initial_moments(name, tmp_path):
    """Mean and spread of every tensor, to the precision that its size allows."""
    family = cases.CLASSES[name]
    config = next(config for preset, config in family.presets.items() if preset.startswith("tiny"))
    model = registry.get_model_class(name)(config)
    params = nn.meta.unbox(model.init(jax.random.key(0), input_ids=jnp.zeros((1, 1), jnp.int32)))["params"]
    modelzoo.to_hf(model, params, tmp_path)
    torch.manual_seed(0)
    theirs = getattr(transformers, name)(transformers.AutoConfig.from_pretrained(tmp_path))
    want = {key: tensor.detach().numpy() for key, tensor in theirs.state_dict().items()}
    spread = 0
    for key, have in load_file(tmp_path / "model.safetensors").items():
        assert (have[want[key] == 0] == 0).all(), (
            f"{key}: zero in transformers, such as the padding token's row"
        )
        mean, std = want[key].mean(), want[key].std()
        if std == 0:
            assert (have == mean).all(), f"{key} begins at {mean}"
            continue
        noise = std / np.sqrt(have.size)
        assert abs(have.mean() - mean) < 6 * noise, f"{key}: mean {have.mean():.3g}, theirs {mean:.3g}"
        assert abs(have.std() - std) < 6 * noise, f"{key}: spread {have.std():.3g}, theirs {std:.3g}"
        spread += have.size > 4000
    assert spread >= 3
