"""`python drive.py OPTIONS.json`: a sweep over `verbs.py` in a process that can be interrupted and killed."""

import json
import logging
import signal
import sys
from pathlib import Path

from mmrlhf.experiments import design, slurm
from mmrlhf.experiments.design import Training
from mmrlhf.experiments.slurm import Slurm
from mmrlhf.experiments.sweeping import sweep

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs the tests in the background ignores it
    design.PROGRAM = "verbs"
    options = json.loads(Path(sys.argv[1]).read_text())
    train = options.pop("train")
    slurm._ACCOUNT_COMES = options.pop("account_comes", 60.0)
    options["slurm"] = Slurm(poll=0.1)
    sweep(train=Training(train["verb"], Path(train["config"])), out=Path(options.pop("out")), **options)
