"""`evaluate vcr`: the three accuracies, the test server's CSV, a page with each question."""

import html
from typing import Any

import numpy as np
import torch

from megatron_interbert.data.downstream.vcr import Question, VcrImages, VcrTexts, read_questions
from megatron_interbert.data.drawing import STYLE, draw_image
from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.data.photo_folder import PhotoFolder, photos_in
from megatron_interbert.files import write_text
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.progress import progress
from megatron_interbert.task_config import EvaluateVcrConfig
from megatron_interbert.tasks.loading import agree_on_inputs, as_trained, check_photos, load_model, open_for
from megatron_interbert.tasks.parts import fit_length
from megatron_interbert.tasks.results import result_of, table, write_result
from megatron_interbert.tasks.vcr import check_labels, open_images, predict, softmax, submission_lines, vcr_metrics

PAGE_STYLE = STYLE + (
    "section{display:grid;grid-template-columns:minmax(220px,360px) 1fr;gap:1rem}@media(max-width:700px){section{display:block}}"
    "ol{padding-left:1.4rem;margin:.3rem 0}li{margin:.15rem 0;padding:.1rem .4rem;border-radius:4px}"
    "li.right{outline:2px solid #1a8f4c}li b{float:right;margin-left:1rem;font-weight:600}h2{font-size:17px;margin:.2rem 0}"
    "td,th{white-space:nowrap;padding:.3rem .5rem}.hit{color:#1a8f4c}.miss{color:#b3402e}\n"
)


def evaluate_vcr(config: EvaluateVcrConfig, state: ParallelState, device: torch.device) -> dict[str, Any]:
    """Writes result.json, result.html and, with --submission, submission.csv; all ranks of a launch call it."""
    check_photos(config.image_folder, state)
    model, source = load_model(config.load, ("choice",), config.kernels, device, state, config.averaged, config.precision)
    as_trained(config, source, "vcr", max_regions=100, max_tokens=60, max_rationale_tokens=80)
    images = open_images(config.annotated_path, config.data_path, config)
    paths = [path for path in (config.annotated_path, config.data_path) if path]
    corpus, tokenizer = open_for(config, source, paths[:1])
    fit_length(config, source.config)
    fit_length(config, source.config, "max_rationale_tokens")
    files = [*(f"{path}/{MANIFEST}" for path in paths), config.annotations]
    folder = agree_on_inputs(config, state, source, tokenizer, files)
    questions = read_questions(config.annotations, images, whole=config.submission)
    if state.is_main:
        print(questions.report(), flush=True)
    items, labelled = questions.items, questions.labelled
    if not config.submission:
        check_labels(questions)
    texts, every = VcrTexts(tokenizer, config.max_tokens, config.max_rationale_tokens), config.submission
    with progress(total=len(items), unit="question", desc="answering", shown=state.is_main) as bar:
        answers, rationales = predict(
            *(model, items, images, texts, state, device, config.batch_size),
            every_answer=every,
            progress=lambda count: bar.update(count * state.data_size),
        )
    metrics: dict[str, float] = {}
    if labelled:
        given_right = rationales[np.arange(len(items)), [q.answer_label for q in items]] if every else rationales
        metrics = vcr_metrics(items, answers, given_right)
    more = {"questions": len(items), "dropped": dict(questions.dropped)}
    result = result_of(config, "finetuned", metrics, source, corpus, files[1:], **more)
    if state.is_main:
        write_result(folder, result)
        if every:
            write_text(folder / "submission.csv", "\n".join(submission_lines(items, answers, rationales)) + "\n")
        if labelled:
            photos = photos_in(config.image_folder)
            write_text(folder / "result.html", page(result, items, answers, given_right, images, config.examples, photos))
        print(table(result) if metrics else "these annotations hold no labels, so no figure is given")
        print(f"result: {folder / 'result.json'}" + (f"\npage:   {folder / 'result.html'}" if labelled else ""))
        if every:
            print(f"submission: {folder / 'submission.csv'}")
    return result


def page(
    result: dict[str, Any],
    questions: list[Question],
    answers: np.ndarray,
    rationales: np.ndarray,
    images: VcrImages,
    most: int,
    photos: PhotoFolder | None,
) -> str:
    """Questions from all over the file: image, options with their probabilities, the right ones outlined."""
    corpus = images.annotated or images.detected
    sections, symbols = [], {}
    for number in np.linspace(0, len(questions) - 1, min(most, len(questions))).astype(int):
        q = questions[number]
        image = q.annotated if images.annotated is not None else q.detected
        symbols.setdefault(image, draw_image(corpus.stores[0], image, photos))
        sections.append(
            f'<section><svg role="img"><use href="#image-{image}"/></svg><div><h2>{html.escape(q.question)}</h2>'
            f"{_options('answer', q.answers, answers[number], q.answer_label)}"
            f"{_options('rationale, given the right answer', q.rationales, rationales[number], q.rationale_label)}"
            f'<p class="note">{html.escape(q.annot_id)}</p></div></section>'
        )
    metrics = result["metrics"]
    figures = "".join(f"<td>{metrics[name]:.1f} %</td>" for name in ("q_a", "qa_r", "q_ar"))
    origin = " Generated scenes and questions, not photographs." if result["data"]["generated"] else ""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<title>InterBERT VCR</title><style>{PAGE_STYLE}</style><svg class="symbols">{"".join(symbols.values())}</svg>'
        "<h1>Visual commonsense reasoning</h1><table><tr><th></th><th>Q to A</th><th>QA to R</th><th>Q to AR</th></tr>"
        f"<tr><td>accuracy</td>{figures}</tr><tr><td>chance</td><td>25.0 %</td><td>25.0 %</td><td>6.2 %</td></tr></table>"
        f'<p class="note">{result["questions"]} questions; the right option is outlined, probabilities to the right.{origin}</p>'
        f"{''.join(sections)}</html>"
    )


def _options(what: str, texts: list[str], logits: np.ndarray, right: int) -> str:
    probabilities = softmax(logits)
    verdict = "hit" if int(np.argmax(logits)) == right else "miss"
    lines = "".join(
        f"<li{' class=right' if i == right else ''}><b>{p:.0%}</b>{html.escape(text)}</li>"
        for i, (text, p) in enumerate(zip(texts, probabilities, strict=True))
    )
    return f'<p class="note {verdict}">{what}: {"right" if verdict == "hit" else "wrong"}</p><ol type="a">{lines}</ol>'
