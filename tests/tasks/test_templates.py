"""The texts of RULER's tasks, written out: for fixed draws, letter by letter."""

from __future__ import annotations

import pytest

from megahybrid.tasks import TASKS, Vocabulary
from megahybrid.tasks.draws import Draws
from tests.tasks.texts import byte_level

PROSE = "Rain fell. Who\nknew? We did! (It was cold.) Then"

SINGLE = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "number afterwards.\n{}\nWhat is the special magic number for rapid-pepper mentioned in the provided text? The "
    "special magic number for rapid-pepper mentioned in the provided text is"
)
SINGLE_UUID = (
    "A special magic uuid is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "uuid afterwards.\n{}\nWhat is the special magic uuid for rapid-pepper mentioned in the provided text? The "
    "special magic uuid for rapid-pepper mentioned in the provided text is"
)
SEVERAL = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the numbers afterwards.\n{}\nWhat are all the special magic numbers for {} mentioned in the provided text? The "
    "special magic numbers for {} mentioned in the provided text are"
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KEYS = "rapid-pepper, mellow-saddle, elegant-marsh, and sweet-pocket"
FOUR_KEYS = (
    " One of the special magic numbers for mellow-saddle is: 4664105. Rain fell. Who knew? One of the special magic "
    "numbers for sweet-pocket is: 5930285. We did! (It was cold.) Then Rain fell. One of the special magic numbers for "
    "rapid-pepper is: 3288624.  One of the special magic numbers for elegant-marsh is: 6823238. Who"
)

EXPECTED = {
    "niah_single_1": (
        2,
        SINGLE.format(f"One of the special magic numbers for rapid-pepper is: 6054507.\n{NOISE}\n{NOISE}"),
        ["6054507"],
    ),
    "niah_single_2": (
        13,
        SINGLE.format(
            "Rain fell. One of the special magic numbers for rapid-pepper is: 6054507. Who knew? We did! (It was "
            "cold.) Then Rain fell. Who"
        ),
        ["6054507"],
    ),
    "niah_single_3": (
        13,
        SINGLE_UUID.format(
            "Rain fell. Who knew? One of the special magic uuids for rapid-pepper is: "
            "8fc5cc90-4136-4e9a-a640-d8c04119417a. We did! (It was cold.) Then Rain fell. Who"
        ),
        ["8fc5cc90-4136-4e9a-a640-d8c04119417a"],
    ),
    "niah_multikey_1": (13, SINGLE.format(FOUR_KEYS), ["3288624"]),
    "niah_multikey_2": (
        2,
        SINGLE.format(
            "One of the special magic numbers for mellow-saddle is: 1046051.\n"
            "One of the special magic numbers for rapid-pepper is: 7327562.\n"
            "One of the special magic numbers for elegant-marsh is: 7061612."
        ),
        ["7327562"],
    ),
    "niah_multikey_3": (
        2,
        SINGLE_UUID.replace("rapid-pepper", "b1614343-8fc5-4c90-8136-ae9ae640d8c0").format(
            "One of the special magic uuids for 4119417a-6839-443d-a5a3-87c28c3d3e0e is: "
            "884a09ea-98d0-491d-9bfb-5e7a62809621.\n"
            "One of the special magic uuids for b1614343-8fc5-4c90-8136-ae9ae640d8c0 is: "
            "022fcb5a-2bec-456c-b421-8c8c0fb95fb2.\n"
            "One of the special magic uuids for df6a72c3-01a8-4a5e-b472-148b75001d43 is: "
            "c4875def-f05c-45ff-bd9f-01287cc53e53."
        ),
        ["022fcb5a-2bec-456c-b421-8c8c0fb95fb2"],
    ),
    "niah_multivalue": (
        13,
        SEVERAL.format(
            "Rain fell. Who knew? One of the special magic numbers for rapid-pepper is: 6054507. We did! One of the "
            "special magic numbers for rapid-pepper is: 9094842.  One of the special magic numbers for rapid-pepper "
            "is: 3292665. (It was cold.) Then Rain fell. One of the special magic numbers for rapid-pepper is: "
            "3288624. Who",
            "rapid-pepper",
            "rapid-pepper",
        ),
        ["6054507", "3292665", "9094842", "3288624"],
    ),
    "niah_multiquery": (13, SEVERAL.format(FOUR_KEYS, KEYS, KEYS), ["3288624", "4664105", "6823238", "5930285"]),
    "vt": (
        6,
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{NOISE}\n {NOISE}\n VAR IGO = 96256 {NOISE}\n {NOISE}\n {NOISE}\n VAR YRW = VAR IGO  {NOISE}\n "
        f"VAR JEA = VAR YRW  {NOISE}\n VAR MVY = VAR JEA  {NOISE}\n VAR YWL = VAR MVY  {NOISE}\n {NOISE}\n\n"
        "Question: Find all variables that are assigned the value 96256 in the text above. Answer: According to the "
        "chain(s) of variable assignment in the text above, 5 variables are assgined the value 96256, they are:  IGO "
        "YRW JEA MVY YWL\n\n\n\n"
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"VAR GGKAS = 46640 {NOISE}\n VAR EXQPO = VAR GGKAS  {NOISE}\n VAR JIFQG = VAR EXQPO  {NOISE}\n {NOISE}\n "
        f"VAR OIAKX = VAR JIFQG  {NOISE}\n VAR ELXPG = VAR OIAKX  {NOISE}\n\n"
        "Question: Find all variables that are assigned the value 46640 in the text above. Answer: According to the "
        "chain(s) of variable assignment in the text above, 5 variables are assgined the value 46640, they are:",
        ["GGKAS", "EXQPO", "JIFQG", "OIAKX", "ELXPG"],
    ),
    "phonebook": (
        3,
        "Silas Rockmere: 887-872-7096\nKate Eastmore: 273-077-2778\nElmer Winbury: 562-343-7303\n"
        "Elmer Yorkfield: 618-824-2278\nMax Preshill: 343-549-4346\nHelen Langford: 494-426-1143\n\n"
        "Kate Eastmore: 273-077-2778\nElmer Yorkfield: 618-824-2278\nMax Preshill:",
        ["343-549-4346"],
    ),
}


def test_every_task_of_text_is_here():
    assert {name for name, task in TASKS.items() if task.text} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_text_is_this_one(name, tmp_path):
    """Data of finished runs, too: who changes this raises the task's version."""
    units, prompt, answers = EXPECTED[name]
    task, tokenizer = TASKS[name], byte_level()
    parameters = task.parameters()
    if hasattr(parameters, "haystack"):
        (tmp_path / "rain.txt").write_text(PROSE)
        parameters.haystack = str(tmp_path / "rain.txt")
    vocabulary = Vocabulary(tokenizer.vocab_size, tokenizer.document_id, tokenizer)
    draft = task.draft(parameters, 2000, vocabulary, Draws("letter"), None)
    assert draft.prompt(units) == prompt
    assert list(draft.answers) == answers


def test_generated_tokens_are_rulers():
    assert {name: TASKS[name].generated for name in EXPECTED if name != "phonebook"} == {
        name: 30 if name == "vt" else 128 for name in EXPECTED if name != "phonebook"
    }
