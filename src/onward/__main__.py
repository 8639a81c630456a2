"""`python -m onward` is the command `onward`.

Python puts the current directory first among the places that it imports from. A run's directory holds files of others,
and a `typer.py` there is not to be run. Nothing but `sys` is imported until that is undone; `-P` undoes it earlier.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]

if __name__ == "__main__":  # a process that is forked from one of these is given its work otherwise
    from onward.cli import main

    main()
