"""Test the generated world of tasks: what can be answered without reading text and image together,
on 10,000 questions; scenes as they are said to be; the same files for the same seed.
"""

import gzip
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from megatron_interbert.sample.corpus import NAMES, World, vocabulary, write_questions
from megatron_interbert.sample.tasks.blind import tasks_in, write_vcr_baselines
from megatron_interbert.sample.tasks.gqa import VALID
from megatron_interbert.sample.tasks.one_sided import looks_of, pairs_of
from megatron_interbert.sample.tasks.pictures import PAINT, SCALE, ground_of, shape_of
from megatron_interbert.sample.tasks.scenes import THINGS, captions_of, draw_scene
from megatron_interbert.sample.tasks.vqa import questions_of
from megatron_interbert.sample.tasks.world import draw_scenes
from megatron_interbert.tasks.baselines import baselines_of
from megatron_interbert.tasks.plain_pickles import read_plain_pickle
from tests.launching import ROOT

ENDINGS = (".json", ".jsonl", ".p", ".txt", ".xml", ".gz")
SIZES = {"train": 600, "test": 1000}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Write a world of tasks by the command."""
    folder = tmp_path_factory.mktemp("world")
    command = [sys.executable, str(ROOT / "tools" / "make_sample.py"), "--output", str(folder)]
    sizes = ["--train-scenes", str(SIZES["train"]), "--test-scenes", str(SIZES["test"])]
    wanted = ["--tasks", "--pictures"]
    subprocess.run([*command, *sizes, *wanted], check=True, capture_output=True)
    return folder


def test_scenes_are_as_they_are_said_to_be():
    world = World(0, 0.3)
    words = set(vocabulary())
    for number in range(300):
        random = np.random.default_rng(number)
        scene = draw_scene(world, random)
        assert len(set(scene.things)) == THINGS
        counts = sorted(np.unique(scene.colours, return_counts=True)[1].tolist())
        assert counts == ([1, 2, 3] if scene.shares else [1] * 6)
        left, right = scene.twins
        assert scene.kinds[left] == scene.kinds[right]
        assert scene.is_left_of(left, right)
        assert np.diff(np.sort(scene.centres)).min() > 20
        assert (scene.boxes >= 0).all()
        assert (scene.boxes[:, 2] <= 640).all()
        texts = [text for text, _ in captions_of(random, scene)]
        asked = list(questions_of(random, scene))
        texts += [question.text for question in asked]
        pairs = list(pairs_of(random, scene))
        texts += [text for pair in pairs for text in pair[:2]]
        texts += looks_of(scene)
        check_pairs(pairs)
        assert words.issuperset(" ".join(texts).split())
        for question in asked:
            check_answer(scene, question)


def check_pairs(pairs):
    """Check pairs of sentences by their words: all but the order and one word are alike."""
    for first, second, entails in pairs:
        words, others = first.split(), second.split()
        if others[0] == "there":
            said = {" ".join(words[1:3]): "a", " ".join(words[5:7]): "no"}
            assert entails == (said[" ".join(others[3:])] == others[2])
        else:
            same_order = words[2] == others[1]
            assert {words[2], words[10]} == {others[1], others[8]}
            assert entails == (same_order == (words[6] == others[5]))


def check_answer(scene, question):
    """Check the answer to a question by the words of it alone."""
    words = question.text.split()
    things = {f"{colour} {kind}" for colour, kind in scene.things}
    if question.question_type in ("is there a", "is there no"):
        there = " ".join(words[3:5]) in things
        assert (question.answer == "yes") == (there == (words[2] == "a"))
    elif question.question_type == "how many":
        assert int(question.answer) == sum(colour == words[2] for colour, _ in scene.things)
    elif question.question_type == "is the":
        one = scene.things.index((words[2], words[3]))
        other = scene.things.index((words[9], words[10]))
        is_left = scene.centres[one] < scene.centres[other]
        assert (question.answer == "yes") == (is_left == (words[6] == "left"))
    elif question.question_type == "are the":
        colours = [
            next(colour for colour, name in scene.things if name == kind)
            for kind in (words[2], words[5])
        ]
        assert (question.answer == "yes") == (colours[0] == colours[1])
    else:
        kind = words[-2]
        of_kind = [n for n, (_, name) in enumerate(scene.things) if name == kind]
        of_kind.sort(key=lambda n: scene.centres[n])
        thing = of_kind[-1 if words[-3] == "right" else 0]
        assert question.answer == scene.things[thing][0]


def chance_of(folder, task):
    """Return the mean and the variance of guessing each question by its kind, in shares."""
    if task == "vqa":
        path = folder / "tasks" / "vqa" / "test_annotations.json"
        kinds = [a["answer_type"] for a in json.loads(path.read_text())["annotations"]]
        p = np.array([1 / len(VALID[kind]) for kind in kinds])
    else:
        path = folder / "tasks" / "gqa" / "test_balanced_questions.json"
        kinds = [len(allowed(e)) for e in json.loads(path.read_text()).values()]
        p = 1 / np.array(kinds)
    return p.mean(), (p * (1 - p)).sum() / len(p) ** 2, len(p)


def allowed(entry):
    """Return the answers that a question of GQA allows."""
    if entry["types"]["structural"] != "query":
        return VALID["yes/no"]
    return VALID["number" if entry["types"]["detailed"] == "count" else "other"]


@pytest.fixture(scope="module")
def entries(world):
    """Return the entries of baselines.json by the folder of the first file and the kind of task."""
    written = json.loads((world / "tasks" / "baselines.json").read_text())["entries"]
    tasks = tasks_in(world / "tasks")
    return {
        task.files[0].parent.name + type(task).__name__: entry
        for task, entry in zip(tasks, written, strict=True)
    }


def test_nothing_is_given_away_by_one_side(world, entries):
    assert len(entries) == 10
    for name in ("vqa", "gqa", "vgqa"):
        mean, variance, count = chance_of(world, "gqa" if name == "gqa" else "vqa")
        assert count > 9000
        accuracy = entries[f"{name}AnswerFiles"]["figures"]["text only"]["accuracy"] / 100
        assert abs(accuracy - mean) < 3 * np.sqrt(variance), name
        # an image does not tell what is asked: the best is to say yes
        image = entries[f"{name}AnswerFiles"]["figures"]["image only"]["accuracy"] / 100
        assert image < mean + 3 * np.sqrt(variance), name

    for name, p in (("snli_ve", 1 / 3), ("nlvr2", 1 / 2), ("guesswhat", 1 / 2)):
        entry = entries[f"{name}AnswerFiles"]
        error = 3 * np.sqrt(p * (1 - p) / entry["samples"])
        for figures in entry["figures"].values():
            assert abs(figures["accuracy"] / 100 - p) < error, (name, figures)

    for name, figure, p in (
        ("refcoco", "accuracy_gt", 1 / 6),
        ("visual7w", "accuracy", 1 / 4),
        ("guesswhat", "accuracy", 1 / 6),
    ):
        entry = entries[f"{name}RegionFiles"]
        error = 3 * np.sqrt(p * (1 - p) / entry["samples"])
        for figures in entry["figures"].values():
            assert abs(figures[figure] / 100 - p) < error, (name, figures)

    entry = entries["flickr30k_entitiesRegionFiles"]
    chance, by_image = (
        entry["figures"][name]["R@1_det"] / 100 for name in ("chance", "image only")
    )
    # each thing has one or two of the 6 to 12 regions, and about as many as any other
    assert abs(chance - 1 / 6) < 3 * np.sqrt(5 / 36 / entry["samples"])
    assert abs(by_image - 1 / 6) < 3 * np.sqrt(5 / 36 / entry["samples"])


def test_dialogues_and_expressions_cannot_be_guessed_from_words(world):
    """Rule out, in GuessWhat, what a dialogue names; count expressions that need boxes."""
    path = world / "tasks" / "guesswhat" / "guesswhat.test.jsonl.gz"
    games = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    for game in games:
        kinds = {found["category"] for found in game["objects"]}
        said = " ".join(turn["q"] for turn in game["qas"])
        assert not kinds.intersection(said.split()), "no thing is named"

    answers = [turn["a"] for game in games for turn in game["qas"]]
    assert answers.count("Yes") / len(answers) == pytest.approx(0.5, abs=0.03)

    refs = read_plain_pickle(str(world / "tasks" / "refcoco" / "refs(unc).p"), "--refs")
    scenes = draw_scenes(World(0, 0.3), "test", SIZES["test"], 0)
    needed = sentences = 0
    for ref in refs:
        if ref["split"] != "val":
            continue
        scene = scenes[ref["image_id"]]
        thing = ref["ann_id"] - 10 * ref["image_id"]
        for sentence in ref["sentences"]:
            meant, alone = meant_by(scene, sentence["sent"])
            assert meant == [thing], sentence
            needed += alone > 1
            sentences += 1

    assert sentences == 6 * SIZES["test"]
    assert needed / sentences > 0.4, "words alone leave several things"


def meant_by(scene, text):
    """Return the things that an expression means, by its words and boxes, and how many by its
    words alone.
    """
    first, _, rest = text.partition(" to the ")
    words = first.split()[1:]
    kind = words[-1]
    found = [
        n
        for n, (colour, name) in enumerate(scene.things)
        if kind in (name, "thing") and (kind != "thing" or colour == words[0])
    ]
    alone = len(found)
    if words[0] in ("left", "right") and kind != "thing":
        found = [min(found, key=lambda n: scene.centres[n] * (1 if words[0] == "left" else -1))]
    if rest:
        side, _, other = rest.partition(" of the ")
        there = scene.things.index(tuple(other.split()))
        found = [n for n in found if (scene.centres[n] < scene.centres[there]) == (side == "left")]
        found = [n for n in found if n != there]
    return found, alone


def test_pairs_of_sentences_give_nothing_away(world):
    """Guess by the second sentence, by the words that both have, by which words are the same."""
    lines = (world / "tasks" / "glue" / "RTE" / "dev.tsv").read_text().splitlines()[1:]
    assert len(lines) == 8 * SIZES["test"]
    rows = [line.split("\t")[1:] for line in lines]
    entails = np.array([label == "entailment" for _, _, label in rows])
    assert entails.mean() == 0.5
    for clue in (
        lambda first, second: second.split()[2],
        lambda first, second: len(set(first.split()) & set(second.split())),
        lambda first, second: first.split()[2] == second.split()[1],
        lambda first, second: second in first,
        lambda first, second: [word in second.split() for word in ("left", "right", "a", "no")],
    ):
        seen = np.array([str(clue(first, second)) for first, second, _ in rows])
        for value in set(seen):
            if value == "True" and entails[seen == value].all():
                continue  # sentences that repeat the first one are true
            some = entails[seen == value]
            assert abs(some.mean() - 0.5) < 3 * 0.5 / np.sqrt(len(some)), value


def test_pictures_show_the_things_in_their_boxes(world):
    """Look at the middle of things and at the corners, which no thing reaches."""
    from PIL import Image

    scenes = draw_scenes(World(0, 0.3), "test", 40, 0)
    right = 0
    for image, scene in scenes.items():
        picture = np.asarray(Image.open(world / "tasks" / "pictures" / "test" / f"{image}.png"))
        assert picture.shape == (240, 320, 3)
        assert tuple(picture[0, 0]) == ground_of(scene.place)
        for (colour, _), box in zip(scene.things, scene.boxes, strict=True):
            x, y = ((box[:2] + box[2:]) / 2 * SCALE).astype(int)
            right += "#{:02x}{:02x}{:02x}".format(*picture[y, x]) == PAINT[colour]
    assert right > 0.95 * 6 * len(scenes)
    captions = world / "tasks" / "pictures" / "test_captions.jsonl"
    lines = [json.loads(line) for line in captions.read_text().splitlines()]
    assert len(lines) == 2 * SIZES["test"]
    assert {line["image"] for line in lines} >= {str(image) for image in scenes}
    shapes = [shape_of(kind) for kind in range(len(NAMES))]
    assert len({shape.tobytes() for shape in shapes}) == len(NAMES)
    assert all((shape >= 0).all() and (shape <= 1).all() for shape in shapes)


def test_options_of_vcr_give_nothing_away(tmp_path):
    for split, questions in (("train", SIZES["train"]), ("test", 10_000)):
        write_questions(World(0, 0.3), tmp_path, split, questions, 0)

    write_vcr_baselines(tmp_path / "vcr")
    (entry,) = json.loads((tmp_path / "vcr" / "baselines.json").read_text())["entries"]
    assert entry["samples"] == 10_000
    assert set(entry["figures"]) == {"word overlap", "text only"}
    for figures in entry["figures"].values():
        for name, p in (("q_a", 1 / 4), ("qa_r", 1 / 4), ("q_ar", 1 / 16)):
            error = 3 * np.sqrt(p * (1 - p) / entry["samples"])
            assert abs(figures[name] / 100 - p) < error, (name, figures)


def test_baselines_stand_beside_results_on_the_same_samples_only(world, entries):
    files = [world / "tasks" / "snli_ve" / "snli_ve_test.jsonl"]
    samples = entries["snli_veAnswerFiles"]["samples"]
    shown = baselines_of(files, samples)
    assert [peer["model"] for peer in shown] == ["text only", "image only"]
    assert shown[0]["figures"] == entries["snli_veAnswerFiles"]["figures"]["text only"]
    assert not baselines_of(files, samples - 1)
    assert not baselines_of([world / "tasks" / "snli_ve" / "snli_ve_train.jsonl"], samples)
    assert not baselines_of([], 0)


def digest(folder):
    """Return the hash of all annotations."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in ENDINGS and path.name not in ("manifest.json", "vocab.txt"):
            found.update(path.read_bytes())

    return found.hexdigest()


def test_a_seed_gives_one_world(tmp_path):
    from megatron_interbert.sample.tasks.world import write_world

    world = World(3, 0.3)
    for name in ("one", "other"):
        write_world(world, tmp_path / name, {"train": 6, "test": 4}, 3)
    write_world(World(4, 0.3), tmp_path / "third", {"train": 6, "test": 4}, 4)
    one, other, third = (digest(tmp_path / name) for name in ("one", "other", "third"))
    assert one == other != third
    assert len(NAMES) == 60
