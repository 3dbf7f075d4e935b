"""A further process of a run that trains on several devices: ``python -m lightning_ft.seeds.rank JOB``."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path


def main(file: str) -> None:
    """Do the job beside rank 0, which alone speaks to the study."""
    task, job = pickle.loads(Path(file).read_bytes())
    task(job)


if __name__ == "__main__":
    main(sys.argv[1])
