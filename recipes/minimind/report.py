"""The end of the chain: each stage's held-out metric, a plot and a sample dialogue.

python recipes/minimind/report.py [--run_dir runs/minimind]
"""

from trl_ext.cli.user_errors import in_sentences


in_sentences()

from trl_ext.minimind.report import report
from trl_ext.minimind.stage import FolderArguments, parse


def main() -> None:
    (stage,) = parse(__file__, FolderArguments)
    report(stage)


if __name__ == "__main__":
    main()
