"""What the command-line entry points share: a mistake of the user ends in one line and exit code 1."""

import os
import signal
import sys
import traceback
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
        from hydra.core.hydra_config import HydraConfig
        from hydra.errors import HydraException
        from hydra.types import RunMode
        from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
        from omegaconf.errors import OmegaConfBaseException

        mistakes: tuple[type[Exception], ...] = (
            *_OURS,
            HydraException,
            OmegaConfBaseException,
            MisconfigurationException,
            # A folder that cannot be written, a full disk.
            OSError,
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

        full = started = False

        @wraps(task)
        def job(cfg: Any) -> Any:
            nonlocal started
            started = True
            # For what the task starts: the processes of a distributed run read this too.
            _show_tracebacks(full)
            try:
                return task(cfg)
            except SIGTERMException:
                # Lightning's way out has the exit code of success.
                print("error: ended by SIGTERM before the work was done", file=sys.stderr, flush=True)
                sys.exit(128 + signal.SIGTERM)
            except Exception as error:
                if full or not (isinstance(error, mistakes) or _is_of_lightning(error)):
                    raise
                if HydraConfig.get().mode == RunMode.MULTIRUN:
                    # Hydra runs the other jobs of a sweep before it raises this again, for which see main().
                    print(f"error: job {HydraConfig.get().job.num}: {one_line(error)}", file=sys.stderr, flush=True)
                    raise
                # Here, because Hydra writes lines of its own about an exception that reaches it.
                sys.exit(f"error: {one_line(error)}")
            finally:
                # The error of an earlier job comes after the last one of a sweep.
                _show_tracebacks(full or HydraConfig.get().mode == RunMode.MULTIRUN)

        def main() -> None:
            nonlocal full, started
            started = False
            full = os.environ.get("HYDRA_FULL_ERROR", "0") == "1"
            # Lets errors of composing the configuration through, which Hydra would print over many lines.
            _show_tracebacks(True)
            try:
                hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(job)()
            except mistakes as error:
                if full:
                    raise
                sys.exit(f"error: {one_line(error)}")
            except ValueError as error:
                # Hydra's own about an override such as model=null, which it raises before the job begins.
                if full or started:
                    raise
                sys.exit(f"error: {one_line(error)}")
            finally:
                _show_tracebacks(full)

        return main

    return decorate


def _is_of_lightning(error: Exception) -> bool:
    """Whether Lightning itself raises this about a value: not all of its errors about options have its own type."""
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    return isinstance(error, ValueError) and frame.f_globals.get("__name__", "").startswith("lightning.")


def _show_tracebacks(show: bool) -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1" if show else "0"
