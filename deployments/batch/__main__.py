"""`python -m deployments.batch`: the command `stagemesh batch`, by a name that `ray job submit` can start."""

import argparse
import sys

from deployments.batch.command import add_options, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m deployments.batch", description="Answer every row of a file.")
    add_options(parser)
    sys.exit(run(parser.parse_args()))
