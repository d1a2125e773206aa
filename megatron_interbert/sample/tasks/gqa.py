"""Write questions about generated scenes in the formats of GQA and Visual Genome QA."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_interbert.files import write_text
from megatron_interbert.sample.corpus import COLOUR_NAMES
from megatron_interbert.sample.tasks.draws import Purpose, draw_for
from megatron_interbert.sample.tasks.scenes import TaskScene
from megatron_interbert.sample.tasks.vqa import Question, questions_of

# structural, semantic and detailed type of each kind of question
TYPES = {
    "is there a": ("verify", "obj", "existAttr"),
    "is there no": ("verify", "obj", "existAttrNot"),
    "is the": ("verify", "rel", "verifyRel"),
    "are the": ("compare", "attr", "sameColor"),
    "how many": ("query", "obj", "count"),
    "what colour is the": ("query", "attr", "color"),
}
STEPS = {"is there a": 2, "is there no": 2, "is the": 3, "are the": 3, "how many": 2}
VALID = {"yes/no": ["yes", "no"], "number": ["0", "1", "2", "3"], "other": COLOUR_NAMES}


def write_gqa(folder: Path, split: str, scenes: Mapping[int, TaskScene], seed: int) -> None:
    """Write SPLIT_balanced_questions.json, SPLIT_all_questions.json, with questions that those
    entail as well, and SPLIT_choices.json.
    """
    everything: dict[str, dict[str, Any]] = {}
    choices: dict[str, dict[str, list[str]]] = {}

    for image, scene in scenes.items():
        random = draw_for(Purpose.GQA, seed, image)
        asked = list(questions_of(random, scene))
        for place, question in enumerate(asked):
            number = f"{image}{place:02d}"
            entry = entry_of(question, image, scene)
            everything[number] = entry
            choices[number] = {"valid": VALID[question.answer_type], "plausible": [question.answer]}

            if question.question_type == "is there a":
                reverse = "no" if question.answer == "yes" else "yes"
                text = question.text.replace("there a", "there no")
                other = replace(question, text=text, answer=reverse, question_type="is there no")
                entailed = f"{image}{place + 50:02d}"
                everything[entailed] = {**entry_of(other, image, scene), "isBalanced": False}
                choices[entailed] = {"valid": ["yes", "no"], "plausible": [reverse]}
                entry["entailed"] = [entailed]

    balanced = {number: entry for number, entry in everything.items() if entry["isBalanced"]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("balanced_questions", balanced),
        ("all_questions", everything),
        ("choices", choices),
    ):
        write_text(folder / f"{split}_{name}.json", json.dumps(content))


def entry_of(question: Question, image: int, scene: TaskScene) -> dict[str, Any]:
    """Return the entry of a question."""
    structural, semantic, detailed = TYPES[question.question_type]
    steps = STEPS.get(question.question_type, 2)

    return {
        "question": question.text,
        "answer": question.answer,
        "fullAnswer": question.answer,
        "imageId": str(image),
        "isBalanced": True,
        "entailed": [],
        "equivalent": [],
        "groups": {"global": detailed, "local": f"{detailed}-{scene.place_name}"},
        "types": {"structural": structural, "semantic": semantic, "detailed": detailed},
        "semantic": [{"operation": "select", "argument": "", "dependencies": []}] * steps,
        "annotations": {"question": {}, "answer": {}, "fullAnswer": {}},
    }


def write_vgqa(folder: Path, split: str, scenes: Mapping[int, TaskScene], seed: int) -> None:
    """Write SPLIT_question_answers.json, with the answers as sentences."""
    images = []

    for image, scene in scenes.items():
        random = draw_for(Purpose.VGQA, seed, image)
        asked = [
            {
                "qa_id": image * 100 + place,
                "image_id": image,
                "question": question.text,
                "answer": f"{question.answer.capitalize()}.",
                "a_objects": [],
                "q_objects": [],
            }
            for place, question in enumerate(questions_of(random, scene))
        ]
        images.append({"id": image, "qas": asked})

    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{split}_question_answers.json", json.dumps(images))
