"""``python -m fedmutual``, or ``python -P`` this file where the package is not installed."""

import os
import sys

if not __package__:
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

import fedmutual


def _forget_current_folder() -> None:
    """Take the current folder, which ``-m`` puts first, from the path: it may hold a ``torch.py``.

    If it is the checkout that this package is in, it goes last.
    """
    if sys.flags.safe_path or not sys.path or not os.path.isdir(sys.path[0] or "."):
        return
    first = os.path.realpath(sys.path[0] or ".")
    if first == os.path.realpath("."):
        del sys.path[0]
        if first == os.path.dirname(os.path.dirname(os.path.realpath(fedmutual.__file__))):
            sys.path.append(first)


if __name__ == "__main__":
    _forget_current_folder()
    from fedmutual.cli import main

    sys.exit(main())
