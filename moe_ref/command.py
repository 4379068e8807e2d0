"""What both command lines share: exit codes, errors in one line, JSON last, files written whole or not at all.

Exit codes: 0 fine, 1 the work failed, 2 the request was wrong (bad flag, bad file, unsupported model).
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from moe_ref.common_flags import complete
from moe_ref.console import Settings, note, warn
from moe_ref.interrupts import EXIT_CODE, open_standard_streams, undoing

LARGEST = 10**12  # whole number of a flag, where nothing smaller bounds it


class RequestError(ValueError):
    """A request that cannot be met as it stands; the message says what to do."""


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse ``argv`` and call its ``run``; a mistake becomes one line on stderr and exit code 2, failed work 1."""
    open_standard_streams()
    complete(parser)
    args = parser.parse_args(argv)
    Settings.quiet = getattr(args, "quiet", False)
    if getattr(args, "model", "") is None:
        return _complain("no model: give a GGUF file, as MODEL or -m MODEL", 2)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a character of the text shows a "?"
        sys.stdout.reconfigure(errors="replace")
    try:
        _refuse_broken_text(args)
        _refuse_own_input(args)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: warn(str(message))
            code = args.run(args) or 0
        sys.stdout.flush()  # so that a full disk is told, and not lost at the end of the interpreter
        return code
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        _drop_stdout()
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return EXIT_CODE
    except MemoryError as error:
        return _complain(f"out of memory: {error or 'use a smaller cache, context or model'}", 1)
    except ValueError as error:  # GGUFError, ConfigError, FormatError, TokenizerError, RequestError, …
        return _complain(str(error), 2)
    except (OSError, RuntimeError) as error:
        _drop_stdout()
        return _complain(str(error), 2 if getattr(error, "is_request", False) else 1)


def _drop_stdout() -> None:
    """What is still buffered goes to where it can be written, lest the interpreter complain about it when it ends."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse_broken_text(args: argparse.Namespace) -> None:
    """Python hides bytes that are no text in lone surrogates, which no tokenizer knows."""
    for name, flag in (("prompt", "-p"), ("system_prompt", "-sys")):
        try:
            (getattr(args, name, None) or "").encode("utf-8")
        except UnicodeEncodeError as error:
            encoding = sys.getfilesystemencoding()
            raise RequestError(f"{flag}: character {error.start} is not {encoding} text; use -f FILE") from error


def _refuse_own_input(args: argparse.Namespace) -> None:
    """What is read must not be what is written, under whatever name."""
    read = [getattr(args, name, None) for name in ("model", "routes", "file")]
    paths = [path for item in read for path in (item if isinstance(item, list) else [item]) if path]
    for output in filter(None, (getattr(args, "output", None), getattr(args, "report", None))):
        refuse_same_file(output, (Path(path) for path in paths if os.path.exists(path)))


def _complain(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """Open ``path`` for writing such that it appears complete or not at all; an old file survives a failure.

    A link keeps its place and its target is replaced. What is no file, such as /dev/stdout or a pipe, is written to.
    """
    target = Path(os.path.realpath(path))
    if not path:
        raise RequestError("no file to write is named")
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        memory = io.BytesIO()
        yield memory
        with naming_full_disk(path), open(path, "wb", buffering=0) as device:
            device.write(memory.getbuffer())
        return
    check_writable(target)
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:200]}.")
    except OSError as error:
        raise RequestError(f"{target}: cannot be written: {error.strerror}") from error
    try:
        with undoing(partial(os.unlink, temporary)):
            with naming_full_disk(path), os.fdopen(handle, "wb") as out:
                yield out
                out.flush()
                os.fsync(out.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def naming_full_disk(path: str | os.PathLike) -> Iterator[None]:
    """The system says that a disk is full, but not which file was being written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)):
            raise
        raise OSError(f"{path}: cannot be written whole: {error.strerror}") from error


def check_writable(path: str | os.PathLike) -> None:
    """Raise RequestError where no file can be at ``path``: its folder is missing, or it is one."""
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise RequestError(f"{target}: there is no folder {target.parent}")
    if target.is_dir():
        raise RequestError(f"{target}: is a folder; name a file in it")


def refuse_same_file(output: str, inputs: Iterable[Path]) -> None:
    """Raise RequestError where ``output`` is one of the files that are read."""
    if any(os.path.exists(output) and os.path.samefile(output, path) for path in inputs):
        raise RequestError(f"{output}: is the input itself; name another file to write")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def counted(number: int, one: str, many: str = "") -> str:
    """1 token, 2 tokens; ``many`` where it is not ``one`` with an s."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def token_list(text: str) -> list[int]:
    """``1,2,3`` -> [1, 2, 3]; ``@FILE`` reads ids separated by commas or white space from a file."""
    if text.startswith("@"):
        text = read_text(text[1:])
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() and len(word) < 10 for word in words):
        raise RequestError(f"--tokens: expected ids such as 1,2,3 or @FILE, found {text[:60]!r}")
    return [int(word) for word in words]


def read_text(path: str) -> str:
    """A UTF-8 file, ``-`` standard input, newlines untouched; raises RequestError where it cannot be read."""
    named = "standard input" if path == "-" else path
    try:
        return _bytes_of(path).decode("utf-8")
    except OSError as error:
        raise RequestError(f"{named}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{named}: is not UTF-8 text (byte {error.start})") from error


def _bytes_of(path: str) -> bytes:
    if path != "-":
        return Path(path).read_bytes()
    if sys.stdin.isatty():
        note("reading standard input; Ctrl-D ends it")
    return sys.stdin.buffer.read()


def number(least: int, most: int | None = None) -> Callable[[str], int]:
    """For argparse's ``type``: a whole number within bounds, at most LARGEST."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, found {text[:40]!r}") from None
        if not least <= value <= (LARGEST if most is None else most):
            accepted = f"at least {least}" if most is None and value < least else f"{least} to {most or LARGEST}"
            raise argparse.ArgumentTypeError(f"{text[:40]}: expected {accepted}")
        return value

    return parse


def decimal(least: float, most: float) -> Callable[[str], float]:
    """For argparse's ``type``: a number within bounds."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, found {text[:40]!r}") from None
        if not least <= value <= most:
            above = "above 0, " if least else ""
            raise argparse.ArgumentTypeError(f"{text[:40]}: expected {above}{least:g} to {most:,.0f}")
        return value

    return parse


class _Model(argparse.Action):
    """Stores the model from its place or from -m; naming two is a mistake."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if values is None:
            return
        if getattr(namespace, "model", None):
            parser.error(f"two models given: {namespace.model} and {values}")
        namespace.model = values


class _Models(argparse.Action):
    """Collects models from their place and from each -m, several with commas between; a file may have commas too."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if values is not None:
            named = [values] if os.path.exists(values) else values.split(",")
            namespace.model = [*(getattr(namespace, "model", None) or []), *named]


def add_model(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """The model, as the first argument or as -m, whichever a person types; ``several``: a list of models."""
    kind, more = (_Models, "; several with commas between, or -m again") if several else (_Model, "")
    parser.add_argument("model_argument", metavar="MODEL", nargs="?", action=kind, help="GGUF file")
    parser.add_argument("-m", "--model", action=kind, metavar="MODEL", help=f"the GGUF file, as in llama.cpp{more}")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """llama.cpp's sampling flags. Greedy unless --temp is given, so that two runs agree."""
    add = parser.add_argument_group("choosing tokens").add_argument
    add("--temp", "--temperature", type=float, default=0.0, metavar="T", help="temperature; 0 is greedy (default)")
    add("--top-k", type=int, default=40, metavar="N", help="keep the N likeliest; 0 keeps all")
    add("--top-p", type=float, default=0.95, metavar="P", help="keep this much probability")
    add("--min-p", type=float, default=0.05, metavar="P", help="drop below this share of the best")
    add("-s", "--seed", type=int, default=-1, metavar="N", help="-1 takes a new one each run (default)")


def add_rounding(parser: argparse.ArgumentParser) -> None:
    """What is rounded as llama.cpp's CPU backend does: nothing, unless asked."""
    add = parser.add_argument_group("rounding").add_argument
    add("--act", default="f32", metavar="TYPE", help="activations: f32 (default); q8: rounded for each matrix")
    for letter, what in (("k", "keys"), ("v", "values")):
        text = f"type of cached {what}: f32 (default; llama.cpp's is f16), f16, bf16, q8_0, q4_0"
        add(f"-ct{letter}", f"--cache-type-{letter}", default="f32", metavar="TYPE", help=text)


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """llama.cpp's prompt flags."""
    prompt = parser.add_argument_group("prompt and length")
    group = prompt.add_mutually_exclusive_group(required=True)
    group.add_argument("-p", "--prompt", metavar="TEXT", help="text to continue")
    group.add_argument("-f", "--file", metavar="FILE", help="read the prompt from a file; - is standard input")
    add = prompt.add_argument
    add("-n", "--predict", "--n-predict", type=number(-1), default=-1, metavar="N", help="tokens; -1 until it ends")
    add("-cnv", "--conversation", action="store_true", help="send the prompt as a chat message")
    system = prompt.add_mutually_exclusive_group().add_argument
    system("-sys", "--system-prompt", metavar="TEXT", help="system message, with -cnv")
    system("-sysf", "--system-prompt-file", metavar="FILE", help="read it from a file")
    add("-e", "--escape", action="store_true", help=r"read \n, \r, \t, \', \", \\ and \xHH in -p and -sys")


def prompt_text(args: argparse.Namespace, metadata: Any) -> str:
    """The prompt as the model shall see it: as given, or through the file's chat template with -cnv."""
    text = args.prompt if args.prompt is not None else read_text(args.file)
    system = read_text(args.system_prompt_file) if args.system_prompt_file else args.system_prompt
    if args.escape:
        text, system = unescaped(text), system and unescaped(system)
    if not args.conversation:
        if system:
            raise RequestError("-sys needs -cnv: a system message exists only in a conversation")
        return text
    from moe_ref.chat import render_chat

    messages = [{"role": "system", "content": system}] if system else []
    return render_chat(metadata, [*messages, {"role": "user", "content": text}])


ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "'": "'", '"': '"', "\\": "\\"}


def unescaped(text: str) -> str:
    """Escape sequences as llama.cpp's -e reads them; an unknown one stays as it is."""

    def meant(match: re.Match[str]) -> str:
        return chr(int(match[2], 16)) if match[2] else ESCAPES[match[1]]

    return re.sub(r"""\\([nrt'"\\]|x([0-7][0-9a-fA-F]))""", meant, text)


def prompt_ids(args: argparse.Namespace, tokenizer: Any, text: str) -> list[int]:
    """Token ids of what :func:`prompt_text` returned."""
    ids: list[int] = tokenizer.encode_chat(text) if args.conversation else tokenizer.encode(text)
    return ids
