"""One process with one device count for life: runs the functions of `device_cases` (and the like) that the tests ask for.

A torch-xla process cannot change its device count, so `conftest` keeps one of these alive for each. Messages are pickles over an inherited
pipe, between a test and its own child.
"""

import importlib
import os
import pickle
import sys
import traceback
from multiprocessing.connection import Connection


def main() -> None:
    descriptor, devices, keep = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "hlo"
    from parallama.engine.torch_xla import backends

    backends.start("cpu", devices, keep_hlo=keep)
    pipe = Connection(descriptor)
    pipe.send_bytes(pickle.dumps("ready"))
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:  # the test run is over
            break
        try:
            target, kwargs = pickle.loads(message)
            module, _, function = target.partition(":")
            reply = ("result", getattr(importlib.import_module(module), function)(**kwargs))
        except Exception as error:
            reply = ("error", type(error).__name__, str(error), traceback.format_exc())
        pipe.send_bytes(pickle.dumps(reply))
    sys.stderr.flush()
    os._exit(0)  # XLA's threads need not be joined one by one


if __name__ == "__main__":
    main()
