"""Set up pretraining on any objectives, and compute losses in float64, one target at a time."""

import json

import torch
import torch.nn.functional as F

from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.pretraining import PretrainingSet
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.pretraining.job import heads_of, model_options
from megatron_interbert.tasks.pretraining.questions import read_questions
from tests.corpus import write_store
from tests.tasks.test_retrieval import sizes

SAMPLES = 24


def write_asked(folder):
    """Write a store whose images have 2 to 9 regions, and questions about some of them."""
    asked = [
        {
            "id": number,
            "qas": [
                {
                    "qa_id": 10 * number + place,
                    "image_id": f"image-{number}",
                    "question": text,
                    "answer": ("red", "blue", "two", "a dog")[(number + place) % 4],
                }
                for place, text in enumerate(("red cat", "the old dog runs", "house"))
            ],
        }
        for number in range(0, 24, 2)
    ]
    (folder / "questions.json").write_text(json.dumps(asked))
    flags = {"questions": str(folder / "questions.json"), "min_occurrences": 1}
    (folder / "questions.yaml").write_text(json.dumps({"vgqa": flags}))
    return write_store(folder / "store", images=24, num_attributes=7)


def settings(store, objectives, **more):
    """Return the settings of a pretraining with some objectives."""
    if "vqa" in objectives:
        more["questions"] = str(store.parent / "questions.yaml")

    config = RunConfig(
        data_path=str(store),
        objectives=objectives,
        data_partitions=2,
        micro_batch_size=SAMPLES,
        global_batch_size=SAMPLES,
        **more,
    )
    config.given |= {"objectives", "data_partitions"}
    config.check()
    return config


def samples_of(config):
    """Open the training set of a configuration."""
    tokenizer = CaptionTokenizer(f"{config.data_path}/vocab.txt")
    asked = read_questions(config, ParallelState())
    questions = asked.questions if asked else None
    return PretrainingSet(Corpus([config.data_path]), tokenizer, config, questions)


def make_model(config, state=None):
    """Build a small model with the heads that the objectives need."""
    state = state or ParallelState()
    small = sizes()
    options = model_options(config, 7, read_questions(config, ParallelState()))
    model = InterBert(small, heads_of(config, True), state=state, **options)
    initialise(model, small, 0, state)
    return model.eval()


def distance_of(words, regions):
    """Compute the transport distance of one sample in float64, its plan by 50 steps of IPOT."""
    cost = 1 - F.normalize(words, dim=1) @ F.normalize(regions, dim=1).T
    count, others = cost.shape
    plan = torch.ones_like(cost)
    nearness = torch.exp(-cost.detach() / 0.5)
    left = torch.ones(count, dtype=cost.dtype) / count
    for _ in range(50):
        kernel = nearness * plan
        right = 1 / (others * (kernel.T @ left))
        left = 1 / (count * (kernel @ right))
        plan = left[:, None] * kernel * right[None]

    return (cost * plan.detach()).sum()


def twin(objective, config, output, batch):
    """Compute a loss in float64, one target at a time."""
    total = output.itm_logits.new_zeros((), dtype=torch.float64)
    if objective == "itm":
        logits = output.itm_logits.double()
        for row, label in enumerate(batch.mismatched.tolist()):
            total = total - logits[row].log_softmax(0)[label]
        return total / len(batch)

    if objective == "wra":
        for sample in range(len(batch)):
            words = output.text_hidden[batch.text_offsets[sample] : batch.text_offsets[sample + 1]]
            start = int(batch.image_offsets[sample]) + 1
            regions = output.image_hidden[start : batch.image_offsets[sample + 1]]
            sign = -1 if batch.mismatched[sample] else 1
            total = total + sign * distance_of(words.double(), regions.double())
        return 0.1 * total / len(batch)

    if objective == "vqa":
        logits = output.task_outputs["vqa"].double()
        pairs = zip(batch.label_owner.tolist(), batch.labels.tolist(), strict=True)
        for row, label in pairs:
            total = total - logits[row].log_softmax(0)[label]
        return total / len(batch.labels)

    if objective == "msm":
        for place, label in enumerate(batch.msm_labels.tolist()):
            total = total - output.msm_logits[place].double().log_softmax(0)[label]
        return total / len(batch.msm_labels)

    region_tokens = batch.region_rows.tolist()
    for target, token in enumerate(batch.mrm_positions.tolist()):
        ids = batch.mrm_class_ids[target]
        probs = batch.mrm_class_probs[target].double()
        if objective == "attributes":
            known = batch.mrm_attribute_rows.tolist()
            if target in known:
                place = known.index(target)
                log_model = output.attribute_logits[target].double().log_softmax(0)
                share = batch.mrm_attribute_probs[place].double()
                total = total - log_model[int(batch.mrm_attribute_ids[place])] * share
            continue

        if objective == "mrfr":
            feature = batch.features[region_tokens.index(token)].double()
            if config.mrfr_normalise:
                spread = ((feature - feature.mean()) ** 2).mean()
                feature = (feature - feature.mean()) / (spread + 1e-5).sqrt()
            squares = (output.mrfr_features[target].double() - feature) ** 2
            total = total + (squares.sum() if config.mrfr_reduction == "sum" else squares.mean())
            continue

        log_model = output.mrm_logits[target].double().log_softmax(0)
        if objective == "mrc":
            pairs = list(zip(probs.tolist(), ids.tolist(), strict=True))
            best, label = max([(p, c) for p, c in pairs if c and p > 0] or pairs)
            total = total - log_model[label] * (best if config.mrc_confidence else 1)
            continue

        whole = torch.full((len(log_model),), 1.0, dtype=torch.float64)
        whole *= (1 - probs.sum()) / (len(log_model) - len(ids))
        whole[ids] = probs
        total = total + (whole * (whole.log() - log_model)).sum()

    targets = batch.mrm_attribute_rows if objective == "attributes" else batch.mrm_positions

    return total / len(targets)
