"""Run notebooks from top to bottom and save what they gave: python scripts/save_notebooks.py 04 07 …

A name is the beginning of a file name in notebooks/; without one, all of them. What cells tagged `timing` print is
measured: save those on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
MOST_SECONDS = 100  # for one cell; on a busy machine a kernel and its client sometimes wait for each other
ATTEMPTS = 5  # of a notebook, each with a kernel of its own, where that happens
SECONDS_BETWEEN_QUESTIONS = 3
KEPT = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


class ThisPython(KernelSpecManager):
    """One kernel: the interpreter that runs this, without a history file, whatever kernels the user has installed."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--HistoryManager.enabled=False"]
        return KernelSpec(argv=argv, display_name=kernel_name, language="python")


class Client(NotebookClient):
    """Kernels that talk through sockets in a folder of their own: two runs at a time never want the same port."""

    folder = ""

    def create_kernel_manager(self) -> AsyncKernelManager:
        self.km = AsyncKernelManager(
            kernel_spec_manager=ThisPython(),
            transport="ipc",
            ip=f"{self.folder}/k",
            connection_file=f"{self.folder}/kernel.json",
        )
        return self.km

    async def _async_poll_kernel_alive(self) -> None:
        """Beside each cell: also asks the kernel something now and then.

        On a busy machine an event of a socket is sometimes missed, and both sides wait; the next message wakes them.
        """
        asking = asyncio.create_task(self._ask())
        try:
            await super()._async_poll_kernel_alive()
        finally:
            asking.cancel()

    async def _ask(self) -> None:
        while self.kc is not None:
            await asyncio.sleep(SECONDS_BETWEEN_QUESTIONS)
            self.kc.kernel_info()


def execute(notebook: NotebookNode) -> None:
    """Run all cells in a kernel of its own; outputs and the widgets' state are written into `notebook`.

    Raises nbclient's CellExecutionError at the first cell that raises.
    """
    for left in reversed(range(ATTEMPTS)):
        ran = copy.deepcopy(notebook)
        try:
            execute_once(ran)
        except (CellTimeoutError, DeadKernelError):
            if not left:
                raise
        else:
            notebook.update(ran)
            return


def execute_once(notebook: NotebookNode) -> None:
    """`execute`, once. Raises also CellTimeoutError and DeadKernelError where the kernel does not answer."""
    with tempfile.TemporaryDirectory(prefix="nb") as folder:
        client = Client(
            notebook,
            resources={"metadata": {"path": str(NOTEBOOKS)}},
            timeout=MOST_SECONDS,
            startup_timeout=MOST_SECONDS,
            iopub_timeout=MOST_SECONDS,
            raise_on_iopub_timeout=True,
            coalesce_streams=True,
            record_timing=False,
        )
        client.folder = folder
        client.execute(env=os.environ | {"IPYTHONDIR": folder})


def save(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    execute(notebook)
    notebook.metadata = {"widgets": notebook.metadata["widgets"], "language_info": {"name": "python"}, **KEPT}
    partial = path.with_suffix(".part")
    nbformat.write(notebook, partial)
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="the beginning of a file name in notebooks/")
    names = parser.parse_args().names or [""]
    paths = sorted({path for name in names for path in NOTEBOOKS.glob(f"{name}*.ipynb")})
    if unknown := [name for name in names if not any(path.name.startswith(name) for path in paths)]:
        parser.error(f"no notebook begins with {', '.join(unknown)}")
    for path in paths:
        print(path.name, flush=True)
        save(path)


if __name__ == "__main__":
    main()
