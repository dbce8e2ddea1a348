"""A program with verbs that stand in for a trainer and an evaluation; run as `python -m verbs`, as mmrlhf is.

`train` writes a model that is the metric its options deserve, `evaluate` reads it. VERBS_LOG gets a line per call that
is no rehearsal; VERBS_WAIT makes a training wait for a file; those whose names match VERBS_FAIL, VERBS_KILL or
VERBS_LEAVE end so.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

KNOWN = {"x", "kind", "k", "run.seed", "run.out", "run.name", "run.tracking", "run.experiment", "run.parent"}
KNOWN |= {"trainer.limit_train_batches", "data.shards"}


def options_of(words):
    found, config = {}, {}
    words = iter(words)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        value = value if equals else next(words)
        if name == "config":
            lines = (line.split(": ") for line in Path(value).read_text().splitlines())
            config = {key: scalar(text) for key, text in lines}
            continue
        if name not in KNOWN:
            sys.exit(f"verbs train: unknown option {name!r}")
        found[name] = scalar(value)
    if not isinstance(found.get("x", 0.0), int | float):
        sys.exit(f"verbs train: x: expected a number, got {found['x']!r}")
    told = {"x": 0.0, "k": 1.0, "kind": "plain"} | config | found
    return told | {"x": float(told["x"]), "k": float(told["k"])}


def scalar(text):
    for read in (int, float, {"null": None, "true": True, "false": False}.__getitem__):
        try:
            return read(text)
        except (KeyError, ValueError):
            continue
    return text


def say(what):
    with Path(os.environ["VERBS_LOG"]).open("a") as file:
        file.write(f"{what} {os.getpid()} {os.environ.get('OMP_NUM_THREADS')}\n")


def train(options):
    out = Path(options["run.out"])
    out.mkdir(parents=True, exist_ok=True)
    if (out / "model").exists():
        return
    name = options["run.name"]
    say(f"begin {name}")
    if options.get("run.tracking"):
        from mmrlhf.tracked import Tracked

        tags = {"mlflow.parentRunId": options["run.parent"]}
        Tracked.begin(out, options["run.tracking"], options["run.experiment"], name, tags).flush()
    (out / "pid").write_text(str(os.getpid()))
    (out / "parent").write_text(str(os.getppid()))
    sys.stdout.write("learning rate xxxxxxxxxx\n")
    sys.stdout.flush()
    if os.environ.get("VERBS_FAIL") and re.search(os.environ["VERBS_FAIL"], name):
        sys.exit("verbs train: the loss is not a number")
    if os.environ.get("VERBS_KILL") and re.search(os.environ["VERBS_KILL"], name):
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("VERBS_LEAVE") and re.search(os.environ["VERBS_LEAVE"], name):
        sys.exit(75)
    if gate := os.environ.get("VERBS_WAIT"):
        # Children of a training, such as workers of a loader, must not outlive it either.
        with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
            (out / "worker").write_text(str(child.pid))
            while not Path(gate).exists():
                with (out / "beats").open("a") as beats:
                    beats.write(".")
                time.sleep(0.02)
            child.kill()
    (out / "model").mkdir()
    small = options.get("trainer.limit_train_batches", 1.0)
    # The more seeds are averaged the nearer to x; a fraction of the data turns the order of 2 and 3 around.
    value = options["x"] + 0.01 * options["run.seed"] + (1.5 if small < 1 and options["x"] == 2 else 0.0)
    (out / "model" / "value").write_text(str(value))
    say(f"end {name}")


def evaluate(words):
    told = dict(zip(words[::2], words[1::2], strict=True))
    if "--print_config" in words or set(told) - {"--model", "--split", "--out"}:
        return
    say(f"{told['--split']} {told['--out'].split('/')[-3]}")
    value = float((Path(told["--model"]) / "value").read_text())
    out = Path(told["--out"])
    (out / "outcomes").mkdir(parents=True, exist_ok=True)
    if told["--split"] == "test":
        value = -value
    (out / "metrics.json").write_text(json.dumps({"world": {"true": value, "n": 2}, "text": "no"}))
    rows = [{"item": f"i{n}", "cluster": "c", "category": "short", "correct": bool(n)} for n in range(2)]
    (out / "outcomes" / "world.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def copy(words):
    """Make what an evaluation reads, and no metrics."""
    told = dict(zip(words[::2], words[1::2], strict=True))
    out = Path(told["--out"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "value").write_text((Path(told["--model"]) / "value").read_text())


def main():
    verb, *words = sys.argv[1:]
    if rehearsed := "--print_config" in words:
        words.remove("--print_config")
    if verb == "copy":
        if not rehearsed:
            copy(words)
        return
    if verb == "evaluate":
        if not rehearsed:
            evaluate(words)
        elif "--split" not in words:
            sys.exit("verbs evaluate: required: --split")
        return
    options = options_of(words)
    if rehearsed:
        sys.stdout.write(json.dumps(options))
    else:
        train(options)


if __name__ == "__main__":
    main()
