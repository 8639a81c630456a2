"""Ask a model the questions of training files, with stock transformers and PEFT: nothing of Onward is imported.

    python demo/ask.py BASE FILE... [--adapter DIRECTORY]

Prints, per file, the first row's question and the model's answer, and how many of the file's rows it answers word for
word as in the file. Answers are greedy, so that the same weights always give the same ones.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

LONGEST_ANSWER = 24
"""Tokens after which an answer is cut off."""


def load(base: Path, adapter: Path | None) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Return the base model, with the adapter if there is one, and the tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval(), AutoTokenizer.from_pretrained(adapter or base, padding_side="left")


@torch.inference_mode()
def answer(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> list[str]:
    """Return the model's answers to all rows, as one batch."""
    prompts = [row["messages"][:-1] for row in rows]
    inputs = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    outputs = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
    answers = outputs[:, inputs["input_ids"].shape[1] :]
    return [" ".join(text.split()) for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def main() -> None:
    """Ask about every file and print the answers."""
    parser = argparse.ArgumentParser(description="Ask a model the questions of training files.")
    parser.add_argument("base", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--adapter", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, tokenizer = load(arguments.base, arguments.adapter)
    for path in arguments.files:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        answers = answer(model, tokenizer, rows)
        right = sum(said == row["messages"][-1]["content"] for said, row in zip(answers, rows, strict=True))
        print(f"{path.name}: {right} of {len(rows)} answers word for word")
        print(f"  {rows[0]['messages'][1]['content']}")
        print(f"  {answers[0]}", flush=True)


if __name__ == "__main__":
    main()
