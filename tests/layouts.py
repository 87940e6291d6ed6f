"""Rows as published sets have them, with neutral words; some keys are left to the tests."""

from __future__ import annotations

from typing import Any

from .files import in_base64

VLGUARD: list[dict[str, Any]] = [
    {
        "id": "a",
        "image": "bad_ads/a.png",
        "safe": False,
        "harmful_category": "privacy",
        "harmful_subcategory": "personal data",
        "instr-resp": [{"instruction": "Read the card.", "response": "I would rather not."}],
    },
    {
        "id": "b",
        "image": "b.png",
        "safe": True,
        "instr-resp": [
            {"safe_instruction": "What is it?", "response": "A cake."},
            {"unsafe_instruction": "How do I spoil it?", "response": "I won't say."},
        ],
    },
]
CAPTCHA = {"id": 3, "instruction": "Read it.", "answer": "xyz"}
"""Of RTVLM."""
MM_SAFETY = {
    "Question": "q",
    "Changed Question": "c",
    "Key Phrase": "k",
    "Phrase Type": "p",
    "Rephrased Question": "On the words?",
    "Rephrased Question(SD)": "On the scene?",
}
MOSSBENCH = {
    "pid": 1,
    "question": "May I?",
    "image_path": "images/1.png",
    "short description": "s",
    "description": "d",
    "meta_data_over": "type 1",
}
JAILBREAKV = {
    "id": 0,
    "redteam_query": "r",
    "format": "Template",
    "policy": "Animal Abuse",
    "image_path": "llm/1.png",
    "from": "f",
    "selected_mini": False,
    "transfer_from_llm": True,
}
"""Without its `jailbreak_query`."""
SIUO = {
    "question_id": 1,
    "image": "1.png",
    "question": "Good?",
    "safety_warning": "w",
    "reference_answer": "Careful.",
}
"""Without its `category`."""
VLSBENCH = {
    "instruction_id": 1,
    "instruction": "Go.",
    "image_path": "imgs/0.png",
    "category": "Privacy",
    "sub_category": "Unknown here",
    "source": "s",
}
HOLISAFE = {
    "image": "h/1.png",
    "query": "What now?",
    "category": "privacy",
    "subcategory": "x",
    "image_safe": True,
    "image_safety_label": "safe",
}
"""Without its `id` and `type`."""
MME = {"index": 1, "image": in_base64(), "question": "Two?", "answer": "Yes", "category": "count"}
CHOICE = {"index": 1, "image": in_base64(), "question": "Which?", "hint": "", "category": "c"}
CHOICE |= {"A": "a cup", "B": "a cat", "C": "", "D": "", "answer": "B"}
"""Of MMBench and SEED-Bench."""
FIGSTEP = {"dataset": "ForbidQI", "category_id": 7, "task_id": 1}
FIGSTEP |= {"category_name": "Privacy Violation", "question": "q", "instruction": "A list."}
FIGSTEP_IMAGE = "data/images/SafeBench/query_ForbidQI_7_1_6.png"
