"""What a model computes: transformer families as pure Flax modules. Imports nothing else of flaxtron.

config = modelzoo.get_config("tiny-gptj")
model = modelzoo.GPTJForCausalLM(config)
out = model.apply({"params": params}, input_ids=ids)
"""

from modelzoo.bloom.config import BloomConfig
from modelzoo.bloom.model import (
    BloomForCausalLM,
    BloomForQuestionAnswering,
    BloomForSequenceClassification,
    BloomForTokenClassification,
    BloomModel,
)
from modelzoo.gptj.config import GPTJConfig
from modelzoo.gptj.model import (
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJModel,
)
from modelzoo.hf import from_hf
from modelzoo.hf_write import to_hf
from modelzoo.layers.cache import Cache
from modelzoo.layers.stack import stack_layers, unstack_layers
from modelzoo.megatron_bert.config import MegatronBertConfig
from modelzoo.megatron_bert.model import (
    MegatronBertForCausalLM,
    MegatronBertForMaskedLM,
    MegatronBertForMultipleChoice,
    MegatronBertForNextSentencePrediction,
    MegatronBertForPreTraining,
    MegatronBertForQuestionAnswering,
    MegatronBertForSequenceClassification,
    MegatronBertForTokenClassification,
    MegatronBertModel,
)
from modelzoo.model import (
    Model,
    abstract_params,
    input_names,
    logical_axes,
    num_params,
    trainable,
    tuned,
    untuned,
)
from modelzoo.mvp.config import MvpConfig
from modelzoo.mvp.model import (
    MvpForCausalLM,
    MvpForConditionalGeneration,
    MvpForQuestionAnswering,
    MvpForSequenceClassification,
    MvpModel,
)
from modelzoo.registry import get_config, get_family, get_model_class, list_presets
from modelzoo.roberta.config import RobertaConfig
from modelzoo.roberta.model import (
    RobertaForCausalLM,
    RobertaForMaskedLM,
    RobertaForMultipleChoice,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
)
from modelzoo.tuning import Lora, Tuning

__all__ = [
    "BloomConfig",
    "BloomForCausalLM",
    "BloomForQuestionAnswering",
    "BloomForSequenceClassification",
    "BloomForTokenClassification",
    "BloomModel",
    "Cache",
    "GPTJConfig",
    "GPTJForCausalLM",
    "GPTJForQuestionAnswering",
    "GPTJForSequenceClassification",
    "GPTJModel",
    "Lora",
    "MegatronBertConfig",
    "MegatronBertForCausalLM",
    "MegatronBertForMaskedLM",
    "MegatronBertForMultipleChoice",
    "MegatronBertForNextSentencePrediction",
    "MegatronBertForPreTraining",
    "MegatronBertForQuestionAnswering",
    "MegatronBertForSequenceClassification",
    "MegatronBertForTokenClassification",
    "MegatronBertModel",
    "Model",
    "MvpConfig",
    "MvpForCausalLM",
    "MvpForConditionalGeneration",
    "MvpForQuestionAnswering",
    "MvpForSequenceClassification",
    "MvpModel",
    "RobertaConfig",
    "RobertaForCausalLM",
    "RobertaForMaskedLM",
    "RobertaForMultipleChoice",
    "RobertaForQuestionAnswering",
    "RobertaForSequenceClassification",
    "RobertaForTokenClassification",
    "RobertaModel",
    "Tuning",
    "abstract_params",
    "from_hf",
    "get_config",
    "get_family",
    "get_model_class",
    "input_names",
    "list_presets",
    "logical_axes",
    "num_params",
    "stack_layers",
    "to_hf",
    "trainable",
    "tuned",
    "unstack_layers",
    "untuned",
]
