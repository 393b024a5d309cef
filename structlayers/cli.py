"""What the command-line entry points share: a mistake of the user ends in one line and exit code 1."""

import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from structlayers import errors

CONFIGS = Path(__file__).parent.parent / "configs"
_OURS = tuple(kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception))


def entry_point(config_name: str) -> Callable[[Callable[[Any], Any]], Callable[[], None]]:
    """Make ``task(cfg)`` a Hydra command with ``configs/<config_name>.yaml`` as its configuration.

    Misspelt overrides and our own errors print one line on stderr; ``HYDRA_FULL_ERROR=1`` shows the traceback instead.
    """

    def decorate(task: Callable[[Any], Any]) -> Callable[[], None]:
        import hydra
        from hydra.errors import HydraException
        from lightning.pytorch.utilities.exceptions import MisconfigurationException
        from omegaconf.errors import OmegaConfBaseException

        mistakes: tuple[type[Exception], ...] = (
            *_OURS,
            HydraException,
            OmegaConfBaseException,
            MisconfigurationException,
        )

        def one_line(error: BaseException) -> str:
            # What a constructor said is inside Hydra's exception.
            cause = error.__cause__
            while isinstance(cause, HydraException) and cause.__cause__:
                cause = cause.__cause__
            if isinstance(cause, _OURS):
                return " ".join(str(cause).split())
            text = str(error).partition("Config search path:")[0]
            detail = f" ({str(cause).splitlines()[0]})" if isinstance(cause, OmegaConfBaseException) else ""
            return " ".join(text.split()) + detail

        full = False

        @wraps(task)
        def job(cfg: Any) -> Any:
            # For what the task starts: the processes of a distributed run read this too.
            _show_tracebacks(full)
            try:
                return task(cfg)
            except mistakes as error:
                if full:
                    raise
                # Here, because Hydra writes lines of its own about an exception that reaches it.
                sys.exit(f"error: {one_line(error)}")

        def main() -> None:
            nonlocal full
            full = os.environ.get("HYDRA_FULL_ERROR", "0") == "1"
            # Lets errors of composing the configuration through, which Hydra would print over many lines.
            _show_tracebacks(True)
            try:
                hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(job)()
            except mistakes as error:
                if full:
                    raise
                sys.exit(f"error: {one_line(error)}")
            finally:
                _show_tracebacks(full)

        return main

    return decorate


def _show_tracebacks(show: bool) -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1" if show else "0"
