"""Write questions about generated scenes in the format of VQA v2."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_interbert.files import write_text
from megatron_interbert.sample.tasks import facts
from megatron_interbert.sample.tasks.draws import Purpose, draw_for
from megatron_interbert.sample.tasks.scenes import THINGS, TaskScene

PEOPLE = 10
UNSURE = 0.3  # share of questions to which one of the people has no answer


@dataclass(frozen=True)
class Question:
    """Hold a question with its answer, and the types by which VQA reports accuracies."""

    text: str
    answer: str
    question_type: str
    answer_type: str


def questions_of(random: np.random.Generator, scene: TaskScene) -> Iterator[Question]:
    """Draw questions about a scene: yes/no questions in couples, colours, counts."""
    true, false = facts.existence(random, scene)
    yield from couple("is there a {} ?", true, false, "is there a")

    true, false = facts.existence(random, scene)
    yield from couple("is there no {} ?", false, true, "is there no")

    true, false = (" ".join(words) for words in facts.relation(random, scene))
    yield from couple("is {} ?", true, false, "is the")

    if scene.shares:
        for colour, count in facts.counts(random, scene):
            text = f"how many {colour} things are there ?"
            yield Question(text, str(count), "how many", "number")

        if found := facts.same_colour(random, scene):
            yield from couple("are {} the same colour ?", *found, "are the")
    else:
        for thing in random.permutation(THINGS)[:2].tolist():
            text = f"what colour is the {scene.only(thing)} ?"
            yield Question(text, scene.things[thing][0], "what colour is the", "other")


def couple(form: str, true: str, false: str, kind: str) -> Iterator[Question]:
    """Yield a question to be answered with yes, and one with no."""
    yield Question(form.format(true), "yes", kind, "yes/no")
    yield Question(form.format(false), "no", kind, "yes/no")


def write_vqa(folder: Path, split: str, scenes: Mapping[int, TaskScene], seed: int) -> None:
    """Write SPLIT_questions.json and SPLIT_annotations.json about scenes, given by image number."""
    asked: list[dict[str, Any]] = []
    answered: list[dict[str, Any]] = []

    for image, scene in scenes.items():
        random = draw_for(Purpose.VQA, seed, image)
        for place, question in enumerate(questions_of(random, scene)):
            number = image * 100 + place
            said = [question.answer] * PEOPLE
            if random.random() < UNSURE:
                said[int(random.integers(PEOPLE))] = "unsure"

            asked.append({"question_id": number, "image_id": image, "question": question.text})
            answered.append(
                {
                    "question_id": number,
                    "image_id": image,
                    "question_type": question.question_type,
                    "answer_type": question.answer_type,
                    "multiple_choice_answer": question.answer,
                    "answers": [
                        {"answer_id": person + 1, "answer": text, "answer_confidence": "yes"}
                        for person, text in enumerate(said)
                    ],
                }
            )

    head = {"info": {"description": "generated"}, "data_type": "generated", "data_subtype": split}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{split}_questions.json", json.dumps({**head, "questions": asked}))
    write_text(folder / f"{split}_annotations.json", json.dumps({**head, "annotations": answered}))
