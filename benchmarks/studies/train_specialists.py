"""Train the merging studies' specialists once, each into a file of its own; those that are there are left alone.

    RANKSHIP_DATA=… python benchmarks/studies/train_specialists.py --to FOLDER

The studies read them from the folder RANKSHIP_SPECIALISTS. A ResNet-20 takes some minutes of one core and comes in
three seeds, a MiniLM up to eight and comes in one.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save

from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.models.opened import open_source
from rankship_pipeline.recipe.choices import Source

STUDIES = Path(__file__).parent
SPECIALISTS = {
    **{
        f"resnet20-{task}-{seed}": ("cifar.py:resnet20", f"specialists.py:train_{task}", seed)
        for seed in (0, 1, 2)
        for task in ("mnist", "fashion", "first", "second")
    },
    "minilm-snips-0": ("minilm.py:snips", "minilm.py:train_snips", 0),
    "minilm-sst2-0": ("minilm.py:sst2", "minilm.py:train_sst2_briefly", 0),
    "minilm-clinc150-0": ("minilm.py:clinc150", "minilm.py:train_clinc150", 0),
}


def main() -> None:
    """Train what is missing, one after the other; `--only` those whose names begin so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    given.to.mkdir(parents=True, exist_ok=True)
    for name, (factory, train, seed) in SPECIALISTS.items():
        file = given.to / f"{name}.safetensors"
        if file.exists() or not name.startswith(given.only):
            continue
        begun = time.process_time()
        state = open_source(Source(name=name, factory=factory, train=train), STUDIES, seed).load_state()
        write_atomic(file, save(state))
        sys.stdout.write(f"{name}: {time.process_time() - begun:.0f} CPU seconds, {torch.get_num_threads()} threads\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
