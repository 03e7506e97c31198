"""Fine-tune nano on recordings and what is said in them: `python examples/finetune.py [--steps 40]`.

The same as `kimi-mm train sft/nano --data my.jsonl`, from Python. The "own data" here are the shipped recordings, and
the scores are on those very recordings: it shows the way, and that the model learns, not how well it generalises.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import kimi_mm
from kimi_mm.evaluation.wer import word_error_rate
from kimi_mm.training.run import train

DEMO = Path(kimi_mm.__file__).parent / "pretrained" / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--clips", type=int, help="how many of the recordings; all unless given")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune"))
    given = parser.parse_args()

    clips = [json.loads(line) for line in (DEMO / "manifest.jsonl").read_text().splitlines()][: given.clips]
    data = write_data(given.output / "data", clips)
    print(f"before: {score(kimi_mm.load('nano'), clips):.0%} of the words are wrong")
    train(
        "sft/nano",
        output=given.output,
        data=[data],
        overrides=[f"steps={given.steps}", f"save_every={given.steps}", "data.batch_positions=1024"],
    )
    print(f"after:  {score(kimi_mm.load(given.output / 'model'), clips):.0%}, in {given.output / 'model'}")


def write_data(folder: Path, clips: list[dict]) -> Path:
    """Writes one conversation a line: a recording from the user, its words from the assistant."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for clip in clips:
        shutil.copy(DEMO / clip["file"], folder)
        said = {"role": "user", "content": [{"type": "audio", "audio": clip["file"]}]}
        rows.append({"messages": [said, {"role": "assistant", "content": clip["text"]}]})
    path = folder / "my.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def score(model: kimi_mm.KimiMM, clips: list[dict]) -> float:
    heard = [model.transcribe(DEMO / clip["file"]).text for clip in clips]
    return word_error_rate([clip["text"] for clip in clips], heard, draws=0).rate


if __name__ == "__main__":
    main()
