#!/bin/sh
# torch 2.14.1, torch.nn.Module.register_forward_hook(always_call=True)
#
# Behaviour: a hook registered with always_call=True runs when the forward fails with an ordinary error, but not when it
#   is left by KeyboardInterrupt or SystemExit. Whatever the hook was to undo stays as it was, in the module, for all
#   later calls and copies.
# Expected: "always" is meant as in try/finally. Guess before running: it runs for an interrupt from the keyboard too.
# Seen: after ValueError the hook has run; after KeyboardInterrupt and SystemExit it has not.
# Why it matters: libraries that keep state in a module for the time of a forward (constraints on weights, adapters,
#   recorders of activations) put it back in such a hook. In a notebook the stop button is pressed all the time, and the
#   next evaluation then runs with what the interrupted forward left behind, without any sign.
# Source: the documentation says that the hook runs regardless of whether an exception is raised while calling the
#   Module; Module._call_impl catches Exception only, of which neither of the two is a subclass.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.14.1 numpy==2.4.6
"$dir/venv/bin/python" - <<'PY'
import sys

import torch
from torch import nn


class Stops(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


def hook_runs(error):
    called = []
    module = Stops(error)
    module.register_forward_hook(lambda *_: called.append(True), always_call=True)
    try:
        module(torch.zeros(1))
    except BaseException as caught:
        assert caught is error
    return bool(called)


seen = {type(error).__name__: hook_runs(error) for error in (ValueError(), KeyboardInterrupt(), SystemExit())}
print("the hook has run after:", seen)
same = seen == {"ValueError": True, "KeyboardInterrupt": False, "SystemExit": False}
sys.exit(0 if same else "the behaviour has changed")
PY
