"""Shows at an evaluation what a run has learned: a sample of its model or answers to questions, and its picture."""

import time
from collections.abc import Sequence
from typing import Any

from llama_jax.cli.progress import print_above
from llama_jax.config import SampleArgs
from llama_jax.data.opened import chat_format_of
from llama_jax.devices.distributed import is_main
from llama_jax.devices.sharding import on_mesh
from llama_jax.errors import UserError
from llama_jax.generation import Model
from llama_jax.training import log
from llama_jax.training.answers import answer, append
from llama_jax.training.plot import plot_losses
from llama_jax.training.run import Run

SAMPLE_TOKENS = 48
# At an evaluation, losses.png is drawn again if it is older than this many seconds.
PLOT_SECONDS = 30


class StopAsked(Exception):
    """A signal arrived while a sample was generated."""


def show(run: Run, sample: Any, step: int) -> int:
    """Print a sample of the model, and draw the losses if the plot is old. If that fails, training continues.

    Of a model that is tuned on conversations, the samples are answers; one is printed, all are in samples.jsonl.

    Return the signal that arrived meanwhile, or 0.
    """
    stop = 0

    def heed(_: object) -> None:
        nonlocal stop
        if stop := run.stop_asked():
            raise StopAsked

    try:
        if run.config.model.max_seq_len > 1:
            model = Model(run.config.model, sample, run.data.tokenizer, run.module)
            chat = chat_format_of(run.data)
            with on_mesh(run.mesh):
                if chat is not None and run.questions:
                    given = answer(model, run.questions, run.chat, chat, heed)
                    _tell_answers(run, step, given)
                elif run.prompt:
                    args = SampleArgs(temperature=0.7, max_new_tokens=SAMPLE_TOKENS, seed=run.config.train.seed)
                    (completion,) = model.generate([run.prompt], args, heed)
                    print_above(log.quoted_lines(run.prompt + completion.text))
        plot = run.folder.plot_path
        if not plot.exists() or time.time() - plot.stat().st_mtime > PLOT_SECONDS:
            draw_losses(run)
    except StopAsked:
        pass
    except (UserError, OSError) as error:
        print_above(f"no sample or plot: {error}")
    return stop


def _tell_answers(run: Run, step: int, given: Sequence[str]) -> None:
    """Print the first answer, and add all to samples.jsonl."""
    print_above(log.quoted_lines(f"{run.questions[0].text}[[{given[0]}]]"))
    if is_main():
        append(run.folder.samples_path, step, run.questions, given)


def draw_losses(run: Run) -> None:
    """Draw losses.png, on process 0."""
    if is_main():
        plot_losses(
            run.folder.plot_path, run.folder.records, str(run.folder.path), run.data.floor, run.settled.expected
        )
