"""The command ``lightning-mst``: ``train``, ``compare``, ``plan`` and ``report``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["main"]

USAGE = """\
usage: lightning-mst COMMAND [ARGUMENTS]

Train a causal language model on long sequences with mini-sequences.

commands:
  train     train one model, or sweep over settings with -m (arguments are Hydra overrides)
  compare   run the same training steps under several mini-sequence settings, side by side
  plan      predict, without a GPU, how long sequences may be on one, and what fills its memory
  report    gather the runs of experiments and sweeps into one table and one picture

options:
  -h, --help   show this text, or after a command that command's options
  --version    show the version

examples:
  lightning-mst train
  lightning-mst train data.sequence_length=16384 mst=auto precision=bf16-true
  lightning-mst train strategy=mst_model_parallel trainer.devices=2
  lightning-mst train -m mst.mlp_chunks=1,2,4,8 precision=32-true,bf16-true
  lightning-mst train model=hf model.name=Qwen/Qwen2-0.5B data=text 'data.paths=[book.txt]'
  lightning-mst compare --mst off recompute auto --steps 4 data.sequence_length=16384
  lightning-mst plan model=llama3_8b precision=bf16-true optimizer=adamw_in_backward
  lightning-mst plan --ladder --host-memory 1TiB model=llama3_8b precision=bf16-true optimizer=adamw_in_backward
  lightning-mst plan --memory 24GiB --length 32768 model=llama3_8b precision=nf4-lora
  lightning-mst train -m experiment=smoke/lm_head
  lightning-mst report multirun
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line program.

    What needs torch is imported only by the command that needs it, so that help is quick.

    Args:
        argv: Arguments after the program's name. Default: those of the process.

    Raises:
        SystemExit: With the exit code, unless it is 0: 1 after a failed run, 2 after a wrong command line.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(USAGE, end="")
    elif command == "--version":
        from lightning_mst import __version__

        print(f"lightning-mst {__version__}")
    elif command == "train":
        _train(rest)
    elif command == "compare":
        from lightning_mst.program.compare import main as compare

        compare(rest)
    elif command == "plan":
        from lightning_mst.program.plan import main as plan

        plan(rest)
    elif command == "report":
        from lightning_mst.report.main import main as report

        report(rest)
    else:
        known = "there are train, compare, plan and report (see --help)"
        print(f"lightning-mst: unknown command {command!r}; {known}", file=sys.stderr)
        raise SystemExit(2)


def _train(overrides: list[str]) -> None:
    """Let Hydra compose the configuration, and train: once, or once per job of a sweep."""
    import hydra

    from lightning_mst.configurations import conf_dir

    process_argv = sys.argv

    def task(config: DictConfig) -> Any:
        # Lightning starts the other processes of a multi-device run with this command line: it has to be whole.
        sys.argv = process_argv
        from lightning_mst.experiments.tasks import run_task

        return run_task(config)

    program = hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(task)
    sys.argv = ["lightning-mst train", *overrides]  # Hydra reads its arguments from here, and nowhere else
    try:
        program()
    finally:
        sys.argv = process_argv
