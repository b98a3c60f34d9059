"""Run by the test of two processes, in each of them: several command lines one after the other.

Usage: python many_commands.py JSON, a list of lists of words. What is written is not proved to reload.
"""

import json
import sys

from llmprune import checkpoint, cli


def main(commands: list[list[str]]) -> None:
    checkpoint.prove_reload = lambda model, folder: {}
    for words in commands:
        sys.argv = ["llmprune", *words]
        try:
            cli.main()
        except SystemExit as end:
            if end.code:
                raise


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
