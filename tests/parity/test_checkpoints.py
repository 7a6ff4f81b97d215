"""Checkpoints of every class: what `to_hf` writes opens in transformers, bit for bit and with nothing to say."""

import transformers

import modelzoo
from tests.parity import cases
from tests.parity.pairs import pair, stored_tensors

VOLATILE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
VOLATILE = (*VOLATILE, "_attn_implementation_autoset")


def plain_config(config):
    return {key: value for key, value in config.to_dict().items() if key not in VOLATILE}


@cases.every_config()
def test_there_and_back(name, title, tmp_path):
    both = pair(name, title)
    modelzoo.to_hf(both.ours, both.params, tmp_path)
    again, report = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    want, have = stored_tensors(both.theirs), stored_tensors(again)
    assert have.keys() == want.keys()
    for key in want:
        assert have[key].detach().numpy().tobytes() == want[key].detach().numpy().tobytes(), key
    assert plain_config(again.config) == plain_config(both.theirs.config)


@cases.every_class()
def test_the_auto_class_finds_it(name, tmp_path):
    """By config.json alone."""
    both = pair(name, cases.titles(name)[0])
    modelzoo.to_hf(both.ours, both.params, tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(both.theirs.config)
    assert config.architectures == [name]


@cases.every_class()
def test_configs_go_both_ways(name):
    """Every config of the cases, and transformers' own defaults."""
    config_class = type(pair(name, cases.titles(name)[0]).ours.config)
    their_class = getattr(transformers, name).config_class
    assert config_class.from_hf(their_class().to_dict()) == config_class()
    for fields in cases.cases_of(name).configs.values():
        theirs = their_class(**fields)
        ours = config_class.from_hf(theirs.to_dict())
        assert config_class.from_hf(theirs.to_diff_dict()) == ours
        assert plain_config(their_class.from_dict(ours.to_hf())) == plain_config(theirs)
