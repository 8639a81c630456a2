"""`python -m onward` is the command `onward`.

Python puts the current directory first on its import path. A run's directory holds files from other people, and a
`typer.py` there must not be run. Nothing but `sys` is imported until that is undone; `-P` prevents it from the start.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]

if __name__ == "__main__":  # a process forked from this one gets its work another way
    from onward.cli import main

    main()
