"""A further process of a run that trains on several devices: ``python -m lightning_ft.seeds.rank``."""

from __future__ import annotations

import base64
import os
import pickle

JOB = "LIGHTNING_FT_SEEDS_JOB"
"""Environment variable: what is to be done, as rank 0 has put it there."""


def main() -> None:
    """Do the job beside rank 0, which alone speaks to the study."""
    # A pickle, as multiprocessing sends: of this process's own parent, from no file and no network.
    task, job = pickle.loads(base64.b64decode(os.environ[JOB]))
    task(job)


if __name__ == "__main__":
    main()
