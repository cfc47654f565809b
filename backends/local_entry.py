"""The script ``LocalTrialBackend`` starts for every attempt: one call of the trial function in a process of its own.

    local_entry.py --st_config_json_filename CONFIG --st_checkpoint_dir FOLDER --attempt SPEC

Reports go to stdout in Syne Tune's format. Exit code 0: returned; 1: failed, the reason is in OUTCOME of the spec file.
SIGTERM sets ``should_stop``.
"""

import argparse
import json
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def main() -> int:
    """Run the attempt or the preparation that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--st_config_json_filename", help="the configuration, as Syne Tune passes it")
    parser.add_argument("--st_checkpoint_dir", help="Syne Tune's checkpoint folder; the spec's folder is used")
    parser.add_argument("--attempt", required=True, help="JSON file with everything else")
    arguments = parser.parse_args()
    order = json.loads(Path(arguments.attempt).read_text())
    sys.path[:] = order["sys_path"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())

    from backends.attempt import die_with_parent

    die_with_parent(order["parent"])
    if "prepare" in order:
        return _prepare(order)
    config = json.loads(Path(arguments.st_config_json_filename).read_text())
    return _attempt({**order["spec"], "config": config}, order, stop)


def _attempt(spec: dict[str, Any], order: dict[str, Any], stop: threading.Event) -> int:
    from backends.attempt import Attempt, AttemptSpec, call, resolve
    from backends.worker import Interpreter, warm_up

    device = warm_up(["torch"], order["threads"], order["gpu"])
    interpreter = Interpreter(order["threads"])

    def run() -> None:
        function = resolve(spec["function"])
        interpreter.remember_torch()
        interpreter.reset(spec["seed"])
        function(Attempt(AttemptSpec(**spec), device, _report, stop, started=order["started"]))

    outcome = call(run)
    if outcome.kind == "returned":
        return 0
    print(outcome.reason, file=sys.stderr)
    Path(order["outcome"]).write_text(json.dumps([outcome.reason, outcome.details]))
    return 1


def _prepare(order: dict[str, Any]) -> int:
    """As ``WorkerPool.prepare``: the outcome file gets [is it the user's mistake, what is wrong]."""
    from backends.attempt import call, resolve
    from backends.context import UserError
    from backends.worker import warm_up

    device = warm_up(["torch"], order["threads"], order["gpu"])
    user: list[str] = []

    def prepare() -> None:
        try:
            resolve(order["prepare"])(order["settings"], device)
        except UserError as error:
            user.append(str(error))

    reason = call(prepare).reason
    if not user and not reason:
        return 0
    Path(order["outcome"]).write_text(json.dumps([bool(user), user[0] if user else reason]))
    return 1


def _report(report: dict[str, Any]) -> None:
    from backends.context import to_json

    print(f"[tune-metric]: {to_json(report)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
