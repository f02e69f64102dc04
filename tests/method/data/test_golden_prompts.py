"""Each of the paper's formats as a model reads it: text and loss mask, written by hand from the published code."""

import json

import pytest

from less_assets.method.data.chat import IGNORED, ChatEncoder
from less_assets.method.data.targets import read_evaluation, read_targets

TASK = "Determine whether the walk ends where it began."
WORKED = [("Q: Left, left.", " No way back. So the answer is No."), ("Q: Stay.", " Still there. So the answer is Yes.")]
WORKED += [("Q: Up, down.", " Back again. So the answer is Yes.")]
ANATOMY = 'Which is "a" bone?,Femur,Heart,Skin,Eye,A\nHow many ribs?,12,24,36,48,B\n'
SHOT = {"context": "Bob has a dog.", "question": "What has Bob?", "answers": [{"text": "a dog"}]}

# Format: (files, prompt of the first target without loss, completion with loss)
TARGETS = {
    "bbh": (
        {
            "bbh-three-shot.json": json.dumps(
                {"navigate": f"{TASK}\n\n" + "\n\n".join(f"{q}\nA:{a}" for q, a in WORKED)}
            )
        },
        "<|user|>\n"
        "Determine whether the walk ends where it began.\n\n"
        "Q: Stay.\nA: Still there. So the answer is Yes.\n\n"
        "Q: Up, down.\nA: Back again. So the answer is Yes.\n\n"
        "Q: Left, left.\n"
        "<|assistant|>\nA:",
        " No way back. So the answer is No.",
    ),
    "mmlu": (
        {"dev/high_school_anatomy_dev.csv": ANATOMY},
        "<|user|>\n"
        "The following are multiple choice questions (with answers) about  high school anatomy.\n\n"
        'Which is "a" bone?\nA. Femur\nB. Heart\nC. Skin\nD. Eye\nAnswer:\n'
        "<|assistant|>\nThe answer is:",
        " A",
    ),
    "tydiqa": (
        {"tydiqa-one-shot.json": json.dumps({"finnish": [SHOT]})},
        "<|user|>\n"
        "Vastaa seuraavaan kysymykseen annetun kappaleen tiedon perusteella.Kappale: Bob has a dog.\n"
        "Kysymys: What has Bob?\n"  # the format's own newline is the turn's
        "<|assistant|>\nVastaus:",
        " a dog",
    ),
    "gsm8k": (
        {"cot-8-shot.json": json.dumps([{"question": "Two and two?", "cot_answer": "4. So the answer is 4."}])},
        "<|user|>\nTwo and two?\n<|assistant|>\n",
        "4. So the answer is 4.",
    ),
}

# Format: (further files, prompt of the first question, reference completion)
EVALUATIONS = {
    "bbh": (
        {"test/navigate.json": json.dumps({"examples": [{"input": "Right.", "target": "No"}]})},
        "<|user|>\n"
        "Determine whether the walk ends where it began.\n\n"
        "Q: Left, left.\nA: No way back. So the answer is No.\n\n"
        "Q: Stay.\nA: Still there. So the answer is Yes.\n\n"
        "Q: Up, down.\nA: Back again. So the answer is Yes.\n\n"
        "Q: Right.\n"
        "<|assistant|>\nA:",
        " So the answer is No.",
    ),
    "mmlu": (
        {"test/high_school_anatomy_test.csv": "A joint?,Knee,Nail,Hair,Tooth,A\n"},
        "<|user|>\n"
        "The following are multiple choice questions (with answers) about  high school anatomy.\n\n"
        'Which is "a" bone?\nA. Femur\nB. Heart\nC. Skin\nD. Eye\nAnswer: A\n\n'
        "How many ribs?\nA. 12\nB. 24\nC. 36\nD. 48\nAnswer: B\n\n"
        "A joint?\nA. Knee\nB. Nail\nC. Hair\nD. Tooth\nAnswer:\n"
        "<|assistant|>\nThe answer is:",
        " A",
    ),
    "tydiqa": (
        {
            "dev/finnish_tydiqa_dev.json": json.dumps(
                {
                    "data": [
                        {
                            "paragraphs": [
                                {
                                    "context": "It rains.",
                                    "qas": [{"id": "finnish-1", "question": "Dry?", "answers": [{"text": "no"}]}],
                                }
                            ]
                        }
                    ]
                }
            )
        },
        "<|user|>\n"
        "Vastaa seuraavaan kysymykseen annetun kappaleen tiedon perusteella.\n\n"
        "Kappale: Bob has a dog.\nKysymys: What has Bob?\nVastaus: a dog\n\n"
        "Kappale: It rains.\nKysymys: Dry?\n"
        "<|assistant|>\nVastaus:",
        " no",
    ),
    "gsm8k": (
        {"test.jsonl": json.dumps({"question": "1,000 + 80?", "answer": "<<1000+80=1080>>1,080.\n#### 1,080"}) + "\n"},
        "<|user|>\n"
        "Answer the following questions.\n\n"
        "Question: Two and two?\nAnswer: 4. So the answer is 4.\n\n"
        "Question: 1,000 + 80?\n"
        "<|assistant|>\nAnswer:",
        " 1,080. So the answer is 1,080.",
    ),
}


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")


@pytest.mark.parametrize("format", TARGETS)
def test_targets_are_encoded_as_published(tmp_path, byte_tokenizer, format):
    files, prompt, completion = TARGETS[format]
    write(tmp_path, files)
    encoded = ChatEncoder(byte_tokenizer, "tulu", 2048).target(read_targets(format, str(tmp_path))[0])
    assert byte_tokenizer.decode(encoded.input_ids) == prompt + completion, "no end token and no newline at the end"
    start = len(byte_tokenizer(prompt, add_special_tokens=False).input_ids)
    assert (encoded.labels[:start] == IGNORED).all()
    assert byte_tokenizer.decode(encoded.labels[start:]) == completion


@pytest.mark.parametrize("format", EVALUATIONS)
def test_questions_are_asked_as_published(tmp_path, byte_tokenizer, format):
    files, prompt, completion = EVALUATIONS[format]
    write(tmp_path, {**TARGETS[format][0], **files})
    (question,) = read_evaluation(format, str(tmp_path))
    asked = ChatEncoder(byte_tokenizer, "tulu", 2048).prompt(question.messages, question.assistant_prefix)
    assert byte_tokenizer.decode(asked) == prompt
    assert question.completion == completion
