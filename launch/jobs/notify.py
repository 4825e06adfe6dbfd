"""Telling somebody that a run is done, or needs a person: one message to a webhook, where one is named."""

import json
import os
import urllib.error
import urllib.request

from asr_train.errors import say
from asr_train.run_dir import RunDir
from launch.verdict import Verdict

WEBHOOK = "WAVEFLEET_WEBHOOK"  # in the environment and nowhere else, for such addresses are secrets
_TIMEOUT_S = 10


def notify(run: RunDir, verdict: Verdict) -> None:
    """Post a verdict as JSON to the address in WAVEFLEET_WEBHOOK; one that cannot be reached is said, and no failure.

    `text` is what chat programs show; the other fields are for programs.
    """
    address = os.environ.get(WEBHOOK)
    if not address:
        return
    content = {
        "text": f"{run.path.name}: {verdict.kind}: {verdict.message}",
        "run": str(run.path),
        "kind": verdict.kind,
        "action": verdict.action,
        "exit_code": verdict.exit_code,
    }
    try:
        request = urllib.request.Request(  # noqa: S310 - the owner's own address
            address, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S):  # noqa: S310
            pass
    except (OSError, ValueError) as error:  # the address is not repeated: it may hold a secret
        reason = error.code if isinstance(error, urllib.error.HTTPError) else type(error).__name__
        say(f"the address in {WEBHOOK} did not take the message: {reason}")
