"""Wrap the packed model in Hugging Face classes.

Importing this package registers them with the Auto classes of transformers.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
)

from megatron_interbert.hf.base import InterBertPreTrainedModel
from megatron_interbert.hf.configuration import InterBertConfig
from megatron_interbert.hf.model_card import model_card
from megatron_interbert.hf.modeling import (
    InterBertForImageTextRetrieval,
    InterBertForMultipleChoice,
    InterBertForPreTraining,
    InterBertForSequenceClassification,
    InterBertModel,
)
from megatron_interbert.hf.scorer import InterBertScorer

__all__ = [
    "InterBertConfig",
    "InterBertForImageTextRetrieval",
    "InterBertForMultipleChoice",
    "InterBertForPreTraining",
    "InterBertForSequenceClassification",
    "InterBertModel",
    "InterBertPreTrainedModel",
    "InterBertScorer",
    "model_card",
]

AutoConfig.register(InterBertConfig.model_type, InterBertConfig, exist_ok=True)
for auto_class, model_class in (
    (AutoModel, InterBertModel),
    (AutoModelForPreTraining, InterBertForPreTraining),
    (AutoModelForMultipleChoice, InterBertForMultipleChoice),
    (AutoModelForSequenceClassification, InterBertForSequenceClassification),
    # The same question as about two sentences, with the same class for "they belong together": 0.
    (AutoModelForNextSentencePrediction, InterBertForImageTextRetrieval),
):
    auto_class.register(InterBertConfig, model_class, exist_ok=True)
# reads vocab.txt just as data/text.py does
AutoTokenizer.register(InterBertConfig, BertTokenizer, exist_ok=True)
