"""Names and shapes of a state on disk."""

import modelzoo
import parallel
import train
from train import canonical, optim

MODEL = modelzoo.GPTJForCausalLM(modelzoo.get_config("tiny-gptj", vocab_size=211, n_embd=32))


def test_names_and_shapes_show_no_mesh():
    optimizer = optim.adamw()
    rules = parallel.make_rules(parallel.make_mesh(data=4, tensor=2))
    state = train.abstract_state(MODEL, optimizer, rules=rules)
    assert state.params["lm_head"]["bias"].shape == (212,)  # padded
    shapes = canonical.rest_shapes(MODEL, state)
    assert shapes["opt_state.mu.lm_head.bias"] == (211,)
    assert shapes["step"] == ()
    assert shapes["rng"] == (2,)
    assert shapes == canonical.rest_shapes(MODEL, train.abstract_state(MODEL, optimizer))
    assert shapes.keys() == canonical.rest_by_name(state).keys() | {"rng"}
    assert canonical.param_shapes(MODEL)["lm_head"]["bias"] == (211,)
