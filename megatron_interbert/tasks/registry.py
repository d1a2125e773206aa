"""List the tasks that `finetune` and `evaluate` know, a row each."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_interbert.tasks.config import EvaluateConfig, FinetuneConfig
from megatron_interbert.tasks.flickr30k_entities.config import (
    EntitiesConfig,
    EvaluateEntitiesConfig,
)
from megatron_interbert.tasks.flickr30k_entities.evaluation import evaluate_entities
from megatron_interbert.tasks.flickr30k_entities.job import entities_job
from megatron_interbert.tasks.glue.config import EvaluateGlueConfig, GlueConfig
from megatron_interbert.tasks.glue.evaluation import evaluate_glue
from megatron_interbert.tasks.glue.job import glue_job
from megatron_interbert.tasks.gqa.config import EvaluateGqaConfig, GqaConfig
from megatron_interbert.tasks.gqa.evaluation import evaluate_gqa
from megatron_interbert.tasks.gqa.job import gqa_job
from megatron_interbert.tasks.guesswhat.config import (
    EvaluateGuesserConfig,
    EvaluateOracleConfig,
    GuesserConfig,
    OracleConfig,
)
from megatron_interbert.tasks.guesswhat.evaluation import evaluate_guesser, evaluate_oracle
from megatron_interbert.tasks.guesswhat.guesser import guesser_job
from megatron_interbert.tasks.guesswhat.oracle import oracle_job
from megatron_interbert.tasks.multitask.config import MultitaskConfig
from megatron_interbert.tasks.multitask.job import multitask_job
from megatron_interbert.tasks.nlvr2.config import EvaluateNlvr2Config, Nlvr2Config
from megatron_interbert.tasks.nlvr2.evaluation import evaluate_nlvr2
from megatron_interbert.tasks.nlvr2.job import nlvr2_job
from megatron_interbert.tasks.refcoco.config import EvaluateRefcocoConfig, RefcocoConfig
from megatron_interbert.tasks.refcoco.evaluation import evaluate_refcoco
from megatron_interbert.tasks.refcoco.job import refcoco_job
from megatron_interbert.tasks.retrieval.config import EvaluateRetrievalConfig, RetrievalConfig
from megatron_interbert.tasks.retrieval.evaluation import evaluate_retrieval
from megatron_interbert.tasks.retrieval.job import retrieval_job
from megatron_interbert.tasks.shop.config import (
    EvaluateProductSearchConfig,
    EvaluateRecommendationConfig,
    ProductSearchConfig,
    RecommendationConfig,
    ScoreTopicsConfig,
)
from megatron_interbert.tasks.shop.evaluation import (
    evaluate_product_search,
    evaluate_recommendation,
)
from megatron_interbert.tasks.shop.search import product_search_job
from megatron_interbert.tasks.shop.topic_scores import score_topics
from megatron_interbert.tasks.shop.topics import recommendation_job
from megatron_interbert.tasks.snli_ve.config import EvaluateSnliVeConfig, SnliVeConfig
from megatron_interbert.tasks.snli_ve.evaluation import evaluate_snli_ve
from megatron_interbert.tasks.snli_ve.job import snli_ve_job
from megatron_interbert.tasks.vcr.config import EvaluateVcrConfig, VcrConfig
from megatron_interbert.tasks.vcr.evaluation import evaluate_vcr
from megatron_interbert.tasks.vcr.job import vcr_job
from megatron_interbert.tasks.vgqa.config import EvaluateVgqaConfig, VgqaConfig
from megatron_interbert.tasks.vgqa.evaluation import evaluate_vgqa
from megatron_interbert.tasks.vgqa.job import vgqa_job
from megatron_interbert.tasks.visual7w.config import EvaluateVisual7wConfig, Visual7wConfig
from megatron_interbert.tasks.visual7w.evaluation import evaluate_visual7w
from megatron_interbert.tasks.visual7w.job import visual7w_job
from megatron_interbert.tasks.vqa.config import EvaluateVqaConfig, VqaConfig
from megatron_interbert.tasks.vqa.evaluation import evaluate_vqa
from megatron_interbert.tasks.vqa.job import vqa_job


@dataclass(frozen=True)
class Row:
    """Hold the flags of a task's evaluation, what runs it, the flags of its finetuning, and what
    makes its job; a task may be only evaluated.
    """

    evaluate_config: type[EvaluateConfig]
    evaluate: Callable[..., Any]
    config: type[FinetuneConfig] | None = None
    make_job: Callable[..., Any] | None = None


REGISTRY = {
    "retrieval": Row(EvaluateRetrievalConfig, evaluate_retrieval, RetrievalConfig, retrieval_job),
    "vcr": Row(EvaluateVcrConfig, evaluate_vcr, VcrConfig, vcr_job),
    "vqa": Row(EvaluateVqaConfig, evaluate_vqa, VqaConfig, vqa_job),
    "gqa": Row(EvaluateGqaConfig, evaluate_gqa, GqaConfig, gqa_job),
    "vgqa": Row(EvaluateVgqaConfig, evaluate_vgqa, VgqaConfig, vgqa_job),
    "nlvr2": Row(EvaluateNlvr2Config, evaluate_nlvr2, Nlvr2Config, nlvr2_job),
    "snli_ve": Row(EvaluateSnliVeConfig, evaluate_snli_ve, SnliVeConfig, snli_ve_job),
    "refcoco": Row(EvaluateRefcocoConfig, evaluate_refcoco, RefcocoConfig, refcoco_job),
    "visual7w": Row(EvaluateVisual7wConfig, evaluate_visual7w, Visual7wConfig, visual7w_job),
    "flickr30k_entities": Row(
        EvaluateEntitiesConfig, evaluate_entities, EntitiesConfig, entities_job
    ),
    "guesswhat_guesser": Row(EvaluateGuesserConfig, evaluate_guesser, GuesserConfig, guesser_job),
    "guesswhat_oracle": Row(EvaluateOracleConfig, evaluate_oracle, OracleConfig, oracle_job),
    "glue": Row(EvaluateGlueConfig, evaluate_glue, GlueConfig, glue_job),
    "product_search": Row(
        EvaluateProductSearchConfig,
        evaluate_product_search,
        ProductSearchConfig,
        product_search_job,
    ),
    "recommendation": Row(
        EvaluateRecommendationConfig,
        evaluate_recommendation,
        RecommendationConfig,
        recommendation_job,
    ),
    "topic_scores": Row(ScoreTopicsConfig, score_topics),
}
SINGLE = {name: (row.config, row.make_job) for name, row in REGISTRY.items() if row.config}
# multitask evaluates its tasks one at a time
FINETUNED = {**SINGLE, "multitask": (MultitaskConfig, partial(multitask_job, known=SINGLE))}
EVALUATED = {name: (row.evaluate_config, row.evaluate) for name, row in REGISTRY.items()}
