"""Check that foreign weights are a model's: no needed parameter is missing, none is of another
model, and each has its shape.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.errors import UsageError
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.weights.foreign import (
    DECODER,
    Link,
    bert_links,
    bert_name,
    official_links,
    plain_name,
)
from megatron_interbert.weights.other_models import INSTEAD, refuse_other_models, refuse_roberta

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

HEADS = ("msm", "mrm", "itm", "choice", "sentence")
# A source may lack any of these as a whole, since it may have been made without that head.
OPTIONAL = (
    "cls.predictions.",
    "cls.imagePredictions.",
    "cls.bi_seq_relationship.",
    "vil_logit.",
    "bert.pooler.",
    "classifier.",
)
REGION = "bert.v_embeddings.image_embeddings.weight"
WORD = "bert.embeddings.word_embeddings.weight"
UNUSED_HEADS = ("vision_logit", "linguisic_logit")  # of the official model, on each stream's tokens
WITH_VOCABULARY = (WORD, DECODER, "cls.predictions.bias")
# what may stand beside the parameters that we read: nothing of ours depends on it
OFFICIAL_EXTRAS = re.compile(r"(?:vil_prediction|vil_logit|vision_logit|linguisic_logit)\..*")
LAYER = re.compile(r"\.layer\.\d+\.")
BERT_EXTRAS = re.compile(
    r"bert\.embeddings\.(?:position_ids|token_type_ids)"  # buffers of transformers
    r"|bert\.pooler\.dense\..*"
    r"|(?:cls|classifier|qa_outputs|linear|fit_denses?)\..*"  # heads of BERT's tasks
)


def by_their_name(names: Iterable[str], kind: str, where: str) -> dict[str, str]:
    """Map official or BERT's own names to those in a file; UsageError if two are one parameter."""
    rename = bert_name if kind == "bert" else plain_name
    result: dict[str, str] = {}

    for name in names:
        other = result.setdefault(rename(name), name)
        if other != name:
            raise UsageError(
                f"{where}: {other[:200]} and {name[:200]} are the same parameter; keep one of them"
            )

    return result


def fit(kind: str, shapes: Shapes, config: ModelConfig, where: str) -> list[Link]:
    """Return the links of an official InterBERT or a BERT (`kind`) whose tensors are there.

    `shapes` are those in the file, by `by_their_name`. Raises UsageError unless the tensors are
    those of such a model of these sizes. A BERT may be deeper, and have any heads of BERT's tasks.
    """
    if kind == "official":
        layers = (
            f"{config.interaction_layers} + {config.text_layers} + {config.image_layers} layers"
        )
        what = f"an official InterBERT state dict of these sizes ({layers})"
        links = present(official_links(config), shapes, where, what)
        extras = OFFICIAL_EXTRAS
    else:
        if config.type_vocab_size > 1:
            refuse_roberta(shapes, where)
        depth = config.interaction_layers + config.text_layers
        what = f"BERT of these sizes (BERT needs {depth} layers for this model)"
        links = present(bert_links(config), shapes, where, what)
        extras = BERT_EXTRAS

    used = {name for link in links for name in link.theirs} | {DECODER}
    strangers = [name for name in shapes if name not in used and not extras.fullmatch(name)]
    if kind == "bert":  # of layers that we leave out
        strangers = [name for name in strangers if LAYER.sub(".layer.0.", name) not in used]

    if strangers:
        more = f" (and {len(strangers) - 1} more)" if len(strangers) > 1 else ""
        raise UsageError(
            f"{where}: {strangers[0][:200]}{more} is no parameter of {what}; {INSTEAD}, or other"
            " sizes by --model"
        )

    check_shapes(links, shapes, config, where)

    return links


def present(links: Sequence[Link], names: Iterable[str], where: str, what: str) -> list[Link]:
    """Return the links all of whose tensors are among `names`.

    Raises UsageError if anything other than a whole head is missing.
    """
    names = set(names)
    needed = [name for link in links for name in link.theirs]
    begun = {head_of(name) for name in needed if name in names}

    for name in needed:
        if name not in names and (head_of(name) in begun or not head_of(name)):
            raise UsageError(f"{where}: {name} is missing; not {what}")

    return [link for link in links if set(link.theirs) <= names]


def head_of(name: str) -> str:
    """Return the entry of OPTIONAL that a parameter belongs to; "" if it must be there."""
    return next((head for head in OPTIONAL if name.startswith(head)), "")


def check_shapes(links: Sequence[Link], shapes: Shapes, config: ModelConfig, where: str) -> None:
    """Raise UsageError, which names the parameter, if a tensor has another shape than the model's.

    A classifier may have any number of labels.
    """
    labels = shapes.get("classifier.weight", (2,))[0]
    expected = their_shapes(links, our_shapes(config, labels), config)
    expected[DECODER] = expected[WORD]
    for head in UNUSED_HEADS:
        expected |= {f"{head}.weight": (1, config.hidden_size), f"{head}.bias": (1,)}

    for name, shape in expected.items():
        if name in shapes:
            refuse_shape(name, shapes[name], shape, where)


def refuse_shape(name: str, found: Shape, expected: Shape, where: str) -> None:
    """Raise UsageError if a parameter's shape is not the expected one."""
    if tuple(found) == tuple(expected):
        return

    what = "give the sizes of these weights by --model"
    if name in WITH_VOCABULARY and found[1:] == expected[1:] and found:
        what = (
            f"vocabulary of {found[0]} entries, the model has {expected[0]}; give the vocabulary"
            " the checkpoint was made with (--vocab-file)"
        )

    raise UsageError(f"{where}: {name} has shape {[*found]}, expected {[*expected]}; {what}")


def check_own(shapes: Shapes, config: ModelConfig, where: str) -> None:
    """Raise UsageError unless the parameters are those of our model, by our names, with the right
    shapes; heads may be missing as a whole.
    """
    labels = shapes.get("sentence_head.output.weight", (2,))[0]
    expected = our_shapes(config, labels)
    begun = {name.split(".")[0] for name in shapes}

    for name, shape in expected.items():
        if name in shapes:
            refuse_shape(name, shapes[name], shape, where)
        elif "_head." not in name or name.split(".")[0] in begun:
            raise UsageError(f"{where}: {name} is missing; not an InterBERT of these sizes")

    for name in shapes:
        if name not in expected:
            raise UsageError(
                f"{where}: {name[:200]} is no parameter of an InterBERT of these sizes; export the"
                " model again"
            )


def our_shapes(config: ModelConfig, labels: int = 2) -> dict[str, Shape]:
    """Return the shape of every parameter of the model with all heads, by our names."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = InterBert(config, HEADS, num_labels=labels)

    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def their_shapes(links: Sequence[Link], ours: Shapes, config: ModelConfig) -> dict[str, Shape]:
    """Return the shape of every foreign tensor of `links`."""
    result = {}
    for link in links:
        parts = link.to_theirs(torch.empty(ours[link.ours], device="meta"), config)
        result |= {name: tuple(part.shape) for name, part in zip(link.theirs, parts, strict=True)}

    return result


def from_foreign(
    kind: str, source: Mapping[str, torch.Tensor], config: ModelConfig, where: str = "state dict"
) -> dict[str, torch.Tensor]:
    """Convert the state dict of an official InterBERT (pretraining or downstream) or of a BERT with
    or without its heads (`kind`) to one in our names; of a BERT it holds the text path only.
    """
    refuse_other_models(source, where)
    names = by_their_name(source, kind, where)
    shapes = {name: tuple(source[original].shape) for name, original in names.items()}

    return {
        link.ours: link.to_ours([source[names[name]] for name in link.theirs], config)
        for link in fit(kind, shapes, config, where)
    }
